// SPDX-License-Identifier: Apache-2.0
#include "device/row_decoder.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <utility>

#include "core/error.h"
#include "device/storages.h"

namespace distorch {

RowDecoder::RowDecoder(RowRecipe recipe, std::vector<PatchTerm> terms, c10::Device compute,
                       const RowDecoder* previous)
    : recipe_(std::move(recipe)),
      terms_(std::move(terms)),
      compute_(compute),
      recipe_there_(recipe_) {
  check_fits(recipe_, terms_, c10::Device(c10::kCPU));
  low_rank_ = low_rank_of(terms_);
  decoding_ = decoding_of(recipe_, low_rank_);
  if (compute.is_cpu()) return;
  for (const PatchTerm& term : terms_) {
    terms_there_.push_back(
        {on_device(term.up, previous), on_device(term.down, previous), term.scale, term.first_row});
  }
  const auto there = [&](at::Tensor RowRecipe::* part) {
    if (!(recipe_.*part).defined()) return;
    recipe_there_.*part =
        previous != nullptr ? previous->recipe_there_.*part : (recipe_.*part).to(compute);
  };
  there(&RowRecipe::scales);
  there(&RowRecipe::table);
}

at::Tensor RowDecoder::on_device(const at::Tensor& factor, const RowDecoder* previous) const {
  for (size_t i = 0; previous != nullptr && i < previous->terms_.size(); ++i) {
    if (factor.is_same(previous->terms_[i].up)) return previous->terms_there_[i].up;
    if (factor.is_same(previous->terms_[i].down)) return previous->terms_there_[i].down;
  }
  return factor.to(compute_);
}

const RowDecoder* RowDecoder::of(const Source& source) {
  return dynamic_cast<const RowDecoder*>(source.decoder.get());
}

void RowDecoder::decode(uint64_t begin, uint64_t end, const std::byte* stored,
                        std::byte* into) const {
  // Single rows are gathered, and used at once.
  const bool streamed = decoded_bytes() >= kPastCaches && end - begin > 1;
  if (decode_rows(decoding_, static_cast<int64_t>(begin), static_cast<int64_t>(end), stored, into,
                  streamed ? Stores::kStreamed : Stores::kCached)) {
    return;
  }
  throw Error(ErrorKind::kFetch, "a patch on it has NaN or inf values");
}

void RowDecoder::decode_on_device(const std::byte* stored, std::byte* into) const {
  const c10::impl::VirtualGuardImpl guard(compute_.type());
  const c10::Stream stream = guard.getStream(compute_);
  // The allocator must not give this memory to others before the stream has read it.
  const auto read_there = [&](const at::Tensor& tensor) {
    if (tensor.defined()) guard.recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
  };
  for (const PatchTerm& term : terms_there_) {
    read_there(term.up);
    read_there(term.down);
  }
  read_there(recipe_there_.scales);
  read_there(recipe_there_.table);
  const at::Tensor from = bytes_at(stored, stored_bytes(), compute_);
  const at::Tensor to = bytes_at(into, decoded_bytes(), compute_);
  // Whether products are finite is not asked: the host would have to wait for the answer.
  distorch::decode({recipe_there_, terms_there_, from,
                    to.view(recipe_.dtype).view({recipe_.rows, recipe_.columns}), std::nullopt});
}

uint64_t RowDecoder::factor_bytes() const {
  uint64_t bytes = recipe_.scales.defined() ? recipe_.scales.nbytes() : 0;
  if (recipe_.table.defined()) bytes += recipe_.table.nbytes();
  for (const PatchTerm& term : terms_) bytes += term.up.nbytes() + term.down.nbytes();
  return bytes;
}

}  // namespace distorch
