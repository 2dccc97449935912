// SPDX-License-Identifier: Apache-2.0
// The simulator's own controls, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "core/virtual_reads.h"
#include "sim/device.h"
#include "sim/memory.h"

namespace py = pybind11;
using namespace distorch::sim;  // NOLINT: this file is nothing else

namespace {

Mode mode_named(const std::string& name) {
  if (name == "deferred") return Mode::kDeferred;
  if (name == "eager") return Mode::kEager;
  if (name == "dry") return Mode::kDry;
  throw std::invalid_argument("mode=" + name + ": expected deferred, eager or dry");
}

void configure(int devices, uint64_t memory, double flops, double memory_bandwidth,
               const std::vector<std::tuple<int, int, double, double>>& links,
               const std::vector<std::vector<size_t>>& shared, const std::string& mode,
               double disk_rate, double disk_latency) {
  Config config{devices, memory,    flops,        memory_bandwidth, {},
                shared,  disk_rate, disk_latency, mode_named(mode)};
  for (const auto& [from, to, rate, latency] : links) {
    config.links.push_back({from, to, rate, latency});
  }
  Machine::instance().configure(std::move(config));
  renew_memories();
  restart_streams();
}

// The disk, for the engine's library, which knows nothing else of this one.
class Disk final : public distorch::ReadClock {
 public:
  void* begin(uint64_t bytes, bool urgent) override {
    return new MarkPtr(Machine::instance().read_file(bytes, urgent));
  }
  bool ended(void* read) override {
    return Machine::instance().reached(*static_cast<MarkPtr*>(read));
  }
  void wait(void* read) override { Machine::instance().await(*static_cast<MarkPtr*>(read)); }
  void forget(void* read) override { delete static_cast<MarkPtr*>(read); }
};
Disk disk;

// See Note [The host and copies]. Streams know pinned memory only.
void host_access(const void* data, uint64_t bytes, bool writes, const char* who) {
  if (!is_pinned(data)) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  Machine::instance().host_access({begin, begin + bytes, writes}, who);
}

std::vector<std::tuple<double, double, std::string, std::string>> timeline() {
  std::vector<std::tuple<double, double, std::string, std::string>> found;
  for (const distorch::VirtualSpan& span : Machine::instance().timeline()) {
    found.emplace_back(span.start, span.end, span.resource, span.label);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_sim, module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def("register_device", [] {
    register_device();
    register_kernels();
  });
  module.def("configure", &configure, released);
  module.def("decode_kernel", [] { return reinterpret_cast<uintptr_t>(&decode_on_sim); });
  module.def("read_clock",
             [] { return reinterpret_cast<uintptr_t>(static_cast<distorch::ReadClock*>(&disk)); });
  module.def("host_access", [] { return reinterpret_cast<uintptr_t>(&host_access); });
  module.def("reset", [] { Machine::instance().reset(); }, released);
  module.def("now", [] { return Machine::instance().now(); });
  module.def("host_work", [](double seconds) { Machine::instance().host_work(seconds); });
  module.def("synchronize", [] { Machine::instance().synchronize_all(); }, released);
  module.def("races", [] { return Machine::instance().races(); });
  module.def("timeline", &timeline, released);
  module.def(
      "slow",
      [](int from, int to, double factor, double start, double end) {
        Machine::instance().slow(from, to, factor, start, end);
      },
      released);
  module.def("fail_copy", [](uint64_t nth) { Machine::instance().fail_copy(nth); });
  module.def("fail_alloc", &fail_allocation);
  module.def("fail_device", [](int device) { Machine::instance().fail_device(device); });
  module.def("begin_capture", &begin_capture);
  module.def("end_capture", &end_capture);
  module.def("event_counts", &event_counts);
  module.def("real_address", [](uintptr_t address) {
    return reinterpret_cast<uintptr_t>(real_bytes(reinterpret_cast<const void*>(address)));
  });
  module.def("has_link", [](int from, int to) { return Machine::instance().link(from, to) >= 0; });
  module.def("memory", [](int device) {
    const MemoryNumbers numbers = memory_numbers(device);
    return std::make_tuple(numbers.capacity, numbers.used, numbers.peak);
  });
  module.def("device_count", [] { return Machine::instance().config().devices; });
  module.def("reset_peak", &reset_peak);
  module.def("set_limit",
             [](int device, uint64_t bytes) { device_memory(device)->set_limit(bytes); });
  module.def("pinned_bytes", &pinned_bytes);
  module.def("is_dry", [] { return Machine::instance().config().mode == Mode::kDry; });
}
