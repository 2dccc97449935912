#include "core/row_code.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/block_list.h"
#include "core/dequantise.h"
#include "core/error.h"
#include "core/half.h"

namespace distorch {
namespace {

// 8-bit floating point without infinities: exponent bias 7, NaN is all ones.
float from_float8_e4m3fn(uint8_t bits) {
  const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if ((bits & 0x7f) == 0x7f) value = std::numeric_limits<float>::quiet_NaN();
  return (bits & 0x80) != 0 ? -value : value;
}

// The upper half of a float16.
float from_float8_e5m2(uint8_t bits) { return from_float16(static_cast<uint16_t>(bits << 8)); }

float from_int8(uint8_t bits) { return static_cast<int8_t>(bits); }
float from_uint8(uint8_t bits) { return bits; }

template <float (*kValue)(uint8_t)>
void bytes_to_float(const std::byte* from, int64_t count, float* into) {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values;
    for (int bits = 0; bits < 256; ++bits) values[bits] = kValue(static_cast<uint8_t>(bits));
    return values;
  }();
  for (int64_t i = 0; i < count; ++i) into[i] = table[static_cast<uint8_t>(from[i])];
}

template <float (*kValue)(uint16_t)>
void halves_to_float(const std::byte* from, int64_t count, float* into) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, sizeof bits);
    into[i] = kValue(bits);
  }
}

void floats(const std::byte* from, int64_t count, float* into) {
  std::memcpy(into, from, static_cast<size_t>(count) * sizeof(float));
}

const RowCode kCodes[] = {
    {"float32", 1, 4, Element::kFloat32, &floats, nullptr},
    {"float16", 1, 2, Element::kFloat16, &halves_to_float<from_float16>, nullptr},
    {"bfloat16", 1, 2, Element::kBFloat16, &halves_to_float<from_bfloat16>, nullptr},
    {"float8_e4m3fn", 1, 1, std::nullopt, &bytes_to_float<from_float8_e4m3fn>, nullptr},
    {"float8_e5m2", 1, 1, std::nullopt, &bytes_to_float<from_float8_e5m2>, nullptr},
    {"int8", 1, 1, std::nullopt, &bytes_to_float<from_int8>, nullptr},
    {"uint8", 1, 1, std::nullopt, &bytes_to_float<from_uint8>, nullptr},
};

template <BlockType kType>
void blocks_to_element(const std::byte* from, int64_t count, Element type, void* into,
                       Stores stores) {
  dequantise(kType, from, count / block_info(kType).elements, type, into, stores);
}

template <BlockType kType>
void blocks_to_float(const std::byte* from, int64_t count, float* into) {
  blocks_to_element<kType>(from, count, Element::kFloat32, into, Stores::kCached);
}

template <BlockType kType>
RowCode block_code() {
  const BlockInfo& info = block_info(kType);
  return {info.name,    info.elements,           info.bytes,
          std::nullopt, &blocks_to_float<kType>, &blocks_to_element<kType>};
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
