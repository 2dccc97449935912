// SPDX-License-Identifier: Apache-2.0
#include "sim/machine.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace distorch::sim {
namespace {

constexpr size_t kQueueLimit = 4096;  // a longer queue holds the host back
constexpr double kSameTime = 1e-12;   // seconds: ends this close are one

std::string place_name(int device) {
  return device == kHost ? "cpu" : "sim:" + std::to_string(device);
}

}  // namespace

Machine& Machine::instance() {
  static Machine& machine = *new Machine;
  return machine;
}

void Machine::configure(Config config) {
  Lock lock(mutex_);
  run_all();
  config_ = std::move(config);
  resources_.clear();
  group_rates_.clear();
  link_ids_.clear();
  for (int device = 0; device < config_.devices; ++device) {
    resources_.push_back({place_name(device), 1.0, 0, -1});
  }
  for (const LinkConfig& link : config_.links) {
    link_ids_[{link.from, link.to}] = static_cast<int>(resources_.size());
    resources_.push_back(
        {place_name(link.from) + "->" + place_name(link.to), link.rate, link.latency, -1});
  }
  for (const auto& group : config_.shared) {
    double rate = 0;
    for (const size_t index : group) {
      Resource& link = resources_[static_cast<size_t>(config_.devices) + index];
      link.group = static_cast<int>(group_rates_.size());
      rate = std::max(rate, link.rate);
    }
    group_rates_.push_back(rate);
  }
  resources_.push_back({"disk", config_.disk_rate, config_.disk_latency, -1});
  lost_.assign(static_cast<size_t>(config_.devices), false);
  reset();
}

void Machine::reset() {
  Lock lock(mutex_);
  try {
    run_all();
  } catch (...) {
  }
  pending_ = nullptr;
  host_ = played_ = 0;
  ++epoch_;
  for (Stream& stream : streams_) merge(host_clock_, stream.clock);
  timeline_.clear();
  slow_.clear();
  ledger_.clear_races();
  fail_copy_in_ = 0;
  lost_.assign(lost_.size(), false);
}

Time Machine::now() {
  Lock lock(mutex_);
  return host_;
}

void Machine::host_work(Time seconds) {
  Lock lock(mutex_);
  host_ += seconds;
}

int Machine::new_stream(std::string name) {
  Lock lock(mutex_);
  streams_.emplace_back();
  streams_.back().name = std::move(name);
  streams_.back().own = streams_.size();
  return static_cast<int>(streams_.size()) - 1;
}

int Machine::resource_of_device(int device) const { return device; }

int Machine::link(int from, int to) const {
  Lock lock(mutex_);
  const auto found = link_ids_.find({from, to});
  return found == link_ids_.end() ? -1 : found->second;
}

// A stream's own part of its clock counts what was issued on it.
void Machine::tick(Stream& stream) {
  merge(stream.clock, host_clock_);
  if (stream.clock.size() <= stream.own) stream.clock.resize(stream.own + 1);
  ++stream.clock[stream.own];
}

void Machine::issue(int id, Task task, Time cost) {
  Lock lock(mutex_);
  throw_pending();
  Stream& stream = streams_.at(static_cast<size_t>(id));
  host_ += cost;
  if (stream.queue.size() >= kQueueLimit) {
    run_until(kNever, [&] { return stream.queue.size() < kQueueLimit; });
    host_ = std::max(host_, played_);
  }
  tick(stream);
  for (const Access& access : task.accesses) {
    ledger_.access(access, static_cast<size_t>(id) + 1, stream.clock, task.label);
  }
  stream.queue.push_back({Item::Kind::kTask, host_, std::move(task), nullptr});
  busy_.insert(static_cast<size_t>(id));
}

MarkPtr Machine::record(int id, Time cost) {
  Lock lock(mutex_);
  Stream& stream = streams_.at(static_cast<size_t>(id));
  host_ += cost;
  auto mark = std::make_shared<Mark>();
  mark->epoch = epoch_;
  merge(stream.clock, host_clock_);
  mark->clock = stream.clock;
  stream.queue.push_back({Item::Kind::kRecord, host_, {}, mark});
  busy_.insert(static_cast<size_t>(id));
  return mark;
}

void Machine::wait(int id, const MarkPtr& mark) {
  Lock lock(mutex_);
  Stream& stream = streams_.at(static_cast<size_t>(id));
  host_ += kEventCost;
  merge(stream.clock, mark->clock);
  if (!mark->done) {
    stream.queue.push_back({Item::Kind::kWait, host_, {}, mark});
    busy_.insert(static_cast<size_t>(id));
  }
}

bool Machine::query(const MarkPtr& mark) {
  Lock lock(mutex_);
  host_ += kQueryCost;
  run_to_host();
  if (mark->done) merge(host_clock_, mark->clock);
  return mark->done;
}

bool Machine::query_stream(int id) {
  Lock lock(mutex_);
  host_ += kQueryCost;
  run_to_host();
  Stream& stream = streams_.at(static_cast<size_t>(id));
  if (!stream.queue.empty()) return false;
  merge(host_clock_, stream.clock);
  return true;
}

void Machine::synchronize(const MarkPtr& mark) {
  Lock lock(mutex_);
  run_until(kNever, [&] { return mark->done.load(); });
  if (mark->epoch == epoch_) host_ = std::max(host_, mark->time);
  merge(host_clock_, mark->clock);
  throw_pending();
}

void Machine::synchronize_stream(int id) { synchronize(record(id)); }

void Machine::synchronize_all() {
  Lock lock(mutex_);
  host_ += kEventCost;
  run_all();
  host_ = std::max(host_, played_);
  for (const Stream& stream : streams_) merge(host_clock_, stream.clock);
  throw_pending();
}

MarkPtr Machine::read_file(uint64_t bytes, bool urgent) {
  Lock lock(mutex_);
  while (readers_.size() < 3) readers_.push_back(new_stream("disk"));
  const int stream = readers_[urgent ? 2 : next_reader_++ % 2];
  Task task;
  task.label = "read " + std::to_string(bytes) + " bytes";
  task.resource = static_cast<int>(resources_.size()) - 1;
  task.amount = static_cast<double>(bytes);
  issue(stream, std::move(task), 0);
  return record(stream, 0);
}

bool Machine::reached(const MarkPtr& mark) {
  Lock lock(mutex_);
  run_to_host();
  return mark->done;
}

void Machine::await(const MarkPtr& mark) {
  Lock lock(mutex_);
  run_until(kNever, [&] { return mark->done.load(); });
  if (mark->epoch == epoch_) host_ = std::max(host_, mark->time);
}

void Machine::host_access(Access access, const std::string& label) {
  Lock lock(mutex_);
  if (host_clock_.empty()) host_clock_.resize(1);
  ++host_clock_[0];
  ledger_.access(access, 0, host_clock_, label);
}

void Machine::forget(uintptr_t begin, uintptr_t end) {
  Lock lock(mutex_);
  ledger_.forget(begin, end);
}

std::vector<std::string> Machine::races() {
  Lock lock(mutex_);
  return ledger_.races();
}

std::vector<Span> Machine::timeline() {
  Lock lock(mutex_);
  run_to_host();
  return timeline_;
}

void Machine::slow(int from, int to, double factor, Time start, Time end) {
  Lock lock(mutex_);
  run_to_host();
  slow_.push_back({link(from, to), factor, start, end});
}

void Machine::fail_copy(uint64_t nth) {
  Lock lock(mutex_);
  fail_copy_in_ = nth;
}

void Machine::fail_device(int device) {
  Lock lock(mutex_);
  lost_.at(static_cast<size_t>(device)) = true;
}

void Machine::check_device(int device) {
  Lock lock(mutex_);
  if (device >= 0 && static_cast<size_t>(device) < lost_.size() && lost_[device]) {
    throw std::runtime_error("sim: device " + place_name(device) + " is lost (injected fault)");
  }
}

void Machine::check_copy() {
  Lock lock(mutex_);
  if (fail_copy_in_ > 0 && --fail_copy_in_ == 0) {
    throw std::runtime_error("sim: a copy failed (injected fault)");
  }
}

void Machine::throw_pending() {
  if (pending_ == nullptr) return;
  std::rethrow_exception(std::exchange(pending_, nullptr));
}

// Plays the queues up to `limit`, or until `reached()`, or until nothing is left.
void Machine::run_until(Time limit, const std::function<bool()>& reached) {
  for (;;) {
    while (start_ready()) {
    }
    if (reached()) return;
    std::vector<int> on_resource(resources_.size()), in_group(group_rates_.size());
    for (const size_t index : busy_) {
      const Stream& stream = streams_[index];
      if (!stream.running || stream.flows_from > played_) continue;
      const int resource = stream.queue.front().task.resource;
      ++on_resource[static_cast<size_t>(resource)];
      const int group = resources_[static_cast<size_t>(resource)].group;
      if (group >= 0) ++in_group[static_cast<size_t>(group)];
    }
    Time next = kNever;
    for (const size_t index : busy_) {
      const Stream& stream = streams_[index];
      if (stream.queue.empty()) continue;
      const Item& front = stream.queue.front();
      if (!stream.running) {
        if (front.issued > played_) next = std::min(next, front.issued);
      } else if (stream.flows_from > played_) {
        next = std::min(next, stream.flows_from);
      } else {
        next = std::min(next, played_ + stream.left / rate_of(stream, on_resource, in_group));
      }
    }
    for (const Slow& window : slow_) {
      if (next == kNever) break;
      if (window.start > played_) next = std::min(next, window.start);
      if (window.end > played_) next = std::min(next, window.end);
    }
    if (next == kNever) {
      if (limit != kNever) played_ = std::max(played_, limit);
      return;
    }
    const Time to = std::min(next, limit);
    std::vector<Stream*> ended;
    for (const size_t index : busy_) {
      Stream& stream = streams_[index];
      if (!stream.running || stream.flows_from > played_) continue;
      const double rate = rate_of(stream, on_resource, in_group);
      const Time end = played_ + stream.left / rate;
      stream.left -= rate * (to - played_);
      if (end <= to + kSameTime) ended.push_back(&stream);
    }
    played_ = std::max(played_, to);
    for (Stream* stream : ended) finish(*stream);
    if (to < next) return;
  }
}

// Starts what can start now. True if anything did.
bool Machine::start_ready() {
  bool any = false;
  std::erase_if(busy_, [this](size_t index) { return streams_[index].queue.empty(); });
  const std::vector<size_t> indices(busy_.begin(), busy_.end());
  for (const size_t index : indices) {
    Stream& stream = streams_[index];
    while (!stream.running && !stream.queue.empty() && stream.queue.front().issued <= played_) {
      Item& front = stream.queue.front();
      if (front.kind == Item::Kind::kWait) {
        if (!front.mark->done) break;
        stream.queue.pop_front();
      } else if (front.kind == Item::Kind::kRecord) {
        front.mark->done = true;
        front.mark->time = played_;
        stream.queue.pop_front();
      } else {
        begin(stream, front);
      }
      any = true;
    }
  }
  return any;
}

void Machine::begin(Stream& stream, Item& item) {
  try {
    if (item.task.start) item.task.start();
  } catch (...) {
    if (pending_ == nullptr) pending_ = std::current_exception();
  }
  stream.started = played_;
  stream.running = true;
  if (item.task.resource < 0) {
    finish(stream);
    return;
  }
  stream.flows_from = played_ + resources_[static_cast<size_t>(item.task.resource)].latency;
  stream.left = item.task.amount;
  if (stream.left <= 0 && stream.flows_from <= played_) finish(stream);
}

void Machine::finish(Stream& stream) {
  Task& task = stream.queue.front().task;
  try {
    if (task.end) task.end();
  } catch (...) {
    if (pending_ == nullptr) pending_ = std::current_exception();
  }
  if (task.resource >= 0) {
    timeline_.push_back(
        {stream.started, played_, resources_[static_cast<size_t>(task.resource)].name, task.label});
  }
  stream.running = false;
  stream.queue.pop_front();
}

double Machine::slowed(int resource) const {
  double factor = 1;
  for (const Slow& window : slow_) {
    if ((window.resource == resource || window.resource < 0) && window.start <= played_ &&
        played_ < window.end) {
      factor *= window.factor;
    }
  }
  return factor;
}

// Everything that is active shares alike, on a link and in a group of links.
double Machine::rate_of(const Stream& stream, const std::vector<int>& on_resource,
                        const std::vector<int>& in_group) const {
  const int id = stream.queue.front().task.resource;
  const Resource& resource = resources_[static_cast<size_t>(id)];
  double rate = resource.rate / on_resource[static_cast<size_t>(id)];
  if (resource.group >= 0) {
    const auto group = static_cast<size_t>(resource.group);
    rate = std::min(rate, group_rates_[group] / in_group[group]);
  }
  return rate / slowed(id);
}

}  // namespace distorch::sim
