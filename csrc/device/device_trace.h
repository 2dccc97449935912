// Intervals on a device's streams, for TraceLog.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <memory>
#include <string>

#include "engine/trace_log.h"
#include "engine/weight.h"

namespace distorch {

// Takes the time on a stream from here to its end, if a trace is on. Device
// times are counted from the first event of the trace on that device.
class DeviceSpan {
 public:
  DeviceSpan(const c10::Stream& stream, std::string track, std::string name, uint64_t bytes = 0);
  ~DeviceSpan();
  DeviceSpan(const DeviceSpan&) = delete;
  DeviceSpan& operator=(const DeviceSpan&) = delete;

 private:
  struct Open;
  std::unique_ptr<Open> open_;  // null: nobody traces
};

// Note [How long a stream waits]
// An event on the stream before the operator's wait, and one behind it: what
// lies between them is the stall, and nothing else is. Both are of the stream,
// so the host needs no clock and waits for nothing. Where the host itself has to
// wait (for a reader), the first event is recorded before that, so that a stream
// that runs dry meanwhile is seen to wait. The times are read when they are
// asked for, or when many are known. On CUDA two events in a row are about a
// microsecond apart, which is what a fetch that waited for nothing then counts.

// A point in a stream's work.
struct Moment {
  explicit Moment(const c10::Stream& stream);
  c10::Stream stream;
  std::shared_ptr<c10::Event> event;
};

// The time from one moment to another.
class DeviceTime : public LateTime {
 public:
  DeviceTime(Moment start, Moment end) : start_(std::move(start)), end_(std::move(end)) {}
  bool known() const override;
  uint64_t nanoseconds() override;  // 0 when the device is gone

 private:
  const Moment start_, end_;
};

// Starts a trace; marks the time on the device ("cpu": only the host's).
void start_trace(const std::string& device);

}  // namespace distorch
