// SPDX-License-Identifier: Apache-2.0
#include "bindings/frames.h"

namespace py = pybind11;

namespace distorch {
namespace {

// Note [Frames of other threads]
// Where a running function has no frame object yet, asking for it makes one. Python may then
// collect garbage, and a finalizer may give the GIL to the very thread whose function it is. That
// thread returns from the function, and the frame object describes memory that is used again:
// Python 3.11 has crashed there. So nobody else runs while frames are walked: the collector is
// switched off, and the walk runs no code of Python. Python itself does the one thing that needs a
// lock of its own, to list the frames of all threads.
class WithoutCollector {
 public:
  WithoutCollector() : was_on_(PyGC_Disable() != 0) {}
  ~WithoutCollector() {
    if (was_on_) PyGC_Enable();
  }
  WithoutCollector(const WithoutCollector&) = delete;
  WithoutCollector& operator=(const WithoutCollector&) = delete;

 private:
  const bool was_on_;
};

// The first argument of the method that runs in a frame.
py::object self_of(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030C0000
  PyObject* found = PyFrame_GetVarString(frame, "self");
#else
  const py::object locals =
      py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(frame)).attr("f_locals");
  PyObject* found = PyMapping_GetItemString(locals.ptr(), "self");
#endif
  if (found == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
}

bool is_call(PyFrameObject* frame, const py::handle& code, const py::handle& parts) {
  const auto runs =
      py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  if (!runs.is(code)) return false;
  const py::object self = self_of(frame);
  if (!self) return false;
  const auto identity = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(self.ptr()));
  const int found = PySet_Contains(parts.ptr(), identity.ptr());
  if (found < 0) throw py::error_already_set();
  return found > 0;
}

// Counts such calls from a frame on outwards, `most` at most.
int count_calls(py::object frame, const py::handle& code, const py::handle& parts, int most) {
  int found = 0;
  while (frame && found < most) {
    auto* here = reinterpret_cast<PyFrameObject*>(frame.ptr());
    if (is_call(here, code, parts)) ++found;
    frame = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetBack(here)));
  }
  return found;
}

py::set calling(const py::handle& code, const py::handle& parts) {
  const py::object current_frames = py::module_::import("sys").attr("_current_frames");
  const WithoutCollector no_collector;
  py::set found;
  const py::dict frames = current_frames();
  for (const auto& [thread, frame] : frames) {
    if (count_calls(py::reinterpret_borrow<py::object>(frame), code, parts, 1) > 0) {
      found.add(thread);
    }
  }
  return found;
}

int calls_of_this_thread(const py::handle& code, const py::handle& parts) {
  const WithoutCollector no_collector;
  const auto frame =
      py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  return count_calls(frame, code, parts, 2);
}

}  // namespace

void install_frame_walkers(py::module_& module) {
  module.def("calling", &calling, py::arg("code"), py::arg("parts"));
  module.def("calls_of_this_thread", &calls_of_this_thread, py::arg("code"), py::arg("parts"));
}

}  // namespace distorch
