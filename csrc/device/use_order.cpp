// SPDX-License-Identifier: Apache-2.0
#include "device/use_order.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <exception>

namespace distorch {
namespace {

// A stream is gone, or there is no memory for an event. What the stream was given may still run.
void wait_instead(c10::Device device) {
  try {
    wait_for_device(device);
  } catch (const std::exception&) {
    // The device is out of order, and says so at the next fetch.
  }
}

}  // namespace

UseOrder::UseOrder(c10::Device device) : stream_(own_stream(device)), events_(device.type()) {}

void UseOrder::add(const c10::Stream& user) {
  if (is_captured(user)) return;  // an event would become a part of the graph
  add(events_.record(user));
}

void UseOrder::add(const EventPtr& event) {
  event->block(stream_);
  count_.fetch_add(1, std::memory_order_release);
}

Lease::~Lease() {
  for (const c10::Stream& stream : streams_) {
    try {
      order_->add(stream);
    } catch (const std::exception&) {
      wait_instead(stream.device());
    }
  }
}

void Lease::lent_to(const c10::Stream& stream) {
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) {
    streams_.push_back(stream);
  }
}

}  // namespace distorch
