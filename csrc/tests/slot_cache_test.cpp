// SPDX-License-Identifier: Apache-2.0
// What a SlotCache promises, over a device whose memory tells whose it is: whoever gets a page
// writes a number there, and the numbers of all that somebody needs must stay.
#include "engine/slot_cache.h"

#include <algorithm>
#include <latch>
#include <thread>

#include "tests/ring_fakes.h"

using namespace distorch;
using Window = Forecast::Window;
using State = Slot::State;
using Pages = std::vector<std::pair<uint64_t, uint64_t>>;

namespace {

// Pages that a weight needs; those of `decoded` elsewhere. Slots without `stored` ones are cheap.
struct Shape {
  uint64_t stored, decoded = 0;
};

// What operators hold: memory that a slot was laid out over.
struct Piece {
  uint64_t number;
  std::byte* memory;
  std::vector<char> own;  // whether each page was given to the slot
  std::shared_ptr<void> block;
};
Piece& piece_of(const Slot& slot) { return *static_cast<Piece*>(slot.wrapped.get()); }

// A cache, its device, and what a ring does with them.
struct Tested : CopyingMemory {
  Tested(uint64_t pages, std::vector<Shape> of, bool grows)
      : shapes(std::move(of)), weights(shapes.size()), by_parts(grows) {
    for (size_t i = 0; i < shapes.size(); ++i) make(i);
    cache.resize(pages * kPage);
  }
  ~Tested() override {
    told([&] { cache.resize(0); });
    operators.clear();
    all_filled();
    CHECK(allocated == 0);
  }

  std::shared_ptr<std::byte> allocate(uint64_t bytes) override {
    if (allocated + bytes > memory) throw std::bad_alloc();
    return plain_memory(bytes);
  }
  bool in_parts() const override { return by_parts; }
  void place(Slot& slot, std::byte* at, std::shared_ptr<void> block) override {
    const bool stored = slot.state == State::kStored;
    if (stored || slot.room_later == 0) slot.data = at;
    const std::vector<char> none((stored ? slot.room_later : slot.room_bytes) / kPage);
    const auto piece = std::make_shared<Piece>(++numbers, at, none, std::move(block));
    pieces.push_back(piece);
    slot.wrapped = piece;
  }
  // Every page is given once.
  void grew(const SlotPtr& slot, Range part) override {
    Piece& piece = piece_of(*slot);
    CHECK(part.begin < part.end && part.end <= piece.own.size() * kPage);
    for (uint64_t at = part.begin; at < part.end; at += kPage) {
      CHECK(!std::exchange(piece.own[at / kPage], 1));
      std::memcpy(piece.memory + at, &piece.number, sizeof piece.number);
    }
    grown.push_back({part.begin / kPage, part.end / kPage});
    if (!is_filled(*slot) || (waits_for_all && !slot->whole())) return;
    readers.push_back(slot);
  }
  // Nothing that is held, wanted, or on its way goes without being told to.
  bool dropped(Slot& slot) override {
    const bool expected = wanted(std::stoul(slot.name)) > 0;
    const bool needed = in_use(slot) || (expected && !slot.cheap);
    CHECK(told_to_drop || slot.overflow || (!needed && (is_filled(slot) || !slot.whole())));
    return is_filled(slot);
  }
  // Whether nothing writes to the slot.
  bool is_filled(const Slot& slot) const {
    return std::ranges::find(readers, &slot, &SlotPtr::get) == readers.end();
  }
  void filled(const SlotPtr slot) {
    slot->state = slot->data != nullptr ? State::kReady : State::kStored;
    std::erase(readers, slot);
  }
  void all_filled() {
    while (!readers.empty()) filled(readers.back());
  }

  // Another weight instead of that one. Each must be in a ring; this one is not used.
  void make(size_t i) {
    static const auto ring = late_ring<PlainMemory>(0).first;
    if (weights[i] != nullptr) drop(i);
    if (weights[i] != nullptr) forecast.remove(weights[i]->id());
    const RingMutex::Unlocked weights_end_without_the_lock(lock);
    const Source source{std::make_shared<Numbered>(i, 1), nullptr};
    weights[i] = std::make_unique<Weight>("w", source, ring, counters);
    weights[i]->in_ring.outlook = &forecast.add(weights[i]->id());
  }
  SlotPtr slot(size_t i) const { return weights[i]->in_ring.slot; }
  uint64_t wanted(size_t i) const { return weights[i]->in_ring.outlook->wanted; }
  // Whether eviction can make room for so many bytes, with or without forgetting predictions.
  bool can_make_room(uint64_t bytes, bool forgets) const {
    Arena left(cache.capacity(), kPage);
    if (cache.used() == 0) return left.has_hole(bytes);
    left.take({0, cache.capacity()});
    for (const Range& hole : region->arena()->holes()) left.free(hole.begin, hole.end - hole.begin);
    for (size_t i = 0; i < weights.size(); ++i) {
      const SlotPtr slot = this->slot(i);
      if (slot == nullptr || slot->room == nullptr || in_use(*slot)) continue;
      const bool stays = !forgets && !slot->cheap && wanted(i) > 0;
      if (stays || !is_filled(*slot)) continue;
      const std::vector<char>& own = piece_of(*slot).own;
      for (size_t k = 0; k < own.size(); ++k) {
        if (own[k]) left.free(slot->room->range().begin + k * kPage, kPage);
      }
    }
    return left.has_hole(bytes);
  }
  void laid_out(const Slot& slot, bool counted) {
    CHECK(slot.overflow == (slot.room == nullptr));
    CHECK(counters->overflows == (overflows += slot.overflow && !counted));
    if (slot.room != nullptr) region = slot.room->region();
  }

  // `ahead`: not because somebody waits, but for that window. Null: there is no room.
  SlotPtr load(size_t i, const Window* ahead) {
    const SlotPtr slot = std::make_shared<Slot>(std::to_string(i), weights[i]->source());
    slot->room_bytes = shapes[i].stored * kPage;
    slot->room_later = shapes[i].decoded * kPage;
    slot->cheap = slot->room_bytes == 0;
    if (slot->cheap) slot->state = State::kStored;
    const size_t predictions = window->queue.size();
    const bool room = can_make_room(slot->room_bytes, false);
    const bool room_at_last = can_make_room(slot->room_bytes, true);
    if (!cache.place(*slot, ahead, *counters)) {
      CHECK(ahead != nullptr && slot->wrapped == nullptr);
      return nullptr;
    }
    // Who waits takes from others as little as is enough.
    if (slot->overflow) CHECK(ahead == nullptr && (lean > 0 || !room_at_last));
    if (window->queue.size() < predictions) CHECK(ahead == nullptr && !room);
    cache.enter(slot, *weights[i]);
    if (slot->cheap) return slot;
    laid_out(*slot, false);
    CHECK(slot->whole() || (ahead != nullptr && by_parts));
    const uint64_t hole = std::min(slot->room_later, cache.capacity() / 2);
    const bool expected = hole > cache.large() && slot->room_later <= cache.capacity();
    if (ahead != nullptr && expected) CHECK(region->arena()->has_hole(hole));
    slot->whole() ? grew(slot, {0, slot->room_bytes}) : void(cache.grow(slot));
    if (ahead != nullptr) cache.grow_later(slot);
    return slot;
  }
  // For a use of this thread.
  bool prepare(size_t i) {
    if (slot(i) != nullptr ? !cache.may_stay(*slot(i)) : !cache.may_promise(*window)) return false;
    if (slot(i) == nullptr && shapes[i].stored > 0 && load(i, window) == nullptr) return false;
    forecast.prepared(*window, weights[i]->id());
    return true;
  }
  void look_ahead(size_t uses) {
    for (; uses > 0; --uses) {
      const auto next = forecast.next(*window);
      const auto found = std::ranges::find_if(weights, [&](auto& w) { return w->id() == next; });
      if (found == weights.end() || !prepare(found - weights.begin())) return;
    }
  }

  // Operators hold what they get until they let go. Meanwhile so many uses are prepared.
  SlotPtr use(size_t i, size_t uses = 0) {
    cache.a_fetch_begins();
    if (lean > 0) --lean;
    forecast.use(*window, weights[i]->id());
    if (slot(i) != nullptr && !slot(i)->whole() && !cache.grow(slot(i))) drop(i);
    const SlotPtr used = slot(i) != nullptr ? slot(i) : load(i, nullptr);
    const auto kept = operators.emplace_back(used->wrapped);
    look_ahead(uses);
    if (used->state == State::kLoading) filled(used);
    if (used->data == nullptr) decode(used);
    operators.pop_back();
    const bool overflow = used->overflow;
    operators.push_back(cache.hand_out(used));
    CHECK(used->in_cache() != overflow && (slot(i) == nullptr) == overflow);
    return used;
  }
  void decode(const SlotPtr& slot) {
    const auto queue = window->queue;
    const bool room = can_make_room(slot->room_later, false);
    const bool counted = slot->overflow;
    cache.place_decoded(*slot, *window, *counters);
    CHECK(window->queue == queue);  // what was read ahead stays
    laid_out(*slot, counted);
    if (slot->overflow) CHECK(lean > 0 || !room);
    grew(slot, {0, slot->room_later});
    filled(slot);
  }
  // Whatever goes meanwhile was told to.
  void told(const std::function<void()>& action) {
    told_to_drop = true;
    action();
    told_to_drop = false;
  }
  void give_back() {
    told([&] { cache.give_back(); });
    lean = weights.size() + 1;  // a fetch counts down as it begins
  }
  void drop(size_t i) {
    if (slot(i) != nullptr) told([&] { cache.drop(slot(i)); });
    CHECK(slot(i) == nullptr);
  }

  // What holds whenever nobody is at work.
  void check() {
    uint64_t used = 0;
    const auto* ring = cache.used() > 0 ? region->data() : nullptr;
    std::erase_if(pieces, [](const auto& piece) { return piece.expired(); });
    for (const auto& known : pieces) {
      const auto piece = known.lock();
      const bool inside = piece->memory >= ring && piece->memory < ring + cache.capacity();
      for (size_t k = 0; k < piece->own.size(); ++k) {
        const auto* page = piece->memory + k * kPage;
        CHECK(!piece->own[k] || std::memcmp(page, &piece->number, sizeof piece->number) == 0);
        if (inside && piece->own[k]) used += kPage;
      }
    }
    CHECK(cache.used() == used && used <= cache.capacity());
    for (const SlotPtr& slot : readers) CHECK(slot->wrapped != nullptr);
  }
  void grow_all() {
    cache.grow_all();
    const size_t parts = grown.size();
    cache.grow_all();
    CHECK(grown.size() == parts);  // the first time took all that was free
    for (size_t i = 0; i < weights.size(); ++i) {
      CHECK(slot(i) == nullptr || slot(i)->whole() || wanted(i) > 0);
    }
  }

  std::vector<std::shared_ptr<void>> operators;  // what each of them holds
  std::vector<SlotPtr> readers;                  // slots that something writes to
  std::vector<std::weak_ptr<Piece>> pieces;
  Pages grown;
  uint64_t numbers = 0;
  uint64_t memory = 1 << 30;   // that the device has
  bool told_to_drop = false;   // whatever it is
  bool waits_for_all = false;  // nothing is written before a room is whole
  const std::vector<Shape> shapes;
  const std::shared_ptr<Counters> counters = Counters::make();
  std::vector<std::unique_ptr<Weight>> weights;
  const bool by_parts;
  Forecast forecast;
  RingMutex mutex;
  SlotCache cache{*this, forecast, mutex};
  Window* window = &forecast.window(std::this_thread::get_id());
  Region* region = nullptr;  // that the latest room is in
  uint64_t overflows = 0;    // that there should be
  size_t lean = 0;           // fetches that still take ordinary memory
  RingMutex::Lock lock{mutex};
};

// What happens beside uses.
void disturb(Tested& it, std::mt19937_64& random) {
  const size_t i = random() % it.shapes.size();
  const uint64_t what = random() % 20, larger = it.cache.capacity() + kPage * (random() % 4);
  if (what < 4) it.drop(i);
  if (what > 3 && what < 8) it.use(i, random() % 4);
  if (what > 7 && what < 12) it.forecast.forget(*it.window);
  if (what > 11 && what < 16) it.make(i);
  if (what == 16) it.told([&] { it.cache.drop_if([](const Slot& slot) { return slot.cheap; }); });
  if (what == 17) it.give_back();
  if (what == 18) it.told([&] { it.cache.resize(0); });
  if (what > 17) it.told([&] { it.cache.resize(larger); });
}

void random_program(std::mt19937_64& random, const std::vector<std::thread::id>& threads) {
  const bool in_parts = random() % 2, many = random() % 8 == 0;
  std::vector<Shape> shapes(many ? 60 : 3 + random() % 8);
  for (Shape& shape : shapes) {
    shape = {1 + random() % 6};
    if (!in_parts && random() % 3 == 0) shape = {random() % 3, 1 + random() % 12};
  }
  Tested it(many ? 150 + random() % 100 : random() % 32, shapes, in_parts);
  it.waits_for_all = random() % 2;
  const size_t used_threads = random() % 16 ? 1 + random() % 3 : threads.size();
  const size_t calm = random() % 2 ? 3 : 30, held = 1 + random() % 6;
  auto& operators = it.operators;
  for (size_t step = 0; step < 40 + 2 * shapes.size(); ++step) {
    if (random() % 4 == 0) it.window = &it.forecast.window(threads[random() % used_threads]);
    if (random() % calm == 0) disturb(it, random);
    it.check();
    it.use(step % shapes.size(), random() % 2 ? 1000 : random() % 3);
    it.check();
    const size_t old = random() % held == 0 ? random() % (operators.size() + 1) : 0;
    operators.erase(operators.begin(), operators.begin() + old);
    for (const SlotPtr& slot : std::vector(it.readers)) {
      if (random() % 2 && (slot->whole() || !slot->in_cache())) it.filled(slot);
    }
    it.grow_all();
    it.look_ahead(random() % 4);
    it.check();
  }
}

// Operators and predictions keep what they have; who waits takes ordinary memory, or what was used
// least recently, and only then what others had predicted.
void what_gives_way_to_who_waits() {
  Tested it(4, {{2}, {2}, {2}}, false);
  for (const size_t i : {0, 1, 0}) it.use(i);
  CHECK(it.use(2)->overflow && it.slot(0) != nullptr && it.slot(1) != nullptr);
  it.operators.clear();
  CHECK(!it.load(2, nullptr)->overflow && it.slot(0) != nullptr && it.slot(1) == nullptr);
  it.all_filled();
  CHECK(it.prepare(2) && !it.load(1, nullptr)->overflow);
  CHECK(it.slot(0) == nullptr && it.slot(2) != nullptr && it.wanted(2) == 1);
  it.all_filled();
  CHECK(it.prepare(1) && !it.prepare(0));
  CHECK(!it.load(0, nullptr)->overflow && it.window->queue.empty());
}

// Until nobody wants it any more.
void a_room_grows_as_its_bytes_become_free() {
  for (const bool wanted : {true, false}) {
    Tested it(4, {{2}, {2}, {4}}, true);
    it.use(0);
    it.use(1);
    it.grown.clear();
    CHECK(it.prepare(2) && it.grown.empty());
    it.operators.pop_back();
    it.grow_all();
    it.operators.clear();
    if (!wanted) it.forecast.forget(*it.window);
    it.grow_all();
    CHECK(it.grown == (wanted ? Pages{{2, 4}, {0, 2}} : Pages{{2, 4}}));
    CHECK(wanted ? it.slot(2)->whole() : it.slot(2) == nullptr);
    it.all_filled();
    CHECK(it.cache.used() == (wanted ? 4 : 2) * kPage);
  }
}

// What somebody has read stays rather than the room of a promise that is not wanted any more.
void broken_promises_go_first() {
  Tested it(4, {{2}, {2}, {4}, {2}}, true);
  it.waits_for_all = true;
  it.use(0);
  it.operators.clear();
  it.use(1);
  CHECK(it.prepare(2) && it.slot(0) == nullptr && !it.slot(2)->whole());
  it.forecast.forget(*it.window);
  it.operators.clear();
  CHECK(!it.load(3, nullptr)->overflow && it.slot(1) != nullptr && it.slot(2) == nullptr);
}

void a_window_has_two_growing_slots_and_nothing_of_other_threads() {
  Tested it(4, {{4}, {4}, {4}, {4}}, true);
  it.use(0);
  CHECK(it.prepare(1) && it.prepare(2) && !it.prepare(3));
  it.operators.clear();
  it.grow_all();
  CHECK(it.slot(1)->whole() && it.prepare(3));
  it.window = &it.forecast.window(std::thread::id());
  CHECK(!it.prepare(0));
  it.use(1);
  it.drop(1);
  it.forecast.forget_all();
  it.grow_all();
  CHECK(!it.prepare(0));  // an operator holds all of the ring, and no weight has that memory
}

// Enough for the largest decoded weight, and then for all that operators wanted at once.
void bytes_read_ahead_leave_a_hole() {
  Tested it(12, std::vector<Shape>(9, {1, 4}), false);
  for (size_t i = 0; i < 9; ++i) CHECK(it.prepare(i) == (i < 8));
  it.all_filled();
  CHECK(!it.use(0)->overflow && !it.prepare(2) && it.use(1)->overflow);
  for (size_t i = 0; i < 9; ++i) it.drop(i);
  it.operators.clear();
  for (size_t i = 0; i < 9; ++i) CHECK(it.prepare(i) == (i < 6));
  for (size_t i = 0; i < 9; ++i) it.drop(i);
  it.all_filled();
  CHECK(it.load(0, nullptr)->room->range().begin == 11 * kPage);
}

void cheap_slots_give_way() {
  Tested it(6, {{0, 2}, {4}}, false);
  it.use(0);
  it.operators.clear();
  CHECK(it.prepare(0) && it.prepare(1) && it.slot(0) == nullptr && it.window->queue.size() == 2);
}

void nothing_is_left_when_operators_let_go() {
  for (const bool resized : {true, false}) {
    Tested it(4, {{2}, {1}}, false);
    it.use(0);
    CHECK(it.prepare(1));
    resized ? it.told([&] { it.cache.resize(0); }) : it.give_back();
    it.check();
    CHECK(it.slot(0) == nullptr && it.slot(1) == nullptr && it.window->queue.empty());
    it.operators.clear();
    it.all_filled();
    CHECK(allocated == 0);
    CHECK(it.use(0)->overflow && it.use(0)->overflow && !it.prepare(1));
    for (int fetch = 0; fetch < 2; ++fetch) it.use(1);  // there is a ring again
    CHECK(it.use(0)->overflow == resized);
  }
}

void a_device_without_memory_gets_the_rings() {
  Tested it(4, {{2}, {5}}, false);
  it.memory = 6 * kPage;
  it.use(0);
  it.operators.clear();
  it.told([&] { it.use(1); });
  CHECK(allocated == 5 * kPage);
  it.operators.clear();
  it.memory = 3 * kPage;  // not enough for the ring
  it.lean = 2;
  CHECK(it.use(0)->overflow && !it.prepare(0));
}

}  // namespace

int main() {
  std::vector<std::jthread> alive;
  std::vector<std::thread::id> threads;
  std::latch end(1);
  for (int i = 0; i < 40; ++i) threads.push_back(alive.emplace_back([&] { end.wait(); }).get_id());
  what_gives_way_to_who_waits();
  a_room_grows_as_its_bytes_become_free();
  broken_promises_go_first();
  a_window_has_two_growing_slots_and_nothing_of_other_threads();
  bytes_read_ahead_leave_a_hole();
  cheap_slots_give_way();
  nothing_is_left_when_operators_let_go();
  a_device_without_memory_gets_the_rings();
  std::mt19937_64 random(1);
  for (int program = 0; program < 700; ++program) random_program(random, threads);
  end.count_down();
}
