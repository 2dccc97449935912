// SPDX-License-Identifier: Apache-2.0
#include "device/device_trace.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cmath>

#include "core/mutex.h"

namespace distorch {
namespace {

// The event from which a trace counts device time.
struct Origin {
  Mutex mutex;
  EventPtr event GUARDED_BY(mutex);
};

Origin& origin = *new Origin;

EventPtr now_on(const c10::Stream& stream) {
  auto event = std::make_shared<c10::Event>(stream.device_type(), c10::EventFlag::BACKEND_DEFAULT);
  event->record(stream);
  return event;
}

double seconds_since(const EventPtr& begin, const EventPtr& event) {
  wait_until_ended(event);
  return begin->elapsedTime(*event) / 1e3;
}

}  // namespace

bool DeviceTime::known() const {
  try {
    return has_ended(needed_) && std::all_of(arrived_.begin(), arrived_.end(), has_ended);
  } catch (const c10::Error&) {
    return true;  // it will not get any later
  }
}

uint64_t DeviceTime::nanoseconds() {
  try {
    double seconds = 0;
    wait_until_ended(needed_);
    for (const EventPtr& event : arrived_) {
      seconds = std::max(seconds, seconds_since(needed_, event));
    }
    return static_cast<uint64_t>(std::llround(seconds * 1e9));
  } catch (const c10::Error&) {
    return 0;
  }
}

struct DeviceSpan::Open {
  c10::Stream stream;
  SpanText text;
  EventPtr begin, start;
};

void DeviceSpan::open(const c10::Stream& stream, SpanText text, EventPtr start) {
  EventPtr begin;
  {
    const MutexLock lock(origin.mutex);
    begin = origin.event;
  }
  if (begin == nullptr || begin->device_type() != stream.device_type()) return;
  if (start == nullptr) start = now_on(stream);
  open_ = std::make_shared<Open>(Open{stream, std::move(text), begin, std::move(start)});
}

DeviceSpan::~DeviceSpan() {
  if (open_ == nullptr) return;
  try {
    TraceLog::instance().add_later([open = open_, end = now_on(open_->stream)]() -> TraceSpan {
      const SpanText& text = open->text;
      return {text.track, text.name, seconds_since(open->begin, open->start),
              seconds_since(open->begin, end), text.bytes};
    });
  } catch (const std::exception&) {
    // The device is gone, and its time with it; or there is no memory for one span more.
  }
}

void start_trace(const std::string& name) {
  const c10::Device device(name);
  const MutexLock lock(origin.mutex);
  origin.event.reset();
  if (!device.is_cpu()) {
    const c10::impl::VirtualGuardImpl guard(device.type());
    const c10::Stream stream = guard.getStream(device);
    guard.synchronizeStream(stream);
    origin.event = now_on(stream);
  }
  TraceLog::instance().start();
}

}  // namespace distorch
