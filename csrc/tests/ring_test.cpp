// The ring over ordinary memory: right bytes for any order, size and number of
// threads; bounded; faults end in errors; nothing is left behind.
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "engine/donor.h"
#include "engine/ring.h"
#include "tests/check.h"

using namespace distorch;

namespace {

std::atomic<uint64_t> allocated{0};

// Slots are handed out as shared pointers to a pair: data, and what holds it.
struct Wrapped {
  std::byte* data;
  std::shared_ptr<void> block;
};

class PlainMemory : public RingDevice {
 public:
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override {
    allocated += bytes;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(kPage, bytes));
    return {memory, [bytes](std::byte* at) {
              allocated -= bytes;
              std::free(at);
            }};
  }
  std::shared_ptr<void> wrap(Slot&, std::byte* data, uint64_t,
                             std::shared_ptr<void> block) override {
    return std::make_shared<Wrapped>(Wrapped{data, std::move(block)});
  }
  bool in_use(const std::shared_ptr<void>& wrapped) const override {
    return wrapped.use_count() > 1;
  }
};

// A device that copies by itself, part by part; what was asked for is there
// after flush().
class CopyingMemory : public PlainMemory {
 public:
  bool is_host() const override { return false; }
  bool brings(const Donor&) const override { return true; }
  bool in_parts() const override { return true; }
  void bring(const std::shared_ptr<Slot>& slot, const std::shared_ptr<Donor>& donor,
             Range part) override {
    if (part.begin >= part.end) return;
    donor->read(part.begin, part.end - part.begin, slot->data + part.begin, false);
    parts += part.end - part.begin < donor->size();
    asked_.push_back(slot);
  }
  void flush(std::vector<std::shared_ptr<Slot>>*) override {
    for (const auto& slot : asked_) {
      if (slot->whole()) slot->state = Slot::State::kReady;
    }
    asked_.clear();
  }
  inline static std::atomic<int> parts{0};  // that were not a whole weight

 protected:
  std::vector<std::shared_ptr<Slot>> asked_;
};

// A device that is filled from what readers bring to host memory.
class StagedMemory : public CopyingMemory {
 public:
  bool brings(const Donor&) const override { return false; }
  std::shared_ptr<Staged> staging(uint64_t bytes) override {
    struct Buffer : Staged {
      std::vector<std::byte> bytes;
    };
    auto buffer = std::make_shared<Buffer>();
    buffer->bytes.resize(bytes + kPage);
    const auto begin = reinterpret_cast<uintptr_t>(buffer->bytes.data());
    buffer->data = buffer->bytes.data() + (round_up(begin, kPage) - begin);
    return buffer;
  }
  void bring(const std::shared_ptr<Slot>& slot, const std::shared_ptr<Donor>& donor,
             Range part) override {
    CHECK(part.begin == 0 && part.end == donor->size());
    std::memcpy(slot->data, slot->staged_data, donor->size());
    asked_.push_back(slot);
  }
};

// Reads only when somebody waits, and lets something happen before.
class LateReader : public Executor {
 public:
  void submit(std::vector<Task> tasks, Urgency) override {
    for (Task& task : tasks) tasks_.push_back(std::move(task));
  }
  void start_afresh() override { tasks_.clear(); }
  void catch_up() override {
    while (prompt && run_next()) {
    }
  }
  bool run_next() override {
    if (meanwhile) std::exchange(meanwhile, nullptr)();
    if (tasks_.empty()) return false;
    const Task task = std::move(tasks_.front());
    tasks_.pop_front();
    task.run();
    return true;
  }
  std::function<void()> meanwhile;
  bool prompt = false;

 private:
  std::deque<Task> tasks_;
};

// A donor whose bytes are a function of its number, and which can fail.
class Numbered : public Donor {
 public:
  Numbered(uint64_t number, uint64_t bytes) : number_(number), bytes_(bytes) {}
  std::string tier() const override { return "disk"; }
  uint64_t size() const override { return bytes_; }
  std::string describe() const override { return "donor " + std::to_string(number_); }
  uint64_t phase() const override { return number_ * 8 % kPage; }
  std::shared_ptr<std::byte> map() override { return nullptr; }
  void read(uint64_t begin, uint64_t bytes, std::byte* into, bool) const override {
    if (failures > 0 && failures-- > 0) throw Error(ErrorKind::kFetch, "a failure of the disk");
    for (uint64_t i = 0; i < bytes; ++i) into[i] = at(begin + i);
    ++reads;
  }
  bool writable() const override { return false; }
  void write(uint64_t, uint64_t, const std::byte*) override {}

  std::byte at(uint64_t position) const {
    return static_cast<std::byte>((number_ * 131 + position * 7) & 0xff);
  }
  mutable std::atomic<int> failures{0};
  mutable std::atomic<int> reads{0};

 private:
  const uint64_t number_, bytes_;
};

struct Model {
  Model(const std::shared_ptr<Ring>& ring, size_t count, uint64_t bytes) {
    for (size_t i = 0; i < count; ++i) {
      donors.push_back(std::make_shared<Numbered>(i, bytes + i * 999));
      weights.push_back(std::make_unique<Weight>(
          "w" + std::to_string(i), Source{donors.back(), nullptr}, ring, counters, kLooseAlign));
    }
  }
  void use(Ring& ring, size_t i) {
    const auto bytes = ring.acquire(*weights[i]);
    const auto* data = static_cast<Wrapped*>(bytes.get())->data;
    for (uint64_t k = 0; k < donors[i]->size(); k += 37) CHECK(data[k] == donors[i]->at(k));
    CHECK(data[donors[i]->size() - 1] == donors[i]->at(donors[i]->size() - 1));
  }
  std::shared_ptr<Counters> counters = Counters::make();
  std::vector<std::shared_ptr<Numbered>> donors;
  std::vector<std::unique_ptr<Weight>> weights;
};

bool copying = false;

std::shared_ptr<Ring> make_ring() {
  std::unique_ptr<RingDevice> device = std::make_unique<PlainMemory>();
  if (copying) device = std::make_unique<CopyingMemory>();
  return std::make_shared<Ring>(std::move(device), 3);
}

// Rows of seven bytes, each byte stored becoming three: itself plus 0, 1, 2.
class Tripling : public Decoder {
 public:
  explicit Tripling(uint64_t bytes) : rows_(bytes / 7) {}
  uint64_t rows() const override { return rows_; }
  uint64_t stored_row() const override { return 7; }
  uint64_t decoded_row() const override { return 21; }
  bool in_place() const override { return false; }
  void decode(uint64_t begin, uint64_t end, const std::byte* stored,
              std::byte* into) const override {
    if (failures > 0 && failures-- > 0) throw Error(ErrorKind::kFetch, "a failure to decode");
    for (uint64_t i = 0; i < (end - begin) * 7; ++i) {
      for (uint64_t k = 0; k < 3; ++k) {
        into[3 * i + k] = static_cast<std::byte>(static_cast<uint64_t>(stored[i]) + k);
      }
    }
  }
  mutable std::atomic<int> failures{0};

 private:
  const uint64_t rows_;
};

// Eight weights that are decoded; every so manyth from memory, and every so
// manyth a small one.
struct DecodedModel {
  static constexpr uint64_t kBytes = 700'000;  // of each donor

  explicit DecodedModel(const std::shared_ptr<Ring>& ring, uint64_t in_memory = 2,
                        uint64_t small = 9)
      : ring(ring) {
    for (uint64_t i = 0; i < 8; ++i) {
      const uint64_t kBytes = i % small == small - 1 ? 7'000 : DecodedModel::kBytes;
      donors.push_back(std::make_shared<Numbered>(i, kBytes));
      std::shared_ptr<Donor> donor = donors.back();
      if (i % in_memory == in_memory - 1) {
        const auto memory = HostDonor::make(kBytes);
        donor->read(0, kBytes, memory->host(), false);
        donor = memory;
      }
      weights.push_back(std::make_unique<Weight>("w" + std::to_string(i),
                                                 Source{donor, std::make_shared<Tripling>(kBytes)},
                                                 ring, counters, kLooseAlign));
      CHECK(weights[i]->size() == 3 * kBytes);
    }
  }

  std::shared_ptr<void> use(uint64_t i) {
    auto held = ring->acquire(*weights[i]);
    const auto* data = static_cast<Wrapped*>(held.get())->data;
    const Numbered& expected = *donors[i];
    for (uint64_t k = 0; k < 3 * expected.size(); k += 31) {
      CHECK(data[k] == static_cast<std::byte>(static_cast<uint64_t>(expected.at(k / 3)) + k % 3));
    }
    return held;
  }

  const std::shared_ptr<Ring> ring;
  std::vector<std::shared_ptr<Numbered>> donors;
  const std::shared_ptr<Counters> counters = Counters::make();
  std::vector<std::unique_ptr<Weight>> weights;
};

// Decoders change while several threads ask.
void decoded_weights() {
  const auto ring = make_ring();
  DecodedModel model(ring);
  ring->reserve(8'000'000);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 40; ++i) model.use((i + t) % 8);
    });
  }
  threads.emplace_back([&] {
    for (int i = 0; i < 40; ++i) {
      Weight& weight = *model.weights[i % 8];
      Source source = weight.source();
      source.decoder = std::make_shared<Tripling>(DecodedModel::kBytes);
      weight.move_to(source);
      ring->written(weight, nullptr);
    }
  });
  for (auto& thread : threads) thread.join();
  const Source source = model.weights[0]->source();
  static_cast<const Tripling&>(*source.decoder).failures = 1;
  ring->written(*model.weights[0], nullptr);
  CHECK_THROWS(kFetch, model.use(0));
  model.use(0);
}

// Once for each use, never ahead, on the thread that asks; and what was read for
// a use that did not come makes room.
void decoded_by_who_asks() {
  struct Device : PlainMemory {
    void decode(const Decoder& decoder, const std::byte* encoded, std::byte* into) override {
      CHECK(std::this_thread::get_id() == asker);
      ++decoded;
      PlainMemory::decode(decoder, encoded, into);
    }
    const std::thread::id asker = std::this_thread::get_id();
    int decoded = 0;
  };
  auto device = std::make_unique<Device>();
  Device& memory = *device;
  auto reader = std::make_unique<LateReader>();
  reader->prompt = true;
  const auto ring = std::make_shared<Ring>(std::move(device), std::move(reader));
  DecodedModel model(ring);
  ring->reserve(5 * DecodedModel::kBytes + 3 * kPage);
  int uses = 0;
  const auto use = [&](uint64_t i) {
    model.use(i);
    ring->released();
    CHECK(memory.decoded == ++uses);
  };
  for (int pass = 0; pass < 4; ++pass) {
    for (uint64_t i = 0; i < 8; ++i) use(i);
  }
  CHECK(model.counters->hits > 0);  // those in memory, at least
  for (int i = 0; i < 24; ++i) use(i * 3 % 8);
  CHECK(model.counters->overflows == 0);
  const Source source = model.weights[0]->source();
  static_cast<const Tripling&>(*source.decoder).failures = 2;  // the second is the last
  CHECK_THROWS(kFetch, model.use(0));
  static_cast<const Tripling&>(*source.decoder).failures = 0;
  model.use(0);
}

// Whose reads are done when it is asked the next time.
std::shared_ptr<Ring> prompt_ring(uint64_t capacity) {
  auto reader = std::make_unique<LateReader>();
  reader->prompt = true;
  auto ring = std::make_shared<Ring>(std::make_unique<PlainMemory>(), std::move(reader));
  ring->reserve(capacity);
  return ring;
}

// What is read ahead has no room for its decoded bytes: this ring has room for
// those of one weight and the bytes of five more.
void read_far_ahead() {
  const auto ring = prompt_ring(8 * DecodedModel::kBytes + 12 * kPage);
  for (const uint64_t in_memory : {9, 2}) {
    DecodedModel model(ring, in_memory);
    const auto from_disk = [&](uint64_t i) { return i % in_memory != in_memory - 1; };
    int used = 0, fewest_ahead = 8;
    const auto pass = [&] {
      for (uint64_t i = 0; i < 8; ++i) {
        const auto held = model.use(i);
        used += from_disk(i);
        int read = 0;
        for (const auto& donor : model.donors) read += donor->reads;
        fewest_ahead = std::min(fewest_ahead, read - used);
        CHECK(ring->used() <= ring->capacity());
      }
      ring->released();
    };
    for (int i = 0; i < 3; ++i) pass();
    const uint64_t misses = model.counters->misses;
    fewest_ahead = 8;
    for (int i = 0; i < 3; ++i) pass();
    if (in_memory == 9) CHECK(fewest_ahead >= 3);  // and one more is asked for
    for (uint64_t i = 0; i < 8; ++i) CHECK(model.donors[i]->reads <= (from_disk(i) ? 7 : 1));
    CHECK(model.counters->misses == misses);
    CHECK(model.counters->overflows == 0);
  }
}

// Operators that want more decoded at once than look-ahead leaves room for teach
// it to leave more, and cost no read.
void several_decoded_at_once() {
  for (const uint64_t small : {9, 2}) {
    const auto ring = prompt_ring(15 * DecodedModel::kBytes);
    DecodedModel model(ring, 9, small);
    const auto pass = [&] {
      for (uint64_t i = 0; i < 8; i += 2) {
        const auto one = model.use(i);
        const auto two = model.use(i + 1);
        CHECK(ring->used() <= ring->capacity());
      }
      ring->released();
    };
    for (int i = 0; i < 3; ++i) pass();
    CHECK(model.counters->overflows <= (small == 9 ? 2 : 0));
    const uint64_t overflows = model.counters->overflows, misses = model.counters->misses;
    for (const auto& donor : model.donors) donor->reads = 0;
    for (int i = 0; i < 3; ++i) pass();
    CHECK(model.counters->overflows == overflows);
    CHECK(model.counters->misses == misses);
    for (const auto& donor : model.donors) CHECK(donor->reads <= 3);
  }
}

// Decoded weights for which the ring is too small take nothing from the others,
// and are read ahead all the same.
void decoded_is_larger_than_the_ring() {
  for (const uint64_t capacity : {2 * DecodedModel::kBytes, 5 * DecodedModel::kBytes}) {
    const auto ring = prompt_ring(capacity);
    DecodedModel model(ring, 9, 2);
    const auto pass = [&] {
      for (uint64_t i = 0; i < 8; ++i) {
        model.use(i);
        CHECK(ring->used() <= ring->capacity());
        ring->released();
      }
    };
    for (int i = 0; i < 3; ++i) pass();
    const uint64_t misses = model.counters->misses;
    for (const auto& donor : model.donors) donor->reads = 0;
    for (int i = 0; i < 3; ++i) pass();
    CHECK(model.counters->misses == misses);
    for (const auto& donor : model.donors) CHECK(donor->reads <= 4);
  }
}

// A weight that is used several times in a step.
void decoded_more_than_once() {
  const auto ring = prompt_ring(8 * DecodedModel::kBytes + 12 * kPage);
  DecodedModel model(ring, 9);
  const auto pass = [&] {
    for (const uint64_t i : {0, 1, 2, 3, 0, 4, 5, 0, 6, 7}) {
      model.use(i);
      ring->released();
    }
  };
  for (int i = 0; i < 3; ++i) pass();
  for (const auto& donor : model.donors) donor->reads = 0;
  const uint64_t misses = model.counters->misses;
  for (int i = 0; i < 3; ++i) pass();
  CHECK(model.counters->overflows == 0);
  CHECK(model.counters->misses == misses);
  for (const auto& donor : model.donors) CHECK(donor->reads <= 3 * 3 + 1);
}

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
  auto reader = std::make_unique<LateReader>();
  LateReader& late = *reader;
  const auto ring = std::make_shared<Ring>(std::make_unique<StagedMemory>(), std::move(reader));
  Model model(ring, 3, 40'000);
  ring->reserve(100'000);
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
  std::shared_ptr<Staged> staging(uint64_t bytes) override {
    if (none_left) throw std::bad_alloc();
    return StagedMemory::staging(bytes);
  }
  inline static bool none_left = false;
};

// A thread asks the device for what readers have brought for another one, and then its own fetch
// fails. What it asked for is issued all the same: the other thread would wait for ever.
void a_failed_fetch_leaves_nothing_behind() {
  auto reader = std::make_unique<LateReader>();
  LateReader& late = *reader;
  const auto ring = std::make_shared<Ring>(std::make_unique<ScarceStaging>(), std::move(reader));
  Model model(ring, 2, 10'000);
  ring->reserve(100'000);
  bool failed = false;
  late.meanwhile = [&] {
    CHECK(late.run_next());  // the first weight's bytes are in host memory
    std::thread([&] {
      ScarceStaging::none_left = true;
      try {
        ring->acquire(*model.weights[1]);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      ScarceStaging::none_left = false;
    }).join();
  };
  model.use(*ring, 0);
  CHECK(failed);
  model.use(*ring, 1);
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
  copying = false;
  failed_reads();
  decoded_weights();
  decoded_by_who_asks();
  read_far_ahead();
  several_decoded_at_once();
  decoded_is_larger_than_the_ring();
  decoded_more_than_once();
  CHECK(allocated == 0);
}
