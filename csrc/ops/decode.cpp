// The operator that decodes and patches a weight: at load, and in fetches.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "core/parts.h"
#include "device/cuda.h"
#include "device/row_decoder.h"
#include "device/threads.h"
#include "hook/errors.h"

namespace distorch {
namespace {

constexpr int64_t kPanelBytes = 32 << 20;  // of float32 rows on a device, at one time

// into [rows, columns] = round_once(float32(stored) * scales + sum of strength
// * up @ down, each from its first row on). `stored` has the rows' bytes as
// `code` says, of any dtype; it is `into` itself only where nothing changes but
// by patches. All are on one device.
class DecodeCall {
 public:
  DecodeCall(const at::Tensor& into, const at::Tensor& stored, c10::string_view code,
             const std::optional<at::Tensor>& scales, at::IntArrayRef scale_block,
             at::TensorList ups, at::TensorList downs, at::ArrayRef<double> strengths,
             at::IntArrayRef first_rows)
      : recipe_(recipe_of(into, stored, code, scales, scale_block)),
        from_(static_cast<const std::byte*>(stored.const_data_ptr())),
        to_(static_cast<std::byte*>(into.mutable_data_ptr())) {
    TORCH_CHECK_VALUE(ups.size() == downs.size() && ups.size() == strengths.size() &&
                          ups.size() == first_rows.size(),
                      "decode_ takes as many factors of one kind as of the other");
    for (size_t i = 0; i < ups.size(); ++i) {
      const PatchTerm term{ups[i], downs[i], strengths[i], first_rows[i]};
      check_term(term, recipe_, into.device());
      terms_.push_back(low_rank_of(term));
    }
    decoding_ = decoding_of(recipe_, terms_);
    TORCH_CHECK_VALUE(static_cast<int64_t>(stored.nbytes()) == rows() * decoding_.stored_row(),
                      "decode_: ", stored.nbytes(), " bytes stored, ",
                      rows() * decoding_.stored_row(), " expected");
    TORCH_CHECK_VALUE(from_ != to_ || decoding_.in_place(), "decode_ cannot widen in place");
  }

  const Decoding& decoding() const { return decoding_; }
  int64_t rows() const { return recipe_.rows; }
  const std::byte* from(int64_t row) const { return from_ + row * decoding_.stored_row(); }
  std::byte* to(int64_t row) const { return to_ + row * decoding_.decoded_row(); }

 private:
  static RowRecipe recipe_of(const at::Tensor& into, const at::Tensor& stored,
                             c10::string_view code, const std::optional<at::Tensor>& scales,
                             at::IntArrayRef scale_block) {
    TORCH_CHECK_VALUE(into.dim() == 2 && into.is_contiguous() && stored.is_contiguous() &&
                          stored.device() == into.device() && scale_block.size() == 2,
                      "decode_ takes contiguous tensors on one device, and writes to a matrix");
    return {&row_code(std::string(code)),
            scales.value_or(at::Tensor()),
            scale_block[0],
            scale_block[1],
            into.scalar_type(),
            into.size(0),
            into.size(1)};
  }

  const RowRecipe recipe_;
  const std::byte* const from_;
  std::byte* const to_;
  std::vector<LowRank> terms_;
  Decoding decoding_;
};

// `finite` (bool, one element) becomes false when a product is not.
void decode_on_host(at::Tensor into, const at::Tensor& stored, c10::string_view code,
                    const std::optional<at::Tensor>& scales, at::IntArrayRef scale_block,
                    at::TensorList ups, at::TensorList downs, at::ArrayRef<double> strengths,
                    at::IntArrayRef first_rows, std::optional<at::Tensor> finite) {
  at_border([&] {
    const DecodeCall call(into, stored, code, scales, scale_block, ups, downs, strengths,
                          first_rows);
    std::atomic<bool> all_finite{true};
    const auto threads = static_cast<int64_t>(compute_threads());
    const int64_t step = call.decoding().in_place() ? kTileRows : kPanelRows;
    const int64_t rows = rows_per_part(call.rows(), call.decoding().decoded_row(), step, threads);
    for_ranges(call.rows(), rows, threads, [&](int64_t begin, int64_t end) {
      if (!decode_rows(call.decoding(), begin, end, call.from(begin), call.to(begin))) {
        all_finite = false;
      }
    });
    if (finite && !all_finite) *finite->mutable_data_ptr<bool>() = false;
  });
}

// Queued on the current stream of `into`.
void decode_on_cuda(at::Tensor into, const at::Tensor& stored, c10::string_view code,
                    const std::optional<at::Tensor>& scales, at::IntArrayRef scale_block,
                    at::TensorList ups, at::TensorList downs, at::ArrayRef<double> strengths,
                    at::IntArrayRef first_rows, std::optional<at::Tensor> finite) {
  at_border([&] {
    const DecodeCall call(into, stored, code, scales, scale_block, ups, downs, strengths,
                          first_rows);
    at::Tensor panel;
    DecodeScratch scratch;
    if (cuda::needs_panel(call.decoding())) {
      const auto row_bytes = into.size(1) * static_cast<int64_t>(sizeof(float));
      scratch.panel_rows = std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(row_bytes, 1), 1,
                                               std::max<int64_t>(call.rows(), 1));
      panel = at::empty({scratch.panel_rows, into.size(1)}, into.options().dtype(at::kFloat));
      scratch.panel = panel.mutable_data_ptr<float>();
    }
    at::Tensor more_terms;
    if (const uint64_t bytes = cuda::more_terms_bytes(call.decoding())) {
      more_terms = at::empty({static_cast<int64_t>(bytes)}, into.options().dtype(at::kByte));
      scratch.more_terms = more_terms.mutable_data_ptr();
    }
    if (finite) scratch.finite = reinterpret_cast<uint8_t*>(finite->mutable_data_ptr<bool>());
    decode_on_gpu(into.device(), call.decoding(), call.rows(), call.from(0), call.to(0), scratch);
  });
}

void decode_nothing(at::Tensor, const at::Tensor&, c10::string_view,
                    const std::optional<at::Tensor>&, at::IntArrayRef, at::TensorList,
                    at::TensorList, at::ArrayRef<double>, at::IntArrayRef,
                    std::optional<at::Tensor>) {}

}  // namespace

TORCH_LIBRARY_IMPL(distorch, CPU, library) { library.impl("decode_", &decode_on_host); }

TORCH_LIBRARY_IMPL(distorch, CUDA, library) { library.impl("decode_", &decode_on_cuda); }

TORCH_LIBRARY_IMPL(distorch, Meta, library) { library.impl("decode_", &decode_nothing); }

}  // namespace distorch
