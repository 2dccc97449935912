// SPDX-License-Identifier: Apache-2.0
#include "sim/machine.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace distorch::sim {
namespace {

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
  time_.await_all();
  time_.forget_resources();
  config_ = std::move(config);
  link_ids_.clear();
  for (int device = 0; device < config_.devices; ++device) {
    time_.add_resource(place_name(device), 1.0);
  }
  std::vector<int> group_of(config_.links.size(), -1);
  for (const auto& group : config_.shared) {
    double rate = 0;
    for (const size_t index : group) rate = std::max(rate, config_.links[index].rate);
    const int id = time_.add_group(rate);
    for (const size_t index : group) group_of[index] = id;
  }
  for (size_t index = 0; index < config_.links.size(); ++index) {
    const LinkConfig& link = config_.links[index];
    link_ids_[{link.from, link.to}] =
        time_.add_resource(place_name(link.from) + "->" + place_name(link.to), link.rate,
                           link.latency, group_of[index]);
  }
  disk_ = time_.add_resource("disk", config_.disk_rate, config_.disk_latency);
  lost_.assign(static_cast<size_t>(config_.devices), false);
  reset();
}

void Machine::reset() {
  Lock lock(mutex_);
  time_.reset();
  for (Stream& each : streams_) merge(host_clock_, each.clock);
  ledger_.clear_races();
  fail_copy_in_ = 0;
  lost_.assign(lost_.size(), false);
}

Time Machine::now() {
  Lock lock(mutex_);
  return time_.host();
}

void Machine::host_work(Time seconds) {
  Lock lock(mutex_);
  time_.host_works(seconds);
}

int Machine::new_stream(std::string name) {
  Lock lock(mutex_);
  streams_.push_back({std::move(name), {}});
  return time_.add_stream();
}

int Machine::resource_of_device(int device) const { return device; }

int Machine::link(int from, int to) const {
  Lock lock(mutex_);
  const auto found = link_ids_.find({from, to});
  return found == link_ids_.end() ? -1 : found->second;
}

// A stream's own part of its clock counts what was issued on it.
void Machine::tick(int id) {
  VectorClock& clock = stream(id).clock;
  merge(clock, host_clock_);
  const size_t own = static_cast<size_t>(id) + 1;
  if (clock.size() <= own) clock.resize(own + 1);
  ++clock[own];
}

void Machine::issue(int id, Task task, Time cost) {
  Lock lock(mutex_);
  throw_pending();
  time_.host_works(cost);
  tick(id);
  for (const Access& access : task.accesses) {
    ledger_.access(access, static_cast<size_t>(id) + 1, stream(id).clock, task.label);
  }
  time_.issue(id, std::move(task));
}

MarkPtr Machine::record(int id, Time cost) {
  Lock lock(mutex_);
  time_.host_works(cost);
  auto mark = std::make_shared<Mark>();
  merge(stream(id).clock, host_clock_);
  mark->clock = stream(id).clock;
  time_.record(id, mark);
  return mark;
}

void Machine::wait(int id, const MarkPtr& mark) {
  Lock lock(mutex_);
  time_.host_works(kEventCost);
  merge(stream(id).clock, mark->clock);
  time_.wait(id, mark);
}

bool Machine::query(const MarkPtr& mark) {
  Lock lock(mutex_);
  time_.host_works(kQueryCost);
  time_.play_to_host();
  if (mark->done) merge(host_clock_, mark->clock);
  return mark->done;
}

bool Machine::query_stream(int id) {
  Lock lock(mutex_);
  time_.host_works(kQueryCost);
  time_.play_to_host();
  if (!time_.idle(id)) return false;
  merge(host_clock_, stream(id).clock);
  return true;
}

void Machine::synchronize(const MarkPtr& mark) {
  Lock lock(mutex_);
  time_.await(mark);
  merge(host_clock_, mark->clock);
  throw_pending();
}

void Machine::synchronize_stream(int id) { synchronize(record(id)); }

void Machine::synchronize_all() {
  Lock lock(mutex_);
  time_.host_works(kEventCost);
  time_.await_all();
  for (const Stream& each : streams_) merge(host_clock_, each.clock);
  throw_pending();
}

MarkPtr Machine::read_file(uint64_t bytes, bool urgent) {
  Lock lock(mutex_);
  while (readers_.size() < 3) readers_.push_back(new_stream("disk"));
  const int reader = readers_[urgent ? 2 : next_reader_++ % 2];
  Task task;
  task.label = "read " + std::to_string(bytes) + " bytes";
  task.resource = disk_;
  task.amount = static_cast<double>(bytes);
  issue(reader, std::move(task), 0);
  return record(reader, 0);
}

bool Machine::reached(const MarkPtr& mark) {
  Lock lock(mutex_);
  time_.play_to_host();
  return mark->done;
}

void Machine::await(const MarkPtr& mark) {
  Lock lock(mutex_);
  time_.await(mark);
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

std::vector<VirtualSpan> Machine::timeline() {
  Lock lock(mutex_);
  time_.play_to_host();
  return time_.spans();
}

void Machine::slow(int from, int to, double factor, Time start, Time end) {
  Lock lock(mutex_);
  time_.play_to_host();
  time_.slow(link(from, to), factor, start, end);
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
  if (const std::exception_ptr thrown = time_.take_failure()) std::rethrow_exception(thrown);
}

}  // namespace distorch::sim
