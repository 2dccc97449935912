// SPDX-License-Identifier: Apache-2.0
// Decoding a matrix on whichever device its bytes are.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/decode.h"

namespace distorch {

// scale * up @ down on the rows from `first_row` on. `up` [rows, rank] and `down` [rank, columns],
// float32, contiguous. A stack of products, such as one for each expert of a layer, has one more
// dimension in front: `up` [products, rows, rank], `down` [products, rank, columns]. They are for
// rows that follow each other.
struct PatchTerm {
  at::Tensor up, down;
  double scale;
  int64_t first_row;
};

// How a matrix [rows, columns] is stored, and what it becomes.
struct RowRecipe {
  const RowCode* code;
  at::Tensor scales;  // float32 [grid rows, grid columns], contiguous; undefined: none
  int64_t scale_rows = 1, scale_columns = 1;  // elements per scale
  at::ScalarType dtype;
  int64_t rows, columns;
  at::Tensor table = {};  // float32 [code->table], contiguous; undefined: none
  int64_t rotation = 0;   // columns that were turned together (core/rotation.h); 0: none
};

// One decoding: into = round_once(turned_back(float32(stored)) * scales + sum of terms), in the
// order that the code asks for (RowCode). All
// tensors are on one device, contiguous, and fit each other (check_fits).
struct DecodeJob {
  const RowRecipe& recipe;
  std::span<const PatchTerm> terms;
  const at::Tensor& stored;  // the rows' bytes, of any dtype
  const at::Tensor& into;    // recipe.dtype; the memory of `stored` only if it fits in place
  std::optional<at::Tensor> finite;  // bool, one element: turns false where a product is not finite
};

// Does the job on the device of `into`, queued on that device's current stream. Operators call this
// for any device. Fetches call it for accelerators only (RowDecoder::decode_on_device); on the host
// they decode by parts (HostDevice::decode_all). Throws c10::Error, also where nothing decodes on
// this kind of device.
void decode(const DecodeJob& job);

// Who does it on one kind of device. The host and CUDA are there from the start; another device
// (the simulator) says who does it there.
using DecodeKernel = void (*)(const DecodeJob& job);
void set_decode_kernel(c10::DeviceType type, DecodeKernel kernel);
DecodeKernel decode_kernel(c10::DeviceType type);  // null: nobody

// Throws c10::Error (ValueError) if blocks, scales or terms do not fit the matrix, or are not on
// `device`.
void check_fits(const RowRecipe& recipe, std::span<const PatchTerm> terms, c10::Device device);
// Throws c10::Error (ValueError) if there are not as many factors of one kind as of the other.
std::vector<PatchTerm> terms_of(at::TensorList ups, at::TensorList downs,
                                at::ArrayRef<double> strengths, at::IntArrayRef first_rows);

// What weights are decoded to. Throws c10::Error (ValueError) on another dtype.
Element element_of(at::ScalarType dtype);
// The numbers that kernels take, over memory that the tensors keep alive.
Decoding decoding_of(const RowRecipe& recipe, std::span<const LowRank> terms);
std::vector<LowRank> low_rank_of(std::span<const PatchTerm> terms);

}  // namespace distorch
