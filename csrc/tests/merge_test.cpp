// SPDX-License-Identifier: Apache-2.0
// Merges against sums in long double, and every width of vectors against the others.
#include "core/merge.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/half.h"
#include "cuda/merge_run.h"
#include "tests/check.h"

using namespace distorch;

namespace {

struct Factors {
  std::vector<float> up, down;
  int64_t rank;
  float scale;
  int64_t first_row = 0;
};

Factors random_factors(std::mt19937& random, int64_t rows, int64_t columns, int64_t rank) {
  std::normal_distribution<float> normal;
  Factors made{std::vector<float>(rows * rank), std::vector<float>(rank * columns), rank,
               normal(random)};
  for (float& value : made.up) value = normal(random);
  for (float& value : made.down) value = normal(random);
  return made;
}

std::vector<LowRank> terms_of(const std::vector<Factors>& factors) {
  std::vector<LowRank> terms;
  for (const Factors& f : factors) {
    const auto rows = static_cast<int64_t>(f.up.size()) / f.rank;
    terms.push_back({f.up.data(), f.down.data(), f.rank, f.scale, f.first_row, rows});
  }
  return terms;
}

void halves() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = from_float16(half);
    const bool special = (bits & 0x7c00u) == 0x7c00u, is_nan = special && (bits & 0x3ffu) != 0;
    CHECK(std::isnan(value) == is_nan);
    if (is_nan) continue;
    CHECK(to_float16(value) == half);
    if (special) continue;
    const int exponent = static_cast<int>((bits >> 10) & 31u);
    const auto mantissa = static_cast<float>(bits & 0x3ffu);
    const float exact =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024.0f + mantissa, exponent - 25);
    CHECK(value == ((bits & 0x8000u) != 0 ? -exact : exact));
    // Halfway to the next number rounds to the even one, anything beyond upwards.
    const float next = from_float16(static_cast<uint16_t>(bits + 1));
    if (std::isinf(next) || (bits & 0x7fffu) == 0x7fffu) continue;
    const float middle = (value + next) / 2;
    CHECK(to_float16(middle) == ((bits & 1u) != 0 ? bits + 1 : bits));
    CHECK(to_float16(std::nextafter(middle, next)) == bits + 1);
    CHECK(to_float16(std::nextafter(middle, value)) == bits);
  }
  CHECK(to_float16(65519.0f) == 0x7bff);
  CHECK(to_float16(65520.0f) == 0x7c00);
  CHECK(std::isnan(from_bfloat16(to_bfloat16(NAN))));
  CHECK(to_bfloat16(1.00390625f) == 0x3f80);  // a tie
  CHECK(to_bfloat16(1.01171875f) == 0x3f82);  // the other way
}

void against_exact_sums() {
  std::mt19937 random(7);
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{13, 37}, {6, 64}, {1, 1}, {40, 130}}) {
    std::vector<Factors> factors;
    for (const int64_t rank : {1, 4, 19}) {
      factors.push_back(random_factors(random, rows, columns, rank));
    }
    if (rows > 10) {  // a part of the rows only
      factors.push_back(random_factors(random, rows - 9, columns, 5));
      factors.back().first_row = 4;
    }
    const auto terms = terms_of(factors);
    std::normal_distribution<float> normal;
    std::vector<float> base(rows * columns);
    for (float& value : base) value = normal(random);
    std::vector<std::vector<float>> singles;
    std::vector<std::vector<uint16_t>> halves, brains;
    for (const MergePath& path : merge_paths()) {
      auto& out = singles.emplace_back(base);
      CHECK(path.merge(Element::kFloat32, out.data(), Element::kFloat32, out.data(), 0, rows,
                       columns, terms));
      auto& half = halves.emplace_back(base.size());
      auto& brain = brains.emplace_back(base.size());
      for (size_t i = 0; i < base.size(); ++i) {
        half[i] = to_float16(base[i]);
        brain[i] = to_bfloat16(base[i]);
      }
      std::vector<float> wide_half(base.size()), wide_brain(base.size());
      for (size_t i = 0; i < base.size(); ++i) {
        wide_half[i] = from_float16(half[i]);
        wide_brain[i] = from_bfloat16(brain[i]);
      }
      std::vector<uint16_t> from_wide(base.size());
      // In two pieces, to the same result; from the same numbers in float32, too.
      const auto merge_both = [&](Element type, const std::vector<float>& wide,
                                  std::vector<uint16_t>& narrow) {
        for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, rows / 3}, {rows / 3, rows}}) {
          const int64_t at = begin * columns;
          CHECK(path.merge(Element::kFloat32, wide.data() + at, type, from_wide.data() + at, begin,
                           end, columns, terms));
          CHECK(path.merge(type, narrow.data() + at, type, narrow.data() + at, begin, end, columns,
                           terms));
        }
        CHECK(from_wide == narrow);
      };
      merge_both(Element::kFloat16, wide_half, half);
      merge_both(Element::kBFloat16, wide_brain, brain);
      CHECK(std::memcmp(out.data(), singles[0].data(), out.size() * sizeof(float)) == 0);
      CHECK(half == halves[0]);
      CHECK(brain == brains[0]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        long double exact = base[i * columns + j];
        for (const Factors& f : factors) {
          const int64_t row = i - f.first_row;
          if (row < 0 || row * f.rank >= static_cast<int64_t>(f.up.size())) continue;
          long double product = 0;
          for (int64_t k = 0; k < f.rank; ++k) {
            product += static_cast<long double>(f.up[row * f.rank + k]) * f.down[k * columns + j];
          }
          exact += f.scale * product;
        }
        CHECK(singles[0][i * columns + j] == static_cast<float>(exact));
      }
    }
  }
}

// A bfloat16 number: biased exponents from `least` on, `spread` of them.
float random_bfloat16(std::mt19937& random, uint32_t least, uint32_t spread) {
  const auto bits = static_cast<uint32_t>(random());
  const auto exponent = static_cast<uint32_t>(least + random() % spread);
  return std::bit_cast<float>((bits & 0x807f0000u) | exponent << 23);
}

// Factors that may be packed in pairs, and those that are just not: all widths agree, whether
// sums round, cancel, or come near to the smallest and largest numbers.
void factors_in_bfloat16() {
  std::mt19937 random(5);
  constexpr int64_t kRows = 13, kColumns = 150;
  struct Case {
    uint32_t least, spread;  // exponents of `up`
    float scale;
  };
  for (const Case& c : {Case{120, 12, 0.7f},
                        {71, 1, 0x1p60f},
                        {69, 3, 0x1p60f},
                        {1, 100, 0x1p60f},
                        {0, 2, 0x1p100f},
                        {183, 6, 0x1p-120f},
                        {127, 1, 1.0f}}) {
    for (const int64_t rank : {1, 2, 7, 64}) {
      std::vector<Factors> factors{random_factors(random, kRows, kColumns, rank),
                                   random_factors(random, 5, kColumns, 3)};
      factors[1].first_row = 6;
      for (Factors& f : factors) {
        f.scale = c.scale;
        for (float& value : f.up) value = random_bfloat16(random, c.least, c.spread);
        for (float& value : f.down) value = random_bfloat16(random, c.least, c.spread);
        f.down[1] = 0;
      }
      const auto list = terms_of(factors);
      for (const Element type : {Element::kFloat16, Element::kBFloat16}) {
        std::vector<uint16_t> base(kRows * kColumns), first;
        for (auto& bits : base) bits = static_cast<uint16_t>(random());
        for (const MergePath& path : merge_paths()) {
          std::vector<uint16_t> out(base.size());
          CHECK(path.merge(type, base.data(), type, out.data(), 0, kRows, kColumns, list));
          if (first.empty()) first = out;
          CHECK(out == first);
        }
      }
    }
  }
}

// visit(patch) of every thread of the CUDA kernel's grid, but for lanes beyond all columns.
template <class Sum, class Visit>
void each_thread(int64_t rows, int64_t columns, const Visit& visit) {
  const cuda::MergeGrid grid = cuda::merge_grid<Sum>(rows, columns);
  CHECK(grid.high <= cuda::kMostHigh && grid.stacked <= cuda::kMostHigh);
  for (int64_t down = 0; down < grid.high * grid.stacked; ++down) {
    for (int64_t across = 0; across < grid.wide; ++across) {
      for (int warp = 0; warp < cuda::kWarps; ++warp) {
        for (int lane = 0; lane < std::min<int64_t>(cuda::kWarp, columns); ++lane) {
          visit(cuda::merge_patch<Sum>(across, down, lane, warp, rows, columns));
        }
      }
    }
  }
}

// Every number has one thread, also where a grid is not high enough.
template <class Sum>
void grid_of_the_gpu(int64_t rows, int64_t columns) {
  std::vector<uint8_t> visits(rows * columns);
  each_thread<Sum>(rows, columns, [&](const cuda::Patch& patch) {
    for (int64_t row = patch.row; row < std::min(patch.row + cuda::kPatchRows<Sum>, rows); ++row) {
      for (int j = 0; j < cuda::kPatchColumns; ++j) {
        const int64_t column = patch.column + j * patch.stride;
        if (column < columns) ++visits[row * columns + column];
      }
    }
  });
  CHECK(std::all_of(visits.begin(), visits.end(), [](uint8_t count) { return count == 1; }));
}

// Every thread of the CUDA kernel, one after the other, against the host's kernel; with as many
// patches again, of rank 1, as are asked for.
void threads_of_the_gpu(int more) {
  std::mt19937 random(11);
  constexpr int64_t kRows = 37, kColumns = 150;
  std::vector<Factors> factors{random_factors(random, kRows, kColumns, 7),
                               random_factors(random, 21, kColumns, 3)};
  factors[1].first_row = 9;
  for (int i = 0; i < more; ++i) factors.push_back(random_factors(random, kRows, kColumns, 1));
  const auto list = terms_of(factors);
  cuda::Terms terms{};
  const size_t in_launch = std::min<size_t>(list.size(), cuda::kInLaunch);
  std::copy_n(list.begin(), in_launch, terms.of);
  terms.more = list.data() + in_launch;
  terms.count = static_cast<int>(list.size());
  std::vector<uint16_t> base(kRows * kColumns), expected(base.size()), actual(base.size());
  for (auto& bits : base) bits = to_bfloat16(std::normal_distribution<float>()(random));
  base[0] = 0x8000;  // -0 in a row that only the first term touches
  CHECK(merge_rows(Element::kBFloat16, base.data(), Element::kBFloat16, expected.data(), 0, kRows,
                   kColumns, list));
  each_thread<float>(kRows, kColumns, [&](const cuda::Patch& patch) {
    float tile[cuda::kPatchRows<float>][cuda::kPatchColumns] = {};
    const auto each = [&](auto&& visit) {
      for (int i = 0; i < cuda::kPatchRows<float>; ++i) {
        for (int j = 0; j < cuda::kPatchColumns; ++j) {
          const int64_t row = patch.row + i, column = patch.column + j * patch.stride;
          if (row < kRows && column < kColumns) visit(tile[i][j], row * kColumns + column);
        }
      }
    };
    each([&](float& value, int64_t at) { value = from_bfloat16(base[at]); });
    CHECK(cuda::add_terms(terms, patch, tile));
    each([&](float& value, int64_t at) { actual[at] = to_bfloat16(value); });
  });
  CHECK(actual == expected);
  factors[0].up[0] = INFINITY;
  const cuda::Patch first{0, 0, cuda::kWarp, kRows, kColumns};
  float tile[cuda::kPatchRows<float>][cuda::kPatchColumns] = {};
  CHECK(!cuda::add_terms(terms, first, tile));
}

void what_is_not_finite_is_told() {
  for (const float bad : {INFINITY, -INFINITY, NAN, 3e38f}) {
    for (const MergePath& path : merge_paths()) {
      std::vector<float> up{1, 1}, down(70, 1.0f), base(140, 0.0f);
      down[69] = bad;
      up[1] = 10;  // overflows in the second row only
      std::vector<uint16_t> weight(140);
      const LowRank term{up.data(), down.data(), 1, 1, 0, 2};
      const bool finite = path.merge(Element::kBFloat16, weight.data(), Element::kBFloat16,
                                     weight.data(), 0, 2, 70, {&term, 1});
      CHECK(!finite);
    }
  }
}

}  // namespace

int main() {
  halves();
  against_exact_sums();
  factors_in_bfloat16();
  threads_of_the_gpu(0);
  threads_of_the_gpu(70);  // more than travel with a launch
  for (const int64_t rows : {1, 33, 2'097'121}) {
    grid_of_the_gpu<float>(rows, 3);
    grid_of_the_gpu<double>(rows, 3);
  }
  grid_of_the_gpu<float>(5, 300);
  what_is_not_finite_is_told();
}
