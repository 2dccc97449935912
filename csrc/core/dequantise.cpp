// SPDX-License-Identifier: Apache-2.0
#include "core/dequantise.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

// DISTORCH_ONE_PATH: without paths for vectors, which take a minute to compile.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(DISTORCH_ONE_PATH)
#include <immintrin.h>
#define DISTORCH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c")))
#define DISTORCH_AVX2 __attribute__((target("avx2,f16c")))
#define DISTORCH_WIDTHS 1
#endif
#define DISTORCH_INLINE inline __attribute__((always_inline))

// Everything below: loops become vectors at this level only, and a product is
// rounded before it is added to (see Note [A block's description]).
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__SANITIZE_ADDRESS__) || defined(DISTORCH_ONE_PATH)
#pragma GCC optimize("fp-contract=off")  // a minute or more of compiling otherwise
#else
#pragma GCC optimize("O3", "fp-contract=off")
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#include "core/block_list.h"
#include "core/half.h"
#include "core/processor.h"

namespace distorch {
namespace {

using Decode = void (*)(BlockType, const uint8_t*, int64_t, const float*, float*);
using Round = void (*)(const float*, int64_t, Element, uint16_t*);

// What a processor computes with. kRounds: it has an instruction that rounds to
// that type. In two steps: any block, whatever its numbers are.
struct Plain {
  static constexpr int kLanes = 1;
  static const Round kRound;
};

struct Avx2 {
  static constexpr int kLanes = 8;
  template <Element kOut>
  static constexpr bool kRounds = kOut == Element::kFloat16;
  static const Decode kDecode;
  static const Round kRound;
};

struct Avx512 {
  static constexpr int kLanes = 16;
  template <Element kOut>
  static constexpr bool kRounds = kOut == Element::kFloat16;
  static const Decode kDecode;
  static const Round kRound;
};

struct Avx512Bfloat16 : Avx512 {
  template <Element>
  static constexpr bool kRounds = true;
};

constexpr int kMostElements = 256;  // of a block

template <Element kOut>
using Stored = std::conditional_t<kOut == Element::kFloat32, float, uint16_t>;

template <Element kOut>
DISTORCH_INLINE Stored<kOut> rounded(float number) {
  if constexpr (kOut == Element::kFloat32) return number;
  if constexpr (kOut == Element::kFloat16) return to_float16(number);
  if constexpr (kOut == Element::kBFloat16) return to_bfloat16(number);
}

// Where vectors go. Streamed: past the caches, whole aligned vectors.
template <bool kStreamed, class Vector>
DISTORCH_INLINE void store(const Vector& numbers, void* into) {
#if defined(DISTORCH_WIDTHS) && defined(__clang__)
  if constexpr (kStreamed) {
    __builtin_nontemporal_store(numbers, reinterpret_cast<Vector*>(into));
    return;
  }
#elif defined(DISTORCH_WIDTHS)
  if constexpr (kStreamed) {
    // GCC has this only as intrinsics, which cannot be inlined into a template.
    struct Bytes {
      std::byte bytes[sizeof(Vector)];
    };
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<Bytes*>(into)) : "v"(numbers));
    return;
  }
#endif
  std::memcpy(into, &numbers, sizeof(numbers));
}

// REQUIRES: numbers are neither NaN nor subnormal.
template <class Level, Element kOut, class Floats>
DISTORCH_INLINE auto round_ordinary(const Floats& numbers) {
  constexpr int kCount = kLanesOf<Floats>;
  using Halves = typename VectorOf<uint16_t, kCount>::Type;
  if constexpr (kOut == Element::kFloat32) {
    return numbers;
  } else if constexpr (!Level::template kRounds<kOut>) {
    static_assert(kOut == Element::kBFloat16);
    using Words = typename VectorOf<uint32_t, kCount>::Type;
    const auto bits = (Words)numbers;
    return __builtin_convertvector((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, Halves);
  } else {
    Halves halves;
#if defined(DISTORCH_WIDTHS) && defined(__clang__)
    static_assert(kOut == Element::kFloat16);
    using Float16s = typename VectorOf<_Float16, kCount>::Type;
    const Float16s converted = __builtin_convertvector(numbers, Float16s);
    std::memcpy(&halves, &converted, sizeof(halves));
#elif defined(DISTORCH_WIDTHS)
    if constexpr (kOut == Element::kFloat16) {
      asm("vcvtps2ph $0, %1, %0" : "=v"(halves) : "v"(numbers));
    } else {
      asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(numbers));
    }
#endif
    return halves;
  }
}

template <class Type, class Level, Element kOut, bool kStreamed>
DISTORCH_INLINE void decode_group(const uint8_t* block, int g, const float* table,
                                  Stored<kOut>* __restrict into) {
  const auto group = blocks::open_group<Type>(block, g, table);
  constexpr int kStep = std::min(Level::kLanes, Type::kGroup);
  into += g * Type::kGroup;
  if constexpr (Level::kLanes == 1) {  // the description as it is
    for (int i = 0; i < Type::kGroup; ++i) into[i] = rounded<kOut>(Type::number(group, i));
  } else {
    using Vector = typename VectorOf<float, kStep>::Type;
    Vector numbers[Type::kGroup / kStep];
#pragma GCC unroll 8
    for (int i = 0; i < Type::kGroup; i += kStep) {
      numbers[i / kStep] = Type::number(group, Places<kStep>{i});
    }
#pragma GCC unroll 8
    for (int i = 0; i < Type::kGroup; i += kStep) {
      store<kStreamed>(round_ordinary<Level, kOut>(numbers[i / kStep]), into + i);
    }
  }
}

// Note [Ordinary blocks]
// Instructions that round keep a NaN's payload, and vcvtneps2bf16 takes
// subnormals for zero; half.h does neither, and all paths agree. Most blocks
// have no such numbers, which their scales tell (Type::ordinary); the others go
// through float32 in memory.
template <class Level, Element kOut>
[[gnu::noinline, gnu::cold]] void decode_in_two_steps(BlockType type, const uint8_t* from,
                                                      int64_t elements, const float* table,
                                                      Stored<kOut>* into) {
  alignas(64) float numbers[kMostElements];
  Level::kDecode(type, from, 1, table, numbers);
  Level::kRound(numbers, elements, kOut, into);
}

template <class Type, class Level, Element kOut, bool kStreamed>
DISTORCH_INLINE void decode_ordinary(const uint8_t* __restrict from, int64_t blocks,
                                     const float* table, Stored<kOut>* __restrict into) {
  // A copy, which the numbers written cannot be: what groups share is computed once.
  uint8_t bytes[Type::kBytes];
  for (int64_t block = 0; block < blocks; ++block) {
    std::memcpy(bytes, from, Type::kBytes);
#pragma GCC unroll 16
    for (int g = 0; g < Type::kElements / Type::kGroup; ++g) {
      decode_group<Type, Level, kOut, kStreamed>(bytes, g, table, into);
    }
    from += Type::kBytes;
    into += Type::kElements;
  }
}

template <class Type, class Level, Element kOut, bool kStreamed>
DISTORCH_INLINE void decode(BlockType type, const uint8_t* from, int64_t blocks, const float* table,
                            Stored<kOut>* into) {
  static_assert(Type::kElements <= kMostElements);
  if constexpr (Level::kLanes == 1 || kOut == Element::kFloat32) {
    decode_ordinary<Type, Level, kOut, kStreamed>(from, blocks, table, into);
  } else {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block;
      while (block < blocks && blocks::is_ordinary<Type>(from + block * Type::kBytes, table))
        ++block;
      decode_ordinary<Type, Level, kOut, kStreamed>(from + first * Type::kBytes, block - first,
                                                    table, into + first * Type::kElements);
      if (block == blocks) return;
      decode_in_two_steps<Level, kOut>(type, from + block * Type::kBytes, Type::kElements, table,
                                       into + block * Type::kElements);
    }
  }
}

// --- types that are numbers already ---

// float32 numbers on the way to 16 bits: they stay in the first cache.
constexpr int64_t kTile = 2048;

DISTORCH_INLINE void widen(BlockType type, const uint8_t* __restrict from, int64_t count,
                           float* __restrict into) {
  if (type == BlockType::kF32) {
    std::memcpy(into, from, static_cast<size_t>(count) * sizeof(float));
  } else if (type == BlockType::kF16) {
    for (int64_t i = 0; i < count; ++i) into[i] = half_at(from + 2 * i);
  } else {
    for (int64_t i = 0; i < count; ++i) into[i] = as_float(load16(from + 2 * i) << 16);
  }
}

template <int kLanes>
DISTORCH_INLINE void stream_bfloat16(const uint8_t* __restrict from, int64_t count,
                                     float* __restrict into) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    typename VectorOf<uint16_t, kLanes>::Type halves;
    std::memcpy(&halves, from + 2 * i, sizeof(halves));
    const auto bits = __builtin_convertvector(halves, Ints<kLanes>) << 16;
    store<true>(bits, into + i);
  }
  widen(BlockType::kBF16, from + 2 * i, count - i, into + i);
}

DISTORCH_INLINE void round_plain(const float* __restrict from, int64_t count, Element type,
                                 uint16_t* __restrict into) {
  if (type == Element::kFloat16) {
    for (int64_t i = 0; i < count; ++i) into[i] = to_float16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) into[i] = to_bfloat16(from[i]);
  }
}

#ifdef DISTORCH_WIDTHS
// Instructions keep a NaN's payload; to_float16 does not, and all paths agree.
DISTORCH_AVX512 void round_avx512(const float* from, int64_t count, Element type, uint16_t* into) {
  int64_t i = 0;
  for (; type == Element::kFloat16 && i + 16 <= count; i += 16) {
    const __m512 numbers = _mm512_loadu_ps(from + i);
    const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, numbers, _MM_FROUND_TO_NEAREST_INT);
    const __mmask16 nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
    const __m256i sign = _mm256_and_si256(halves, _mm256_set1_epi16(INT16_MIN));
    const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi16(0x7e00));
    auto* target = reinterpret_cast<__m256i*>(into + i);
    _mm256_storeu_si256(target, _mm256_mask_blend_epi16(nan, halves, quiet));
  }
  round_plain(from + i, count - i, type, into + i);
}

DISTORCH_AVX2 void round_avx2(const float* from, int64_t count, Element type, uint16_t* into) {
  int64_t i = 0;
  for (; type == Element::kFloat16 && i + 8 <= count; i += 8) {
    const __m256 numbers = _mm256_loadu_ps(from + i);
    const __m128i halves = _mm256_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT);
    const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q));
    const __m128i nan =
        _mm_packs_epi32(_mm256_castsi256_si128(unordered), _mm256_extracti128_si256(unordered, 1));
    const __m128i sign = _mm_and_si128(halves, _mm_set1_epi16(INT16_MIN));
    const __m128i quiet = _mm_or_si128(sign, _mm_set1_epi16(0x7e00));
    auto* target = reinterpret_cast<__m128i*>(into + i);
    _mm_storeu_si128(target, _mm_blendv_epi8(halves, quiet, nan));
  }
  round_plain(from + i, count - i, type, into + i);
}
#endif

DISTORCH_INLINE void convert(Round round, BlockType type, const uint8_t* from, int64_t count,
                             Element out_type, uint16_t* into) {
  const int64_t bytes = block_info(type).bytes;
  alignas(64) float tile[kTile];
  for (int64_t first = 0; first < count; first += kTile) {
    const int64_t here = std::min(kTile, count - first);
    widen(type, from + first * bytes, here, tile);
    round(tile, here, out_type, into + first);
  }
}

// --- both ---

template <class Level, Element kOut, bool kStreamed>
DISTORCH_INLINE void decode_any(BlockType type, const uint8_t* from, int64_t blocks,
                                const float* table, Stored<kOut>* into) {
  switch (type) {
    case BlockType::kF32:
    case BlockType::kF16:
    case BlockType::kBF16:
      if constexpr (kOut != Element::kFloat32) {
        convert(Level::kRound, type, from, blocks, kOut, into);
      } else if (kStreamed && type == BlockType::kBF16) {
        stream_bfloat16<Level::kLanes>(from, blocks, into);
      } else {
        widen(type, from, blocks, into);
      }
      return;
#define DISTORCH_DECODE(name) \
  case BlockType::k##name:    \
    return decode<blocks::name, Level, kOut, kStreamed>(type, from, blocks, table, into);
      DISTORCH_BLOCK_TYPES(DISTORCH_DECODE)
#undef DISTORCH_DECODE
  }
}

void stream_fence() {
#ifdef DISTORCH_WIDTHS
  _mm_sfence();
#endif
}

// Types that need no rounding: their bits are the result.
bool is_copy(BlockType type, Element out_type) {
  return (type == BlockType::kF32 && out_type == Element::kFloat32) ||
         (type == BlockType::kF16 && out_type == Element::kFloat16) ||
         (type == BlockType::kBF16 && out_type == Element::kBFloat16);
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 64 == 0; }

template <class Level, Element kOut>
DISTORCH_INLINE void dequantise_to(BlockType type, const void* from, int64_t blocks, void* into,
                                   Stores stores, const float* table) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  auto* numbers = static_cast<Stored<kOut>*>(into);
  if (is_copy(type, kOut)) {
    if (blocks > 0) std::memcpy(into, from, static_cast<size_t>(blocks * block_info(type).bytes));
  } else if (Level::kLanes > 1 && stores == Stores::kStreamed && is_aligned(into)) {
    decode_any<Level, kOut, (Level::kLanes > 1)>(type, bytes, blocks, table, numbers);
    stream_fence();
  } else if constexpr (Level::kLanes > 1 && kOut == Element::kFloat32) {
    Level::kDecode(type, bytes, blocks, table, numbers);
  } else {
    decode_any<Level, kOut, false>(type, bytes, blocks, table, numbers);
  }
}

template <class Level>
DISTORCH_INLINE void dequantise_at(BlockType type, const void* from, int64_t blocks,
                                   Element out_type, void* into, Stores stores,
                                   const float* table) {
  switch (out_type) {
    case Element::kFloat32:
      return dequantise_to<Level, Element::kFloat32>(type, from, blocks, into, stores, table);
    case Element::kFloat16:
      return dequantise_to<Level, Element::kFloat16>(type, from, blocks, into, stores, table);
    case Element::kBFloat16:
      return dequantise_to<Level, Element::kBFloat16>(type, from, blocks, into, stores, table);
  }
}

const Round Plain::kRound = round_plain;

#ifdef DISTORCH_WIDTHS
const Round Avx2::kRound = round_avx2;
const Round Avx512::kRound = round_avx512;

DISTORCH_AVX512 void decode_avx512(BlockType type, const uint8_t* from, int64_t blocks,
                                   const float* table, float* into) {
  decode_any<Avx512, Element::kFloat32, false>(type, from, blocks, table, into);
}
const Decode Avx512::kDecode = decode_avx512;

DISTORCH_AVX2 void decode_avx2(BlockType type, const uint8_t* from, int64_t blocks,
                               const float* table, float* into) {
  decode_any<Avx2, Element::kFloat32, false>(type, from, blocks, table, into);
}
const Decode Avx2::kDecode = decode_avx2;

#ifndef __clang__  // which lets no such instruction be inlined from a template
DISTORCH_AVX512 void dequantise_avx512_bf16(BlockType type, const void* from, int64_t blocks,
                                            Element out_type, void* into, Stores stores,
                                            const float* table) {
  dequantise_at<Avx512Bfloat16>(type, from, blocks, out_type, into, stores, table);
}
#endif

DISTORCH_AVX512 void dequantise_avx512(BlockType type, const void* from, int64_t blocks,
                                       Element out_type, void* into, Stores stores,
                                       const float* table) {
  dequantise_at<Avx512>(type, from, blocks, out_type, into, stores, table);
}

DISTORCH_AVX2 void dequantise_avx2(BlockType type, const void* from, int64_t blocks,
                                   Element out_type, void* into, Stores stores,
                                   const float* table) {
  dequantise_at<Avx2>(type, from, blocks, out_type, into, stores, table);
}

#endif

void dequantise_plain(BlockType type, const void* from, int64_t blocks, Element out_type,
                      void* into, Stores stores, const float* table) {
  dequantise_at<Plain>(type, from, blocks, out_type, into, stores, table);
}

}  // namespace

std::vector<DequantisePath> dequantise_paths() {
  std::vector<DequantisePath> found{{"plain", dequantise_plain}};
#ifdef DISTORCH_WIDTHS
  if (has_avx2()) found.push_back({"avx2", dequantise_avx2});
  if (has_avx512()) found.push_back({"avx512", dequantise_avx512});
#ifndef __clang__
  if (has_avx512() && __builtin_cpu_supports("avx512bf16")) {
    found.push_back({"avx512 bfloat16", dequantise_avx512_bf16});
  }
#endif
#endif
  return found;
}

void dequantise(BlockType type, const void* from, int64_t blocks, Element out_type, void* into,
                Stores stores, const float* table) {
  static const auto chosen = dequantise_paths().back().run;
  chosen(type, from, blocks, out_type, into, stores, table);
}

}  // namespace distorch
