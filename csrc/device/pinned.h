// SPDX-License-Identifier: Apache-2.0
// Pinned host memory: devices copy from it, and to it, by themselves.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <list>
#include <memory>
#include <vector>

#include "core/arena.h"
#include "core/file.h"
#include "core/mutex.h"
#include "device/events.h"

namespace distorch {

// Pinned memory for copies to and from a device: uint8 [bytes], aligned to kPage. Of exactly that
// size where the library of kernels is there; PyTorch's allocator rounds up to a power of two.
// The memory is freed with the tensor. Freeing does not wait for copies: a caller that starts a
// copy keeps the tensor until the copy has ended. Throws c10::Error.
at::Tensor pinned_memory(uint64_t bytes, c10::Device device);

// Host memory through which bytes pass on their way to a device and back.
struct HostBuffer {
  virtual ~HostBuffer() = default;
  std::byte* data = nullptr;
};

// Pinned buffers. Pinning is slow, so they are cut from a few large slabs, and used again when the
// copies from them have ended.
// Safe for every thread. The ring takes buffers with its mutex held, so nothing in here may wait
// for the ring.
class PinnedBuffers : public std::enable_shared_from_this<PinnedBuffers> {
  struct Slab {
    Slab(at::Tensor pinned, uint64_t bytes) : memory(std::move(pinned)), arena(bytes, kPage) {}
    const at::Tensor memory;
    Arena arena;
  };

  struct Busy {
    std::shared_ptr<Slab> slab;
    Range range;
    EventPtr copied;
  };

 public:
  // Memory of one slab. `copied` is set by whoever has a device copy from it.
  class Buffer : public HostBuffer {
   public:
    ~Buffer() override;
    EventPtr copied;

   private:
    friend class PinnedBuffers;
    std::shared_ptr<PinnedBuffers> from_;
    std::list<Busy> place_;  // one: its entry in `busy_`, made here because ~Buffer must not throw
  };

  // The buffers of a device. Every ring of that device holds the same object.
  static std::shared_ptr<PinnedBuffers> of(c10::Device device);
  // The same, or null if no ring of that device is there.
  static std::shared_ptr<PinnedBuffers> known(c10::Device device);

  explicit PinnedBuffers(c10::Device device) : device_(device) {}
  ~PinnedBuffers();  // waits for copies from it

  // `bytes` of pinned memory, aligned to kPage. If many buffers still wait for their copies, this
  // waits for the oldest copy. Otherwise the host could run ahead of the device without limit.
  // Throws c10::Error where no memory can be pinned or the device is out of order.
  std::shared_ptr<Buffer> take(uint64_t bytes);

 private:
  std::shared_ptr<Buffer> carve(uint64_t bytes) REQUIRES(mutex_);
  void add_slab(uint64_t bytes) REQUIRES(mutex_);
  void drop_idle_slabs() REQUIRES(mutex_);
  void collect() REQUIRES(mutex_);
  void wait_for_oldest() REQUIRES(mutex_);

  const c10::Device device_;
  Mutex mutex_;
  std::vector<std::shared_ptr<Slab>> slabs_ GUARDED_BY(mutex_);
  uint64_t slab_bytes_ GUARDED_BY(mutex_) = 0;
  // Given back before their copies had ended; the oldest first.
  std::list<Busy> busy_ GUARDED_BY(mutex_);
};

// Host memory for bytes that come from a device: a pinned buffer where a ring has some for that
// device and the bytes are not too many, else ordinary memory.
std::shared_ptr<HostBuffer> host_buffer(uint64_t bytes, c10::Device device);

// The bytes of a device's memory, on the host, behind what was issued on the current stream. Waits.
std::shared_ptr<HostBuffer> bring_back(const c10::Storage& memory);

}  // namespace distorch
