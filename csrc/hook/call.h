// One operator call with sharded arguments.
#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/stack.h>
#include <c10/util/SmallVector.h>

#include "hook/sharded.h"

namespace distorch {

// The dispatch keys that an operator still has to pass below the hook.
inline c10::DispatchKeySet below_hook(c10::DispatchKeySet keys) {
  return keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kHookKey);
}

// Sharded arguments are replaced by real tensors over fetched memory, the
// operator runs, what it wrote goes to the donors, and results that are or
// alias arguments become sharded again. The memory is let go with this object.
class Call {
 public:
  Call();
  // An operator that failed may have written half of a weight: what the ring
  // holds of it is thrown away, the donor's bytes stay.
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Replaces the sharded tensors among the arguments on top of `stack`.
  void swap_arguments(const c10::FunctionSchema& schema, torch::jit::Stack& stack);
  // The real tensor to pass for `tensor`, or `tensor` itself if it is plain.
  at::Tensor real(const at::Tensor& tensor, bool writes = false);
  // The same for an operator that neither writes to it nor returns it.
  at::Tensor read_only(const at::Tensor& tensor, Likeness likeness);
  // Brings written arguments to their donors. Throws Error(kFetch).
  void commit();
  // Replaces real arguments and their views among the top `count` values.
  void wrap_results(torch::jit::Stack& stack, size_t count);

 private:
  struct Fetched {
    Weight* weight;
    c10::StorageImpl* memory;  // kept alive by the real tensors over it
    c10::Device device;
  };
  struct Swapped {
    at::Tensor sharded;
    at::Tensor real;
    bool writes;
    bool in_place;  // was when its memory was asked for
    bool committed;
  };

  // Aliasing arguments of one call see one memory.
  c10::Storage memory_of(Handle& handle);
  void swap(c10::IValue& value, bool writes);
  void commit(Swapped& argument);
  void wrap(c10::IValue& value) const;
  at::Tensor wrapped(const at::Tensor& result) const;

  // The operator itself, for a trace; null while nobody traces.
  struct Traced;
  void begin_trace(const Handle& handle);

  std::unique_ptr<Traced> traced_;
  c10::SmallVector<Fetched, 2> fetched_;
  c10::SmallVector<Swapped, 2> swapped_;
};

}  // namespace distorch
