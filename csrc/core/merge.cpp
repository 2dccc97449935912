#include "core/merge.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/half.h"

// The same body, compiled for several widths and chosen when the program runs.
#if defined(__x86_64__) && defined(__GNUC__)
#define DISTORCH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define DISTORCH_AVX2 __attribute__((target("avx2,fma")))
#define DISTORCH_WIDTHS 1
#endif
// Rows of conversions become vectors at this level only.
#pragma GCC optimize("O3")
#define DISTORCH_INLINE inline __attribute__((always_inline))

namespace distorch {
namespace {

constexpr int kRows = 6;  // of one tile
constexpr size_t kCacheLine = 64;

// How an element is read, summed and written.
template <class BaseElement, class OutElement, class SumElement>
struct Types {
  using Base = BaseElement;
  using Out = OutElement;
  using Sum = SumElement;
};

struct Float32 {
  using Stored = float;
  static float load(float value) { return value; }
  template <class Sum>
  static float store(Sum value) {
    return static_cast<float>(value);
  }
};
struct Float16 {
  using Stored = uint16_t;
  static float load(uint16_t value) { return from_float16(value); }
  static uint16_t store(float value) { return to_float16(value); }
};
struct BFloat16 {
  using Stored = uint16_t;
  static float load(uint16_t value) { return from_bfloat16(value); }
  static uint16_t store(float value) { return to_bfloat16(value); }
};

// `sum` += a * b with one rounding, in each place. kFused: the target has an
// instruction for it, into which compilers contract the expression.
template <bool kFused, class Sum, class Lane>
DISTORCH_INLINE void multiply_add(Sum a, const Lane& b, Lane& sum) {
  if constexpr (kFused) {
    sum += a * b;
  } else {
    for (size_t i = 0; i < sizeof(Lane) / sizeof(Sum); ++i) sum[i] = std::fma(a, b[i], sum[i]);
  }
}

// The end of the rows from `row` on that the same terms apply to.
inline int64_t same_terms_until(int64_t row, int64_t end, std::span<const LowRank> terms) {
  for (const LowRank& term : terms) {
    if (row < term.first_row) end = std::min(end, term.first_row);
    const int64_t last = term.first_row + term.rows;
    if (row < last) end = std::min(end, last);
  }
  return end;
}

// A panel of `kLanes` vectors of `kBytes` bytes; rows [begin, end) of it.
template <class Type, int kBytes, int kLanes, bool kFused>
struct Panel {
  using Sum = typename Type::Sum;
  using Base = typename Type::Base;
  using Out = typename Type::Out;
  typedef Sum Lane __attribute__((vector_size(kBytes), aligned(sizeof(Sum)), may_alias));
  static constexpr int kPerLane = kBytes / sizeof(Sum);
  static constexpr int kColumns = kLanes * kPerLane;

  // `down` of all terms for this panel's columns, [rank, kColumns] one after
  // the other; columns beyond the weight's are zero.
  static DISTORCH_INLINE void pack(std::span<const LowRank> terms, int64_t first, int64_t count,
                                   int64_t columns, Sum* packed) {
    for (const LowRank& term : terms) {
      for (int64_t k = 0; k < term.rank; ++k, packed += kColumns) {
        const float* from = term.down + k * columns + first;
        for (int64_t j = 0; j < count; ++j) packed[j] = from[j];
        for (int64_t j = count; j < kColumns; ++j) packed[j] = 0;
      }
    }
  }

  // up [kHeight rows, rank] @ packed [rank, kColumns] added to `tile`.
  template <int kHeight>
  static DISTORCH_INLINE void add_product(const LowRank& term, const float* up, const Sum* packed,
                                          Sum* tile, Lane& checked) {
    Lane sums[kHeight][kLanes] = {};
    for (int64_t k = 0; k < term.rank; ++k, packed += kColumns) {
      Lane down[kLanes];
      for (int l = 0; l < kLanes; ++l)
        down[l] = *reinterpret_cast<const Lane*>(packed + l * kPerLane);
      for (int i = 0; i < kHeight; ++i) {
        const Sum factor = up[i * term.rank + k];
        for (int l = 0; l < kLanes; ++l) multiply_add<kFused>(factor, down[l], sums[i][l]);
      }
    }
    const Sum scale = term.scale;
    for (int i = 0; i < kHeight; ++i) {
      for (int l = 0; l < kLanes; ++l) {
        auto& into = *reinterpret_cast<Lane*>(tile + i * kColumns + l * kPerLane);
        multiply_add<kFused>(scale, sums[i][l], into);
        checked += sums[i][l] * Sum{0};  // NaN from here on if the product is not finite
      }
    }
  }

  template <int kHeight>
  static DISTORCH_INLINE void merge_tile(const typename Base::Stored* base,
                                         typename Out::Stored* out, int64_t row, int64_t first,
                                         int64_t count, int64_t columns,
                                         std::span<const LowRank> terms, const Sum* packed,
                                         Lane& checked) {
    // Of the next tile, whose rows lie too far apart for the processor to expect
    // them; behind the last one nothing is read either.
    for (int i = 0; i < kHeight; ++i) {
      const auto* next = reinterpret_cast<const char*>(base + (i + kHeight) * columns + first);
      for (size_t at = 0; at < kColumns * sizeof(*base); at += kCacheLine) {
        __builtin_prefetch(next + at);
      }
    }
    alignas(kBytes) Sum tile[kHeight * kColumns];
    for (int i = 0; i < kHeight; ++i) {
      const auto* from = base + i * columns + first;
      if (count == kColumns) {  // a constant, for the compiler
        for (int j = 0; j < kColumns; ++j) tile[i * kColumns + j] = Base::load(from[j]);
        continue;
      }
      for (int j = 0; j < kColumns; ++j)
        tile[i * kColumns + j] = j < count ? Base::load(from[j]) : 0;
    }
    for (const LowRank& term : terms) {
      if (row >= term.first_row && row < term.first_row + term.rows) {
        const float* up = term.up + (row - term.first_row) * term.rank;
        add_product<kHeight>(term, up, packed, tile, checked);
      }
      packed += term.rank * kColumns;
    }
    for (int i = 0; i < kHeight; ++i) {
      auto* into = out + i * columns + first;
      const Sum* of = tile + i * kColumns;
      if (count == kColumns) {
        for (int j = 0; j < kColumns; ++j) into[j] = Out::store(of[j]);
        continue;
      }
      for (int64_t j = 0; j < count; ++j) into[j] = Out::store(of[j]);
    }
  }

  static DISTORCH_INLINE bool merge(const void* base, void* out, int64_t begin, int64_t end,
                                    int64_t columns, std::span<const LowRank> terms) {
    int64_t ranks = 0;
    for (const LowRank& term : terms) ranks += term.rank;
    std::vector<Sum> packed(static_cast<size_t>(ranks * kColumns));
    const auto* from = static_cast<const typename Base::Stored*>(base);
    auto* into = static_cast<typename Out::Stored*>(out);
    Lane checked = {};
    for (int64_t first = 0; first < columns; first += kColumns) {
      const int64_t count = std::min<int64_t>(kColumns, columns - first);
      pack(terms, first, count, columns, packed.data());
      for (int64_t row = begin; row < end;) {
        const int64_t at = (row - begin) * columns;
        if (row + kRows <= same_terms_until(row, end, terms)) {
          merge_tile<kRows>(from + at, into + at, row, first, count, columns, terms, packed.data(),
                            checked);
          row += kRows;
        } else {
          merge_tile<1>(from + at, into + at, row, first, count, columns, terms, packed.data(),
                        checked);
          ++row;
        }
      }
    }
    for (int i = 0; i < kPerLane; ++i) {
      if (std::isnan(checked[i])) return false;
    }
    return true;
  }
};

struct Rows {
  Element base_type;
  const void* base;
  Element out_type;
  void* out;
  int64_t begin, end, columns;
};

template <class Type, int kBytes, int kLanes, bool kFused>
DISTORCH_INLINE bool merge_as(const Rows& rows, std::span<const LowRank> terms) {
  return Panel<Type, kBytes, kLanes, kFused>::merge(rows.base, rows.out, rows.begin, rows.end,
                                                    rows.columns, terms);
}

template <int kBytes, int kLanes, bool kFused>
DISTORCH_INLINE bool merge_any(const Rows& rows, std::span<const LowRank> terms) {
  const bool wide = rows.base_type == Element::kFloat32;
  switch (rows.out_type) {
    case Element::kFloat32:
      return merge_as<Types<Float32, Float32, double>, kBytes, kLanes, kFused>(rows, terms);
    case Element::kFloat16:
      return wide ? merge_as<Types<Float32, Float16, float>, kBytes, kLanes, kFused>(rows, terms)
                  : merge_as<Types<Float16, Float16, float>, kBytes, kLanes, kFused>(rows, terms);
    case Element::kBFloat16:
      break;
  }
  return wide ? merge_as<Types<Float32, BFloat16, float>, kBytes, kLanes, kFused>(rows, terms)
              : merge_as<Types<BFloat16, BFloat16, float>, kBytes, kLanes, kFused>(rows, terms);
}

using Merge = bool (*)(const Rows&, std::span<const LowRank>);

#ifdef DISTORCH_WIDTHS
DISTORCH_AVX512 bool merge_avx512(const Rows& rows, std::span<const LowRank> terms) {
  return merge_any<64, 4, true>(rows, terms);
}

DISTORCH_AVX2 bool merge_avx2(const Rows& rows, std::span<const LowRank> terms) {
  return merge_any<32, 2, true>(rows, terms);
}
#endif

#ifdef __aarch64__
constexpr bool kAlwaysFused = true;
#else
constexpr bool kAlwaysFused = false;
#endif

bool merge_plain(const Rows& rows, std::span<const LowRank> terms) {
  return merge_any<16, 2, kAlwaysFused>(rows, terms);
}

Merge fastest() {
#ifdef DISTORCH_WIDTHS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return merge_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return merge_avx2;
#endif
  return merge_plain;
}

template <Merge kPath>
bool merge_by(Element base_type, const void* base, Element out_type, void* out, int64_t begin,
              int64_t end, int64_t columns, std::span<const LowRank> terms) {
  return kPath({base_type, base, out_type, out, begin, end, columns}, terms);
}

}  // namespace

std::vector<MergePath> merge_paths() {
  std::vector<MergePath> found{{"plain", merge_by<merge_plain>}};
#ifdef DISTORCH_WIDTHS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back({"avx2", merge_by<merge_avx2>});
  }
  if (fastest() == merge_avx512) found.push_back({"avx512", merge_by<merge_avx512>});
#endif
  return found;
}

bool merge_rows(Element base_type, const void* base, Element out_type, void* out, int64_t begin,
                int64_t end, int64_t columns, std::span<const LowRank> terms) {
  static const Merge chosen = fastest();
  return chosen({base_type, base, out_type, out, begin, end, columns}, terms);
}

}  // namespace distorch
