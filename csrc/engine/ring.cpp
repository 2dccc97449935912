#include "engine/ring.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <utility>

#include "engine/reading.h"
#include "engine/trace_log.h"

namespace distorch {
namespace {

constexpr size_t kMaxWindows = 32;  // threads whose order is remembered
constexpr size_t kFarAhead = 256;   // uses ahead of which what needs no room is not followed
constexpr size_t kGrowing = 2;      // weights of a window that may wait for a part of their room

void count_bytes(Counters& counters, const Donor& donor) {
  const std::vector<Extent> extents = donor.extents();
  for (const Extent& extent : extents) counters.travelled(extent.place, extent.bytes);
  if (extents.empty()) counters.travelled(donor.tier(), donor.size());
}

}  // namespace

Ring::Ring(std::unique_ptr<RingDevice> device, size_t io_threads)
    : Ring(std::move(device), std::make_unique<IoPool>(io_threads)) {}

Ring::Ring(std::unique_ptr<RingDevice> device, std::unique_ptr<Executor> readers)
    : device_(std::move(device)), pool_(std::move(readers)) {}

Ring::~Ring() = default;

void Ring::Lock::lock() {
  held_.lock();
  lock_taken();
}

void Ring::Lock::unlock() {
  std::vector<Source> sources = std::exchange(ring_.let_go_, {});
  lock_given_up();
  held_.unlock();
  for (Source& source : sources) let_go(std::move(source));
}

void Ring::Lock::wait(std::condition_variable& condition) {
  if (ring_.let_go_.empty()) return condition.wait(held_);
  unlock();  // lets go of them: nobody else would while we wait
  lock();
}

// A slot that this thread wants. It may be dropped meanwhile, and this is then its last holder.
struct Ring::Waiter {
  Waiter(Ring& of, SlotPtr wanted) : ring(of), slot(std::move(wanted)) {}
  ~Waiter() {
    if (slot->weight == nullptr) ring.let_go_.push_back(slot->source);
  }
  Waiter(const Waiter&) = delete;
  Waiter& operator=(const Waiter&) = delete;
  Ring& ring;
  const SlotPtr slot;
};

void Ring::enlist(Weight& weight) {
  Lock lock(*this);
  weights_.emplace(weight.id(), &weight);
}

void Ring::delist(Weight& weight) {
  Lock lock(*this);
  weights_.erase(weight.id());
  if (const SlotPtr slot = weight.in_ring.slot) drop(slot);
}

uint64_t Ring::capacity() const {
  Lock lock(*this);
  return capacity_;
}

uint64_t Ring::used() const {
  Lock lock(*this);
  return region_ ? region_->arena.used() : 0;
}

uint64_t Ring::reserve(uint64_t bytes) {
  Lock lock(*this);
  reservations_.emplace(next_ticket_, bytes);
  resize();
  return next_ticket_++;
}

void Ring::release(uint64_t ticket) {
  Lock lock(*this);
  reservations_.erase(ticket);
  resize();
}

void Ring::give_back() {
  Lock lock(*this);
  lean_ = weights_.size() + 1;
  let_go_of_region();
}

void Ring::refuse_recording(const Weight& weight) const {
  if (!device_->recording()) return;
  const Error refused = could_not_bring(
      ErrorKind::kFetch, weight.name(), *weight.donor(),
      "a graph is being captured on the current stream (CUDA graphs), which would keep this one "
      "copy's address instead of fetching each time. Capture only what is resident and plain: "
      "distorch.redistribute(model, ...) with the compute device alone, quantised weights with "
      "resident='dequantised', keep=[...] for the captured part; or leave out the capture "
      "(torch.compile without mode='reduce-overhead')");
  throw refused;
}

// When an exception leaves, issues what this thread has asked of the device. Another thread may be
// waiting for one of these copies, and nobody else would issue it.
struct Ring::FlushAtEnd {
  ~FlushAtEnd() {
    if (std::uncaught_exceptions() == before) return;
    try {
      ring.flush();
    } catch (...) {
      // The exception that leaves already says that the device, or this fetch, failed.
    }
  }
  Ring& ring;
  const int before = std::uncaught_exceptions();
};

std::shared_ptr<void> Ring::acquire(Weight& weight) {
  refuse_recording(weight);
  Counters& counters = weight.counters();
  pool_->catch_up();
  Lock lock(*this);
  const FlushAtEnd flushing{*this};
  if (lean_ > 0) --lean_;
  if (!staged_.empty()) {
    bring_staged();
    flush();  // a copy that is not issued holds its room, which may be needed below
  }
  Window& window = window_of_this_thread();
  advance(window, weight.id());
  if (const SlotPtr held = usable_slot(weight); held && held->state == Slot::State::kReady) {
    std::shared_ptr<void> bytes = hand_out(held);  // held: looking ahead does not evict it
    look_ahead(window);
    flush();
    device_->lend(*held, counters);
    counters.hits.fetch_add(1, std::memory_order_relaxed);
    return bytes;
  }
  for (bool planned = false;;) {
    const SlotPtr known = usable_slot(weight);
    const bool asked_now = known == nullptr;
    const Waiter waiter(*this, asked_now ? load(weight, IoPool::Urgency::kNow, nullptr) : known);
    const SlotPtr& slot = waiter.slot;
    if (!planned) {
      const bool is_there = slot->state == Slot::State::kStored;
      (is_there ? counters.hits : counters.misses).fetch_add(1, std::memory_order_relaxed);
      const std::shared_ptr<void> kept = slot->wrapped;  // looking ahead does not evict it
      look_ahead(window);
    }
    planned = true;  // `window` belongs to the lock, which waiting gives up
    flush();
    wait_for(slot, counters, lock);
    if (slot->state == Slot::State::kStaged) {
      bring_staged();
      flush();
    } else if (slot->state == Slot::State::kStored) {
      decode(slot, counters, lock);
    }
    if (slot->state == Slot::State::kReady) {
      device_->lend(*slot, counters);
      return hand_out(slot);
    }
    // An early read that failed may have met a passing fault, and another thread
    // may have dropped the slot meanwhile: ask once more.
    if (!asked_now || slot->state != Slot::State::kFailed) continue;
    if (slot->out_of_order) std::rethrow_exception(slot->out_of_order);
    if (!slot->error.empty()) throw Error(slot->error_kind, slot->error);
  }
}

void Ring::released() {
  if (device_->recording()) return;  // what was captured needed nothing of the ring
  pool_->catch_up();
  Lock lock(*this);
  const FlushAtEnd flushing{*this};
  look_ahead(window_of_this_thread());
  if (!staged_.empty()) bring_staged();
  flush();
}

// The weight's slot, unless a part of its room is still somebody else's.
Ring::SlotPtr Ring::usable_slot(Weight& weight) {
  const SlotPtr slot = weight.in_ring.slot;
  if (slot == nullptr || slot->whole()) return slot;
  if (!grow(slot)) {
    drop(slot);
    return nullptr;
  }
  flush();
  return slot;
}

std::shared_ptr<void> Ring::hand_out(const SlotPtr& slot) {
  std::shared_ptr<void> bytes = slot->wrapped;
  slot->used_at = clock_;
  if (slot->overflow) {
    drop(SlotPtr(slot));
  } else if (slot->weight != nullptr) {
    slots_.splice(slots_.end(), slots_, slot->place);  // most recently used
  }
  return bytes;
}

void Ring::wait_for(const SlotPtr& slot, Counters& counters, Lock& lock) {
  if (slot->state != Slot::State::kLoading) return;
  const HostSpan span("stalls", slot->name);
  const bool timed = device_->waits(*slot);
  const auto start = std::chrono::steady_clock::now();
  pool_->hurry();
  const auto run_next = [&] {
    const Unlocked other_threads_go_on(lock);
    return pool_->run_next();
  };
  while (slot->state == Slot::State::kLoading) {
    if (run_next()) continue;
    while (slot->state == Slot::State::kLoading) lock.wait(*part_done_);
  }
  if (timed) return;
  const auto waited = std::chrono::steady_clock::now() - start;
  counters.stall_ns.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count(),
                              std::memory_order_relaxed);
}

// A thread that was not seen before starts with what the last one knew.
Ring::Window& Ring::window_of_this_thread() {
  const auto id = std::this_thread::get_id();
  if (id == latest_thread_) {
    latest_window_->used_at = ++clock_;
    return *latest_window_;
  }
  auto found = windows_.find(id);
  if (found == windows_.end()) {
    const auto older = [](const auto& a, const auto& b) {
      return a.second.used_at < b.second.used_at;
    };
    AccessTrace known;
    if (!windows_.empty()) {
      known = std::max_element(windows_.begin(), windows_.end(), older)->second.trace;
    }
    if (windows_.size() >= kMaxWindows) {
      auto oldest = std::min_element(windows_.begin(), windows_.end(), older);
      forget_predictions(oldest->second);
      windows_.erase(oldest);
    }
    found = windows_.emplace(id, Window()).first;
    found->second.trace = std::move(known);
  }
  found->second.used_at = ++clock_;
  latest_thread_ = id;
  latest_window_ = &found->second;
  return *latest_window_;
}

void Ring::suggest(Weight& weight, uint64_t next) {
  Lock lock(*this);
  weight.in_ring.next = next;
}

void Ring::advance(Window& window, uint64_t id) {
  if (window.latest == id) return;
  window.latest = id;
  const bool learned = window.trace.record(id);
  const bool guessed = !window.ahead.empty() && window.ahead.front() == id;
  if (!learned && !guessed) return forget_predictions(window);
  if (window.ahead.empty()) return;
  const auto found = weights_.find(window.ahead.front());
  if (found != weights_.end()) --found->second->in_ring.wanted;
  window.ahead.pop_front();
  if (learned) return;
  // Guesses so far; what was learned by now may say otherwise.
  for (size_t i = 0; i < window.ahead.size(); ++i) {
    const auto known = window.trace.predict(i);
    if (known && *known != window.ahead[i]) return forget_predictions(window);
  }
}

// What follows the access `last`, after all that is under way in the window.
std::optional<uint64_t> Ring::expected_after(const Window& window, uint64_t last) const {
  const size_t ahead = window.ahead.size();
  if (window.trace.period() > 0) {
    return ahead < window.trace.period() ? window.trace.predict(ahead) : std::nullopt;
  }
  const auto found = weights_.find(last);
  if (found == weights_.end() || ahead >= weights_.size()) return std::nullopt;
  const uint64_t next = found->second->in_ring.next;
  if (next == 0 || next == window.latest) return std::nullopt;
  return next;
}

void Ring::forget_predictions(Window& window) {
  for (const uint64_t id : window.ahead) {
    const auto found = weights_.find(id);
    if (found != weights_.end()) --found->second->in_ring.wanted;
  }
  window.ahead.clear();
  for (const SlotPtr& slot : std::exchange(window.growing, {})) {
    if (!slot->whole()) drop(slot);  // else somebody may be waiting for it
  }
}

// A prediction never fails an operator. Whoever needs such a weight asks for it again, and is told.
void Ring::look_ahead(Window& window) {
  try {
    ask_ahead(window);
  } catch (const std::exception&) {
  }
}

void Ring::ask_ahead(Window& window) {
  grow_all(window);
  uint64_t last = window.ahead.empty() ? window.latest : window.ahead.back();
  while (window.growing.size() < kGrowing) {
    const std::optional<uint64_t> id = expected_after(window, last);
    if (!id) return;
    const auto found = weights_.find(*id);
    if (found != weights_.end()) {
      Weight& weight = *found->second;
      const SlotPtr held = weight.in_ring.slot;
      if (held != nullptr && !may_stay(*held)) return;
      if (held == nullptr && device_->is_host() && weight.decodes_memory()) {
        if (window.ahead.size() >= kFarAhead) return;
      } else if (held == nullptr) {
        const SlotPtr slot = load(weight, IoPool::Urgency::kAhead, &window);
        if (slot == nullptr) return;
        if (!slot->whole()) window.growing.push_back(slot);
      }
      ++weight.in_ring.wanted;
    }
    window.ahead.push_back(*id);
    last = *id;
  }
}

// Null when there is no room and nobody waits for it.
Ring::SlotPtr Ring::load(Weight& weight, IoPool::Urgency urgency, const Window* window) {
  auto slot = std::make_shared<Slot>(weight, weight.source());
  const Source& source = slot->source;
  let_go_.push_back(source);  // the slot's may be the last one if this gives up below
  const Donor& donor = *source.donor;
  const uint64_t bytes = source.size();
  const bool host = device_->is_host();
  const bool by_device = device_->brings(donor);
  const uint64_t phase = donor.phase() % source.alignment == 0 ? donor.phase() : 0;
  if (host && source.decodes_memory()) {
    expect_decoded(room_for(bytes));
    slot->encoded = source.donor->host();
    slot->cheap = true;
    slot->state = Slot::State::kStored;
    enter(slot, weight);
    return slot;
  }
  if (!host && !by_device) slot->staged = device_->staging(round_up(phase + donor.size(), kPage));
  const bool apart = source.decoder != nullptr && !source.decoder->in_place();
  const uint64_t data_phase = host && !apart ? phase : 0;
  const uint64_t stored_phase = host && apart ? donor.phase() : 0;
  const uint64_t stored = apart ? room_for(stored_phase + donor.size()) : 0;
  uint64_t own = room_for(data_phase + bytes);
  const bool decoded_room_later = host && apart && is_large(own);
  if (decoded_room_later) {
    expect_decoded(own);
    own = 0;
  }
  slot->room = find_room(own + stored, urgency, window, decoded_room_later);
  if (slot->room == nullptr && urgency == IoPool::Urgency::kAhead) return nullptr;
  slot->overflow = slot->room == nullptr;
  std::shared_ptr<void> block = slot->room;
  std::byte* begin = nullptr;
  if (slot->overflow) {
    weight.counters().overflows.fetch_add(1, std::memory_order_relaxed);
    const std::shared_ptr<std::byte> ordinary = ordinary_memory(own + stored);
    begin = ordinary.get();
    block = ordinary;
  } else {
    begin = slot->room->data();
  }
  if (apart) slot->stored = begin + own + stored_phase;
  if (!decoded_room_later) slot->data = begin + data_phase;
  if (host && source.decoder != nullptr) slot->encoded = slot->landing();
  slot->wrapped = decoded_room_later
                      ? device_->wrap(*slot, slot->stored, donor.size(), std::move(block))
                      : device_->wrap(*slot, slot->data, bytes, std::move(block));
  enter(slot, weight);
  if (slot->staged != nullptr) slot->staged_data = slot->staged->data + phase;
  if (!host && slot->whole()) fill(slot, {0, donor.size()});
  grow(slot);
  if (by_device) return slot;
  try {
    queue_reads(slot, host ? slot->landing() : slot->staged_data,
                host && apart ? stored_phase : phase, urgency);
  } catch (...) {  // nobody would fill it
    drop(slot);
    throw;
  }
  return slot;
}

void Ring::enter(const SlotPtr& slot, Weight& weight) {
  slot->place = slots_.insert(slots_.end(), slot);
  weight.in_ring.slot = slot;
  count_bytes(weight.counters(), *slot->source.donor);
}

// What readers brought to host memory goes on to the device.
void Ring::bring_staged() {
  for (auto next = staged_.begin(); next != staged_.end();) {
    const SlotPtr slot = *next;
    if (!slot->whole()) {
      ++next;
      continue;
    }
    next = staged_.erase(next);
    slot->state = Slot::State::kLoading;
    try {
      device_->bring(slot, {0, slot->source.donor->size()});
    } catch (const std::exception& refused) {  // this thread may want another weight
      fail(slot, ErrorKind::kFetch, refused.what());
    }
  }
}

void Ring::fail(const SlotPtr& slot, ErrorKind kind, const std::string& why) {
  slot->state = Slot::State::kFailed;
  slot->error = could_not_bring(kind, slot->name, *slot->source.donor, why).what();
  slot->error_kind = kind;
  drop(slot);
  part_done_->notify_all();
}

void Ring::flush() {
  std::vector<SlotPtr> failed;
  std::exception_ptr out_of_order;
  try {
    device_->flush(&failed);
  } catch (...) {
    out_of_order = std::current_exception();
  }
  for (const SlotPtr& slot : failed) {
    if (slot->weight == nullptr) continue;
    slot->out_of_order = out_of_order;
    fail(slot, ErrorKind::kFetch, slot->error);
  }
  part_done_->notify_all();
  // This error is the device's own and concerns no weight, so it is not wrapped in ours.
  if (out_of_order) std::rethrow_exception(out_of_order);
}

// Bytes for a part of a slot that is its own now.
void Ring::fill(const SlotPtr& slot, Range part) {
  try {
    if (slot->staged != nullptr) return device_->took(*slot);
    const uint64_t stored = slot->source.donor->size();
    if (slot->source.decoder != nullptr) {  // decoded as a whole
      if (!slot->whole() || std::exchange(slot->asked, true)) return;
      part = {0, stored};
    }
    device_->bring(slot, {part.begin, std::min(part.end, stored)});
  } catch (...) {  // nobody would ask for that part again
    drop(slot);
    throw;
  }
}

void Ring::drop(const SlotPtr& slot) {
  if (slot->weight == nullptr) return;
  let_go_.push_back(slot->source);
  device_->dropped(*slot);
  slot->weight->in_ring.slot.reset();
  slot->weight = nullptr;
  slots_.erase(slot->place);
  for (auto& [thread, window] : windows_) std::erase(window.growing, slot);
  if (slot->state == Slot::State::kStaged) std::erase(staged_, slot);
  // Readers that are under way write to host memory, so the room on the device is free now. If the
  // device was asked for the copy already, that copy still needs the room.
  const bool asked = slot->parts_left == 0 && slot->state != Slot::State::kStaged;
  if (slot->staged == nullptr || asked) return;
  slot->wrapped.reset();
  slot->room.reset();
}

void Ring::after_fork_in_child() {
  pool_->start_afresh();
  // Threads that waited in the parent are part of the old one's state.
  static_cast<void>(part_done_.release());
  part_done_ = std::make_unique<std::condition_variable>();
  for (auto slot = slots_.begin(); slot != slots_.end();) {
    const SlotPtr current = *slot++;
    if (current->state == Slot::State::kLoading) drop(current);
  }
  mutex_.unlock();
}

void Ring::written(Weight& weight, const std::byte* data) {
  Lock lock(*this);
  const SlotPtr slot = weight.in_ring.slot;
  if (slot != nullptr && (slot->data == nullptr || slot->data != data)) drop(slot);
}

}  // namespace distorch
