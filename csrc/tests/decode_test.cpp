// SPDX-License-Identifier: Apache-2.0
// Stored rows to the rows of a weight: every code, with scales and patches, against plain loops.
#include "core/decode.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/block_types_packed.h"
#include "core/error.h"
#include "core/half.h"
#include "core/interleave.h"
#include "core/rotation.h"
#include "cuda/numbers_run.h"
#include "cuda/rotation_run.h"
#include "tests/check.h"

using namespace distorch;

namespace {

float value_of(const char* code, uint8_t bits) {
  float value = 0;
  const auto byte = static_cast<std::byte>(bits);
  row_code(code).to_float(&byte, 1, nullptr, &value);
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
      row_code("float8_e4m3fn").to_float(&stored[i * kColumns + j], 1, nullptr, &number);
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

// The sign of a Hadamard matrix of any power of 4: -1 for each pair of base-4 digits that are
// opposite.
int hadamard(int row, int column) {
  int sign = 1;
  for (; row > 0 || column > 0; row /= 4, column /= 4) {
    if (row % 4 + column % 4 == 3) sign = -sign;
  }
  return sign;
}

int digits_of(int64_t group) { return group == 1 ? 0 : 1 + digits_of(group / 4); }

void turned_back() {
  std::mt19937 random(9);
  for (const int64_t group : {4, 16, 64, 256, 1024, 4096}) {
    CHECK(is_rotation(group));
    CHECK(rotation_scale(group) == std::ldexp(1.0f, -digits_of(group)));
    std::vector<float> numbers(2 * group);
    for (float& number : numbers)
      number = static_cast<float>(static_cast<int>(random() % 255) - 127);
    std::vector<float> turned = numbers;
    rotate_back(turned.data(), 2 * group, group);
    for (int64_t i = 0; i < 2 * group; ++i) {
      double sum = 0;  // of integers: exact
      for (int64_t k = 0; k < group; ++k) {
        sum += hadamard(static_cast<int>(i % group), static_cast<int>(k)) *
               static_cast<double>(numbers[i / group * group + k]);
      }
      CHECK(turned[i] == sum * rotation_scale(group));
    }
    rotate_back(turned.data(), 2 * group, group);
    for (int64_t i = 0; i < 2 * group; ++i) CHECK(std::fabs(turned[i] - numbers[i]) < 1e-3f);
  }
  for (const int64_t group : {INT64_MIN, int64_t{-4}, int64_t{0}, int64_t{1}, int64_t{2},
                              int64_t{8}, int64_t{12}, int64_t{255}, int64_t{16384}, INT64_MAX}) {
    CHECK(!is_rotation(group));
  }
}

// The body of the CUDA kernel, thread by thread and stage by stage.
void turned_back_on_a_gpu() {
  std::mt19937 random(10);
  std::normal_distribution<float> normal;
  for (const int64_t group : {4, 16, 64, 256, 1024, 4096}) {
    const int64_t held = cuda::groups_at_once(group) * group;
    CHECK(held % group == 0 && held / 4 <= 1024);
    std::vector<float> wanted(held);
    for (float& number : wanted) number = normal(random);
    std::vector<float> got = wanted;
    rotate_back(wanted.data(), held, group);
    for (int apart = 1; apart < group; apart *= 4) {
      for (int thread = 0; thread < held / 4; ++thread) {
        cuda::turn_stage(got.data(), thread, apart);
      }
    }
    for (float& number : got) number *= rotation_scale(group);
    CHECK(got == wanted);
  }
}

// [rows, columns] of random blocks with scales per row, turned, and with a patch: against plain
// loops, whole and in parts. Types: what is scaled before it is turned, and what after.
void turned_rows() {
  constexpr int64_t kRows = 101, kColumns = 128, kGroup = 64;
  std::mt19937 random(12);
  std::normal_distribution<float> normal;
  const std::vector<float> levels{-0.98f, -0.79f, -0.64f, -0.5f, -0.38f, -0.26f, -0.16f, -0.05f,
                                  0.05f,  0.16f,  0.27f,  0.38f, 0.5f,   0.64f,  0.79f,  0.98f};
  std::vector<float> scales(kRows), up(kRows), down(kColumns);
  for (auto* numbers : {&scales, &up, &down}) {
    for (float& number : *numbers) number = normal(random);
  }
  const LowRank term{up.data(), down.data(), 1, 0.5f, 0, kRows};
  for (const char* name : {"int8", "I4x16", "W4x16", "W6x16"}) {
    const RowCode& code = row_code(name);
    std::vector<std::byte> stored(kRows * code.bytes_of(kColumns));
    for (std::byte& byte : stored) byte = static_cast<std::byte>(random());
    for (const Element out : {Element::kFloat32, Element::kFloat16, Element::kBFloat16}) {
      for (const bool patched : {false, true}) {
        const std::span<const LowRank> terms(&term, patched ? 1 : 0);
        const Decoding decoding{&code, {scales.data(), 1, kColumns, 1},          out,   kColumns,
                                terms, code.table > 0 ? levels.data() : nullptr, kGroup};
        const int64_t row_bytes = decoding.decoded_row();
        std::vector<std::byte> whole(kRows * row_bytes), parts(whole.size());
        CHECK(!decoding.in_place() && !decoding.code_alone());
        CHECK(decode_rows(decoding, 0, kRows, stored.data(), whole.data()));
        for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, 50}, {50, 51}, {51, kRows}}) {
          CHECK(decode_rows(decoding, begin, end, stored.data() + begin * decoding.stored_row(),
                            parts.data() + begin * row_bytes));
        }
        CHECK(whole == parts);
        for (int64_t i = 0; i < kRows; ++i) {
          std::vector<float> row(kColumns);
          code.to_float(stored.data() + i * decoding.stored_row(), kColumns, levels.data(),
                        row.data());
          const bool scaled_first = code.scaled_before_rotation;
          for (float& number : row) {
            if (scaled_first)
              number = rounded_to(patched ? Element::kFloat32 : out, number * scales[i]);
          }
          rotate_back(row.data(), kColumns, kGroup);
          for (float& number : row) {
            if (!scaled_first) number *= scales[i];
          }
          std::vector<std::byte> wanted(row_bytes);
          const LowRank of_row{up.data() + i, down.data(), 1, 0.5f, 0, 1};
          CHECK(merge_rows(Element::kFloat32, row.data(), out, wanted.data(), 0, 1, kColumns,
                           {&of_row, terms.size()}));
          CHECK(std::memcmp(wanted.data(), whole.data() + i * row_bytes, row_bytes) == 0);
        }
      }
    }
  }
}

// Each packed type by what its format says, number by number.
void packed_blocks() {
  const float levels[16] = {-1.0f, -0.8f, -0.6f, -0.5f, -0.4f, -0.3f, -0.2f, -0.1f,
                            0.1f,  0.2f,  0.3f,  0.4f,  0.5f,  0.6f,  0.8f,  1.0f};
  const float e2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  std::mt19937 random(14);
  std::array<std::byte, 33> block;
  const auto byte = [&](int i) { return std::to_integer<int>(block[i]); };
  const auto half = [&](int first, int i) { return byte(first + i / 2) >> 4 * (i % 2) & 15; };
  const auto number_of = [&](const char* name, int i) {
    float numbers[32];
    row_code(name).to_float(block.data(), row_code(name).elements, levels, numbers);
    return numbers[i];
  };
  for (int trial = 0; trial < 2000; ++trial) {
    for (std::byte& some : block) some = static_cast<std::byte>(random());
    const bool no_number = (byte(0) & 0x7f) == 0x7f;
    const float scale = no_number ? NAN : float8(byte(0), 3, 7);
    const auto on_grid = [&](float number) {
      return no_number ? 0.0f : std::nearbyint(std::clamp(number, -127.0f, 127.0f)) + 0.0f;
    };
    for (int i = 0; i < 16; ++i) {
      const int high_first = half(1, i ^ 1);
      const float digit = (high_first & 8) != 0 ? -e2m1[high_first & 7] : e2m1[high_first & 7];
      CHECK(same(number_of("FP4x16", i), digit * (levels[0] * scale)));
      CHECK(number_of("W4x16", i) == on_grid(levels[half(1, i)] * scale));
      const int six = half(1, i) | (byte(9 + i / 4) >> 2 * (i % 4) & 3) << 4;
      CHECK(number_of("W6x16", i) == on_grid(static_cast<float>(six - 32) * scale));
      const int four = half(0, i);
      CHECK(number_of("I4x16", i) == static_cast<float>(four < 8 ? four : four - 16));
    }
    const float power = byte(0) == 0 ? 0.0f : std::ldexp(1.0f, byte(0) - 127);
    for (int i = 0; i < 32; ++i) {
      const bool is_nan = (byte(1 + i) & 0x7f) == 0x7f;
      const float digit = is_nan ? NAN : float8(byte(1 + i), 3, 7);
      CHECK(same(number_of("FP8x32", i), power * digit));
    }
  }
}

void parts_of_blocks() {
  constexpr int64_t kRows = 5, kBlocks = 7;
  std::mt19937 random(15);
  for (const std::vector<int64_t>& sizes :
       std::vector<std::vector<int64_t>>{{1}, {1, 8}, {1, 32}, {1, 8, 4}, {1, 5, 2}}) {
    int64_t block = 0;
    std::vector<std::vector<uint8_t>> bytes;
    std::vector<Part> parts;
    for (const int64_t size : sizes) {
      auto& part = bytes.emplace_back(kRows * kBlocks * size);
      for (uint8_t& byte : part) byte = static_cast<uint8_t>(random());
      parts.push_back({part.data(), size});
      block += size;
    }
    constexpr int64_t kBegin = 2, kEnd = 5;
    std::vector<uint8_t> into((kEnd - kBegin) * kBlocks * block);
    interleave_rows(parts, kBlocks, kBegin, kEnd, into.data());
    auto next = into.begin();
    for (int64_t i = kBegin * kBlocks; i < kEnd * kBlocks; ++i) {
      for (const Part& part : parts) {
        for (int64_t j = 0; j < part.bytes; ++j) CHECK(*next++ == part.data[i * part.bytes + j]);
      }
    }
    CHECK(next == into.end());
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
  turned_back();
  turned_back_on_a_gpu();
  turned_rows();
  packed_blocks();
  parts_of_blocks();
  check_numbers<cuda::PlainFloat32>("float32");
  check_numbers<cuda::PlainFloat16>("float16");
  check_numbers<cuda::PlainBFloat16>("bfloat16");
  check_numbers<Float8E4M3FN>("float8_e4m3fn");
  check_numbers<Float8E5M2>("float8_e5m2");
  check_numbers<Int8>("int8");
  check_numbers<UInt8>("uint8");
}
