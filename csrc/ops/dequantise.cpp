// The operators that decode the blocks of GGUF files.
#include "core/dequantise.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/parts.h"
#include "device/row_decoder.h"
#include "device/threads.h"

namespace distorch {
namespace {

constexpr int64_t kNumbersPerPart = 1 << 18;
constexpr size_t kPastCaches =
    32 << 20;  // bytes: larger results are in no cache when they are used

BlockType type_of(const std::string& name) {
  const auto type = block_type_named(name);
  TORCH_CHECK_VALUE(type.has_value(), "dequantise: no block type ", name);
  return *type;
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
  const BlockInfo& info = block_info(type);
  TORCH_CHECK_VALUE(into.sizes() == at::IntArrayRef(decoded_sizes(blocks, type)),
                    "dequantise_: ", blocks.sizes(), " of ", name, " do not fill ", into.sizes());
  TORCH_CHECK_VALUE(into.is_contiguous() && blocks.is_contiguous(),
                    "dequantise_ takes contiguous tensors");
  const Element element = element_of(into.scalar_type());
  const auto* from = blocks.const_data_ptr<uint8_t>();
  auto* to = static_cast<std::byte*>(into.mutable_data_ptr());
  const auto block_size = static_cast<int64_t>(into.element_size()) * info.elements;
  const int64_t per_part = kNumbersPerPart / info.elements;
  const Stores stores = into.nbytes() > kPastCaches ? Stores::kStreamed : Stores::kCached;
  for_ranges(blocks.numel() / info.bytes, per_part, compute_threads(),
             [&](int64_t begin, int64_t end) {
               dequantise(type, from + begin * info.bytes, end - begin, element,
                          to + begin * block_size, stores);
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

}  // namespace

TORCH_LIBRARY_IMPL(distorch, CPU, library) {
  library.impl("dequantise", &dequantise_new);
  library.impl("dequantise_", &dequantise_into);
}

TORCH_LIBRARY_IMPL(distorch, Meta, library) {
  library.impl("dequantise", &dequantise_meta);
  library.impl("dequantise_", [](at::Tensor, const at::Tensor&, const std::string&) {});
}

}  // namespace distorch
