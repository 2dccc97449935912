// SPDX-License-Identifier: Apache-2.0
#include "engine/reads.h"

#include <algorithm>
#include <exception>
#include <vector>

#include "core/host_access.h"
#include "engine/trace_log.h"

namespace distorch {
namespace {

// One read of a reader thread. Each read that ends wakes a thread, which costs the computation on
// the other cores more than the read itself.
constexpr uint64_t kPartBytes = 4 << 20;

void read_part(const Slot& slot, uint64_t begin, uint64_t end, std::byte* into) {
  const HostSpan span("reads", slot.name, end - begin);
  host_writes(into, end - begin, "reading a file to host memory");
  slot.source.donor->read(begin, end - begin, into, true);
}

}  // namespace

// The parts of one slot's read. They hold the slot, and so its memory.
struct Reads::Whole {
  Transfer& transfer;
  const SlotPtr slot;
  size_t parts_left;               // guarded by the ring's mutex
  std::optional<Failure> failure;  // the first one; guarded by the ring's mutex
};

void Reads::queue(Transfer& transfer, const SlotPtr& slot, std::byte* into,
                  Executor::Urgency urgency) {
  const uint64_t bytes = slot->source.donor->size();
  const uint64_t phase = reinterpret_cast<uintptr_t>(into) % kPage;
  const auto whole = std::make_shared<Whole>(Whole{transfer, slot, 0, std::nullopt});
  std::vector<Executor::Task> tasks;
  // Parts end at whole pages of the memory, so that no two share one.
  uint64_t begin = 0;
  do {
    const uint64_t end =
        std::min(bytes, round_down(begin + phase, kPartBytes) + kPartBytes - phase);
    const auto read = [this, whole, begin, end, into] {
      // Whatever a donor throws becomes the slot's error. Nobody else would be told, and the
      // threads that wait for the slot would wait for ever.
      std::optional<Failure> failure;
      try {
        read_part(*whole->slot, begin, end, into + begin);
      } catch (const Error& error) {
        failure = Failure::of(*whole->slot, error.what(), error.kind());
      } catch (const std::exception& error) {
        failure = Failure::of(*whole->slot, error.what());
      }
      end_part(*whole, std::move(failure));
    };
    tasks.push_back({read, end - begin});
    begin = end;
  } while (begin < bytes);
  whole->parts_left = tasks.size();
  readers_->submit(std::move(tasks), urgency);
}

void Reads::end_part(Whole& whole, std::optional<Failure> failure) {
  const RingMutex::Lock lock(mutex_);
  if (!whole.failure) whole.failure = std::move(failure);
  if (--whole.parts_left > 0) return;
  whole.transfer.was_read(whole.slot, std::move(whole.failure));
  mutex_.notify();
}

}  // namespace distorch
