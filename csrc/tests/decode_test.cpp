// Stored rows to the rows of a weight: every code, with scales and patches, against plain loops.
#include "core/decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/half.h"
#include "cuda/numbers_run.h"
#include "tests/check.h"

using namespace distorch;

namespace {

float value_of(const char* code, uint8_t bits) {
  float value = 0;
  const auto byte = static_cast<std::byte>(bits);
  row_code(code).to_float(&byte, 1, &value);
  return value;
}

// A sign, an exponent and a mantissa, by what the formats say; their largest exponent is special.
float float8(int bits, int mantissa_bits, int bias) {
  const int exponent = (bits & 0x7f) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int digits = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
  const float magnitude =
      std::ldexp(static_cast<float>(digits), std::max(exponent, 1) - bias - mantissa_bits);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

void all_numbers_of_a_byte() {
  for (int bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<uint8_t>(bits);
    const bool is_nan = (bits & 0x7f) == 0x7f;
    CHECK(same(value_of("float8_e4m3fn", byte), is_nan ? NAN : float8(bits, 3, 7)));
    if ((bits & 0x7c) != 0x7c) CHECK(same(value_of("float8_e5m2", byte), float8(bits, 2, 15)));
    CHECK(value_of("int8", byte) == static_cast<float>(bits < 128 ? bits : bits - 256));
    CHECK(value_of("uint8", byte) == static_cast<float>(bits));
  }
}

void small_numbers() {
  CHECK(value_of("float8_e4m3fn", 0x38) == 1.0f);
  CHECK(value_of("float8_e4m3fn", 0x7e) == 448.0f);
  CHECK(value_of("float8_e4m3fn", 0x01) == std::ldexp(1.0f, -9));
  CHECK(value_of("float8_e4m3fn", 0xb8) == -1.0f);
  CHECK(std::isnan(value_of("float8_e4m3fn", 0x7f)) && std::isnan(value_of("float8_e4m3fn", 0xff)));
  CHECK(value_of("float8_e5m2", 0x3c) == 1.0f);
  CHECK(value_of("float8_e5m2", 0x7b) == 57344.0f);
  CHECK(std::isinf(value_of("float8_e5m2", 0x7c)) && std::isnan(value_of("float8_e5m2", 0x7d)));
  CHECK(value_of("int8", 0x80) == -128.0f && value_of("uint8", 0x80) == 128.0f);
  CHECK_THROWS(kFormat, row_code("float3"));
}

// [rows, columns] of random bytes that are numbers, with scales in blocks of
// 4 x 5 and a patch on some rows.
void scales_and_patches() {
  constexpr int64_t kRows = 101, kColumns = 33, kRank = 3, kFirst = 7, kPatched = 60;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<std::byte> stored(kRows * kColumns);
  for (auto& byte : stored) byte = static_cast<std::byte>(random() % 0x7f);
  std::vector<float> grid(26 * 7), up(kPatched * kRank), down(kRank * kColumns);
  for (auto* numbers : {&grid, &up, &down}) {
    for (float& number : *numbers) number = normal(random);
  }
  const LowRank term{up.data(), down.data(), kRank, 0.5f, kFirst, kPatched};
  const Decoding decoding{
      &row_code("float8_e4m3fn"), {grid.data(), 4, 5, 7}, Element::kFloat16, kColumns, {&term, 1}};
  CHECK(decoding.stored_row() == 33 && decoding.decoded_row() == 66 && !decoding.in_place());
  std::vector<uint16_t> whole(kRows * kColumns), parts(whole.size());
  auto* into = reinterpret_cast<std::byte*>(whole.data());
  CHECK(decode_rows(decoding, 0, kRows, stored.data(), into));
  for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, 9}, {9, 70}, {70, kRows}}) {
    into = reinterpret_cast<std::byte*>(parts.data()) + begin * 66;
    CHECK(decode_rows(decoding, begin, end, stored.data() + begin * 33, into));
  }
  CHECK(whole == parts);
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kColumns; ++j) {
      float sum = 0, number = 0;
      row_code("float8_e4m3fn").to_float(&stored[i * kColumns + j], 1, &number);
      number *= grid[i / 4 * 7 + j / 5];
      const int64_t row = i - kFirst;
      if (row >= 0 && row < kPatched) {
        for (int64_t k = 0; k < kRank; ++k) {
          sum = std::fma(up[row * kRank + k], down[k * kColumns + j], sum);
        }
        number = std::fma(0.5f, sum, number);
      }
      CHECK(whole[i * kColumns + j] == to_float16(number));
    }
  }
}

// The body of the CUDA kernel for plain numbers and their scales, number by number.
template <class Type>
void check_numbers(const char* name) {
  constexpr int64_t kRows = 19, kColumns = 64;
  std::mt19937 random(5);
  std::vector<uint8_t> stored(kRows * kColumns * Type::kBytes);
  for (uint8_t& byte : stored) byte = static_cast<uint8_t>(random());
  std::vector<float> grid(5 * 8), wanted(kRows * kColumns);
  for (float& number : grid) number = std::normal_distribution<float>()(random);
  const Decoding decoding{&row_code(name), {grid.data(), 4, 8, 8}, Element::kFloat32, kColumns, {}};
  CHECK(decode_rows(decoding, 0, kRows, reinterpret_cast<const std::byte*>(stored.data()),
                    reinterpret_cast<std::byte*>(wanted.data())));
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kColumns; ++j) {
      const float got = cuda::scaled<Type>(stored.data(), i, j, kColumns, {grid.data(), 4, 8, 8});
      const float number = wanted[i * kColumns + j];
      CHECK((std::isnan(got) && std::isnan(number)) || got == number);
    }
  }
}

void kept_as_it_is() {
  const std::vector<uint16_t> stored{0x8000, 0x3f80, 0x7fc1, 0x0001};  // -0, 1, NaN, subnormal
  std::vector<uint16_t> out(4);
  const Decoding decoding{&row_code("bfloat16"), {}, Element::kBFloat16, 2, {}};
  CHECK(decoding.in_place());
  CHECK(decode_rows(decoding, 0, 2, reinterpret_cast<const std::byte*>(stored.data()),
                    reinterpret_cast<std::byte*>(out.data())));
  CHECK(out == stored);
}

}  // namespace

int main() {
  all_numbers_of_a_byte();
  small_numbers();
  scales_and_patches();
  kept_as_it_is();
  check_numbers<cuda::PlainFloat32>("float32");
  check_numbers<cuda::PlainFloat16>("float16");
  check_numbers<cuda::PlainBFloat16>("bfloat16");
  check_numbers<Float8E4M3FN>("float8_e4m3fn");
  check_numbers<Float8E5M2>("float8_e5m2");
  check_numbers<Int8>("int8");
  check_numbers<UInt8>("uint8");
}
