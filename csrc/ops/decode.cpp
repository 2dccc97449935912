// SPDX-License-Identifier: Apache-2.0
// The operators that decode and patch a matrix, and the blocks of GGUF files.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/blocks.h"
#include "core/interleave.h"
#include "device/decode.h"
#include "device/threads.h"
#include "hook/errors.h"

namespace distorch {
namespace {

// into [rows, columns] = round_once(turned_back(float32(stored)) * scales + sum of strength * up @
// down, each from its first row on). `stored` has the rows' bytes as `code` says, of any dtype. It
// is `into` itself only where nothing changes but by patches. `finite` (bool, one element) becomes
// false when a product is not.
void decode_matrix(at::Tensor into, const at::Tensor& stored, c10::string_view code,
                   const std::optional<at::Tensor>& scales, at::IntArrayRef scale_block,
                   at::TensorList ups, at::TensorList downs, at::ArrayRef<double> strengths,
                   at::IntArrayRef first_rows, std::optional<at::Tensor> finite,
                   const std::optional<at::Tensor>& table, int64_t rotation) {
  at_border([&] {
    TORCH_CHECK_VALUE(into.dim() == 2 && into.is_contiguous() && stored.is_contiguous() &&
                          stored.device() == into.device() && scale_block.size() == 2,
                      "decode_ takes contiguous tensors on one device, and writes to a matrix");
    const RowRecipe recipe{&row_code(std::string(code)),
                           scales.value_or(at::Tensor()),
                           scale_block[0],
                           scale_block[1],
                           into.scalar_type(),
                           into.size(0),
                           into.size(1),
                           table.value_or(at::Tensor()),
                           rotation};
    const std::vector<PatchTerm> terms = terms_of(ups, downs, strengths, first_rows);
    check_fits(recipe, terms, into.device());
    const Decoding decoding = decoding_of(recipe, {});
    const int64_t expected = recipe.rows * decoding.stored_row();
    TORCH_CHECK_VALUE(static_cast<int64_t>(stored.nbytes()) == expected,
                      "decode_: ", stored.nbytes(), " bytes stored, ", expected, " expected");
    TORCH_CHECK_VALUE(stored.const_data_ptr() != into.const_data_ptr() || decoding.in_place(),
                      "decode_ cannot widen in place");
    decode({recipe, terms, stored, into, std::move(finite)});
  });
}

void decode_nothing(at::Tensor, const at::Tensor&, c10::string_view,
                    const std::optional<at::Tensor>&, at::IntArrayRef, at::TensorList,
                    at::TensorList, at::ArrayRef<double>, at::IntArrayRef,
                    std::optional<at::Tensor>, const std::optional<at::Tensor>&, int64_t) {}

// --- blocks of GGUF files ---

BlockType type_of(const std::string& name) {
  const auto type = block_type_named(name);
  TORCH_CHECK_VALUE(type.has_value() && block_info(*type).table == 0, "dequantise: no block type ",
                    name, " that needs no table");
  return *type;
}

// Blocks of one number have names of their own as rows.
const RowCode& code_of(BlockType type) {
  switch (type) {
    case BlockType::kF32:
      return row_code("float32");
    case BlockType::kF16:
      return row_code("float16");
    case BlockType::kBF16:
      return row_code("bfloat16");
    default:
      return row_code(block_info(type).name);
  }
}

// [.., bytes of a row] -> [.., elements of a row]
at::DimVector decoded_sizes(const at::Tensor& blocks, BlockType type) {
  const BlockInfo& info = block_info(type);
  TORCH_CHECK_VALUE(
      blocks.scalar_type() == at::kByte && blocks.dim() >= 1 && blocks.size(-1) % info.bytes == 0,
      "dequantise takes uint8 rows of whole ", info.name, " blocks (", info.bytes, " bytes), not ",
      blocks.scalar_type(), " ", blocks.sizes());
  at::DimVector sizes(blocks.sizes());
  sizes.back() = sizes.back() / info.bytes * info.elements;
  return sizes;
}

void dequantise_into(at::Tensor into, const at::Tensor& blocks, const std::string& name) {
  const BlockType type = type_of(name);
  TORCH_CHECK_VALUE(into.sizes() == at::IntArrayRef(decoded_sizes(blocks, type)),
                    "dequantise_: ", blocks.sizes(), " of ", name, " do not fill ", into.sizes());
  TORCH_CHECK_VALUE(into.is_contiguous() && blocks.is_contiguous(),
                    "dequantise_ takes contiguous tensors");
  TORCH_CHECK_VALUE(into.device() == blocks.device(), "dequantise_ takes tensors on one device");
  at_border([&] {
    const RowRecipe recipe{&code_of(type), {}, 1, 1, into.scalar_type(), 1, into.numel()};
    decode({recipe, {}, blocks, into, std::nullopt});
  });
}

at::Tensor dequantise_meta(const at::Tensor& blocks, const std::string& name,
                           at::ScalarType dtype) {
  element_of(dtype);
  return at::empty(decoded_sizes(blocks, type_of(name)), blocks.options().dtype(dtype));
}

at::Tensor dequantise_new(const at::Tensor& blocks, const std::string& name, at::ScalarType dtype) {
  at::Tensor into = dequantise_meta(blocks, name, dtype);
  dequantise_into(into, blocks.contiguous(), name);
  return into;
}

// --- blocks that are made of numbers and their scales ---

// into [rows, blocks * bytes]: of each block its bytes of every part, one part after the other.
// `parts` are uint8 [rows, blocks * own bytes]; the first has one byte per block.
void interleave(at::Tensor into, at::TensorList parts) {
  at_border([&] {
    const auto is_rows = [&](const at::Tensor& rows) {
      return rows.dim() == 2 && rows.scalar_type() == at::kByte && rows.is_contiguous() &&
             rows.size(0) == into.size(0);
    };
    TORCH_CHECK_VALUE(into.dim() == 2 && is_rows(into) && !parts.empty(),
                      "interleave_ takes contiguous rows of bytes");
    const int64_t blocks = parts[0].size(1);
    std::vector<Part> found;
    int64_t block = 0;
    for (const at::Tensor& part : parts) {
      TORCH_CHECK_VALUE(is_rows(part) && blocks > 0 && part.size(1) % blocks == 0,
                        "interleave_: ", part.sizes(), " has not rows of ", blocks, " blocks");
      found.push_back({part.const_data_ptr<uint8_t>(), part.size(1) / blocks});
      block += found.back().bytes;
    }
    TORCH_CHECK_VALUE(into.size(1) == blocks * block, "interleave_: ", into.sizes(),
                      " has not room for ", blocks, " blocks of ", block, " bytes");
    auto* to = into.mutable_data_ptr<uint8_t>();
    const auto threads = static_cast<int64_t>(compute_threads());
    const int64_t rows = into.size(0);
    for_ranges(rows, rows_per_part(rows, blocks * block, 1, threads), threads,
               [&](int64_t begin, int64_t end) {
                 interleave_rows(found, blocks, begin, end, to + begin * blocks * block);
               });
  });
}

void register_kernels(torch::Library& library) {
  library.impl("decode_", &decode_matrix);
  library.impl("dequantise", &dequantise_new);
  library.impl("dequantise_", &dequantise_into);
}

}  // namespace

TORCH_LIBRARY_IMPL(distorch, CPU, library) {
  register_kernels(library);
  library.impl("interleave_", &interleave);
}

TORCH_LIBRARY_IMPL(distorch, CUDA, library) { register_kernels(library); }

TORCH_LIBRARY_IMPL(distorch, Meta, library) {
  library.impl("decode_", &decode_nothing);
  library.impl("dequantise", &dequantise_meta);
  library.impl("dequantise_", [](at::Tensor, const at::Tensor&, const std::string&) {});
}

}  // namespace distorch
