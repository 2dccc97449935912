// SPDX-License-Identifier: Apache-2.0
#include "core/row_code.h"

#include <array>
#include <cstring>
#include <vector>

#include "core/block_list.h"
#include "core/dequantise.h"
#include "core/error.h"
#include "core/half.h"
#include "core/plain_numbers.h"

namespace distorch {
namespace {

template <class Number>
void bytes_to_float(const std::byte* from, int64_t count, const float*, float* into) {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values;
    for (int bits = 0; bits < 256; ++bits) {
      const auto byte = static_cast<uint8_t>(bits);
      values[bits] = Number::number(&byte, 0);
    }
    return values;
  }();
  for (int64_t i = 0; i < count; ++i) into[i] = table[static_cast<uint8_t>(from[i])];
}

template <float (*kValue)(uint16_t)>
void halves_to_float(const std::byte* from, int64_t count, const float*, float* into) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof bits);
    into[i] = kValue(bits);
  }
}

void floats(const std::byte* from, int64_t count, const float*, float* into) {
  std::memcpy(into, from, static_cast<size_t>(count) * sizeof(float));
}

const RowCode kCodes[] = {
    {"float32", 1, 4, Element::kFloat32, &floats, nullptr},
    {"float16", 1, 2, Element::kFloat16, &halves_to_float<from_float16>, nullptr},
    {"bfloat16", 1, 2, Element::kBFloat16, &halves_to_float<from_bfloat16>, nullptr},
    {"float8_e4m3fn", 1, 1, std::nullopt, &bytes_to_float<Float8E4M3FN>, nullptr},
    {"float8_e5m2", 1, 1, std::nullopt, &bytes_to_float<Float8E5M2>, nullptr},
    {"int8", 1, 1, std::nullopt, &bytes_to_float<Int8>, nullptr},
    {"uint8", 1, 1, std::nullopt, &bytes_to_float<UInt8>, nullptr},
};

template <BlockType kType>
void blocks_to_element(const std::byte* from, int64_t count, const float* table, Element type,
                       void* into, Stores stores) {
  dequantise(kType, from, count / block_info(kType).elements, type, into, stores, table);
}

template <BlockType kType>
void blocks_to_float(const std::byte* from, int64_t count, const float* table, float* into) {
  blocks_to_element<kType>(from, count, table, Element::kFloat32, into, Stores::kCached);
}

template <BlockType kType>
RowCode block_code() {
  const BlockInfo& info = block_info(kType);
  // comfy-kitchen does so for these two.
  constexpr bool kScaledFirst = kType == BlockType::kW4x16 || kType == BlockType::kW6x16;
  return {info.name,
          info.elements,
          info.bytes,
          std::nullopt,
          &blocks_to_float<kType>,
          &blocks_to_element<kType>,
          info.table,
          kScaledFirst};
}

const std::vector<RowCode>& block_codes() {
  static const std::vector<RowCode> codes{
#define DISTORCH_CODE(name) block_code<BlockType::k##name>(),
      DISTORCH_BLOCK_TYPES(DISTORCH_CODE)
#undef DISTORCH_CODE
  };
  return codes;
}

}  // namespace

const RowCode& row_code(const std::string& name) {
  for (const RowCode& code : kCodes) {
    if (name == code.name) return code;
  }
  for (const RowCode& code : block_codes()) {
    if (name == code.name) return code;
  }
  throw Error(ErrorKind::kFormat, "weights stored as '" + name + "' are not known here");
}

}  // namespace distorch
