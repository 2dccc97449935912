// SPDX-License-Identifier: Apache-2.0
#include "engine/weight.h"

#include <algorithm>
#include <map>
#include <utility>

#include "core/mutex.h"
#include "engine/ring.h"
#include "engine/waiting.h"

namespace distorch {
namespace {

constexpr size_t kAskAfter = 64;     // stalls whose time is not known, before anybody asks
constexpr size_t kMostLater = 8192;  // stalls whose time is not known

std::atomic<uint64_t> next_weight{1};

struct Groups {
  Mutex mutex;
  uint64_t next_id GUARDED_BY(mutex) = 1;
  std::map<uint64_t, std::weak_ptr<Counters>> known GUARDED_BY(mutex);
  std::vector<Counters*> unused GUARDED_BY(mutex);
};

// Never destroyed: weights may outlive every static object.
Groups& groups = *new Groups;

void put_aside(Counters* counters) {
  counters->reset();  // lets go of what devices still know
  const MutexLock lock(groups.mutex);
  groups.known.erase(counters->id);
  groups.unused.push_back(counters);
}

// Some that nobody holds.
Counters* take_unused() {
  const MutexLock lock(groups.mutex);
  if (groups.unused.empty()) return new Counters;
  Counters* taken = groups.unused.back();
  groups.unused.pop_back();
  return taken;
}

}  // namespace

std::shared_ptr<Counters> Counters::make() {
  const std::shared_ptr<Counters> made(take_unused(), &put_aside);
  made->reset();  // of what was counted while nobody held them
  const MutexLock lock(groups.mutex);
  made->id = groups.next_id++;
  groups.known.emplace(made->id, made);
  return made;
}

std::shared_ptr<Counters> Counters::find(uint64_t id) {
  const MutexLock lock(groups.mutex);
  const auto found = groups.known.find(id);
  return found == groups.known.end() ? nullptr : found->second.lock();
}

void Counters::reset() {
  for (auto* counter : {&hits, &misses, &stall_ns, &overflows}) counter->store(0);
  const MutexLock lock(mutex_);
  bytes_.clear();
  later_.clear();
}

void Counters::add_known() {
  while (!later_.empty() && later_.front()->known()) {
    stall_ns += later_.front()->nanoseconds();
    later_.pop_front();
  }
}

void Counters::stalls(std::unique_ptr<LateTime> time) {
  const MutexLock lock(mutex_);
  if (later_.size() >= kAskAfter) add_known();
  if (later_.size() < kMostLater) later_.push_back(std::move(time));
}

uint64_t Counters::known_stall_ns() {
  const MutexLock lock(mutex_);
  add_known();
  return stall_ns;
}

uint64_t Counters::all_stall_ns() {
  std::deque<std::unique_ptr<LateTime>> later;
  {
    const MutexLock lock(mutex_);
    later.swap(later_);
  }
  for (const auto& time : later) stall_ns += time->nanoseconds();  // other threads go on counting
  return stall_ns;
}

void Counters::travelled(const std::string& tier, uint64_t bytes) {
  const MutexLock lock(mutex_);
  bytes_[tier] += bytes;
}

std::map<std::string, uint64_t> Counters::bytes() const {
  const MutexLock lock(mutex_);
  return bytes_;
}

Weight::Weight(std::string name, Source source, std::shared_ptr<Ring> ring,
               std::shared_ptr<Counters> counters)
    : id_(next_weight++),
      name_(std::move(name)),
      ring_(std::move(ring)),
      source_(std::move(source)),
      counters_(counters.get()),
      counters_owner_(std::move(counters)) {
  ring_->enlist(*this);
}

Weight::~Weight() {
  // Without the interpreter's lock: who has the ring's may be waiting for that one.
  waiting([this] { ring_->delist(*this); });
  let_go(std::move(source_));
}

Source Weight::source() const {
  const MutexLock lock(mutex_);
  return source_;
}

void Weight::count_in(std::shared_ptr<Counters> counters) {
  const MutexLock lock(mutex_);
  counters_.store(counters.get(), std::memory_order_release);
  counters_owner_.swap(counters);
}

uint64_t Weight::moves() const {
  const MutexLock lock(mutex_);
  return moves_;
}

bool Weight::move_to(Source source, std::optional<uint64_t> expected) {
  {
    const MutexLock lock(mutex_);
    if (expected && moves_ != *expected) return false;
    std::swap(source_, source);
    ++moves_;
  }
  let_go(std::move(source));
  return true;
}

Source Weight::begin_write() {
  const MutexLock lock(mutex_);
  ++moves_;
  return source_;
}

bool Weight::end_write(const Source& written) {
  const MutexLock lock(mutex_);
  ++moves_;
  return source_.donor == written.donor && source_.decoder == nullptr;
}

void Weight::changed(const std::byte* written) {
  ring_->written(*this, written);
  const MutexLock lock(mutex_);  // not the ring's and ours at once: the ring asks for our source
  ++moves_;
}

// See Note [Copies that a weight adopts].
void Weight::store(const std::byte* whole, uint64_t total, uint64_t begin, uint64_t bytes) {
  const Ring::Write writing(*ring_, *this);
  Source now = begin_write();
  while (now.decoder == nullptr && now.donor->writable() && total == now.donor->size()) {
    now.donor->write(begin, bytes, whole + begin);
    if (end_write(now)) return;
    let_go(std::exchange(now, begin_write()));
  }
  const bool in_memory = now.donor->host() != nullptr;
  std::shared_ptr<Donor> target;
  if (in_memory && now.decoder != nullptr) {
    target = HostDonor::make(total);
  } else {
    target = FileDonor::scratch(total);
  }
  target->write(0, total, whole);
  move_to({std::move(target), nullptr, now.alignment});
}

}  // namespace distorch
