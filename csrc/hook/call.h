// SPDX-License-Identifier: Apache-2.0
// One operator call with sharded arguments.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/stack.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>

#include "hook/sharded.h"

namespace distorch {

// Whether a tensor, or one of a list, is sharded.
bool holds_sharded(const c10::IValue& value);

// The dispatch keys that an operator still has to pass below the hook.
inline c10::DispatchKeySet below_hook(c10::DispatchKeySet keys) {
  return keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kHookKey);
}

// Sharded arguments are replaced by real tensors over fetched memory, the
// operator runs, what it wrote goes to the donors, and results that are or
// alias arguments become sharded again. The memory is let go with this object.
//
// Note [Out of memory]
// An operator that finds no memory on the compute device gets the ring's: its
// weights are let go, the ring gives back all of its memory, and the operator
// runs again, with weights in ordinary memory. So it goes on, without looking
// ahead, about one step long. Operators that write to arguments or draw random
// numbers are not run twice; their error leaves, but whoever tries again finds
// the memory free. Operators without sharded arguments do not pass here.
class Call {
 public:
  Call();
  // An operator that failed may have written half of a weight: what the ring
  // holds of it is thrown away, the donor's bytes stay.
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // See Note [Out of memory]. `op` replaces arguments and runs an operator;
  // `boxed` is that operator if it may write to arguments or draw random numbers.
  template <class Operator>
  decltype(auto) run(const Operator& op, const c10::OperatorHandle* boxed = nullptr) {
    try {
      return op();
    } catch (const c10::OutOfMemoryError&) {
      if (!make_room(boxed)) throw;
    }
    try {
      return op();
    } catch (c10::OutOfMemoryError& error) {
      tell_that_room_was_made(error);
      throw;
    }
  }
  // An operator whose arguments are on top of `stack`: replaces arguments, has `kernel` run it on
  // the stack, brings to donors what it wrote, and wraps its results.
  void run_boxed(const c10::OperatorHandle& op, torch::jit::Stack& stack,
                 c10::function_ref<void()> kernel);
  // The same with the kernel that the operator has for those keys.
  void run_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                 torch::jit::Stack& stack) {
    run_boxed(op, stack, [&] { op.redispatchBoxed(keys, &stack); });
  }

  // The real tensor to pass for `tensor`, or `tensor` itself if it is plain.
  at::Tensor real(const at::Tensor& tensor, bool writes = false);
  // The same for an operator that neither writes to it nor returns it.
  at::Tensor read_only(const at::Tensor& tensor, Likeness likeness);
  // Brings written arguments to their donors. Throws Error(kFetch).
  void commit();

 private:
  struct Fetched {
    std::shared_ptr<Weight> weight;  // another thread may give the tensor other data meanwhile
    c10::StorageImpl* memory;        // kept alive by the real tensors over it
    c10::Device device;
  };
  struct Swapped {
    at::Tensor sharded;
    at::Tensor real;
    bool writes;
    bool in_place;  // `real` is over the donor's own memory
    bool committed;
  };

  // Aliasing arguments of one call see one memory.
  c10::Storage memory_of(Handle& handle);
  // Replaces the sharded tensors among the arguments on top of `stack`.
  void swap_arguments(const c10::FunctionSchema& schema, torch::jit::Stack& stack);
  // Replaces real arguments and their views among the top `count` values.
  void wrap_results(torch::jit::Stack& stack, size_t count);
  void swap(c10::IValue& value, bool writes);
  void commit(Swapped& argument);
  void wrap(c10::IValue& value) const;
  at::Tensor wrapped(const at::Tensor& result) const;

  // The operator itself, for a trace; null while nobody traces.
  struct Traced;
  void begin_trace(const Handle& handle);

  // Whether the operator is to run again.
  bool make_room(const c10::OperatorHandle* boxed);
  bool can_run_again(const c10::OperatorHandle& op) const;
  void tell_that_room_was_made(c10::OutOfMemoryError& error) const;

  Ring* starved_ = nullptr;      // that gave its memory back
  torch::jit::Stack arguments_;  // as they came; kept where an accelerator computes
  std::unique_ptr<Traced> traced_;
  c10::SmallVector<Fetched, 2> fetched_;
  c10::SmallVector<Swapped, 2> swapped_;
};

}  // namespace distorch
