// SPDX-License-Identifier: Apache-2.0
#include "bindings/turns.h"

#include <pythread.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace distorch {
namespace {

// Note [Turns and Ctrl-C]
// Ctrl-C raises an exception between any two steps of Python code, also in the code that ends a
// `with` block. A turn that was never ended would refuse every change from then on. So this is a
// class in C: the interpreter calls its __exit__ without looking for signals before that.
// The GIL guards all that is here. No code of Python runs in between, but where a thread waits.

constexpr auto kMoment = std::chrono::microseconds(200);

using Parts = std::vector<uintptr_t>;  // sorted

struct Turn {
  unsigned long thread = 0;
  pid_t process = 0;
  Parts parts;
  bool nested = false;
  py::object error, called_back, elsewhere;
};

std::vector<const Turn*> under_way, waiting;

// A forked child has one thread. What the others had begun does not count there.
bool counts(const Turn& turn, unsigned long me) {
  return turn.process == ::getpid() || turn.thread == me;
}

bool share_one(const Parts& a, const Parts& b) {
  auto left = a.begin();
  auto right = b.begin();
  while (left != a.end() && right != b.end()) {
    if (*left == *right) return true;
    (*left < *right ? left : right)++;
  }
  return false;
}

Parts parts_from(const py::handle& numbers) {
  Parts parts;
  for (const py::handle number : numbers) parts.push_back(number.cast<uintptr_t>());
  std::sort(parts.begin(), parts.end());
  return parts;
}

// What has to happen before a turn may begin.
enum class Next { kBegin, kWait, kCalledBack, kElsewhere };

Next next_of(const Turn& turn) {
  bool mine = false, own_elsewhere = false, others = false;
  for (const Turn* other : under_way) {
    if (!counts(*other, turn.thread)) continue;
    const bool overlaps = share_one(other->parts, turn.parts);
    if (other->thread == turn.thread) {
      mine |= overlaps;
      own_elsewhere |= !overlaps;
    } else {
      others |= overlaps;
    }
  }
  if (mine && !turn.nested) return Next::kCalledBack;
  if (others && (mine || own_elsewhere)) return Next::kElsewhere;
  return others ? Next::kWait : Next::kBegin;
}

// False, with an error of Python's: it was refused or interrupted.
bool begin(Turn& turn) {
  turn.thread = PyThread_get_thread_ident();
  turn.process = ::getpid();
  under_way.reserve(under_way.size() + 1);  // what may find no memory comes first
  Next next = next_of(turn);
  if (next == Next::kWait) {
    waiting.push_back(&turn);
    while (next == Next::kWait) {
      {
        const py::gil_scoped_release released;
        std::this_thread::sleep_for(kMoment);
      }
      next = PyErr_CheckSignals() == 0 ? next_of(turn) : Next::kBegin;
    }
    std::erase(waiting, &turn);
    if (PyErr_Occurred() != nullptr) return false;
  }
  if (next == Next::kBegin) {
    under_way.push_back(&turn);
    return true;
  }
  const py::object& text = next == Next::kCalledBack ? turn.called_back : turn.elsewhere;
  PyErr_SetObject(turn.error.ptr(), text.ptr());
  return false;
}

// --- The class ---

struct TurnObject {
  PyObject_HEAD Turn* turn;
};

// Runs what may throw, and makes an error of Python's of that.
template <typename F>
PyObject* guarded(F&& work) {
  try {
    return work();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  }
  return nullptr;
}

PyObject* turn_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  PyObject *parts, *error, *called_back, *elsewhere;
  int nested = 0;
  if (!PyArg_ParseTuple(arguments, "OpOOO", &parts, &nested, &error, &called_back, &elsewhere)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    auto turn = std::make_unique<Turn>();
    turn->parts = parts_from(parts);
    turn->nested = nested != 0;
    turn->error = py::reinterpret_borrow<py::object>(error);
    turn->called_back = py::reinterpret_borrow<py::object>(called_back);
    turn->elsewhere = py::reinterpret_borrow<py::object>(elsewhere);
    PyObject* self = type->tp_alloc(type, 0);
    if (self != nullptr) reinterpret_cast<TurnObject*>(self)->turn = turn.release();
    return self;
  });
}

void turn_free(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  Turn* const turn = reinterpret_cast<TurnObject*>(self)->turn;
  std::erase(under_way, turn);
  delete turn;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* turn_enter(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    if (!begin(*reinterpret_cast<TurnObject*>(self)->turn)) return nullptr;
    Py_INCREF(self);
    return self;
  });
}

PyObject* turn_exit(PyObject* self, PyObject*) {
  std::erase(under_way, reinterpret_cast<TurnObject*>(self)->turn);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"__enter__", turn_enter, METH_NOARGS, nullptr},
    {"__exit__", turn_exit, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(turn_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(turn_free)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"distorch._C.Turn", sizeof(TurnObject), 0, Py_TPFLAGS_DEFAULT, slots};

bool has_turn(unsigned long thread, const py::handle& numbers) {
  const Parts parts = parts_from(numbers);
  return std::any_of(under_way.begin(), under_way.end(), [&](const Turn* turn) {
    return turn->thread == thread && share_one(turn->parts, parts);
  });
}

py::set waiting_for_turn(const py::handle& numbers) {
  const Parts parts = parts_from(numbers);
  std::vector<unsigned long> threads;  // before anything of Python's is made, which may run code
  for (const Turn* turn : waiting) {
    if (share_one(turn->parts, parts)) threads.push_back(turn->thread);
  }
  py::set found;
  for (const unsigned long thread : threads) found.add(thread);
  return found;
}

}  // namespace

void install_turns(py::module_& module) {
  PyObject* const type = PyType_FromSpec(&spec);
  if (type == nullptr) throw py::error_already_set();
  module.attr("Turn") = py::reinterpret_steal<py::object>(type);
  module.def("has_turn", &has_turn, py::arg("thread"), py::arg("parts"));
  module.def("waiting_for_turn", &waiting_for_turn, py::arg("parts"));
}

}  // namespace distorch
