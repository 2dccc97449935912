#include "device/device_trace.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cmath>
#include <mutex>

namespace distorch {
namespace {

using EventPtr = std::shared_ptr<c10::Event>;

// The event from which a trace counts device time.
struct Origin {
  std::mutex mutex;
  EventPtr event;  // guarded by mutex
};

Origin& origin() {
  static Origin& instance = *new Origin;
  return instance;
}

EventPtr now_on(const c10::Stream& stream) {
  auto event = std::make_shared<c10::Event>(stream.device_type(), c10::EventFlag::BACKEND_DEFAULT);
  event->record(stream);
  return event;
}

double seconds_since(const EventPtr& begin, const EventPtr& event) {
  event->synchronize();
  return begin->elapsedTime(*event) / 1e3;
}

}  // namespace

Moment::Moment(const c10::Stream& stream) : stream(stream), event(now_on(stream)) {}

bool DeviceTime::known() const {
  try {
    return end_.event->query();
  } catch (const c10::Error&) {
    return true;  // it will not get any later
  }
}

uint64_t DeviceTime::nanoseconds() {
  try {
    const double seconds = seconds_since(start_.event, end_.event);
    return static_cast<uint64_t>(std::llround(std::max(seconds, 0.0) * 1e9));
  } catch (const c10::Error&) {
    return 0;
  }
}

struct DeviceSpan::Open {
  c10::Stream stream;
  std::string track, name;
  uint64_t bytes;
  EventPtr begin, start;
};

DeviceSpan::DeviceSpan(const c10::Stream& stream, std::string track, std::string name,
                       uint64_t bytes) {
  if (!TraceLog::instance().active()) return;
  EventPtr begin;
  {
    std::lock_guard lock(origin().mutex);
    begin = origin().event;
  }
  if (begin == nullptr || begin->device_type() != stream.device_type()) return;
  open_.reset(new Open{stream, std::move(track), std::move(name), bytes, begin, now_on(stream)});
}

DeviceSpan::~DeviceSpan() {
  if (open_ == nullptr) return;
  EventPtr end;
  try {
    end = now_on(open_->stream);
  } catch (const c10::Error&) {
    return;  // the device is gone, and its time with it
  }
  std::shared_ptr<Open> open = std::move(open_);
  TraceLog::instance().add_later([open, end]() -> TraceSpan {
    return {open->track, open->name, seconds_since(open->begin, open->start),
            seconds_since(open->begin, end), open->bytes};
  });
}

void start_trace(const std::string& name) {
  const c10::Device device(name);
  std::lock_guard lock(origin().mutex);
  origin().event.reset();
  if (!device.is_cpu()) {
    const c10::impl::VirtualGuardImpl guard(device.type());
    const c10::Stream stream = guard.getStream(device);
    guard.synchronizeStream(stream);
    origin().event = now_on(stream);
  }
  TraceLog::instance().start();
}

}  // namespace distorch
