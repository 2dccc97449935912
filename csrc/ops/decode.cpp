// The operator that decodes and patches a weight: at load, and in fetches.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

#include "device/row_decoder.h"
#include "hook/errors.h"

namespace distorch {
namespace {

constexpr int64_t kRowsPerTask = 48;

// into [rows, columns] = round_once(float32(stored) * scales + sum of strength
// * up @ down, each from its first row on). `stored` has the rows' bytes as
// `code` says, of any dtype; it is `into` itself only where nothing changes but
// by patches. `finite` (bool, one element) becomes false when a product is not.
void decode_on_host(at::Tensor into, const at::Tensor& stored, c10::string_view code,
                    const std::optional<at::Tensor>& scales, at::IntArrayRef scale_block,
                    at::TensorList ups, at::TensorList downs, at::ArrayRef<double> strengths,
                    at::IntArrayRef first_rows, std::optional<at::Tensor> finite) {
  at_border([&] {
    TORCH_CHECK_VALUE(into.dim() == 2 && into.is_contiguous() && stored.is_contiguous(),
                      "decode_ takes contiguous tensors, and writes to a matrix");
    TORCH_CHECK_VALUE(ups.size() == downs.size() && ups.size() == strengths.size() &&
                          ups.size() == first_rows.size() && scale_block.size() == 2,
                      "decode_ takes as many factors of one kind as of the other");
    const RowRecipe recipe{&row_code(std::string(code)),
                           scales.value_or(at::Tensor()),
                           scale_block[0],
                           scale_block[1],
                           into.scalar_type(),
                           into.size(0),
                           into.size(1)};
    std::vector<LowRank> terms;
    for (size_t i = 0; i < ups.size(); ++i) {
      const PatchTerm term{ups[i], downs[i], strengths[i], first_rows[i]};
      check_term(term, recipe);
      terms.push_back(low_rank_of(term));
    }
    const Decoding decoding = decoding_of(recipe, terms);
    TORCH_CHECK_VALUE(static_cast<int64_t>(stored.nbytes()) == recipe.rows * decoding.stored_row(),
                      "decode_: ", stored.nbytes(), " bytes stored, ",
                      recipe.rows * decoding.stored_row(), " expected");
    const auto* from = static_cast<const std::byte*>(stored.const_data_ptr());
    auto* to = static_cast<std::byte*>(into.mutable_data_ptr());
    TORCH_CHECK_VALUE(from != to || decoding.in_place(), "decode_ cannot widen in place");
    std::atomic<bool> all_finite{true};
    at::parallel_for(0, recipe.rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
      if (!decode_rows(decoding, begin, end, from + begin * decoding.stored_row(),
                       to + begin * decoding.decoded_row())) {
        all_finite = false;
      }
    });
    if (finite && !all_finite) *finite->mutable_data_ptr<bool>() = false;
  });
}

void decode_nothing(at::Tensor, const at::Tensor&, c10::string_view,
                    const std::optional<at::Tensor>&, at::IntArrayRef, at::TensorList,
                    at::TensorList, at::ArrayRef<double>, at::IntArrayRef,
                    std::optional<at::Tensor>) {}

}  // namespace

TORCH_LIBRARY_IMPL(distorch, CPU, library) { library.impl("decode_", &decode_on_host); }

TORCH_LIBRARY_IMPL(distorch, Meta, library) { library.impl("decode_", &decode_nothing); }

}  // namespace distorch
