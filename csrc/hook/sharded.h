// SPDX-License-Identifier: Apache-2.0
// The sharded tensor: an ordinary TensorImpl with one more dispatch key, over
// a storage that holds no memory but a handle.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <utility>

#include "core/mutex.h"
#include "engine/weight.h"

namespace distorch {

// Note [The hook's dispatch key]
// CustomRNGKeyId is a backend key that no backend uses. It comes after
// autograd, autocast, functionalization and the Python modes (they see the
// sharded tensor) and before the dense backend (it sees real memory). A tensor
// has it in addition to the key of its compute device, so everything that asks
// a tensor what it is gets the answer of an ordinary tensor of that device.
inline constexpr c10::DispatchKey kHookKey = c10::DispatchKey::CustomRNGKeyId;

// Note [Weights that move while they are used]
// redistribute(), set_loras() and merging in the background give a weight other bytes to come from,
// while other threads run operators on it.
// * Sharded before and after: the tensor is not touched, so views and copies of it follow. The
//   weight gets another source (Weight::move_to). A fetch that is under way goes on with the source
//   that it began with: the slot keeps it. Then the ring lets go of that slot (Ring::written).
// * Plain before or after: the tensor's storage and dispatch keys change together. An operator
//   reads the keys first and the storage later, so none may run on the tensor at that moment:
//   distorch/runtime/changes.py sees to that.

// A donor's own memory, where operators may use it. It may come, change and go while operators run
// in other threads (see adopt in ops/ops.cpp). An operator keeps the memory that it has got.
class InPlace {
 public:
  InPlace() = default;
  // Of a handle that no other thread knows yet.
  InPlace(c10::Storage memory) : memory_(std::move(memory)), there_(bool(memory_)) {}
  InPlace(InPlace&& other) noexcept
      : memory_(std::move(other.memory_)), there_(other.there_.load()) {}

  explicit operator bool() const { return there_.load(std::memory_order_acquire); }
  // Null where there is none.
  c10::Storage memory() const {
    if (!*this) return {};
    const MutexLock lock(mutex_);
    return memory_;
  }
  // From now on it is what `look` finds, or none. Of threads that do so at once, the one that looks
  // last also sets last. The old memory, if nobody else has it, ends without the mutex.
  template <typename Look>
  void renew(const Look& look) {
    c10::Storage memory;
    const MutexLock lock(mutex_);
    memory = look();
    std::swap(memory_, memory);
    there_.store(bool(memory_), std::memory_order_release);
  }

 private:
  mutable Mutex mutex_;
  c10::Storage memory_ GUARDED_BY(mutex_);
  std::atomic<bool> there_{false};
};

// What the tag on a storage says.
struct Handle {
  std::shared_ptr<Weight> weight;
  c10::Device compute;
  InPlace in_place;
};

// To be called after Weight::move_to() and Weight::store(). What operators use in place is from now
// on that of the weight's source. Another thread may give the weight another source meanwhile, and
// calls this after that: then the later source counts. Last comes Weight::changed(written).
void moved(Handle& handle, const std::byte* written = nullptr);

inline bool is_sharded(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->key_set().has(kHookKey);
}

// REQUIRES: is_sharded(tensor).
Handle& handle_of(const at::Tensor& tensor);

// A storage without memory that stands for `handle`. Reading its pointer is an
// error that explains itself.
c10::Storage make_tagged_storage(Handle handle);

// Whether reading the storage's address gives null instead of an error, for
// profilers, which note addresses and follow none. Asking for memory to write
// stays an error.
void show_address(const at::Tensor& sharded, bool shown);

// A sharded tensor of the given geometry (elements) over a tagged storage.
at::Tensor make_sharded(c10::Storage tagged, c10::ScalarType dtype, at::IntArrayRef sizes,
                        at::IntArrayRef strides, int64_t offset);

// A sharded view of `sharded` with the geometry and dtype of `like`.
at::Tensor make_sharded_like(const at::Tensor& sharded, const at::Tensor& like);

// How much a real tensor is like its sharded one. Below autograd nothing needs
// "requires grad" or "is an inference tensor", but composite kernels (matmul,
// convolution) choose by them between algorithms that differ in their bits.
// Kernels that only read bytes are spared the cost.
enum class Likeness { kExact, kBytes };

// A plain tensor over `memory` with the geometry of `sharded`.
at::Tensor make_real(const at::Tensor& sharded, c10::Storage memory, Likeness likeness);

// The bytes of the weight on its compute device. Blocks until they are there.
// Throws Error(kFetch).
c10::Storage fetch(Handle& handle);

}  // namespace distorch
