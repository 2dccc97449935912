// SPDX-License-Identifier: Apache-2.0
// The decoder of a matrix: numbers of any width, scales, patches.
#pragma once

#include <vector>

#include "device/decode.h"
#include "engine/source.h"

namespace distorch {

class RowDecoder : public Decoder {
 public:
  // Tensors of `recipe` and `terms` are on the host. If `compute` is another device, it gets copies
  // of them; those that `previous`, of the same recipe, has there are used again.
  // Throws c10::Error on parts that do not fit each other.
  RowDecoder(RowRecipe recipe, std::vector<PatchTerm> terms, c10::Device compute,
             const RowDecoder* previous = nullptr);
  // The decoder of a source; null if it has none.
  static const RowDecoder* of(const Source& source);

  uint64_t rows() const override { return recipe_.rows; }
  uint64_t stored_row() const override { return decoding_.stored_row(); }
  uint64_t decoded_row() const override { return decoding_.decoded_row(); }
  bool in_place() const override { return decoding_.in_place(); }
  void decode(uint64_t begin, uint64_t end, const std::byte* stored,
              std::byte* into) const override;
  void decode_on_device(const std::byte* stored, std::byte* into) const override;

  const RowRecipe& recipe() const { return recipe_; }
  // Whether the stored bytes are the weight.
  bool plain() const { return in_place() && terms_.empty(); }
  // Bytes of factors and scales on the compute device.
  uint64_t factor_bytes() const;

 private:
  at::Tensor on_device(const at::Tensor& factor, const RowDecoder* previous) const;

  const RowRecipe recipe_;
  const std::vector<PatchTerm> terms_;
  std::vector<LowRank> low_rank_;
  Decoding decoding_;

  // The same with tensors on the compute device. Not used if that is the host.
  const c10::Device compute_;
  RowRecipe recipe_there_;
  std::vector<PatchTerm> terms_there_;
};

}  // namespace distorch
