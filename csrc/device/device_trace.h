// SPDX-License-Identifier: Apache-2.0
// Intervals on a device's streams, for TraceLog.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/events.h"
#include "engine/trace_log.h"
#include "engine/weight.h"

namespace distorch {

// What a span of a trace says beside its times.
struct SpanText {
  std::string track, name;
  uint64_t bytes = 0;
};

// Takes the time on a stream from here to its end, if a trace is on. Device
// times are counted from the first event of the trace on that device.
class DeviceSpan {
 public:
  // `text` makes a SpanText. It is asked only while somebody traces. `start`: a timed event from
  // which the time is taken instead.
  template <class Text>
  DeviceSpan(const c10::Stream& stream, const Text& text, EventPtr start = nullptr) {
    if (TraceLog::instance().active()) open(stream, text(), std::move(start));
  }
  ~DeviceSpan();
  DeviceSpan(const DeviceSpan&) = delete;
  DeviceSpan& operator=(const DeviceSpan&) = delete;

 private:
  struct Open;
  void open(const c10::Stream& stream, SpanText text, EventPtr start);

  std::shared_ptr<Open> open_;  // null: nobody traces
};

// Note [How long a stream waits]
// One event is recorded on the stream before the operator's wait. The copies have
// events behind them anyway. A stall is the time from the former to the last of
// the latter, and zero if the copies ended earlier. So the host needs no clock
// and does not wait. If the host itself has to wait for a reader, the first event
// is recorded before that: the stream may run dry meanwhile, and that is a stall,
// too. The times are read when somebody asks for them, or when many have ended.

// The time from an event on a stream to the last of those that it waits for.
class DeviceTime : public LateTime {
 public:
  DeviceTime(EventPtr needed, std::vector<EventPtr> arrived)
      : needed_(std::move(needed)), arrived_(std::move(arrived)) {}
  bool known() const override;
  uint64_t nanoseconds() override;  // 0 when the device is gone

 private:
  const EventPtr needed_;  // timed, as all of them
  const std::vector<EventPtr> arrived_;
};

// Starts a trace; marks the time on the device ("cpu": only the host's).
void start_trace(const std::string& device);

}  // namespace distorch
