// SPDX-License-Identifier: Apache-2.0
// What an AccessTrace predicts for the orders that models have.
#include <malloc.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "core/access_trace.h"
#include "tests/check.h"

using distorch::AccessTrace;
using Order = std::vector<uint64_t>;

namespace {

size_t in_use = 0;  // bytes that this program has from operator new

}  // namespace

void* operator new(size_t bytes) {
  void* at = std::malloc(bytes);
  if (at == nullptr) throw std::bad_alloc();
  in_use += ::malloc_usable_size(at);
  return at;
}

void operator delete(void* at) noexcept {
  if (at != nullptr) in_use -= ::malloc_usable_size(at);
  std::free(at);
}

void operator delete(void* at, size_t) noexcept { operator delete(at); }

namespace {

Order range(uint64_t begin, uint64_t end) {
  Order order;
  for (uint64_t id = begin; id < end; ++id) order.push_back(id);
  return order;
}

Order joined(const std::vector<Order>& parts) {
  Order all;
  for (const Order& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Accesses that were not the predicted ones, in one more run through `order`.
int surprises(AccessTrace& trace, const Order& order) {
  int count = 0;
  for (const uint64_t id : order) count += trace.record(id) ? 0 : 1;
  return count;
}

void knows_nothing_at_first() {
  AccessTrace trace;
  CHECK(trace.period() == 0);
  CHECK(!trace.predict(0).has_value());
  trace.record(7);
  CHECK(!trace.predict(0).has_value());
}

// Models that are loaded anew have new weights each time, in a process that may run for weeks.
void a_weight_that_is_seen_once_costs_little() {
  AccessTrace trace;
  const size_t before = in_use;
  for (uint64_t id = 1; id <= 10'000; ++id) trace.record(id);
  CHECK(in_use > before);
  CHECK(in_use - before < 100 * 10'000);
  for (uint64_t id = 10'001; id <= 100'000; ++id) trace.record(id);
  CHECK(in_use - before < 5'000'000);  // and only so many are kept
}

void repeated_pass() {
  AccessTrace trace;
  surprises(trace, range(0, 100));
  CHECK(surprises(trace, range(0, 100)) <= 1);
  CHECK(surprises(trace, range(0, 100)) == 0);
  for (uint64_t k = 0; k < 250; ++k) CHECK(*trace.predict(k) == k % 100);
}

void alternating_passes() {
  // With and without a layer, as classifier-free guidance with skipped layers.
  const Order with = range(0, 30);
  const Order without = joined({range(0, 10), range(20, 30)});
  AccessTrace trace;
  for (int step = 0; step < 3; ++step) surprises(trace, joined({with, without}));
  CHECK(surprises(trace, joined({with, without})) == 0);
  CHECK(surprises(trace, joined({with, without})) == 0);
}

void weight_used_twice() {
  // A tied weight (0) is followed by 1 at the start and by 9 at the end.
  const Order pass = joined({range(0, 8), {0, 9}});
  AccessTrace trace;
  for (int step = 0; step < 3; ++step) surprises(trace, pass);
  CHECK(surprises(trace, pass) == 0);
}

void forward_and_backward() {
  Order backward = range(0, 20);
  std::reverse(backward.begin(), backward.end());
  const Order step = joined({range(0, 20), backward});
  AccessTrace trace;
  for (int i = 0; i < 3; ++i) surprises(trace, step);
  CHECK(surprises(trace, step) == 0);
}

void changed_order_is_learned_again() {
  AccessTrace trace;
  for (int i = 0; i < 3; ++i) surprises(trace, range(0, 50));
  Order other = range(0, 50);
  std::reverse(other.begin(), other.end());
  for (int i = 0; i < 3; ++i) surprises(trace, other);
  CHECK(surprises(trace, other) == 0);
}

void repeats_are_one_access() {
  AccessTrace trace;
  trace.record(1);
  CHECK(trace.record(1));
  CHECK(trace.period() == 0);
}

// Random orders with a bounded memory: never a crash, never an unknown id.
void random_orders() {
  std::mt19937_64 random(1);
  AccessTrace trace(64);
  for (int i = 0; i < 20000; ++i) {
    trace.record(random() % (1 + i % 90));
    for (uint64_t k = 0; k < 3; ++k) {
      const auto next = trace.predict(k);
      CHECK(!next.has_value() || *next < 90);
    }
  }
}

}  // namespace

int main() {
  knows_nothing_at_first();
  a_weight_that_is_seen_once_costs_little();
  repeated_pass();
  alternating_passes();
  weight_used_twice();
  forward_and_backward();
  changed_order_is_learned_again();
  repeats_are_one_access();
  random_orders();
}
