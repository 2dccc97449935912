// SPDX-License-Identifier: Apache-2.0
#include "core/merge.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/chain.h"
#include "core/half.h"
#include "core/processor.h"

// The same body, compiled for several processors and chosen when the program runs.
#ifdef DISTORCH_X86
#define DISTORCH_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,fma"
#define DISTORCH_TARGET(features) __attribute__((target(features)))
#endif
// Rows of conversions become vectors at this level only.
#pragma GCC optimize("O3")

namespace distorch {
namespace {

constexpr uint64_t kCacheLine = 64;
constexpr int64_t kBlockBytes = 256 << 10;  // of packed factors, which stay in a core's cache

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

// body(0), body(1), .. with constants. Of loops over arrays of vectors compilers
// make what they like, often with the arrays in memory.
#define DISTORCH_BODY __attribute__((always_inline))
template <int kCount, class Body>
DISTORCH_INLINE void unrolled(const Body& body) {
  [&]<int... kAt>(std::integer_sequence<int, kAt...>) DISTORCH_BODY {
    (body(std::integral_constant<int, kAt>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

inline bool applies(const LowRank& term, int64_t row) {
  return row >= term.first_row && row < term.first_row + term.rows;
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

// Memory that starts at a cache line.
template <class Element>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(new (std::align_val_t{kCacheLine}) Element[count]) {}
  ~Scratch() { ::operator delete[](data_, std::align_val_t{kCacheLine}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Element* data() const { return data_; }

 private:
  Element* const data_;
};

struct Rows {
  const void* base;
  void* out;
  int64_t begin, end, columns;
};

// Panels of `kLanes` vectors of `kBytes` bytes, in tiles of up to kTileRows rows.
template <class Type, class Steps, int kBytes, int kLanes, bool kFused>
struct Panels {
  using Sum = typename Type::Sum;
  using Base = typename Type::Base;
  using Out = typename Type::Out;
  using Factors = typename Steps::Factors;
  typedef Sum Lane __attribute__((vector_size(kBytes), aligned(sizeof(Sum)), may_alias));
  typedef Factors FactorLane
      __attribute__((vector_size(kBytes), aligned(sizeof(Factors)), may_alias));
  static_assert(sizeof(Sum) == sizeof(Factors));
  static constexpr int kPerLane = kBytes / sizeof(Sum);
  static constexpr int kColumns = kLanes * kPerLane;

  static int64_t steps_of(const LowRank& term) {
    return (term.rank + Steps::kPerStep - 1) / Steps::kPerStep;
  }

  // `up` of all terms for rows [begin, end): [rows, steps] one after the other.
  static DISTORCH_INLINE void pack_up(std::span<const LowRank> terms, int64_t begin, int64_t end,
                                      Factors* packed) {
    for (const LowRank& term : terms) {
      const int64_t steps = steps_of(term);
      for (int64_t row = begin; row < end; ++row, packed += steps) {
        if (!applies(term, row)) continue;
        const float* from = term.up + (row - term.first_row) * term.rank;
        for (int64_t k = 0; k < term.rank; k += Steps::kPerStep) {
          const int64_t last = k + Steps::kPerStep - 1;
          packed[k / Steps::kPerStep] = Steps::pack(from[k], last < term.rank ? from[last] : 0);
        }
      }
    }
  }

  // `down` of all terms for the columns of a panel, [steps, kColumns] one after
  // the other; columns beyond the weight's are zero.
  static DISTORCH_INLINE void pack_down(std::span<const LowRank> terms, int64_t first,
                                        int64_t count, int64_t columns, Factors* packed) {
    constexpr float kZeros[kColumns] = {};
    for (const LowRank& term : terms) {
      for (int64_t k = 0; k < term.rank; k += Steps::kPerStep, packed += kColumns) {
        const int64_t last = k + Steps::kPerStep - 1;
        const float* one = term.down + k * columns + first;
        const float* other = last < term.rank ? term.down + last * columns + first : kZeros;
        for (int64_t j = 0; j < count; ++j) packed[j] = Steps::pack(one[j], other[j]);
        for (int64_t j = count; j < kColumns; ++j) packed[j] = 0;
      }
    }
  }

  // up [kHeight, steps] @ down [steps, kColumns].
  template <int kHeight>
  static DISTORCH_INLINE void multiply(int64_t steps, const Factors* up, const Factors* down,
                                       Lane (&sums)[kHeight][kLanes]) {
    unrolled<kHeight>([&](auto i) DISTORCH_BODY {
      unrolled<kLanes>([&](auto l) DISTORCH_BODY { sums[i][l] = Lane{}; });
    });
    for (int64_t k = 0; k < steps; ++k, down += kColumns) {
      FactorLane lanes[kLanes];
      unrolled<kLanes>([&](auto l) DISTORCH_BODY {
        lanes[l] = *reinterpret_cast<const FactorLane*>(down + l * kPerLane);
      });
      unrolled<kHeight>([&](auto i) DISTORCH_BODY {
        const Factors factor = up[i * steps + k];
        unrolled<kLanes>([&](auto l) DISTORCH_BODY { Steps::step(factor, lanes[l], sums[i][l]); });
      });
    }
  }

  // One tile: where its rows are stored and go.
  struct Tile {
    const typename Base::Stored* base;
    typename Out::Stored* out;
    int64_t columns;  // of the weight: from one row to the next
    int64_t count;    // of the tile
  };

  // Rows of a tile to `values` and back. A whole panel is a constant to compilers.
  template <int kHeight>
  static DISTORCH_INLINE void load(const Tile& tile, Sum (&values)[kHeight][kColumns]) {
    for (int i = 0; i < kHeight; ++i) {
      const auto* from = tile.base + i * tile.columns;
      if (tile.count == kColumns) {
#pragma GCC unroll 1  // it becomes vectors as a loop only
        for (int j = 0; j < kColumns; ++j) values[i][j] = Base::load(from[j]);
        continue;
      }
      for (int j = 0; j < kColumns; ++j) values[i][j] = j < tile.count ? Base::load(from[j]) : 0;
    }
  }

  template <int kHeight>
  static DISTORCH_INLINE void store(const Sum (&values)[kHeight][kColumns], const Tile& tile) {
    for (int i = 0; i < kHeight; ++i) {
      auto* into = tile.out + i * tile.columns;
      if (tile.count == kColumns) {
#pragma GCC unroll 1
        for (int j = 0; j < kColumns; ++j) into[j] = Out::store(values[i][j]);
        continue;
      }
      for (int64_t j = 0; j < tile.count; ++j) into[j] = Out::store(values[i][j]);
    }
  }

  // A tile from `row` on, with those terms that it is of. `up` and `down` are
  // packed, of rows [begin, end) and of the tile's panel.
  template <int kHeight>
  static DISTORCH_INLINE void merge_tile(const Tile& tile, std::span<const LowRank> terms,
                                         int64_t row, int64_t begin, int64_t end, const Factors* up,
                                         const Factors* down, Lane& checked) {
    alignas(kBytes) Sum values[kHeight][kColumns];
    load(tile, values);
    for (const LowRank& term : terms) {
      const int64_t steps = steps_of(term);
      if (applies(term, row)) {
        Lane sums[kHeight][kLanes];
        multiply<kHeight>(steps, up + (row - begin) * steps, down, sums);
        unrolled<kHeight>([&](auto i) DISTORCH_BODY {
          unrolled<kLanes>([&](auto l) DISTORCH_BODY {
            auto& into = *reinterpret_cast<Lane*>(&values[i][l * kPerLane]);
            Singles<Sum, kFused>::step(term.scale, sums[i][l], into);
            // NaN from here on if the product is not finite.
            if constexpr (!Steps::kFinite) checked += sums[i][l] * Sum{0};
          });
        });
      }
      up += (end - begin) * steps;
      down += steps * kColumns;
    }
    store(values, tile);
  }

  // All rows, for columns whose packed factors stay in the cache; then the next
  // ones: each row is walked through as memory likes it.
  static DISTORCH_INLINE bool merge(const Rows& all, std::span<const LowRank> terms) {
    const auto [base, out, begin, end, columns] = all;
    int64_t steps = 0;
    for (const LowRank& term : terms) steps += steps_of(term);
    const int64_t panel = steps * kColumns;  // numbers of its packed factors
    const int64_t at_once =
        std::max<int64_t>(kBlockBytes / sizeof(Factors) / std::max<int64_t>(panel, 1), 1);
    const int64_t panels = std::min(at_once, (columns + kColumns - 1) / kColumns);
    const Scratch<Factors> up((end - begin) * steps), down(panels * panel);
    pack_up(terms, begin, end, up.data());
    const auto* from = static_cast<const typename Base::Stored*>(base);
    auto* into = static_cast<typename Out::Stored*>(out);
    Lane checked = {};
    for (int64_t block = 0; block < columns; block += at_once * kColumns) {
      const int64_t block_end = std::min(columns, block + at_once * kColumns);
      for (int64_t first = block; first < block_end; first += kColumns) {
        pack_down(terms, first, std::min<int64_t>(kColumns, columns - first), columns,
                  down.data() + (first - block) / kColumns * panel);
      }
      for (int64_t row = begin; row < end;) {
        const bool whole = row + kTileRows <= same_terms_until(row, end, terms);
        const int64_t at = (row - begin) * columns;
        const Factors* packed = down.data();
        for (int64_t first = block; first < block_end; first += kColumns, packed += panel) {
          const Tile tile{from + at + first, into + at + first, columns,
                          std::min<int64_t>(kColumns, columns - first)};
          if (whole) {
            merge_tile<kTileRows>(tile, terms, row, begin, end, up.data(), packed, checked);
          } else {
            merge_tile<1>(tile, terms, row, begin, end, up.data(), packed, checked);
          }
        }
        row += whole ? kTileRows : 1;
      }
    }
    for (int i = 0; i < kPerLane; ++i) {
      if (std::isnan(checked[i])) return false;
    }
    return true;
  }
};

// By vectors of so many bytes, panels of so many vectors, one step at a time.
template <class Type, int kBytes, int kLanes, bool kFused>
DISTORCH_INLINE bool merge_singly(const Rows& rows, std::span<const LowRank> terms) {
  using Steps = Singles<typename Type::Sum, kFused>;
  return Panels<Type, Steps, kBytes, kLanes, kFused>::merge(rows, terms);
}

// Processors. A function for each kind of elements, or compilers run out of
// registers.
#ifdef __aarch64__
constexpr bool kAlwaysFused = true;
#else
constexpr bool kAlwaysFused = false;
#endif

struct Plain {
  template <class Type>
  static bool merge(const Rows& rows, std::span<const LowRank> terms) {
    return merge_singly<Type, 16, 2, kAlwaysFused>(rows, terms);
  }
};

#ifdef DISTORCH_X86
struct Avx2 {
  template <class Type>
  DISTORCH_TARGET("avx2,fma")
  static bool merge(const Rows& rows, std::span<const LowRank> terms) {
    return merge_singly<Type, 32, 2, true>(rows, terms);
  }
};

struct Avx512 {
  template <class Type>
  DISTORCH_TARGET(DISTORCH_AVX512)
  static bool merge(const Rows& rows, std::span<const LowRank> terms) {
    return merge_singly<Type, 64, 4, true>(rows, terms);
  }
};

#ifdef DISTORCH_PAIRS
struct Avx512Bf16 {
  template <class Type>
  static bool merge(const Rows& rows, std::span<const LowRank> terms) {
    if constexpr (std::is_same_v<typename Type::Sum, float>) {
      if (fit(rows, terms)) return merge_pairs<Type>(rows, terms);
    }
    return Avx512::merge<Type>(rows, terms);
  }

  DISTORCH_TARGET(DISTORCH_AVX512 ",avx512bf16") static bool are_chains() {
    return Pairs::are_chains();
  }

 private:
  DISTORCH_TARGET(DISTORCH_AVX512)
  static bool fit(const Rows& rows, std::span<const LowRank> terms) {
    return Pairs::fit(terms, rows.begin, rows.end, rows.columns);
  }

  template <class Type>
  DISTORCH_TARGET(DISTORCH_AVX512 ",avx512bf16")
  static bool merge_pairs(const Rows& rows, std::span<const LowRank> terms) {
    return Panels<Type, Pairs, 64, 4, true>::merge(rows, terms);
  }
};
#endif
#endif

// Those of the terms that are for some of rows [begin, end), in their order. A stack of experts has
// one or more for each expert, and factors are packed for every term of a merge.
std::vector<LowRank> terms_for(int64_t begin, int64_t end, std::span<const LowRank> terms) {
  std::vector<LowRank> found;
  std::copy_if(terms.begin(), terms.end(), std::back_inserter(found), [&](const LowRank& term) {
    return term.first_row < end && begin < term.first_row + term.rows;
  });
  return found;
}

template <class Processor>
bool merge_on(Element base_type, const void* base, Element out_type, void* out, int64_t begin,
              int64_t end, int64_t columns, std::span<const LowRank> all_terms) {
  const Rows rows{base, out, begin, end, columns};
  const std::vector<LowRank> terms = terms_for(begin, end, all_terms);
  const bool wide = base_type == Element::kFloat32;
  switch (out_type) {
    case Element::kFloat32:
      return Processor::template merge<Types<Float32, Float32, double>>(rows, terms);
    case Element::kFloat16:
      return wide ? Processor::template merge<Types<Float32, Float16, float>>(rows, terms)
                  : Processor::template merge<Types<Float16, Float16, float>>(rows, terms);
    case Element::kBFloat16:
      break;
  }
  return wide ? Processor::template merge<Types<Float32, BFloat16, float>>(rows, terms)
              : Processor::template merge<Types<BFloat16, BFloat16, float>>(rows, terms);
}

}  // namespace

std::vector<MergePath> merge_paths() {
  std::vector<MergePath> found{{"plain", merge_on<Plain>}};
#ifdef DISTORCH_X86
  if (has_avx2()) found.push_back({"avx2", merge_on<Avx2>});
  if (has_avx512()) found.push_back({"avx512", merge_on<Avx512>});
#endif
#ifdef DISTORCH_PAIRS
  if (has_avx512() && __builtin_cpu_supports("avx512bf16") && Avx512Bf16::are_chains()) {
    found.push_back({"avx512_bf16", merge_on<Avx512Bf16>});
  }
#endif
  return found;
}

bool merge_rows(Element base_type, const void* base, Element out_type, void* out, int64_t begin,
                int64_t end, int64_t columns, std::span<const LowRank> terms) {
  static const auto fastest = merge_paths().back().merge;
  return fastest(base_type, base, out_type, out, begin, end, columns, terms);
}

}  // namespace distorch
