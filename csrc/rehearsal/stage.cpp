// SPDX-License-Identifier: Apache-2.0
#include "rehearsal/stage.h"

#include <stdexcept>
#include <utility>

#include "core/alignment.h"

namespace distorch {
namespace {

// No process has memory this low in so large a range, but none of these addresses is used anyway.
constexpr uint64_t kFirstAddress = uint64_t{1} << 40;

}  // namespace

Stage::Stage(const Script& script)
    : script_(script),
      compute_(time_.add_resource("compute", 1.0)),
      disk_(time_.add_resource("disk", script.disk_rate, script.disk_latency)),
      compute_stream_(new_stream("compute " + script.compute)),
      next_address_(kFirstAddress) {
  for (const double rate : script.groups) time_.add_group(rate);
  for (const Script::Link& link : script.links) {
    if (link.from == script.compute) {
      links_[link.from] = {compute_, 1 / link.rate};
    } else {
      links_[link.from] = {time_.add_resource(link.from, link.rate, link.latency, link.group), 1};
    }
  }
  for (uint32_t i = 0; i < script.readers; ++i) readers_.push_back(new_stream("reads"));
  for (uint32_t i = 0; i < script.urgent_readers; ++i) {
    urgent_readers_.push_back(new_stream("reads"));
  }
}

int Stage::new_stream(std::string track) {
  tracks_.push_back(std::move(track));
  return time_.add_stream();
}

const Stage::Link& Stage::link_from(const std::string& place) const {
  const auto found = links_.find(place);
  if (found != links_.end()) return found->second;
  throw std::invalid_argument("there is no link from " + place + " to " + script_.compute);
}

void Stage::run(int stream, std::string name, int resource, double amount) {
  time_.host_works(script_.issue_seconds);
  time_.issue(stream, {std::move(name), resource, amount, nullptr, nullptr});
}

void Stage::compute(std::string name, Time seconds, uint64_t operators) {
  run(compute_stream_, std::move(name), compute_, seconds);
  time_.host_works(static_cast<double>(operators - 1) * script_.issue_seconds);
}

void Stage::copy(int stream, const std::string& name, const std::string& place, uint64_t bytes) {
  const Link& link = link_from(place);
  run(stream, name, link.resource, static_cast<double>(bytes) * link.per_byte);
}

MarkPtr Stage::record(int stream) {
  time_.host_works(script_.event_seconds);
  auto mark = std::make_shared<Mark>();
  time_.record(stream, mark);
  return mark;
}

void Stage::wait(int stream, const MarkPtr& mark) {
  time_.host_works(script_.event_seconds);
  time_.wait(stream, mark);
}

std::shared_ptr<std::byte> Stage::no_memory(uint64_t bytes) {
  const uint64_t address = next_address_;
  next_address_ += round_up_room(bytes, kPage);
  return {reinterpret_cast<std::byte*>(address), [](std::byte*) {}};
}

void* Stage::begin(uint64_t bytes, bool urgent) {
  std::deque<int>& readers = urgent ? urgent_readers_ : readers_;
  const int reader = readers.front();
  readers.pop_front();
  readers.push_back(reader);
  time_.issue(reader, {"read", disk_, static_cast<double>(bytes), nullptr, nullptr});
  auto mark = std::make_unique<MarkPtr>(std::make_shared<Mark>());
  time_.record(reader, *mark);
  return mark.release();
}

bool Stage::ended(void* read) {
  time_.play_to_host();
  return (*static_cast<MarkPtr*>(read))->done;
}

void Stage::wait(void* read) { time_.await(*static_cast<MarkPtr*>(read)); }

void Stage::forget(void* read) { delete static_cast<MarkPtr*>(read); }

}  // namespace distorch
