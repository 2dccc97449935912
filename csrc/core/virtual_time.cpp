// SPDX-License-Identifier: Apache-2.0
#include "core/virtual_time.h"

#include <algorithm>

namespace distorch {
namespace {

constexpr size_t kQueueLimit = 4096;  // a longer queue holds the host back
constexpr double kSameTime = 1e-12;   // seconds: ends this close are one

}  // namespace

int VirtualTime::add_group(double rate) {
  group_rates_.push_back(rate);
  return static_cast<int>(group_rates_.size()) - 1;
}

int VirtualTime::add_resource(std::string name, double rate, Time latency, int group) {
  resources_.push_back({std::move(name), rate, latency, group});
  return static_cast<int>(resources_.size()) - 1;
}

void VirtualTime::forget_resources() {
  resources_.clear();
  group_rates_.clear();
}

int VirtualTime::add_stream() {
  streams_.emplace_back();
  return static_cast<int>(streams_.size()) - 1;
}

void VirtualTime::queue(int stream, Item item) {
  streams_.at(static_cast<size_t>(stream)).queue.push_back(std::move(item));
  busy_.insert(static_cast<size_t>(stream));
}

void VirtualTime::issue(int stream, VirtualTask task) {
  const Stream& known = streams_.at(static_cast<size_t>(stream));
  if (known.queue.size() >= kQueueLimit) {
    run_until(kNever, [&] { return known.queue.size() < kQueueLimit; });
    host_ = std::max(host_, played_);
  }
  queue(stream, {Item::Kind::kTask, host_, std::move(task), nullptr});
}

void VirtualTime::record(int stream, const MarkPtr& mark) {
  mark->epoch = epoch_;
  queue(stream, {Item::Kind::kRecord, host_, {}, mark});
}

void VirtualTime::wait(int stream, const MarkPtr& mark) {
  if (!mark->done) queue(stream, {Item::Kind::kWait, host_, {}, mark});
}

void VirtualTime::play_to_host() {
  run_until(host_, [] { return false; });
}

void VirtualTime::await(const MarkPtr& mark) {
  run_until(kNever, [&] { return mark->done.load(); });
  if (mark->epoch == epoch_) host_ = std::max(host_, mark->time);
}

void VirtualTime::await_all() {
  run_until(kNever, [] { return false; });
  host_ = std::max(host_, played_);
}

void VirtualTime::reset() {
  run_until(kNever, [] { return false; });
  failure_ = nullptr;
  host_ = played_ = 0;
  ++epoch_;
  spans_.clear();
  slow_.clear();
}

void VirtualTime::slow(int resource, double factor, Time start, Time end) {
  slow_.push_back({resource, factor, start, end});
}

// --- Playing ---

// Plays the queues up to `limit`, or until `reached()`, or until nothing is left.
template <class Reached>
void VirtualTime::run_until(Time limit, const Reached& reached) {
  for (;;) {
    while (start_ready()) {
    }
    if (reached()) return;
    const Time next = next_event();
    if (next == kNever) {
      if (limit != kNever) played_ = std::max(played_, limit);
      return;
    }
    const Time to = std::min(next, limit);
    std::vector<size_t> ended;
    for (const size_t index : busy_) {
      Stream& stream = streams_[index];
      if (!stream.running || stream.flows_from > played_) continue;
      const double rate = rate_of(stream);
      const Time end = played_ + stream.left / rate;
      stream.left -= rate * (to - played_);
      if (end <= to + kSameTime) ended.push_back(index);
    }
    played_ = std::max(played_, to);
    for (const size_t index : ended) finish(index);
    if (to < next) return;
  }
}

// When anything changes next, with what flows now; kNever: nothing is left. Leaves in
// `on_resource_` and `in_group_` what rate_of() needs.
Time VirtualTime::next_event() {
  on_resource_.assign(resources_.size(), 0);
  in_group_.assign(group_rates_.size(), 0);
  for (const size_t index : busy_) {
    const Stream& stream = streams_[index];
    if (!stream.running || stream.flows_from > played_) continue;
    const auto resource = static_cast<size_t>(stream.queue.front().task.resource);
    ++on_resource_[resource];
    if (const int group = resources_[resource].group; group >= 0) {
      ++in_group_[static_cast<size_t>(group)];
    }
  }
  Time next = kNever;
  for (const size_t index : busy_) {
    const Stream& stream = streams_[index];
    if (stream.queue.empty()) continue;
    if (!stream.running) {
      const Time issued = stream.queue.front().issued;
      if (issued > played_) next = std::min(next, issued);
    } else if (stream.flows_from > played_) {
      next = std::min(next, stream.flows_from);
    } else {
      next = std::min(next, played_ + stream.left / rate_of(stream));
    }
  }
  for (const Slow& window : slow_) {
    if (next == kNever) break;
    if (window.start > played_) next = std::min(next, window.start);
    if (window.end > played_) next = std::min(next, window.end);
  }
  return next;
}

// Starts what can start now. True if anything did.
bool VirtualTime::start_ready() {
  bool any = false;
  std::erase_if(busy_, [this](size_t index) { return streams_[index].queue.empty(); });
  const std::vector<size_t> indices(busy_.begin(), busy_.end());
  for (const size_t index : indices) {
    Stream& stream = streams_[index];
    while (!stream.running && !stream.queue.empty() && stream.queue.front().issued <= played_) {
      const Item& front = stream.queue.front();
      if (front.kind == Item::Kind::kWait) {
        if (!front.mark->done) break;
        stream.queue.pop_front();
      } else if (front.kind == Item::Kind::kRecord) {
        front.mark->time = played_;
        front.mark->done = true;
        stream.queue.pop_front();
      } else {
        begin(index);
      }
      any = true;
    }
  }
  return any;
}

// What a task throws is somebody's to throw later: the queues go on.
void VirtualTime::attempt(const std::function<void()>& action) {
  if (!action) return;
  try {
    action();
  } catch (...) {
    if (failure_ == nullptr) failure_ = std::current_exception();
  }
}

void VirtualTime::begin(size_t index) {
  Stream& stream = streams_[index];
  const VirtualTask& task = stream.queue.front().task;
  attempt(task.start);
  stream.started = played_;
  stream.running = true;
  if (task.resource < 0) return finish(index);
  stream.flows_from = played_ + resources_[static_cast<size_t>(task.resource)].latency;
  stream.left = task.amount;
  if (stream.left <= 0 && stream.flows_from <= played_) finish(index);
}

void VirtualTime::finish(size_t index) {
  Stream& stream = streams_[index];
  VirtualTask& task = stream.queue.front().task;
  attempt(task.end);
  if (task.resource >= 0) {
    spans_.push_back({stream.started, played_, static_cast<int>(index), name_of(task.resource),
                      std::move(task.label), task.amount});
  }
  stream.running = false;
  stream.queue.pop_front();
}

double VirtualTime::slowed(int resource) const {
  double factor = 1;
  for (const Slow& window : slow_) {
    if ((window.resource == resource || window.resource < 0) && window.start <= played_ &&
        played_ < window.end) {
      factor *= window.factor;
    }
  }
  return factor;
}

// Everything that is active shares alike, on a resource and in a group of them.
double VirtualTime::rate_of(const Stream& stream) const {
  const int id = stream.queue.front().task.resource;
  const auto index = static_cast<size_t>(id);
  double rate = resources_[index].rate / on_resource_[index];
  if (resources_[index].group >= 0) {
    const auto group = static_cast<size_t>(resources_[index].group);
    rate = std::min(rate, group_rates_[group] / in_group_[group]);
  }
  return rate / slowed(id);
}

}  // namespace distorch
