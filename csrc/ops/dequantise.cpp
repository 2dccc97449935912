// The operators that decode the blocks of GGUF files.
#include "core/dequantise.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "core/parts.h"
#include "device/cuda.h"
#include "device/row_decoder.h"
#include "device/threads.h"
#include "hook/errors.h"

namespace distorch {
namespace {

constexpr int64_t kNumbersPerPart = 1 << 18;

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

BlockType check_filled(const at::Tensor& into, const at::Tensor& blocks, const std::string& name) {
  const BlockType type = type_of(name);
  TORCH_CHECK_VALUE(into.sizes() == at::IntArrayRef(decoded_sizes(blocks, type)),
                    "dequantise_: ", blocks.sizes(), " of ", name, " do not fill ", into.sizes());
  TORCH_CHECK_VALUE(into.is_contiguous() && blocks.is_contiguous(),
                    "dequantise_ takes contiguous tensors");
  TORCH_CHECK_VALUE(into.device() == blocks.device(), "dequantise_ takes tensors on one device");
  return type;
}

void dequantise_into(at::Tensor into, const at::Tensor& blocks, const std::string& name) {
  const BlockType type = check_filled(into, blocks, name);
  const BlockInfo& info = block_info(type);
  const Element element = element_of(into.scalar_type());
  const auto* from = blocks.const_data_ptr<uint8_t>();
  auto* to = static_cast<std::byte*>(into.mutable_data_ptr());
  const auto block_size = static_cast<int64_t>(into.element_size()) * info.elements;
  const int64_t per_part = kNumbersPerPart / info.elements;
  const Stores stores = into.nbytes() >= kPastCaches ? Stores::kStreamed : Stores::kCached;
  for_ranges(blocks.numel() / info.bytes, per_part, compute_threads(),
             [&](int64_t begin, int64_t end) {
               dequantise(type, from + begin * info.bytes, end - begin, element,
                          to + begin * block_size, stores);
             });
}

// Blocks of one number have names of their own as rows.
const char* code_of(BlockType type) {
  switch (type) {
    case BlockType::kF32:
      return "float32";
    case BlockType::kF16:
      return "float16";
    case BlockType::kBF16:
      return "bfloat16";
    default:
      return block_info(type).name;
  }
}

// Queued on the current stream of `into`.
void dequantise_into_on_cuda(at::Tensor into, const at::Tensor& blocks, const std::string& name) {
  const BlockType type = check_filled(into, blocks, name);
  at_border([&] {
    const Decoding decoding{
        &row_code(code_of(type)), {}, element_of(into.scalar_type()), into.numel(), {}};
    decode_on_gpu(into.device(), decoding, 1, blocks.const_data_ptr(), into.mutable_data_ptr(), {});
  });
}

at::Tensor dequantise_meta(const at::Tensor& blocks, const std::string& name,
                           at::ScalarType dtype) {
  element_of(dtype);
  return at::empty(decoded_sizes(blocks, type_of(name)), blocks.options().dtype(dtype));
}

template <auto kInto>
at::Tensor dequantise_new(const at::Tensor& blocks, const std::string& name, at::ScalarType dtype) {
  at::Tensor into = dequantise_meta(blocks, name, dtype);
  kInto(into, blocks.contiguous(), name);
  return into;
}

}  // namespace

TORCH_LIBRARY_IMPL(distorch, CPU, library) {
  library.impl("dequantise", &dequantise_new<&dequantise_into>);
  library.impl("dequantise_", &dequantise_into);
}

TORCH_LIBRARY_IMPL(distorch, CUDA, library) {
  library.impl("dequantise", &dequantise_new<&dequantise_into_on_cuda>);
  library.impl("dequantise_", &dequantise_into_on_cuda);
}

TORCH_LIBRARY_IMPL(distorch, Meta, library) {
  library.impl("dequantise", &dequantise_meta);
  library.impl("dequantise_", [](at::Tensor, const at::Tensor&, const std::string&) {});
}

}  // namespace distorch
