// SPDX-License-Identifier: Apache-2.0
// Weights that are decoded, in a ring on the host: who decodes them, when, and in which room.
#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "tests/ring_fakes.h"

using namespace distorch;

namespace {

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
  void decode_on_device(const std::byte*, std::byte*) const override { CHECK(false); }
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
      const Source source{donor, std::make_shared<Tripling>(kBytes), kLooseAlign};
      weights.push_back(std::make_unique<Weight>("w" + std::to_string(i), source, ring, counters));
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
    void decode_all(const Decoder& decoder, const std::byte* encoded, std::byte* into) override {
      CHECK(std::this_thread::get_id() == asker);
      ++decoded;
      PlainMemory::decode_all(decoder, encoded, into);
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

// One thread cannot have the room of the decoded bytes, while another one waits for them.
void decoded_by_one_who_fails() {
  struct Device : PlainMemory {
    std::shared_ptr<void> wrap(std::byte* data, uint64_t bytes,
                               std::shared_ptr<void> block) override {
      if (std::exchange(refuses, false)) throw std::bad_alloc();
      return PlainMemory::wrap(data, bytes, std::move(block));
    }
    bool refuses = false;
  };
  auto device = std::make_unique<Device>();
  Device& memory = *device;
  auto reader = std::make_unique<LateReader>();
  LateReader& late = *reader;
  const auto ring = std::make_shared<Ring>(std::move(device), std::move(reader));
  DecodedModel model(ring, 9);
  ring->reserve(5 * DecodedModel::kBytes);
  bool failed = false;
  late.meanwhile = [&] {
    memory.refuses = true;
    try {
      ring->acquire(*model.weights[0]);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  model.use(0);
  CHECK(failed);
}

}  // namespace

int main() {
  decoded_weights();
  decoded_by_who_asks();
  read_far_ahead();
  several_decoded_at_once();
  decoded_is_larger_than_the_ring();
  decoded_more_than_once();
  decoded_by_one_who_fails();
  CHECK(allocated == 0);
}
