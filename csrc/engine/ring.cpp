#include "engine/ring.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <utility>

#include "engine/trace_log.h"

namespace distorch {
namespace {

// One read of an I/O thread. Each read that ends wakes a thread, which costs
// the computation on the other cores more than the read itself.
constexpr uint64_t kPartBytes = 4 << 20;
constexpr size_t kMaxWindows = 32;  // threads whose order is remembered

Error could_not_bring(ErrorKind kind, const std::string& name, const Donor& donor,
                      const std::string& why) {
  return Error(kind, "weight '" + name + "' (" + std::to_string(donor.size()) +
                         " bytes) could not be brought from " + donor.describe() + ": " + why);
}

// One part of a weight, with errors that name the whole.
void read_part(const Donor& donor, const std::string& name, uint64_t begin, uint64_t end,
               std::byte* into) {
  const HostSpan span("reads", name, end - begin);
  try {
    donor.read(begin, end - begin, into, true);
  } catch (const Error& error) {
    throw could_not_bring(error.kind(), name, donor, error.what());
  }
}

// Memory of its own for each thread that decodes, as large as it ever had to be.
std::byte* scratch_memory(uint64_t bytes) {
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<std::byte, Free> memory;
  thread_local uint64_t room = 0;
  if (room < bytes) {
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(kPage, round_up(bytes, kPage))));
    room = bytes;
  }
  return memory.get();
}

// Rows [begin, end) of a weight that is not kept as it is.
void decode_part(const Source& source, const std::string& name, uint64_t begin, uint64_t end,
                 std::byte* into) {
  const Decoder& decoder = *source.decoder;
  const uint64_t first = begin * decoder.stored_row(), last = end * decoder.stored_row();
  const std::byte* stored = source.donor->host();
  if (stored != nullptr) {
    stored += first;
  } else {
    const uint64_t lead = (source.donor->phase() + first) % kPage;
    std::byte* memory = scratch_memory(lead + last - first + kPage) + lead;
    read_part(*source.donor, name, first, last, memory);
    stored = memory;
  }
  const HostSpan span("decodes", name, last - first);
  try {
    decoder.decode(begin, end, stored, into + begin * decoder.decoded_row());
  } catch (const Error& error) {
    throw could_not_bring(error.kind(), name, *source.donor, error.what());
  }
}

void count_bytes(Counters& counters, const Donor& donor) {
  const std::vector<Extent> extents = donor.extents();
  for (const Extent& extent : extents) counters.travelled(extent.place, extent.bytes);
  if (extents.empty()) counters.travelled(donor.tier(), donor.size());
}

}  // namespace

struct Ring::Region {
  Region(std::shared_ptr<std::byte> memory, uint64_t bytes, uint64_t granule)
      : memory(std::move(memory)), arena(bytes, granule) {}
  std::shared_ptr<std::byte> memory;
  Arena arena;
};

Ring::Ring(std::unique_ptr<RingDevice> device, size_t io_threads)
    : device_(std::move(device)), pool_(io_threads) {}

Ring::~Ring() = default;

void Ring::enlist(Weight& weight) {
  Lock lock(mutex_);
  weights_.emplace(weight.id(), &weight);
}

void Ring::delist(Weight& weight) {
  Lock lock(mutex_);
  weights_.erase(weight.id());
  if (weight.in_ring.slot != nullptr) drop(SlotPtr(weight.in_ring.slot));
}

uint64_t Ring::capacity() const {
  Lock lock(mutex_);
  return capacity_;
}

uint64_t Ring::used() const {
  Lock lock(mutex_);
  return region_ ? region_->arena.used() : 0;
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

// Slots of the old region live on until their last holder lets go.
void Ring::resize() {
  uint64_t wanted = 0;
  for (const auto& [ticket, bytes] : reservations_) wanted = std::max(wanted, bytes);
  wanted = round_up(wanted, kPage);
  if (wanted == capacity_) return;
  while (!slots_.empty()) drop(SlotPtr(slots_.front()));
  for (auto& [thread, window] : windows_) forget_predictions(window);
  region_.reset();
  capacity_ = wanted;
}

std::shared_ptr<void> Ring::acquire(Weight& weight) {
  Counters& counters = weight.counters();
  Lock lock(mutex_);
  if (!staged_.empty()) bring_staged();
  Window& window = window_of_this_thread();
  advance(window, weight.id());
  if (const SlotPtr& slot = weight.in_ring.slot; slot && slot->state == Slot::State::kReady) {
    const SlotPtr held = slot;
    std::shared_ptr<void> bytes = hand_out(held);  // held: looking ahead does not evict it
    look_ahead(window);
    flush();
    device_->lend(*held);
    counters.hits.fetch_add(1, std::memory_order_relaxed);
    return bytes;
  }
  counters.misses.fetch_add(1, std::memory_order_relaxed);
  for (bool planned = false;;) {
    SlotPtr slot = weight.in_ring.slot;
    const bool asked_now = slot == nullptr;
    if (asked_now) slot = load(weight, IoPool::Urgency::kNow);
    if (!planned) look_ahead(window);
    planned = true;  // `window` belongs to the lock, which waiting gives up
    flush();
    wait_for(slot, counters, lock);
    if (slot->state == Slot::State::kStaged) {
      bring_staged();
      flush();
    }
    if (slot->state == Slot::State::kReady) {
      device_->lend(*slot);
      return hand_out(slot);
    }
    // An early read that failed may have met a passing fault: ask once more.
    if (asked_now) throw Error(slot->error_kind, slot->error);
  }
}

void Ring::released() {
  Lock lock(mutex_);
  look_ahead(window_of_this_thread());
  flush();
}

std::shared_ptr<void> Ring::hand_out(const SlotPtr& slot) {
  std::shared_ptr<void> bytes = slot->wrapped;
  if (slot->overflow) {
    drop(SlotPtr(slot));
  } else if (slot->weight != nullptr) {
    slots_.splice(slots_.end(), slots_, slot->place);  // most recently used
  }
  return bytes;
}

void Ring::wait_for(const SlotPtr& slot, Counters& counters, Lock& lock) {
  if (slot->state != Slot::State::kLoading) return;
  const HostSpan span("stalls", slot->weight != nullptr ? slot->weight->name() : "");
  const auto start = std::chrono::steady_clock::now();
  pool_.hurry();
  part_done_->wait(lock, [&] { return slot->state != Slot::State::kLoading; });
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
    found = windows_.emplace(id, Window{std::move(known), 0, {}, 0}).first;
  }
  found->second.used_at = ++clock_;
  latest_thread_ = id;
  latest_window_ = &found->second;
  return *latest_window_;
}

void Ring::suggest(Weight& weight, uint64_t next) {
  Lock lock(mutex_);
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
}

void Ring::look_ahead(Window& window) {
  for (uint64_t last = window.ahead.empty() ? window.latest : window.ahead.back();;) {
    const std::optional<uint64_t> id = expected_after(window, last);
    if (!id) return;
    const auto found = weights_.find(*id);
    if (found != weights_.end()) {
      Weight& weight = *found->second;
      if (weight.in_ring.slot == nullptr && load(weight, IoPool::Urgency::kAhead) == nullptr) {
        return;
      }
      ++weight.in_ring.wanted;
    }
    window.ahead.push_back(*id);
    last = *id;
  }
}

// Null when there is no room and nobody waits for it.
Ring::SlotPtr Ring::load(Weight& weight, IoPool::Urgency urgency) {
  const Source source = weight.source();
  const Donor& donor = *source.donor;
  const uint64_t bytes = source.size();
  const bool by_device = device_->brings(donor);
  uint64_t phase = donor.phase() % weight.alignment() == 0 ? donor.phase() : 0;
  std::shared_ptr<Staged> staging;
  if (!by_device) staging = device_->staging(round_up(phase + donor.size(), kPage));
  const bool by_readers = !by_device && staging == nullptr;
  const uint64_t slot_phase = by_readers && source.decoder == nullptr ? phase : 0;
  bool overflow = false;
  std::byte *block_data = nullptr, *stored = nullptr;
  auto block = find_room(slot_phase + bytes, urgency, &block_data, &overflow);
  if (block == nullptr) return nullptr;
  std::shared_ptr<void> stored_block;
  if (source.decoder != nullptr && !by_readers && !source.decoder->in_place()) {
    stored_block = find_room(donor.size(), urgency, &stored, &overflow);
    if (stored_block == nullptr) return nullptr;
  }
  auto slot = std::make_shared<Slot>();
  slot->data = block_data + slot_phase;
  slot->wrapped = device_->wrap(slot->data, bytes, std::move(block));
  slot->weight = &weight;
  slot->decoder = source.decoder;
  slot->stored = stored;
  slot->stored_block = std::move(stored_block);
  slot->overflow = overflow;
  slot->place = slots_.insert(slots_.end(), slot);
  weight.in_ring.slot = slot;
  count_bytes(weight.counters(), donor);
  if (overflow) weight.counters().overflows.fetch_add(1, std::memory_order_relaxed);
  if (by_device) {
    device_->bring(slot, donor);
  } else if (staging != nullptr) {
    slot->staged_data = staging->data + phase;
    slot->staged = std::move(staging);
    queue_reads(slot, weight.name(), source.donor, slot->staged_data, phase, urgency);
  } else if (source.decoder != nullptr) {
    queue_decoding(slot, weight.name(), source, urgency);
  } else {
    queue_reads(slot, weight.name(), source.donor, slot->data, phase, urgency);
  }
  return slot;
}

// What readers brought to host memory goes on to the device.
void Ring::bring_staged() {
  for (const SlotPtr& slot : std::exchange(staged_, {})) {
    if (slot->weight == nullptr) continue;  // let go of in the meantime
    slot->state = Slot::State::kLoading;
    device_->bring(slot, *slot->weight->donor());
  }
}

void Ring::flush() {
  std::vector<SlotPtr> failed;
  device_->flush(&failed);
  for (const SlotPtr& slot : failed) {
    if (slot->weight == nullptr) continue;
    const Error named = could_not_bring(ErrorKind::kFetch, slot->weight->name(),
                                        *slot->weight->donor(), slot->error);
    slot->error = named.what();
    drop(slot);
  }
}

std::shared_ptr<void> Ring::find_room(uint64_t wanted, IoPool::Urgency urgency, std::byte** data,
                                      bool* overflow) {
  const uint64_t granule = device_->granule();
  const uint64_t bytes = std::max(round_up(wanted, granule), granule);
  try {
    if (bytes <= capacity_) {
      do {
        if (auto block = carve(bytes, data)) return block;
      } while (device_->reclaim() || evict_one());
    }
  } catch (const std::exception&) {  // the device has no room for the ring itself
    if (urgency == IoPool::Urgency::kNow) return overflow_room(bytes, data, overflow);
  }
  if (urgency == IoPool::Urgency::kAhead) return nullptr;
  // Threads that went away may still have predictions that hold room.
  for (auto& [thread, window] : windows_) forget_predictions(window);
  while (bytes <= capacity_ && (device_->reclaim() || evict_one())) {
    if (auto block = carve(bytes, data)) return block;
  }
  return overflow_room(bytes, data, overflow);
}

std::shared_ptr<void> Ring::overflow_room(uint64_t bytes, std::byte** data, bool* overflow) {
  *overflow = true;
  auto block = device_->allocate(bytes);
  *data = block.get();
  return block;
}

std::shared_ptr<void> Ring::carve(uint64_t bytes, std::byte** data) {
  if (region_ == nullptr) {
    region_ = std::make_shared<Region>(device_->allocate(capacity_), capacity_, device_->granule());
  }
  const auto offset = region_->arena.allocate(bytes);
  if (!offset) return nullptr;
  *data = region_->memory.get() + *offset;
  return std::shared_ptr<void>(*data, [region = region_, offset = *offset, bytes](void*) {
    region->arena.free(offset, bytes);
  });
}

// The least recently used slot that no prediction and no op holds.
bool Ring::evict_one() {
  for (const SlotPtr& slot : slots_) {
    if (slot->weight->in_ring.wanted > 0 || slot->state != Slot::State::kReady) continue;
    if (device_->in_use(slot->wrapped)) continue;
    drop(SlotPtr(slot));
    return true;
  }
  return false;
}

void Ring::drop(const SlotPtr& slot) {
  if (slot->weight == nullptr) return;
  device_->dropped(*slot);
  slot->weight->in_ring.slot.reset();
  slot->weight = nullptr;
  slots_.erase(slot->place);
}

// A task of several that fill a slot.
IoPool::Task Ring::part(const SlotPtr& slot, std::function<void()> work) {
  ++slot->parts_left;
  return [this, slot, work = std::move(work)] {
    try {
      work();
      finish_part(slot, nullptr);
    } catch (const Error& error) {
      finish_part(slot, &error);
    }
  };
}

void Ring::queue_reads(const SlotPtr& slot, const std::string& name, std::shared_ptr<Donor> donor,
                       std::byte* into, uint64_t phase, IoPool::Urgency urgency) {
  const uint64_t bytes = donor->size();
  std::vector<IoPool::Task> tasks;
  // Parts end at whole pages of the block, so that no two share one.
  for (uint64_t begin = 0; begin < bytes || tasks.empty();) {
    const uint64_t end =
        std::min(bytes, round_down(begin + phase, kPartBytes) + kPartBytes - phase);
    tasks.push_back(part(slot, [donor, begin, end, into, name] {
      read_part(*donor, name, begin, end, into + begin);
    }));
    begin = end;
    if (begin >= bytes) break;
  }
  pool_.submit(std::move(tasks), urgency);
}

// Each part of the rows is decoded by the thread that brought it.
void Ring::queue_decoding(const SlotPtr& slot, const std::string& name, const Source& source,
                          IoPool::Urgency urgency) {
  const Decoder& decoder = *source.decoder;
  const uint64_t row = std::max(decoder.stored_row(), decoder.decoded_row());
  const uint64_t step = std::max<uint64_t>(1, kPartBytes / std::max<uint64_t>(row, 1));
  std::vector<IoPool::Task> tasks;
  for (uint64_t begin = 0; begin < decoder.rows(); begin += step) {
    const uint64_t end = std::min(decoder.rows(), begin + step);
    tasks.push_back(part(slot, [source, begin, end, into = slot->data, name] {
      decode_part(source, name, begin, end, into);
    }));
  }
  pool_.submit(std::move(tasks), urgency);
}

void Ring::finish_part(const SlotPtr& slot, const Error* error) {
  {
    Lock lock(mutex_);
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
      staged_.push_back(slot);
    }
  }
  part_done_->notify_all();
}

void Ring::after_fork_in_child() {
  pool_.start_afresh();
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
  Lock lock(mutex_);
  const SlotPtr slot = weight.in_ring.slot;
  if (slot != nullptr && slot->data != data) drop(slot);
}

}  // namespace distorch
