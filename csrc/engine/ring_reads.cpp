// How a slot gets its bytes: tasks that readers work on, and decoding.
#include <algorithm>
#include <exception>
#include <utility>

#include "engine/reading.h"
#include "engine/ring.h"
#include "engine/trace_log.h"

namespace distorch {
namespace {

// One read of an I/O thread. Each read that ends wakes a thread, which costs
// the computation on the other cores more than the read itself.
constexpr uint64_t kPartBytes = 4 << 20;

}  // namespace

// A task of several that fill a slot. Whatever `work` throws becomes the slot's error: nobody else
// would be told, and the threads that wait for the slot would wait for ever.
IoPool::Task Ring::part(const SlotPtr& slot, uint64_t bytes, std::function<void()> work) {
  ++slot->parts_left;
  const auto run = [this, slot, work = std::move(work)] {
    std::optional<Error> failed;
    try {
      work();
    } catch (const Error& error) {
      failed.emplace(error);
    } catch (const std::exception& error) {
      failed.emplace(
          could_not_bring(ErrorKind::kFetch, slot->name, *slot->source.donor, error.what()));
    }
    finish_part(slot, failed ? &*failed : nullptr);
  };
  return {run, bytes};
}

void Ring::queue_reads(const SlotPtr& slot, std::byte* into, uint64_t phase,
                       IoPool::Urgency urgency) {
  const std::shared_ptr<Donor>& donor = slot->source.donor;
  const uint64_t bytes = donor->size();
  std::vector<IoPool::Task> tasks;
  // Parts end at whole pages of the block, so that no two share one.
  for (uint64_t begin = 0; begin < bytes || tasks.empty();) {
    const uint64_t end =
        std::min(bytes, round_down(begin + phase, kPartBytes) + kPartBytes - phase);
    const auto read = [donor, begin, end, into, name = slot->name] {
      read_part(*donor, name, begin, end, into + begin);
    };
    tasks.push_back(part(slot, end - begin, read));
    begin = end;
    if (begin >= bytes) break;
  }
  pool_->submit(std::move(tasks), urgency);
}

void Ring::finish_part(const SlotPtr& slot, const Error* error) {
  {
    Lock lock(*this);
    if (error != nullptr && slot->error.empty()) {
      slot->error = error->what();
      slot->error_kind = error->kind();
    }
    if (--slot->parts_left > 0) return;
    slot->state = slot->error.empty() ? Slot::State::kReady : Slot::State::kFailed;
    if (slot->state == Slot::State::kFailed) {
      drop(slot);
    } else if (slot->staged != nullptr) {
      slot->state = Slot::State::kStaged;
      if (slot->weight != nullptr) staged_.push_back(slot);
    } else if (slot->encoded != nullptr) {
      slot->state = Slot::State::kStored;
    }
  }
  part_done_->notify_all();
}

// See Note [Who decodes]. Who else wants the weight waits, as for a read.
void Ring::decode(const SlotPtr& slot, Counters& counters, Lock& lock) {
  const std::shared_ptr<void> encoded = slot->wrapped;
  if (slot->data == nullptr) {
    try {
      room_to_decode(slot, window_of_this_thread(), counters);
    } catch (...) {
      drop(slot);
      throw;
    }
  }
  slot->state = Slot::State::kLoading;
  try {
    const Unlocked other_threads_go_on(lock);
    const HostSpan span("decodes", slot->name, slot->source.donor->size());
    device_->decode(*slot->source.decoder, slot->encoded, slot->data);
  } catch (const Error& error) {
    return fail(slot, error.kind(), error.what());
  } catch (const std::exception& error) {
    return fail(slot, ErrorKind::kFetch, error.what());
  }
  slot->encoded = nullptr;
  slot->state = Slot::State::kReady;
  part_done_->notify_all();
}

}  // namespace distorch
