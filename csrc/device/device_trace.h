// Intervals on a device's streams, for TraceLog.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <memory>
#include <string>

#include "engine/trace_log.h"

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

// Starts a trace; marks the time on the device ("cpu": only the host's).
void start_trace(const std::string& device);

}  // namespace distorch
