// SPDX-License-Identifier: Apache-2.0
// Every path of the decoder against the description it is made from, number by
// number, over random bytes at odd addresses.
#include "core/dequantise.h"

#include <cmath>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "core/block_list.h"
#include "core/half.h"
#include "cuda/dequantise_run.h"
#include "tests/check.h"

using namespace distorch;

namespace {

// What types with a table are tried with: a factor, or levels.
constexpr float table[16] = {0.37f, -0.98f, -0.79f, 0.64f, -0.5f, 0.38f, -0.26f, 0.0f,
                             0.16f, -0.05f, 0.27f,  0.5f,  0.64f, 0.79f, 0.98f,  -1.0f};

template <class Type>
float described(const uint8_t* bytes, int64_t number) {
  const uint8_t* block = bytes + number / Type::kElements * Type::kBytes;
  const int at = static_cast<int>(number % Type::kElements);
  return Type::number(blocks::open_group<Type>(block, at / Type::kGroup, table), at % Type::kGroup);
}

float described(BlockType type, const uint8_t* bytes, int64_t number) {
  switch (type) {
    case BlockType::kF32:
      return as_float(load32(bytes + 4 * number));
    case BlockType::kF16:
      return from_float16(static_cast<uint16_t>(load16(bytes + 2 * number)));
    case BlockType::kBF16:
      return from_bfloat16(static_cast<uint16_t>(load16(bytes + 2 * number)));
#define DISTORCH_CASE(name) \
  case BlockType::k##name:  \
    return described<blocks::name>(bytes, number);
      DISTORCH_BLOCK_TYPES(DISTORCH_CASE)
#undef DISTORCH_CASE
  }
  return 0;
}

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

// Memory that starts a cache line: vectors are streamed to no other.
template <class Number>
struct OnALine {
  using value_type = Number;
  static constexpr std::align_val_t kLine{64};
  Number* allocate(size_t count) {
    return static_cast<Number*>(::operator new(count * sizeof(Number), kLine));
  }
  void deallocate(Number* at, size_t) { ::operator delete(at, kLine); }
  bool operator==(const OnALine&) const = default;
};

void check_path(const DequantisePath& path, BlockType type, int64_t blocks, Stores stores,
                std::mt19937_64& random) {
  const BlockInfo& info = block_info(type);
  // Of exactly the size, so that the sanitizers see a step too far.
  std::vector<uint8_t> bytes(static_cast<size_t>(blocks * info.bytes + 1));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  const auto count = static_cast<size_t>(blocks * info.elements);
  std::vector<float, OnALine<float>> full(count);
  std::vector<uint16_t> half(count), brain(count);
  const uint8_t* from = bytes.data() + 1;
  path.run(type, from, blocks, Element::kFloat32, full.data(), stores, table);
  path.run(type, from, blocks, Element::kFloat16, half.data(), stores, table);
  path.run(type, from, blocks, Element::kBFloat16, brain.data(), stores, table);
  for (size_t i = 0; i < count; ++i) {
    const float wanted = described(type, from, static_cast<int64_t>(i));
    CHECK(same(full[i], wanted));
    CHECK(same(from_float16(half[i]), from_float16(to_float16(wanted))));
    CHECK(same(from_bfloat16(brain[i]), from_bfloat16(to_bfloat16(wanted))));
  }
}

// The body of the CUDA kernel, thread by thread.
template <class Type>
void check_runs(BlockType type, std::mt19937_64& random) {
  constexpr int64_t kBlocks = 9, kRuns = kBlocks * Type::kElements / cuda::kRun;
  std::vector<uint8_t> bytes(kBlocks * Type::kBytes);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  std::vector<float> wanted(kBlocks * Type::kElements);
  dequantise(type, bytes.data(), kBlocks, Element::kFloat32, wanted.data(), Stores::kCached, table);
  for (int64_t run = 0; run < kRuns; ++run) {
    float numbers[cuda::kRun];
    cuda::decode_run<Type>(bytes.data(), run, table, numbers);
    for (int i = 0; i < cuda::kRun; ++i) CHECK(same(numbers[i], wanted[run * cuda::kRun + i]));
  }
}

// What blocks say about themselves: see Note [Ordinary blocks].
template <class Type>
void check_ordinary(std::mt19937_64& random) {
  constexpr int kBlocks = 400;
  uint8_t block[Type::kBytes];
  int ordinary = 0;
  for (int i = 0; i < kBlocks; ++i) {
    for (uint8_t& byte : block) byte = static_cast<uint8_t>(random());
    if (!blocks::is_ordinary<Type>(block, table)) continue;
    ++ordinary;
    for (int k = 0; k < Type::kElements; ++k) {
      const float magnitude = std::fabs(described<Type>(block, k));
      CHECK(magnitude == 0 || (magnitude >= 0x1p-100f && magnitude <= 0x1p100f));
    }
  }
  CHECK(ordinary > kBlocks / 2);
}

void lookups() {
  for (const BlockType type : block_types()) {
    CHECK(block_type_named(block_info(type).name) == type);
  }
  CHECK(!block_type_named("Q4_9") && !block_type_named(""));
}

}  // namespace

int main() {
  lookups();
  std::mt19937_64 random(6);
#define DISTORCH_CHECK(name)                            \
  check_runs<blocks::name>(BlockType::k##name, random); \
  check_ordinary<blocks::name>(random);
  DISTORCH_BLOCK_TYPES(DISTORCH_CHECK)
#undef DISTORCH_CHECK
  for (const DequantisePath& path : dequantise_paths()) {
    for (const BlockType type : block_types()) {
      for (const int64_t blocks : {0, 1, 3, 70}) {
        for (const Stores stores : {Stores::kCached, Stores::kStreamed}) {
          check_path(path, type, blocks, stores, random);
        }
      }
    }
  }
}
