// SPDX-License-Identifier: Apache-2.0
#include "device/decode.h"

#include <array>
#include <atomic>

#include "core/rotation.h"
#include "device/cuda.h"
#include "device/threads.h"

namespace distorch {
namespace {

constexpr int64_t kLeastNumbers = 1 << 18;  // of a part: fewer are not worth another thread

bool is_float32_on(const at::Tensor& tensor, c10::Device device) {
  return tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && tensor.device() == device;
}

bool is_matrix_on(const at::Tensor& tensor, c10::Device device) {
  return tensor.dim() == 2 && is_float32_on(tensor, device);
}

// Two matrices, or two stacks of as many matrices.
bool are_factors_on(const PatchTerm& term, c10::Device device) {
  const int64_t dims = term.up.dim();
  return (dims == 2 || (dims == 3 && term.up.size(0) == term.down.size(0))) &&
         term.down.dim() == dims && is_float32_on(term.up, device) &&
         is_float32_on(term.down, device);
}

void decode_on_host(const DecodeJob& job) {
  const std::vector<LowRank> terms = low_rank_of(job.terms);
  Decoding decoding = decoding_of(job.recipe, terms);
  int64_t rows = job.recipe.rows;
  if (decoding.code_alone()) {
    // Nothing depends on the row, so that each block counts as one: parts may begin anywhere.
    rows *= decoding.columns / decoding.code->elements;
    decoding.columns = decoding.code->elements;
  }
  const auto* from = static_cast<const std::byte*>(job.stored.const_data_ptr());
  auto* to = static_cast<std::byte*>(job.into.mutable_data_ptr());
  const Stores stores = job.into.nbytes() >= kPastCaches ? Stores::kStreamed : Stores::kCached;
  std::atomic<bool> all_finite{true};
  const auto threads = static_cast<int64_t>(compute_threads());
  const int64_t step = decoding.in_place() ? kTileRows : kPanelRows;
  const int64_t least = kLeastNumbers / std::max<int64_t>(decoding.columns, 1);
  const int64_t per_part =
      std::max(rows_per_part(rows, decoding.decoded_row(), step, threads), least / step * step);
  for_ranges(rows, per_part, threads, [&](int64_t begin, int64_t end) {
    const bool finite = decode_rows(decoding, begin, end, from + begin * decoding.stored_row(),
                                    to + begin * decoding.decoded_row(), stores);
    if (!finite) all_finite = false;
  });
  if (job.finite && !all_finite) *job.finite->mutable_data_ptr<bool>() = false;
}

using Kernels = std::array<std::atomic<DecodeKernel>, c10::COMPILE_TIME_MAX_DEVICE_TYPES>;

// By c10::DeviceType.
Kernels& kernels() {
  static Kernels& instance = []() -> Kernels& {
    auto& made = *new Kernels{};
    made[static_cast<size_t>(c10::kCPU)] = &decode_on_host;
    made[static_cast<size_t>(c10::kCUDA)] = &decode_on_cuda;
    return made;
  }();
  return instance;
}

}  // namespace

void set_decode_kernel(c10::DeviceType type, DecodeKernel kernel) {
  kernels()[static_cast<size_t>(type)] = kernel;
}

DecodeKernel decode_kernel(c10::DeviceType type) { return kernels()[static_cast<size_t>(type)]; }

void decode(const DecodeJob& job) {
  const c10::DeviceType type = job.into.device().type();
  const DecodeKernel kernel = decode_kernel(type);
  TORCH_CHECK_NOT_IMPLEMENTED(kernel != nullptr, "distorch decodes weights on the CPU and on CUDA ",
                              "devices, not on ", type);
  kernel(job);
}

void check_fits(const RowRecipe& recipe, std::span<const PatchTerm> terms, c10::Device device) {
  TORCH_CHECK_VALUE(recipe.columns % recipe.code->elements == 0, "rows of ", recipe.columns,
                    " elements are not whole blocks of ", recipe.code->name);
  if (recipe.scales.defined()) {
    const at::Tensor& scales = recipe.scales;
    TORCH_CHECK_VALUE(
        recipe.scale_rows > 0 && recipe.scale_columns > 0 && is_matrix_on(scales, device) &&
            scales.size(0) == divide_up(recipe.rows, recipe.scale_rows) &&
            scales.size(1) == divide_up(recipe.columns, recipe.scale_columns),
        "scales ", scales.scalar_type(), " ", scales.sizes(), " on ", scales.device(),
        ", each for ", recipe.scale_rows, " x ", recipe.scale_columns,
        " elements, do not fit a weight of [", recipe.rows, ", ", recipe.columns, "] on ", device);
  }
  const int64_t shared = recipe.table.defined() ? recipe.table.numel() : 0;
  TORCH_CHECK_VALUE(shared == recipe.code->table, recipe.code->name, " takes a table of ",
                    recipe.code->table, " numbers, not of ", shared);
  TORCH_CHECK_VALUE(
      shared == 0 || (recipe.table.scalar_type() == at::kFloat && recipe.table.is_contiguous() &&
                      recipe.table.device() == device),
      "a table is float32, contiguous, and on ", device);
  if (recipe.rotation != 0) {
    TORCH_CHECK_VALUE(is_rotation(recipe.rotation) && recipe.columns % recipe.rotation == 0,
                      "rows of ", recipe.columns, " elements are not turned in groups of ",
                      recipe.rotation, ": expected a power of 4, at most ", kLargestRotation,
                      ", that divides them");
    TORCH_CHECK_VALUE(!recipe.scales.defined() || recipe.scale_columns % recipe.rotation == 0,
                      "a scale for ", recipe.scale_columns, " columns is not one for groups of ",
                      recipe.rotation, " that were turned together");
  }
  for (const PatchTerm& term : terms) {
    TORCH_CHECK_VALUE(
        are_factors_on(term, device) && term.up.size(-1) == term.down.size(-2) &&
            term.down.size(-1) == recipe.columns && term.first_row >= 0 &&
            term.first_row + term.up.numel() / std::max<int64_t>(term.up.size(-1), 1) <=
                recipe.rows,
        "a patch of ", term.up.sizes(), " @ ", term.down.sizes(), " from row ", term.first_row,
        " on does not fit a weight of [", recipe.rows, ", ", recipe.columns, "]");
  }
}

std::vector<PatchTerm> terms_of(at::TensorList ups, at::TensorList downs,
                                at::ArrayRef<double> strengths, at::IntArrayRef first_rows) {
  TORCH_CHECK_VALUE(ups.size() == downs.size() && ups.size() == strengths.size() &&
                        ups.size() == first_rows.size(),
                    "patches take as many factors of one kind as of the other");
  std::vector<PatchTerm> terms;
  for (size_t i = 0; i < ups.size(); ++i) {
    terms.push_back({ups[i], downs[i], strengths[i], first_rows[i]});
  }
  return terms;
}

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
  const float* table = recipe.table.defined() ? recipe.table.const_data_ptr<float>() : nullptr;
  return {recipe.code, scales, element_of(recipe.dtype), recipe.columns,
          terms,       table,  recipe.rotation};
}

std::vector<LowRank> low_rank_of(std::span<const PatchTerm> terms) {
  std::vector<LowRank> found;
  for (const PatchTerm& term : terms) {
    const int64_t products = term.up.dim() == 3 ? term.up.size(0) : 1;
    const int64_t rows = term.up.size(-2), rank = term.up.size(-1);
    for (int64_t i = 0; i < products; ++i) {
      found.push_back({term.up.const_data_ptr<float>() + i * rows * rank,
                       term.down.const_data_ptr<float>() + i * rank * term.down.size(-1), rank,
                       static_cast<float>(term.scale), term.first_row + i * rows, rows});
    }
  }
  return found;
}

}  // namespace distorch
