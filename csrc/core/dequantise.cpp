#include "core/dequantise.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
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
#elif defined(__SANITIZE_ADDRESS__)
#pragma GCC optimize("fp-contract=off")  // minutes of compiling otherwise
#else
#pragma GCC optimize("O3", "fp-contract=off")
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#include "core/block_list.h"
#include "core/half.h"

namespace distorch {
namespace {

// float32 numbers on the way to 16 bits: they stay in the first cache.
constexpr int64_t kTile = 2048;

// Where vectors of numbers go. Streamed: past the caches, whole aligned vectors.
template <bool kStreamed, class Vector>
DISTORCH_INLINE void store(const Vector& numbers, float* into) {
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

// kLanes numbers at once; 1: the description as it is.
template <class Type, int kLanes, bool kStreamed>
DISTORCH_INLINE void decode_group(const uint8_t* block, int g, float* __restrict into) {
  const auto group = Type::open(block, g);
  constexpr int kStep = std::min(kLanes, Type::kGroup);
  if constexpr (kLanes == 1) {
    for (int i = 0; i < Type::kGroup; ++i) into[g * Type::kGroup + i] = Type::number(group, i);
  } else {
    using Vector = typename VectorOf<float, kStep>::Type;
    Vector numbers[Type::kGroup / kStep];
#pragma GCC unroll 8
    for (int i = 0; i < Type::kGroup; i += kStep) {
      numbers[i / kStep] = Type::number(group, Places<kStep>{i});
    }
#pragma GCC unroll 8
    for (int i = 0; i < Type::kGroup; i += kStep) {
      store<kStreamed>(numbers[i / kStep], into + g * Type::kGroup + i);
    }
  }
}

template <class Type, int kLanes, bool kStreamed>
DISTORCH_INLINE void decode(const uint8_t* __restrict from, int64_t blocks,
                            float* __restrict into) {
  // A copy, which the numbers written cannot be: what groups share is computed once.
  uint8_t bytes[Type::kBytes];
  for (int64_t block = 0; block < blocks; ++block) {
    std::memcpy(bytes, from, Type::kBytes);
#pragma GCC unroll 16
    for (int g = 0; g < Type::kElements / Type::kGroup; ++g) {
      decode_group<Type, kLanes, kStreamed>(bytes, g, into);
    }
    from += Type::kBytes;
    into += Type::kElements;
  }
}

DISTORCH_INLINE void decode_float16(const uint8_t* __restrict from, int64_t count,
                                    float* __restrict into) {
  for (int64_t i = 0; i < count; ++i) into[i] = half_at(from + 2 * i);
}

template <int kLanes, bool kStreamed>
DISTORCH_INLINE void decode_bfloat16(const uint8_t* __restrict from, int64_t count,
                                     float* __restrict into) {
  int64_t i = 0;
  if constexpr (kStreamed) {
    for (; i + kLanes <= count; i += kLanes) {
      typename VectorOf<uint16_t, kLanes>::Type halves;
      std::memcpy(&halves, from + 2 * i, sizeof(halves));
      const auto bits = __builtin_convertvector(halves, Ints<kLanes>) << 16;
      store<kStreamed>(bits, into + i);
    }
  }
  for (; i < count; ++i) into[i] = as_float(load16(from + 2 * i) << 16);
}

template <int kLanes, bool kStreamed = false>
DISTORCH_INLINE void decode_any(BlockType type, const uint8_t* from, int64_t blocks, float* into) {
  switch (type) {
    case BlockType::kF32:
      std::memcpy(into, from, static_cast<size_t>(blocks) * sizeof(float));
      return;
    case BlockType::kF16:
      return decode_float16(from, blocks, into);
    case BlockType::kBF16:
      return decode_bfloat16<kLanes, kStreamed>(from, blocks, into);
#define DISTORCH_DECODE(name) \
  case BlockType::k##name:    \
    return decode<blocks::name, kLanes, kStreamed>(from, blocks, into);
      DISTORCH_BLOCK_TYPES(DISTORCH_DECODE)
#undef DISTORCH_DECODE
  }
}

// --- float32 to 16 bits ---

DISTORCH_INLINE void round_plain(const float* __restrict from, int64_t count, Element type,
                                 uint16_t* __restrict into) {
  if (type == Element::kFloat16) {
    for (int64_t i = 0; i < count; ++i) into[i] = to_float16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) into[i] = to_bfloat16(from[i]);
  }
}

void stream_fence() {
#ifdef DISTORCH_WIDTHS
  _mm_sfence();
#endif
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

// --- both ---

// Types that need no rounding: their bits are the result.
bool is_copy(BlockType type, Element out_type) {
  return (type == BlockType::kF32 && out_type == Element::kFloat32) ||
         (type == BlockType::kF16 && out_type == Element::kFloat16) ||
         (type == BlockType::kBF16 && out_type == Element::kBFloat16);
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 64 == 0; }

using Round = void (*)(const float*, int64_t, Element, uint16_t*);

template <int kLanes>
DISTORCH_INLINE void dequantise_tiles(Round round, BlockType type, const void* from, int64_t blocks,
                                      Element out_type, void* into, Stores stores) {
  const BlockInfo& info = block_info(type);
  const auto* bytes = static_cast<const uint8_t*>(from);
  if (is_copy(type, out_type)) {
    if (blocks > 0) std::memcpy(into, from, static_cast<size_t>(blocks * info.bytes));
    return;
  }
  if (out_type == Element::kFloat32) {
    auto* numbers = static_cast<float*>(into);
    if (kLanes > 1 && stores == Stores::kStreamed && is_aligned(into)) {
      decode_any<kLanes, (kLanes > 1)>(type, bytes, blocks, numbers);
      stream_fence();
      return;
    }
    return decode_any<kLanes>(type, bytes, blocks, numbers);
  }
  alignas(64) float tile[kTile];
  const int64_t step = kTile / info.elements;
  auto* halves = static_cast<uint16_t*>(into);
  for (int64_t block = 0; block < blocks; block += step) {
    const int64_t count = std::min(step, blocks - block);
    decode_any<kLanes>(type, bytes + block * info.bytes, count, tile);
    round(tile, count * info.elements, out_type, halves + block * info.elements);
  }
}

#ifdef DISTORCH_WIDTHS
DISTORCH_AVX512 void dequantise_avx512(BlockType type, const void* from, int64_t blocks,
                                       Element out_type, void* into, Stores stores) {
  dequantise_tiles<16>(round_avx512, type, from, blocks, out_type, into, stores);
}

DISTORCH_AVX2 void dequantise_avx2(BlockType type, const void* from, int64_t blocks,
                                   Element out_type, void* into, Stores stores) {
  dequantise_tiles<8>(round_avx2, type, from, blocks, out_type, into, stores);
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
#endif

void dequantise_plain(BlockType type, const void* from, int64_t blocks, Element out_type,
                      void* into, Stores stores) {
  dequantise_tiles<1>(round_plain, type, from, blocks, out_type, into, stores);
}

}  // namespace

std::vector<DequantisePath> dequantise_paths() {
  std::vector<DequantisePath> found{{"plain", dequantise_plain}};
#ifdef DISTORCH_WIDTHS
  if (has_avx2()) found.push_back({"avx2", dequantise_avx2});
  if (has_avx512()) found.push_back({"avx512", dequantise_avx512});
#endif
  return found;
}

void dequantise(BlockType type, const void* from, int64_t blocks, Element out_type, void* into,
                Stores stores) {
  static const auto chosen = dequantise_paths().back().run;
  chosen(type, from, blocks, out_type, into, stores);
}

}  // namespace distorch
