// SPDX-License-Identifier: Apache-2.0
// Events of a device that are used again, and whether a stream is being captured.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <array>
#include <memory>
#include <vector>

#include "core/mutex.h"

namespace distorch {

using EventPtr = std::shared_ptr<c10::Event>;

// Only timed events know how much time lies between them. They cost the device more.
enum class Timing { kUntimed, kTimed };

// The events of one device. The engine records a few of them for each fetch, and to make an event
// takes several times as long as to record one. Safe for every thread. Events may outlive the pool.
class EventPool {
 public:
  explicit EventPool(c10::DeviceType type) : type_(type), idle_(std::make_shared<Idle>()) {}

  // An event recorded on `stream`. It comes back to the pool when its last holder lets it go:
  // streams that were told to wait for it remember the moment, not the event.
  // Throws c10::Error where the device refuses.
  EventPtr record(const c10::Stream& stream, Timing timing = Timing::kUntimed);

 private:
  struct Idle {
    using Events = std::vector<std::unique_ptr<c10::Event>>;
    Mutex mutex;
    std::array<Events, 2> events GUARDED_BY(mutex);  // by Timing
  };

  const c10::DeviceType type_;
  const std::shared_ptr<Idle> idle_;
};

// Ask a device, or wait for it. Another thread may be capturing a graph in CUDA's "global" mode,
// which is PyTorch's default. An ordinary query or wait would break that capture. These functions
// switch the calling thread to the "relaxed" mode meanwhile. They throw c10::Error.
bool has_ended(const EventPtr& event);
void wait_until_ended(const EventPtr& event);
void wait_for_device(c10::Device device);

// A stream for the engine's own work, of high priority. PyTorch keeps a small pool of streams for
// each priority and gives them out in turn, and users take theirs from the default one. From the
// same pool, a stream that a user captures on could be one of ours.
c10::Stream own_stream(c10::Device device);

// Whether what is issued on `stream` is recorded for a graph (CUDA graphs) instead of done.
// Throws c10::Error where the device is out of order.
bool is_captured(const c10::Stream& stream);

}  // namespace distorch
