// SPDX-License-Identifier: Apache-2.0
// The ring over ordinary memory: right bytes for any order, size and number of
// threads; bounded; faults end in errors; nothing is left behind. Weights that are
// decoded: decoded_ring_test.cpp.
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "tests/ring_fakes.h"

using namespace distorch;

namespace {

// Any capacity, from none to everything: right bytes, bounded memory.
void right_bytes_for_any_capacity() {
  for (const uint64_t capacity : {0UL, 10'000UL, 300'000UL, 1'000'000UL, 4'000'000UL}) {
    const auto ring = make_ring();
    Model model(ring, 20, 50'000);
    const uint64_t ticket = ring->reserve(capacity);
    for (int pass = 0; pass < 5; ++pass) {
      for (size_t i = 0; i < 20; ++i) {
        model.use(*ring, i);
        ring->released();
      }
      CHECK(ring->used() <= ring->capacity());
    }
    const uint64_t fetches = model.counters->hits + model.counters->misses;
    CHECK(fetches == 100);
    if (capacity == 4'000'000) CHECK(model.donors[3]->reads == 1);  // it stayed
    ring->release(ticket);
    CHECK(ring->capacity() == 0);
  }
  CHECK(allocated == 0);
}

void random_order_only_costs_time() {
  const auto ring = make_ring();
  Model model(ring, 30, 20'000);
  ring->reserve(200'000);
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i) model.use(*ring, random() % 30);
}

void many_threads() {
  const auto ring = make_ring();
  Model one(ring, 12, 30'000), two(ring, 9, 80'000);
  const uint64_t ticket = ring->reserve(400'000);
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (int i = 0; i < 200; ++i) {
        Model& model = t % 2 == 0 ? one : two;
        model.use(*ring, t < 4 ? i % model.weights.size() : random() % model.weights.size());
      }
    });
  }
  // Meanwhile the ring is made smaller and larger, weights come and go.
  std::thread planner([&] {
    for (int i = 0; i < 30; ++i) {
      const uint64_t more = ring->reserve(100'000 * (i % 7));
      Model passing(ring, 3, 10'000);
      passing.use(*ring, 1);
      ring->release(more);
      if (i % 10 == 9) ring->give_back();
    }
  });
  for (auto& thread : threads) thread.join();
  planner.join();
  ring->release(ticket);
}

// Readers hold on to what they have begun to fill, for a moment.
bool nothing_is_left() {
  for (int i = 0; i < 10'000 && allocated > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return allocated == 0;
}

// A device without memory gets the ring's, but for what is held; about one step
// later the ring is there again.
void what_is_given_back() {
  const auto ring = make_ring();
  constexpr size_t kCount = 6;
  Model model(ring, kCount, 50'000);
  ring->reserve(400'000);
  for (size_t i = 0; i < 2 * kCount; ++i) model.use(*ring, i % kCount);
  auto held = ring->acquire(*model.weights[0]);
  ring->give_back();
  CHECK(static_cast<Wrapped*>(held.get())->data[0] == model.donors[0]->at(0));
  held.reset();
  CHECK(nothing_is_left());
  const uint64_t before = model.counters->overflows;
  for (size_t i = 0; i < kCount; ++i) model.use(*ring, i);
  CHECK(model.counters->overflows == before + kCount);
  CHECK(nothing_is_left());
  for (size_t i = 0; i < kCount; ++i) model.use(*ring, i);
  CHECK(model.counters->overflows == before + kCount);
  CHECK(allocated >= 400'000);
}

void failed_reads() {
  const auto ring = make_ring();
  Model model(ring, 4, 3'000'000);  // several parts each
  ring->reserve(20'000'000);
  model.donors[1]->failures = 1;
  CHECK_THROWS(kFetch, model.use(*ring, 1));
  model.use(*ring, 1);  // the next try is a new one
  // A look-ahead that fails is no error: the op that needs it asks again.
  for (int pass = 0; pass < 3; ++pass) {
    for (size_t i = 0; i < 4; ++i) model.use(*ring, i);
  }
  try {
    model.donors[2]->failures = 100;
    ring->written(*model.weights[2], nullptr);
    model.use(*ring, 2);
    CHECK(false);
  } catch (const Error& error) {
    const std::string text = error.what();
    for (const char* part : {"w2", "3001998", "donor 2", "a failure of the disk"}) {
      CHECK(text.find(part) != std::string::npos);
    }
  }
}

// What ops hold is not refilled, whatever else is asked for.
void held_slots_stay() {
  const auto ring = make_ring();
  Model model(ring, 10, 50'000);
  ring->reserve(150'000);
  const auto held = ring->acquire(*model.weights[0]);
  for (int pass = 0; pass < 3; ++pass) {
    for (size_t i = 1; i < 10; ++i) model.use(*ring, i);
  }
  const auto* data = static_cast<Wrapped*>(held.get())->data;
  for (uint64_t k = 0; k < 50'000; ++k) CHECK(data[k] == model.donors[0]->at(k));
}

void the_order_is_learned() {
  auto reader = std::make_unique<LateReader>();
  reader->prompt = true;  // every read has ended when the next weight is asked for
  const auto ring = std::make_shared<Ring>(std::make_unique<PlainMemory>(), std::move(reader));
  Model model(ring, 20, 50'000);
  ring->reserve(300'000);
  for (int pass = 0; pass < 2; ++pass) {
    for (size_t i = 0; i < 20; ++i) model.use(*ring, i);
  }
  model.counters->reset();
  for (size_t i = 0; i < 20; ++i) {
    model.use(*ring, i);
  }
  CHECK(model.counters->hits == 20);
  CHECK(model.counters->overflows == 0);
}

// Weights of very different sizes in a ring of the two largest: the rooms of
// many are free only in pieces, and all of them are there in time.
void rooms_are_filled_part_by_part() {
  const auto ring = make_ring();
  Model model(ring, 16, 0);
  for (size_t i = 0; i < 16; ++i) {
    model.donors[i] = std::make_shared<Numbered>(i, 4096 << (i < 8 ? i : 15 - i));
    model.weights[i]->move_to({model.donors[i], nullptr});
  }
  ring->reserve(2 * (4096 << 7));
  CopyingMemory::parts = 0;
  for (int pass = 0; pass < 6; ++pass) {
    if (pass == 2) model.counters->reset();
    for (size_t i = 0; i < 16; ++i) {
      model.use(*ring, i);
      ring->released();
      CHECK(ring->used() <= ring->capacity());
    }
  }
  CHECK(CopyingMemory::parts > 0);
  CHECK(model.counters->misses == 0);
  CHECK(model.counters->overflows == 0);
}

// Another thread's doings while an op waits for a reader.
void what_is_waited_for_may_go() {
  const auto [ring, late] = late_ring<StagedMemory>(100'000);
  Model model(ring, 3, 40'000);
  late.meanwhile = [&] { ring->written(*model.weights[0], nullptr); };
  model.use(*ring, 0);  // its slot was dropped meanwhile: it is asked for again
  CHECK(model.donors[0]->reads == 2);

  // A room that is promised by one thread, and whole when another one asks,
  // is not taken by a third one.
  ring->suggest(*model.weights[0], model.weights[1]->id());
  ring->suggest(*model.weights[1], model.weights[2]->id());
  auto first = ring->acquire(*model.weights[0]);  // 2 is promised its room
  const auto second = ring->acquire(*model.weights[1]);
  first.reset();
  const int before = model.donors[2]->reads;
  late.meanwhile = [&] { std::thread([&] { ring->acquire(*model.weights[0]); }).join(); };
  std::thread([&] { model.use(*ring, 2); }).join();
  CHECK(model.donors[2]->reads == before + 1);
}

// Host memory for what readers bring that is used up now and then.
class ScarceStaging : public StagedMemory {
 public:
  inline static std::function<void()> meanwhile;
  inline static int left = -1;         // negative: there is no end of it
  inline static bool refuses = false;  // once

 protected:
  std::shared_ptr<std::byte> staging(uint64_t bytes) override {
    if (meanwhile) std::exchange(meanwhile, nullptr)();
    if (left == 0) throw std::bad_alloc();
    --left;
    return StagedMemory::staging(bytes);
  }
  bool refused() override { return std::exchange(refuses, false); }
};

// A thread asks the device for what readers have brought for another one, and then its own fetch
// fails. What it asked for is issued all the same: the other thread would wait for ever.
void a_failed_fetch_leaves_nothing_behind() {
  const auto [ring, late] = late_ring<ScarceStaging>(100'000);
  Model model(ring, 2, 10'000);
  bool failed = false;
  late.meanwhile = [&] {
    CHECK(late.run_next());  // the first weight's bytes are in host memory
    std::thread([&] {
      ScarceStaging::left = 0;
      try {
        ring->acquire(*model.weights[1]);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      ScarceStaging::left = -1;
    }).join();
  };
  model.use(*ring, 0);
  CHECK(failed);
  model.use(*ring, 1);
}

// A weight gets another source while its bytes are on their way. The slot goes on with the source
// that it began with: the other one may have more bytes than the slot has room for.
void a_weight_that_moves_while_it_is_read() {
  const auto [ring, late] = late_ring<StagedMemory>(100'000);
  Model model(ring, 1, 10'000);
  late.meanwhile = [&] {
    CHECK(late.run_next());  // its bytes are in host memory
    model.weights[0]->move_to({std::make_shared<Numbered>(0, 90'000), nullptr, kLooseAlign});
  };
  model.use(*ring, 0);
  CHECK(model.donors[0]->reads == 1);
}

// While a weight is written to, its bytes are half old and half new. Looking ahead waits with it.
void a_weight_that_is_written_to_is_not_brought_ahead() {
  const auto [ring, late] = late_ring<CopyingMemory>(100'000);
  Model model(ring, 3, 10'000);
  ring->suggest(*model.weights[0], model.weights[1]->id());
  ring->suggest(*model.weights[1], model.weights[2]->id());
  {
    const Ring::Write writing(*ring, *model.weights[1]);
    model.use(*ring, 0);
    ring->released();
    CHECK(model.donors[1]->reads == 0);
    CHECK(model.donors[2]->reads == 0);  // comes after it
  }
  ring->released();
  CHECK(model.donors[1]->reads == 1);
  CHECK(model.donors[2]->reads == 1);
}

// The ring has room for the first part of a weight. The rest is asked for when there is room, and
// not while the weight is written to.
void a_weight_that_is_written_to_does_not_grow() {
  const auto [ring, late] = late_ring<CopyingMemory>(30 * kPage);
  Model model(ring, 2, 20 * kPage);
  ring->suggest(*model.weights[0], model.weights[1]->id());
  auto held = ring->acquire(*model.weights[0]);
  CHECK(model.donors[1]->reads == 1);
  {
    const Ring::Write writing(*ring, *model.weights[1]);
    held.reset();
    ring->released();
    CHECK(model.donors[1]->reads == 1);
  }
  model.use(*ring, 1);
}

// Whatever goes wrong while bytes are brought is the error of the weight that they were for.
void faults_of_every_kind() {
  const auto [ring, late] = late_ring<ScarceStaging>(100'000);
  Model model(ring, 1, 10'000);
  // A reader meets something that is no error of ours.
  model.donors[0]->thrown = std::make_exception_ptr(std::bad_alloc());
  CHECK_THROWS(kFetch, model.use(*ring, 0));
  model.use(*ring, 0);
  // Reads cannot be queued: nobody waits for them.
  ring->written(*model.weights[0], nullptr);
  late.refused = true;
  bool refused = false;
  try {
    ring->acquire(*model.weights[0]);
  } catch (const std::system_error&) {
    refused = true;
  }
  CHECK(refused);
  model.use(*ring, 0);
}

// A device refuses what readers brought for a weight, while a thread asks for another one.
void a_refused_copy_fails_its_own_weight() {
  const auto [ring, late] = late_ring<ScarceStaging>(100'000);
  Model model(ring, 2, 10'000);
  ring->suggest(*model.weights[0], model.weights[1]->id());
  model.use(*ring, 0);
  while (late.run_next()) {  // the second weight is in host memory
  }
  ScarceStaging::refuses = true;
  model.use(*ring, 0);
  CHECK(!ScarceStaging::refuses);
  model.use(*ring, 1);  // is read again
  CHECK(model.donors[1]->reads == 2);
}

// What cannot be brought ahead costs the look-ahead, not the operator.
void a_prediction_fails_no_operator() {
  const auto ring =
      std::make_shared<Ring>(std::make_unique<ScarceStaging>(), std::make_unique<IoPool>(1));
  Model model(ring, 2, 10'000);
  ring->reserve(100'000);
  ring->suggest(*model.weights[0], model.weights[1]->id());
  ScarceStaging::left = 1;  // for the weight that is asked for
  model.use(*ring, 0);
  CHECK(ScarceStaging::left == 0);
  ScarceStaging::left = -1;
  model.use(*ring, 1);
}

// Threads that wait look whether there is something to issue. They wake each other only then.
void threads_that_wait_let_each_other_sleep() {
  struct Counting : PlainMemory {
    bool issue() override {
      ++issues;
      return false;
    }
    std::atomic<int> issues{0};
  };
  struct Slow : Numbered {
    using Numbered::Numbered;
    void read(uint64_t begin, uint64_t bytes, std::byte* into, bool slack) const override {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      Numbered::read(begin, bytes, into, slack);
    }
  };
  auto device = std::make_unique<Counting>();
  const Counting& asked = *device;
  const auto ring = std::make_shared<Ring>(std::move(device), std::make_unique<IoPool>(2));
  ring->reserve(100'000);
  const auto counters = Counters::make();
  Weight first("first", {std::make_shared<Slow>(1, 10'000)}, ring, counters);
  Weight second("second", {std::make_shared<Slow>(2, 10'000)}, ring, counters);
  std::thread other([&] { ring->acquire(first); });
  ring->acquire(second);
  other.join();
  CHECK(asked.issues < 100);  // a handful; thousands, if each one that looks wakes the other
}

// Slots that were promised to one thread, over what another one keeps, can grow no more. The first
// thread has turned to other weights, and these are read ahead as ever.
void promises_of_a_forgotten_queue_bind_nobody() {
  copying = true;
  const auto ring = make_ring();
  ring->reserve(48 * kPage);
  Model model(ring, 18, 0);
  for (size_t i = 0; i < 18; ++i) {
    model.donors[i] = std::make_shared<Numbered>(i, (i < 7 ? 10 : 2) * kPage);
    model.weights[i]->move_to({model.donors[i], nullptr, kLooseAlign});
    const size_t next = i < 8 ? (i + 1) % 8 : 8 + (i - 7) % 10;
    ring->suggest(*model.weights[i], model.weights[next]->id());
  }
  auto held = ring->acquire(*model.weights[0]);
  std::thread([&, &ring = ring] { ring->acquire(*model.weights[7]); }).join();
  held.reset();
  for (int pass = 0; pass < 3; ++pass) {
    model.counters->reset();
    for (size_t i = 8; i < 18; ++i) {
      model.use(*ring, i);
      ring->released();
    }
  }
  CHECK(model.counters->misses == 0);
}

void an_early_read_that_failed_is_asked_for_again() {
  const auto [ring, late] = late_ring<PlainMemory>(1 << 20);
  late.prompt = true;
  Model model(ring, 8, 10'000);
  for (size_t i = 0; i < 3; ++i) ring->suggest(*model.weights[i], model.weights[i + 1]->id());
  model.donors[2]->failures = 1;
  for (const size_t i : {0, 7, 0, 1}) {  // 7 is a surprise: what was foreseen is foreseen anew
    model.use(*ring, i);
    ring->released();
  }
  model.counters->reset();
  model.use(*ring, 2);
  CHECK(model.counters->hits == 1);
}

// An early read may have met a passing fault. The operator that needs it asks once more.
void an_early_read_that_fails_meanwhile_is_asked_for_again() {
  const auto [ring, late] = late_ring<PlainMemory>(1 << 20);
  Model model(ring, 2, 10'000);
  ring->suggest(*model.weights[0], model.weights[1]->id());
  model.donors[1]->failures = 1;
  model.use(*ring, 0);
  model.use(*ring, 1);
  CHECK(model.donors[1]->failures == 0 && model.donors[1]->reads == 1);
}

// A donor that may be the last to hold memory which the host language knows.
class Watched : public Numbered {
 public:
  using Numbered::Numbered;
  ~Watched() override {
    check_mutex_held(false);
    ++ended;
  }
  inline static std::atomic<int> ended{0};
};

Source watched(uint64_t number) {
  return {std::make_shared<Watched>(number, 30'000), nullptr, kLooseAlign};
}

// The weight moves while a thread is bringing it, which is then the last to hold the old donor.
void a_donor_ends_with_the_fetch_that_needed_it() {
  const auto [ring, late] = late_ring<ScarceStaging>(200'000);
  const auto counters = Counters::make();
  Weight first("first", watched(0), ring, counters), second("second", watched(1), ring, counters);
  ring->suggest(first, second.id());
  ring->acquire(first);  // and the second is on its way
  Watched::ended = 0;
  late.meanwhile = [&] {
    second.move_to(watched(2));
    ring->written(second, nullptr);
  };
  ring->acquire(second);
  CHECK(Watched::ended == 1);
  ring->written(second, nullptr);
  ScarceStaging::left = 0;
  ScarceStaging::meanwhile = [&] { std::thread([&] { second.move_to(watched(3)); }).join(); };
  bool failed = false;
  try {
    ring->acquire(second);
  } catch (const std::bad_alloc&) {
    failed = true;
  }
  ScarceStaging::left = -1;
  CHECK(failed);
  CHECK(Watched::ended == 2);
}

// See Note [Copies that a weight adopts]. Between the end of a write or a move and changed(), the
// ring may still have old bytes. Whoever copies those is refused.
void a_copy_of_old_bytes_is_not_adopted() {
  constexpr uint64_t kBytes = 30'000;
  const auto filled = [](int value) {
    auto donor = HostDonor::make(kBytes);
    std::memset(donor->host(), value, kBytes);
    return Source{std::move(donor), nullptr, kLooseAlign};
  };
  const std::vector<std::byte> written(kBytes, std::byte{1});
  const std::vector<std::function<void(Weight&)>> changes = {
      [&](Weight& weight) { weight.store(written.data(), kBytes, 0, kBytes); },
      [&](Weight& weight) { weight.move_to(filled(1)); }};
  for (const auto& change : changes) {
    const auto ring = make_ring();
    const uint64_t ticket = ring->reserve(100'000);
    Weight weight("weight", filled(0), ring, Counters::make());
    const auto first_byte = [&] {
      return *static_cast<Wrapped*>(ring->acquire(weight).get())->data;
    };
    CHECK(first_byte() == std::byte{0});
    change(weight);
    const uint64_t moves = weight.moves();
    CHECK(first_byte() == std::byte{0});  // what a copy would read now
    weight.changed();
    CHECK(!weight.move_to(filled(0), moves));
    CHECK(first_byte() == std::byte{1});
    CHECK(weight.move_to(filled(2), weight.moves()));
    ring->release(ticket);
  }
}

// Whoever lets go of a slot, the ring's mutex is not held when the slot's donor ends.
void donors_end_outside_the_lock() {
  const auto [ring, late] = late_ring<StagedMemory>(70'000);
  const auto counters = Counters::make();
  std::vector<std::unique_ptr<Weight>> weights;
  for (uint64_t i = 0; i < 4; ++i) {
    weights.push_back(std::make_unique<Weight>("w", watched(i), ring, counters));
  }
  // Moved, but the ring was not told: evicting the slot ends the donor.
  ring->acquire(*weights[0]);
  weights[0]->move_to(watched(10));
  for (const auto& weight : weights) ring->acquire(*weight);
  CHECK(Watched::ended == 1);
  // Moved while a thread waits for it: that thread is the last to hold the slot.
  late.meanwhile = [&] {
    weights[0]->move_to(watched(11));
    ring->written(*weights[0], nullptr);
  };
  ring->acquire(*weights[0]);
  CHECK(Watched::ended == 2);
  // The ring gives up its slots, and the weights go.
  weights[0]->move_to(watched(12));
  ring->give_back();
  CHECK(Watched::ended == 3);
  weights.clear();
  while (late.run_next()) {
  }
  CHECK(Watched::ended == 7);  // of four weights and three moves
}

}  // namespace

int main() {
  for (const bool by_device : {false, true}) {
    copying = by_device;
    right_bytes_for_any_capacity();
    random_order_only_costs_time();
    many_threads();
    held_slots_stay();
    what_is_given_back();
  }
  the_order_is_learned();
  rooms_are_filled_part_by_part();
  what_is_waited_for_may_go();
  a_failed_fetch_leaves_nothing_behind();
  a_weight_that_is_written_to_is_not_brought_ahead();
  a_weight_that_is_written_to_does_not_grow();
  a_weight_that_moves_while_it_is_read();
  a_copy_of_old_bytes_is_not_adopted();
  faults_of_every_kind();
  a_refused_copy_fails_its_own_weight();
  a_prediction_fails_no_operator();
  threads_that_wait_let_each_other_sleep();
  promises_of_a_forgotten_queue_bind_nobody();
  an_early_read_that_failed_is_asked_for_again();
  an_early_read_that_fails_meanwhile_is_asked_for_again();
  donors_end_outside_the_lock();
  a_donor_ends_with_the_fetch_that_needed_it();
  copying = false;
  failed_reads();
  CHECK(allocated == 0);
}
