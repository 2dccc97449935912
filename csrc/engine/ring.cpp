// SPDX-License-Identifier: Apache-2.0
#include "engine/ring.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "engine/trace_log.h"

namespace distorch {
namespace {

// Weights that cannot be brought ahead are passed over, up to so many uses in the queue.
constexpr size_t kFarAhead = 256;

void count_bytes(Counters& counters, const Donor& donor) {
  const std::vector<Extent> extents = donor.extents();
  for (const Extent& extent : extents) counters.travelled(extent.place, extent.bytes);
  if (extents.empty()) counters.travelled(donor.tier(), donor.size());
}

}  // namespace

Ring::Ring(std::unique_ptr<Transfer> transfer, std::unique_ptr<Executor> readers)
    : transfer_(std::move(transfer)),
      cache_(*transfer_, forecast_, mutex_),
      reads_(mutex_, std::move(readers)) {}

// When an exception leaves, issues what this thread has asked of the device. Another thread may be
// waiting for one of these copies, and nobody else would issue it.
struct Ring::IssueAtEnd {
  explicit IssueAtEnd(Ring& of) : ring(of) {}
  ~IssueAtEnd() NOT_FOLLOWED {  // the mutex is held when this ends
    if (std::uncaught_exceptions() == before) return;
    try {
      ring.issue();
    } catch (...) {
      // The exception that leaves already says that the device, or this fetch, failed.
    }
  }
  IssueAtEnd(const IssueAtEnd&) = delete;
  IssueAtEnd& operator=(const IssueAtEnd&) = delete;
  Ring& ring;
  const int before = std::uncaught_exceptions();
};

// A slot that this thread wants. It may be dropped meanwhile, and this is then its last holder.
struct Ring::Waiter {
  Waiter(RingMutex& of, SlotPtr wanted) : mutex(of), slot(std::move(wanted)) {}
  ~Waiter() NOT_FOLLOWED {  // the mutex is held when this ends
    if (!slot->in_cache()) mutex.let_go(slot->source);
  }
  Waiter(const Waiter&) = delete;
  Waiter& operator=(const Waiter&) = delete;
  RingMutex& mutex;
  const SlotPtr slot;
};

std::shared_ptr<void> Ring::acquire(Weight& weight) {
  refuse_recording(weight);
  Counters& counters = weight.counters();
  reads_.catch_up();
  Lock lock(mutex_);
  const IssueAtEnd issuing(*this);
  cache_.a_fetch_begins();
  issue();  // what readers have brought holds room that may be needed below
  Forecast::Window& window = forecast_.window(std::this_thread::get_id());
  forecast_.use(window, weight.id());
  // The slot may fail, or may be dropped by another thread. It is asked for again then, but an
  // error that this thread's own request met is the operator's.
  for (bool first = true;; first = false) {
    const SlotPtr there = usable_slot(weight);
    const Waiter waiter(mutex_, there != nullptr ? there : load(weight, nullptr));
    const SlotPtr& slot = waiter.slot;
    if (first) {  // later `window` may be gone: other threads have had the mutex
      const bool hit = slot->state == Slot::State::kReady || slot->state == Slot::State::kStored;
      (hit ? counters.hits : counters.misses).fetch_add(1, std::memory_order_relaxed);
      const std::shared_ptr<void> held = slot->wrapped;  // so that looking ahead does not evict it
      look_ahead(window);
    }
    wait_for(*slot, counters, lock);
    if (slot->state == Slot::State::kStored) decode(slot, counters, lock);
    if (slot->state == Slot::State::kReady) {
      transfer_->lend(*slot, counters);
      return cache_.hand_out(slot);
    }
    if (there == nullptr && slot->failure) {
      cache_.drop(slot);
      slot->failure->raise();
    }
  }
}

// Asks the device alone, without the mutex: clang would want it for whatever a Transfer does.
bool Ring::recording() const NOT_FOLLOWED { return transfer_->recording(); }

void Ring::refuse_recording(const Weight& weight) const {
  if (!recording()) return;
  throw weight.source().could_not_bring(
      ErrorKind::kFetch, weight.name(),
      "a graph is being captured on the current stream (CUDA graphs), which would keep this one "
      "copy's address instead of fetching each time. Capture only what is resident and plain: "
      "distorch.redistribute(model, ...) with the compute device alone, quantised weights with "
      "resident='dequantised', keep=[...] for the captured part; or leave out the capture "
      "(torch.compile without mode='reduce-overhead')");
}

void Ring::released() {
  if (recording()) return;  // what was captured needed nothing of the ring
  reads_.catch_up();
  Lock lock(mutex_);
  const IssueAtEnd issuing(*this);
  look_ahead(forecast_.window(std::this_thread::get_id()));
  issue();
}

// --- Finding or making a slot ---

// The weight's slot, after its room was grown as far as that goes. A slot that has failed, or whose
// room is still not whole, is dropped: an operator does not wait for room. Null: there is none.
SlotPtr Ring::usable_slot(Weight& weight) {
  const SlotPtr slot = weight.in_ring.slot;
  if (slot == nullptr) return nullptr;
  if (slot->state == Slot::State::kFailed || !cache_.grow(slot)) {
    cache_.drop(slot);
    return nullptr;
  }
  issue();  // what has grown just now
  return slot;
}

// `ahead`: the window that prepares for a use; null if somebody waits. Null if there is no room and
// nobody waits.
SlotPtr Ring::load(Weight& weight, const Forecast::Window* ahead) {
  const Source source = weight.source();
  mutex_.let_go(source);  // a slot that is given up below may be the last to hold it
  const SlotPtr slot = transfer_->make_slot(weight.name(), source, cache_.large());
  if (!cache_.place(*slot, ahead, weight.counters())) return nullptr;
  cache_.enter(slot, weight);
  try {
    count_bytes(weight.counters(), *slot->source.donor);
    if (slot->whole()) {  // at once, or it needs no room of the ring
      transfer_->grew(slot, {0, slot->room_bytes});
    } else {
      cache_.grow(slot);  // takes what is free now; grow_all() takes the rest
    }
    const auto urgency = ahead == nullptr ? Executor::Urgency::kNow : Executor::Urgency::kAhead;
    transfer_->start(slot, reads_, urgency);
  } catch (...) {  // nobody would fill it
    cache_.drop(slot);
    throw;
  }
  return slot;
}

// --- Looking ahead ---

// A prediction never fails an operator. Whoever needs such a weight asks for it again, and is told.
void Ring::look_ahead(Forecast::Window& window) {
  try {
    cache_.grow_all();
    while (cache_.may_promise(window)) {
      const auto next = forecast_.next(window);
      if (!next) return;
      const auto found = weights_.find(*next);
      if (found != weights_.end() && !bring_ahead(*found->second, window)) return;
      forecast_.prepared(window, *next);
    }
  } catch (const std::exception&) {
    // The weight is brought when it is asked for, and the error is told then.
  }
}

// Has a weight brought ahead of its use, or keeps it. False: look no further now, since there is no
// room yet or this is far enough.
bool Ring::bring_ahead(Weight& weight, const Forecast::Window& window) {
  if (const SlotPtr held = weight.in_ring.slot) {
    if (held->state != Slot::State::kFailed) return cache_.may_stay(*held);
    cache_.drop(held);
  }
  if (weight.in_ring.writers > 0) return false;
  const Transfer& transfer = *transfer_;
  if (!weight.ask_source([&](const Source& source) { return transfer.brings_ahead(source); })) {
    return window.queue.size() < kFarAhead;
  }
  const SlotPtr slot = load(weight, &window);
  if (slot == nullptr) return false;
  cache_.grow_later(slot);
  return true;
}

// --- Waiting ---

// Threads that wait are woken only if there was something to do. They call issue() themselves, and
// would wake each other for ever.
void Ring::issue() {
  bool changed = true;  // also where it throws
  struct Notify {
    ~Notify() {
      if (changed) mutex.notify();
    }
    RingMutex& mutex;
    const bool& changed;
  } const at_end{mutex_, changed};
  changed = transfer_->issue();
}

void Ring::wait_for(Slot& slot, Counters& counters, Lock& lock) {
  issue();
  if (slot.state != Slot::State::kLoading) return;
  const HostSpan span("stalls", slot.name);
  const bool timed = transfer_->times_wait(slot);
  const auto start = std::chrono::steady_clock::now();
  reads_.hurry();
  while (slot.state == Slot::State::kLoading) {
    const bool has_read = reads_.run_next(lock);
    issue();
    if (!has_read && slot.state == Slot::State::kLoading) mutex_.wait();
  }
  if (timed) return;
  const auto waited = std::chrono::steady_clock::now() - start;
  counters.stall_ns.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count(),
                              std::memory_order_relaxed);
}

// See Note [Who decodes].
void Ring::decode(const SlotPtr& slot, Counters& counters, Lock& lock) {
  const std::shared_ptr<void> encoded = slot->wrapped;  // stays until it is decoded
  if (slot->data == nullptr) {  // small ones have room already, and those decoded in place
    try {
      cache_.place_decoded(*slot, forecast_.window(std::this_thread::get_id()), counters);
    } catch (...) {
      cache_.drop(slot);
      throw;
    }
  }
  transfer_->decode(*slot, lock);
  mutex_.notify();
}

// --- What happens beside fetches ---

void Ring::written(Weight& weight, const std::byte* data) {
  Lock lock(mutex_);
  const SlotPtr slot = weight.in_ring.slot;
  if (slot != nullptr && (slot->data == nullptr || slot->data != data)) cache_.drop(slot);
}

Ring::Write::Write(Ring& ring, Weight& weight) : ring_(ring), weight_(weight) {
  Lock lock(ring_.mutex_);
  ++weight_.in_ring.writers;
  // Looking ahead would ask for the rest of it.
  if (const SlotPtr slot = weight_.in_ring.slot; slot != nullptr && !slot->whole()) {
    ring_.cache_.drop(slot);
  }
}

Ring::Write::~Write() {
  Lock lock(ring_.mutex_);
  --weight_.in_ring.writers;
}

void Ring::suggest(Weight& weight, uint64_t next) {
  Lock lock(mutex_);
  forecast_.suggest(weight.id(), next);
}

void Ring::enlist(Weight& weight) {
  Lock lock(mutex_);
  weights_.emplace(weight.id(), &weight);
  weight.in_ring.outlook = &forecast_.add(weight.id());
}

void Ring::delist(Weight& weight) {
  Lock lock(mutex_);
  if (const SlotPtr slot = weight.in_ring.slot) cache_.drop(slot);
  weights_.erase(weight.id());
  forecast_.remove(weight.id());
}

uint64_t Ring::reserve(uint64_t bytes) {
  Lock lock(mutex_);
  reservations_.emplace(next_ticket_, bytes);
  resize();
  return next_ticket_++;
}

void Ring::release(uint64_t ticket) {
  Lock lock(mutex_);
  reservations_.erase(ticket);
  resize();
}

uint64_t Ring::reserved_beside(uint64_t ticket) const {
  Lock lock(mutex_);
  return largest_but(ticket);
}

uint64_t Ring::largest_but(uint64_t ticket) const {
  uint64_t largest = 0;
  for (const auto& [other, bytes] : reservations_) {
    if (other != ticket) largest = std::max(largest, bytes);
  }
  return largest;
}

void Ring::resize() { cache_.resize(largest_but(0)); }

void Ring::give_back() {
  Lock lock(mutex_);
  cache_.give_back();
}

uint64_t Ring::capacity() const {
  Lock lock(mutex_);
  return cache_.capacity();
}

uint64_t Ring::used() const {
  Lock lock(mutex_);
  return cache_.used();
}

void Ring::start_afresh() {
  mutex_.start_afresh();
  reads_.start_afresh();
  Lock lock(mutex_);
  cache_.drop_if([](const Slot& slot) { return slot.state == Slot::State::kLoading; });
  for (const auto& [id, weight] : weights_) weight->in_ring.writers = 0;
}

}  // namespace distorch
