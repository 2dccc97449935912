// SPDX-License-Identifier: Apache-2.0
#include "device/events.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <utility>

#include "core/mutex.h"
#include "device/cuda.h"

namespace distorch {
namespace {

constexpr size_t kMostIdle = 512;  // of each kind; a device far behind holds more for a while

// PyTorch passes the question on since 2.13. Before that, the library of kernels is asked.
template <class Guard>
bool ask_captured(const Guard& guard, const c10::Stream& stream) {
  if constexpr (requires { guard.isStreamCapturing(stream); }) {
    return guard.isStreamCapturing(stream);
  } else {
    const cuda::Kernels* kernels = stream.device().is_cuda() ? cuda_kernels() : nullptr;
    if (kernels == nullptr) return false;
    const c10::OptionalDeviceGuard on_device{stream.device()};
    bool found = false;
    const int error = kernels->is_capturing(
        stream.device_index(), static_cast<CUstream_st*>(stream.native_handle()), &found);
    check_cuda(*kernels, error, "asking whether a graph is being captured");
    return found;
  }
}

// While it lives, what this thread asks of CUDA breaks no capture of another thread.
class BesideCaptures {
 public:
  explicit BesideCaptures(c10::DeviceType type)
      : kernels_(type == c10::kCUDA ? cuda_kernels() : nullptr) {
    if (kernels_ != nullptr) before_ = kernels_->exchange_capture_mode(cuda::kRelaxedCapture);
  }
  ~BesideCaptures() {
    if (kernels_ != nullptr) kernels_->exchange_capture_mode(before_);
  }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  const cuda::Kernels* const kernels_;
  int before_ = 0;
};

}  // namespace

bool has_ended(const EventPtr& event) {
  const BesideCaptures beside(event->device_type());
  return event->query();
}

void wait_until_ended(const EventPtr& event) {
  const BesideCaptures beside(event->device_type());
  event->synchronize();
}

void wait_for_device(c10::Device device) {
  const BesideCaptures beside(device.type());
  c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
}

c10::Stream own_stream(c10::Device device) {
  constexpr int kHigh = -1;
  return c10::impl::VirtualGuardImpl(device.type()).getNewStream(device, kHigh);
}

bool is_captured(const c10::Stream& stream) {
  return ask_captured(c10::impl::VirtualGuardImpl(stream.device_type()), stream);
}

EventPtr EventPool::record(const c10::Stream& stream, Timing timing) {
  const auto kind = static_cast<size_t>(timing);
  std::unique_ptr<c10::Event> event;
  {
    const MutexLock lock(idle_->mutex);
    auto& events = idle_->events[kind];
    if (!events.empty()) {
      event = std::move(events.back());
      events.pop_back();
    }
  }
  if (event == nullptr) {
    event = std::make_unique<c10::Event>(type_, timing == Timing::kTimed
                                                    ? c10::EventFlag::BACKEND_DEFAULT
                                                    : c10::EventFlag::PYTORCH_DEFAULT);
  }
  event->record(stream);  // where that fails, the event is gone with its error
  const auto give_back = [idle = idle_, kind](c10::Event* used) {
    std::unique_ptr<c10::Event> owned(used);
    const MutexLock lock(idle->mutex);
    if (idle->events[kind].size() < kMostIdle) idle->events[kind].push_back(std::move(owned));
  };
  return {event.release(), give_back};
}

}  // namespace distorch
