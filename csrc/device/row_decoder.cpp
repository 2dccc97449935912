#include "device/row_decoder.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <numeric>

#include "core/error.h"

namespace distorch {
namespace {

bool is_matrix_on(const at::Tensor& tensor, c10::Device device) {
  return tensor.dim() == 2 && tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
         tensor.device() == device;
}

}  // namespace

Element element_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kHalf:
      return Element::kFloat16;
    case at::kBFloat16:
      return Element::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, "weights are decoded to float32, float16 or bfloat16, not ", dtype);
  }
}

Decoding decoding_of(const RowRecipe& recipe, std::span<const LowRank> terms) {
  Scales scales;
  if (recipe.scales.defined()) {
    scales = {recipe.scales.const_data_ptr<float>(), recipe.scale_rows, recipe.scale_columns,
              recipe.scales.size(1)};
  }
  return {recipe.code, scales, element_of(recipe.dtype), recipe.columns, terms};
}

LowRank low_rank_of(const PatchTerm& term) {
  return {term.up.const_data_ptr<float>(),
          term.down.const_data_ptr<float>(),
          term.up.size(1),
          static_cast<float>(term.scale),
          term.first_row,
          term.up.size(0)};
}

void check_term(const PatchTerm& term, const RowRecipe& recipe, c10::Device device) {
  TORCH_CHECK_VALUE(
      is_matrix_on(term.up, device) && is_matrix_on(term.down, device) &&
          term.up.size(1) == term.down.size(0) && term.down.size(1) == recipe.columns &&
          term.first_row >= 0 && term.first_row + term.up.size(0) <= recipe.rows,
      "a patch of ", term.up.sizes(), " @ ", term.down.sizes(), " from row ", term.first_row,
      " on does not fit a weight of [", recipe.rows, ", ", recipe.columns, "]");
}

RowDecoder::RowDecoder(RowRecipe recipe, std::vector<PatchTerm> terms, c10::Device compute,
                       const RowDecoder* previous)
    : recipe_(std::move(recipe)), terms_(std::move(terms)) {
  TORCH_CHECK_VALUE(recipe_.columns % recipe_.code->elements == 0, "rows of ", recipe_.columns,
                    " elements are not whole blocks of ", recipe_.code->name);
  for (const PatchTerm& term : terms_) {
    check_term(term, recipe_);
    low_rank_.push_back(low_rank_of(term));
  }
  decoding_ = decoding_of(recipe_, low_rank_);
  if (compute.is_cpu()) return;
  for (const PatchTerm& term : terms_) {
    ups_.push_back(on_device(term.up, compute, previous));
    downs_.push_back(on_device(term.down, compute, previous));
  }
  if (!recipe_.scales.defined()) return;
  scales_ = previous != nullptr ? previous->scales_ : recipe_.scales.to(compute);
}

at::Tensor RowDecoder::on_device(const at::Tensor& factor, c10::Device compute,
                                 const RowDecoder* previous) const {
  for (size_t i = 0; previous != nullptr && i < previous->terms_.size(); ++i) {
    if (factor.is_same(previous->terms_[i].up)) return previous->ups_[i];
    if (factor.is_same(previous->terms_[i].down)) return previous->downs_[i];
  }
  return factor.to(compute);
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

void RowDecoder::decode_on_device(const at::Tensor& stored, const at::Tensor& into,
                                  const c10::Stream& stream) const {
  static const auto decode = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("distorch::decode_", "")
                                 .typed<void(at::Tensor, const at::Tensor&, c10::string_view,
                                             const std::optional<at::Tensor>&, at::IntArrayRef,
                                             at::TensorList, at::TensorList, at::ArrayRef<double>,
                                             at::IntArrayRef, std::optional<at::Tensor>)>();
  const c10::impl::VirtualGuardImpl guard(stream.device_type());
  for (const auto* factors : {&ups_, &downs_}) {
    for (const at::Tensor& factor : *factors) {
      guard.recordDataPtrOnStream(factor.storage().data_ptr(), stream);
    }
  }
  std::optional<at::Tensor> scales;
  if (scales_.defined()) {
    scales = scales_;
    guard.recordDataPtrOnStream(scales_.storage().data_ptr(), stream);
  }
  std::vector<double> strengths;
  std::vector<int64_t> first_rows;
  for (const PatchTerm& term : terms_) {
    strengths.push_back(term.scale);
    first_rows.push_back(term.first_row);
  }
  const int64_t block[] = {recipe_.scale_rows, recipe_.scale_columns};
  decode.call(into.view(recipe_.dtype).view({recipe_.rows, recipe_.columns}), stored,
              recipe_.code->name, scales, block, ups_, downs_, strengths, first_rows, std::nullopt);
}

uint64_t RowDecoder::factor_bytes() const {
  const auto add = [](uint64_t sum, const PatchTerm& term) {
    return sum + term.up.nbytes() + term.down.nbytes();
  };
  const uint64_t factors = std::accumulate(terms_.begin(), terms_.end(), uint64_t{0}, add);
  return factors + (recipe_.scales.defined() ? recipe_.scales.nbytes() : 0);
}

}  // namespace distorch
