// The decoder of a matrix: numbers of any width, scales, patches.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <string>
#include <vector>

#include "core/decode.h"
#include "engine/decoder.h"

namespace distorch {

// scale * up @ down on rows from `first_row` on. float32, contiguous, on the
// host; `up` [rows, rank], `down` [rank, columns].
struct PatchTerm {
  at::Tensor up, down;
  double scale;
  int64_t first_row;
};

// How a matrix [rows, columns] is stored, and what it becomes.
struct RowRecipe {
  const RowCode* code;
  at::Tensor scales;  // float32 [grid rows, grid columns], contiguous, on the host; undefined: none
  int64_t scale_rows = 1, scale_columns = 1;  // elements per scale
  at::ScalarType dtype;
  int64_t rows, columns;
};

class RowDecoder : public Decoder {
 public:
  // `compute` gets copies of scales and factors if it is not the host; those
  // that `previous`, of the same recipe, has there are used again.
  // Throws c10::Error on parts that do not fit each other.
  RowDecoder(RowRecipe recipe, std::vector<PatchTerm> terms, c10::Device compute,
             const RowDecoder* previous = nullptr);

  uint64_t rows() const override { return recipe_.rows; }
  uint64_t stored_row() const override { return decoding_.stored_row(); }
  uint64_t decoded_row() const override { return decoding_.decoded_row(); }
  bool in_place() const override { return decoding_.in_place(); }
  void decode(uint64_t begin, uint64_t end, const std::byte* stored,
              std::byte* into) const override;

  // The whole matrix, queued on `stream`, which is the current one; uint8.
  void decode_on_device(const at::Tensor& stored, const at::Tensor& into,
                        const c10::Stream& stream) const;

  const RowRecipe& recipe() const { return recipe_; }
  // Whether the stored bytes are the weight.
  bool plain() const { return in_place() && terms_.empty(); }
  // Bytes of factors and scales on the compute device.
  uint64_t factor_bytes() const;

 private:
  const RowRecipe recipe_;
  const std::vector<PatchTerm> terms_;
  std::vector<LowRank> low_rank_;
  Decoding decoding_;
  at::Tensor on_device(const at::Tensor& factor, c10::Device compute,
                       const RowDecoder* previous) const;

  // On the compute device.
  std::vector<at::Tensor> ups_, downs_;
  at::Tensor scales_;
};

// What weights are decoded to. Throws c10::Error (ValueError) on another dtype.
Element element_of(at::ScalarType dtype);
// The numbers that decode_rows() takes, over memory that `recipe` keeps alive.
Decoding decoding_of(const RowRecipe& recipe, std::span<const LowRank> terms);
LowRank low_rank_of(const PatchTerm& term);
// Throws c10::Error (ValueError) on a term that does not fit the matrix, or is
// not on `device`.
void check_term(const PatchTerm& term, const RowRecipe& recipe,
                c10::Device device = c10::Device(c10::kCPU));

}  // namespace distorch
