// SPDX-License-Identifier: Apache-2.0
// What Python needs beside the operators: numbers and settings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <cstring>
#include <memory>
#include <vector>

#include "bindings/errors.h"
#include "bindings/frames.h"
#include "bindings/placement.h"
#include "bindings/rehearsal.h"
#include "bindings/turns.h"
#include "core/checksum.h"
#include "core/file.h"
#include "core/host_access.h"
#include "core/virtual_reads.h"
#include "device/cuda.h"
#include "device/decode.h"
#include "device/device_donor.h"
#include "device/device_trace.h"
#include "device/devices.h"
#include "engine/waiting.h"

namespace py = pybind11;
using distorch::Counters;
using distorch::Reservation;

namespace {

// distorch/_library.py reads this from the file, before the library is loaded.
[[gnu::used]] constexpr char kBuiltFor[] = "distorch was built for torch " TORCH_VERSION;

// (track, name, start, end, bytes) of every interval; seconds.
std::vector<std::tuple<std::string, std::string, double, double, uint64_t>> stopped_trace() {
  std::vector<std::tuple<std::string, std::string, double, double, uint64_t>> found;
  for (const distorch::TraceSpan& span : distorch::TraceLog::instance().stop()) {
    found.emplace_back(span.track, span.name, span.start, span.end, span.bytes);
  }
  return found;
}

// `tensor.data = data`, also between devices where PyTorch refuses. The version of `tensor` is
// kept. The GIL is held until the change is whole, so that Python code of other threads sees the
// old tensor or the new one. Operators that already run do not hold the GIL: see
// Note [Weights that move while they are used].
void set_data(const py::handle& tensor, const py::handle& data) {
  TORCH_CHECK_TYPE(THPVariable_Check(tensor.ptr()) && THPVariable_Check(data.ptr()),
                   "set_data takes two tensors");
  const at::Tensor& self = THPVariable_Unpack(tensor.ptr());
  const at::Tensor& other = THPVariable_Unpack(data.ptr());
  // The end of the old storage may give up the GIL: not before the change is whole.
  const c10::Storage old = self.has_storage() ? self.storage() : c10::Storage();
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  if (impl->has_compatible_shallow_copy_type(other.key_set())) {
    self.set_data(other);
  } else {
    impl->shallow_copy_from(other.getIntrusivePtr());
  }
}

// An object of C++ that lives as long as the capsule does. Objects of pybind11's classes are not
// used: where there is no memory to register one, pybind11 ends the process or frees it twice.
template <typename T>
py::capsule capsule_of(std::unique_ptr<T> object) {
  py::capsule made(object.get(), [](void* held) { delete static_cast<T*>(held); });
  static_cast<void>(object.release());
  return made;
}

Counters& counters_in(const py::capsule& capsule) {
  return **capsule.get_pointer<std::shared_ptr<Counters>>();
}

// (fetches, hits, stall in seconds, overflows, bytes by tier) since the last reset. `wait`: for the
// devices, so that every stall is counted.
std::tuple<uint64_t, uint64_t, double, uint64_t, std::map<std::string, uint64_t>> read_counters(
    const py::capsule& capsule, bool wait) {
  Counters& counters = counters_in(capsule);
  const py::gil_scoped_release released;  // a device may be slow to answer
  const uint64_t stall_ns = wait ? counters.all_stall_ns() : counters.known_stall_ns();
  const double stall = 1e-9 * static_cast<double>(stall_ns);
  const uint64_t hits = counters.hits.load();
  return {hits + counters.misses.load(), hits, stall, counters.overflows.load(), counters.bytes()};
}

constexpr size_t kSumThreads = 4;

// Four bytes for each block of a buffer, whose first byte is at `begin` of its file.
py::bytes take_block_sums(const py::buffer& buffer, uint64_t begin,
                          const std::vector<uint64_t>& cuts) {
  const py::buffer_info info = buffer.request();
  std::vector<uint32_t> sums;
  {
    const py::gil_scoped_release released;
    const auto bytes = static_cast<uint64_t>(info.size * info.itemsize);
    sums = distorch::block_sums(static_cast<const std::byte*>(info.ptr), begin,
                                distorch::block_ends(begin, begin + bytes, cuts), kSumThreads);
  }
  return {reinterpret_cast<const char*>(sums.data()), sums.size() * sizeof(uint32_t)};
}

// Whoever reads that file has its bytes compared, as long as the capsule lives. ValueError if it
// cannot be opened, or has not so many bytes or blocks.
py::capsule verify_file(const std::string& path, uint64_t bytes, const std::vector<uint64_t>& cuts,
                        const std::string& sums) {
  distorch::Checksums known;
  known.sums.resize(sums.size() / sizeof(uint32_t));
  std::memcpy(known.sums.data(), sums.data(), known.sums.size() * sizeof(uint32_t));
  try {
    return capsule_of([&] {
      const py::gil_scoped_release released;
      known.ends = distorch::block_ends(0, bytes, cuts);
      auto file = std::make_unique<std::shared_ptr<distorch::File>>(distorch::File::open(path));
      (*file)->verify_with(std::move(known));
      return file;
    }());
  } catch (const distorch::Error& error) {
    throw py::value_error(error.what());
  }
}

void wait_without_interpreter(const std::function<void()>& wait) {
  if (Py_IsInitialized() == 0 || PyGILState_Check() == 0) return wait();
  const py::gil_scoped_release released;
  wait();
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  // For whatever takes a mutex. Its holder may be in an allocator that waits for the GIL.
  const py::call_guard<py::gil_scoped_release> without_gil;
  module.def("new_counters", [] {
    return capsule_of(std::make_unique<std::shared_ptr<Counters>>(Counters::make()));
  });
  module.def("counters_id", [](const py::capsule& counters) { return counters_in(counters).id; });
  module.def("read_counters", &read_counters);
  module.def("reset_counters", [](const py::capsule& counters) {
    Counters& found = counters_in(counters);
    const py::gil_scoped_release released;
    found.reset();
  });
  module.def("reserve", [](const std::string& device, uint64_t nbytes) {
    return capsule_of([&] {
      const py::gil_scoped_release released;
      return std::make_unique<Reservation>(device, nbytes);
    }());
  });
  module.def("reserved_beside", [](const std::string& device, const py::object& own) {
    const Reservation* known = nullptr;
    if (!own.is_none()) known = py::capsule(own).get_pointer<Reservation>();
    const py::gil_scoped_release released;
    return distorch::reserved_beside(device, known);
  });

  module.def("block_sums", &take_block_sums);
  module.def("verify_file", &verify_file);
  module.def("set_data", &set_data, py::arg("tensor"), py::arg("data"));
  module.def("fetch_count", [] { return distorch::process_fetches.load(); });
  module.def("set_scratch_directory", &distorch::set_scratch_directory);
  module.def("scratch_directory", &distorch::scratch_directory);
  module.def("set_cuda_library", &distorch::set_cuda_library);
  module.def("has_cuda_kernels", [] { return distorch::cuda_kernels() != nullptr; });
  module.def("set_io_threads", &distorch::set_io_threads);
  module.def("set_peer_access", &distorch::set_peer_access, py::arg("to"), py::arg("from_"),
             py::arg("possible"));
  module.def("set_read_clock", [](const std::string& device_type, uintptr_t clock) {
    distorch::set_read_clock(device_type, reinterpret_cast<distorch::ReadClock*>(clock));
  });
  module.def("decode_kernel", [](const std::string& device_type) {
    return reinterpret_cast<uintptr_t>(distorch::decode_kernel(c10::Device(device_type).type()));
  });
  module.def("set_decode_kernel", [](const std::string& device_type, uintptr_t kernel) {
    distorch::set_decode_kernel(c10::Device(device_type).type(),
                                reinterpret_cast<distorch::DecodeKernel>(kernel));
  });
  module.def("set_host_access", [](uintptr_t told) {
    distorch::set_host_access(reinterpret_cast<distorch::HostAccess>(told));
  });
  module.def("start_trace", &distorch::start_trace, without_gil);
  module.def("stop_trace", &stopped_trace, without_gil);
  distorch::set_wait_wrapper(&wait_without_interpreter);
  distorch::install_error_thrower(module);
  distorch::install_frame_walkers(module);
  distorch::install_turns(module);
  distorch::install_rehearsal(module);
  distorch::install_placement(module);
}
