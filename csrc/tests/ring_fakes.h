// Devices, readers and donors for tests of the ring: ordinary memory, and bytes that are known.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "engine/donor.h"
#include "engine/ring.h"
#include "tests/check.h"

namespace distorch {

// Bytes that every PlainMemory has given out and not got back.
inline std::atomic<uint64_t> allocated{0};

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
  void bring(const std::shared_ptr<Slot>& slot, Range part) override {
    if (part.begin >= part.end) return;
    const Donor& donor = *slot->source.donor;
    donor.read(part.begin, part.end - part.begin, slot->data + part.begin, false);
    parts += part.end - part.begin < donor.size();
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
  void bring(const std::shared_ptr<Slot>& slot, Range part) override {
    const uint64_t bytes = slot->source.donor->size();
    CHECK(part.begin == 0 && part.end == bytes);
    std::memcpy(slot->data, slot->staged_data, bytes);
    asked_.push_back(slot);
  }
};

// Reads only when somebody waits, and lets something happen before.
class LateReader : public Executor {
 public:
  void submit(std::vector<Task> tasks, Urgency) override {
    if (std::exchange(refused, false)) {
      throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
    }
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
  bool refused = false;  // what is submitted next

 private:
  std::deque<Task> tasks_;
};

// A ring over such a device, and its reader.
template <class Device>
std::pair<std::shared_ptr<Ring>, LateReader&> late_ring(uint64_t bytes) {
  auto reader = std::make_unique<LateReader>();
  LateReader& late = *reader;
  auto ring = std::make_shared<Ring>(std::make_unique<Device>(), std::move(reader));
  ring->reserve(bytes);
  return {std::move(ring), late};
}

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
    if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
    for (uint64_t i = 0; i < bytes; ++i) into[i] = at(begin + i);
    ++reads;
  }
  bool writable() const override { return false; }
  void write(uint64_t, uint64_t, const std::byte*) override {}

  std::byte at(uint64_t position) const {
    return static_cast<std::byte>((number_ * 131 + position * 7) & 0xff);
  }
  mutable std::atomic<int> failures{0};
  mutable std::exception_ptr thrown;  // once; not for several threads
  mutable std::atomic<int> reads{0};

 private:
  const uint64_t number_, bytes_;
};

struct Model {
  Model(const std::shared_ptr<Ring>& ring, size_t count, uint64_t bytes) {
    for (size_t i = 0; i < count; ++i) {
      donors.push_back(std::make_shared<Numbered>(i, bytes + i * 999));
      weights.push_back(std::make_unique<Weight>(
          "w" + std::to_string(i), Source{donors.back(), nullptr, kLooseAlign}, ring, counters));
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

// Whether make_ring() takes a device that copies by itself.
inline bool copying = false;

inline std::shared_ptr<Ring> make_ring() {
  std::unique_ptr<RingDevice> device = std::make_unique<PlainMemory>();
  if (copying) device = std::make_unique<CopyingMemory>();
  return std::make_shared<Ring>(std::move(device), 3);
}

}  // namespace distorch
