// SPDX-License-Identifier: Apache-2.0
// Devices, readers and donors for tests of the ring: ordinary memory, and bytes that are known.
#pragma once

#include <algorithm>
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

#include "core/io_pool.h"
#include "engine/donor.h"
#include "engine/host_transfer.h"
#include "engine/reads.h"
#include "engine/ring.h"
#include "engine/waiting.h"
#include "tests/check.h"

namespace distorch {

// Bytes that every PlainMemory has given out and not got back.
inline std::atomic<uint64_t> allocated{0};

// What operators hold of a slot: its bytes, and what keeps them alive.
struct Wrapped {
  std::byte* data;
  std::shared_ptr<void> block;
};

inline std::shared_ptr<std::byte> plain_memory(uint64_t bytes) {
  allocated += bytes;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kPage, bytes));
  return {memory, [bytes](std::byte* at) {
            allocated -= bytes;
            std::free(at);
          }};
}

// The host.
class PlainMemory : public HostTransfer {
 public:
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override { return plain_memory(bytes); }
  bool in_use(const Slot& slot) const override { return slot.wrapped.use_count() > 1; }

 protected:
  std::shared_ptr<void> wrap(std::byte* data, uint64_t, std::shared_ptr<void> block) override {
    return std::make_shared<Wrapped>(Wrapped{data, std::move(block)});
  }
  void decode_all(const Decoder& decoder, const std::byte* encoded, std::byte* into) override {
    decoder.decode(0, decoder.rows(), encoded, into);
  }
};

// A device that copies by itself, part by part. What was asked for is there after issue().
class CopyingMemory : public Transfer {
 public:
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override { return plain_memory(bytes); }
  bool in_use(const Slot& slot) const override { return slot.wrapped.use_count() > 1; }
  bool in_parts() const override { return true; }
  SlotPtr make_slot(const std::string& name, Source source, uint64_t) override {
    return sized(std::make_shared<Slot>(name, std::move(source)));
  }
  void place(Slot& slot, std::byte* memory, std::shared_ptr<void> block) override {
    slot.data = memory;
    slot.wrapped = std::make_shared<Wrapped>(Wrapped{memory, std::move(block)});
  }
  void start(const SlotPtr&, Reads&, Executor::Urgency) override {}
  void was_read(const SlotPtr&, std::optional<Failure>) override { CHECK(false); }
  void grew(const SlotPtr& slot, Range part) override {
    const Donor& donor = *slot->source.donor;
    part.end = std::min(part.end, donor.size());
    if (part.begin >= part.end) return;
    donor.read(part.begin, part.end - part.begin, slot->data + part.begin, false);
    parts += part.end - part.begin < donor.size();
    asked_.push_back(slot);
  }
  bool issue() override {
    const std::vector<SlotPtr> asked = std::exchange(asked_, {});
    for (const auto& slot : asked) {
      if (slot->whole()) slot->state = Slot::State::kReady;
    }
    return !asked.empty();
  }
  bool dropped(Slot& slot) override {
    const auto same = [&](const SlotPtr& asked) { return asked.get() == &slot; };
    if (std::erase_if(asked_, same) > 0) fail(slot);
    return false;
  }
  inline static std::atomic<int> parts{0};  // that were not a whole weight

 protected:
  static SlotPtr sized(SlotPtr slot) {
    slot->room_bytes = round_up(std::max<uint64_t>(slot->source.donor->size(), 1), kPage);
    return slot;
  }
  std::vector<SlotPtr> asked_;
};

// A device that is filled from what readers bring to host memory.
class StagedMemory : public CopyingMemory {
 public:
  SlotPtr make_slot(const std::string& name, Source source, uint64_t) override {
    const auto slot = std::make_shared<StagedSlot>(name, std::move(source));
    slot->staged = staging(slot->source.donor->size());
    return sized(slot);
  }
  void start(const SlotPtr& slot, Reads& reads, Executor::Urgency urgency) override {
    reads.queue(*this, slot, static_cast<StagedSlot&>(*slot).staged.get(), urgency);
  }
  void was_read(const SlotPtr& slot, std::optional<Failure> failure) override {
    if (failure || !slot->in_cache()) return fail(*slot, std::move(failure));
    asked_.push_back(slot);
  }
  void grew(const SlotPtr&, Range) override {}
  bool issue() override {
    const std::vector<SlotPtr> asked = std::exchange(asked_, {});
    for (const SlotPtr& slot : asked) {
      if (!slot->whole()) {
        asked_.push_back(slot);
      } else if (refused()) {
        fail(*slot, Failure::of(*slot, "refused"));
      } else {
        std::memcpy(slot->data, static_cast<StagedSlot&>(*slot).staged.get(),
                    slot->source.donor->size());
        slot->state = Slot::State::kReady;
      }
    }
    return asked_.size() < asked.size();
  }

 protected:
  struct StagedSlot : Slot {
    using Slot::Slot;
    std::shared_ptr<std::byte> staged;
  };
  // Room for readers.
  virtual std::shared_ptr<std::byte> staging(uint64_t bytes) {
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(kPage, round_up(bytes, kPage)));
    return {memory, &std::free};
  }
  // Whether the device refuses a copy.
  virtual bool refused() { return false; }
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
  std::unique_ptr<Transfer> transfer = std::make_unique<PlainMemory>();
  if (copying) transfer = std::make_unique<CopyingMemory>();
  return std::make_shared<Ring>(std::move(transfer), std::make_unique<IoPool>(3));
}

}  // namespace distorch
