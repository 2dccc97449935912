// Storages over memory that the engine manages.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <cstddef>
#include <memory>

namespace distorch {

// A c10::Storage over a slot's bytes on `device` that keeps `block` alive.
std::shared_ptr<void> slot_storage(std::byte* data, uint64_t bytes, std::shared_ptr<void> block,
                                   c10::Device device);
// Whether a tensor, or anybody but the ring, holds what slot_storage() made.
bool slot_in_use(const std::shared_ptr<void>& storage);

// Bytes as a tensor that owns nothing: uint8 [bytes].
at::Tensor bytes_at(const std::byte* data, uint64_t bytes, c10::Device device);

// Host memory for bytes that are read from `offset` of a file: its address is
// that of the file modulo kPage, and the page on either side is nobody's.
c10::Storage memory_in_phase(uint64_t bytes, uint64_t offset);

// Pinned host memory for copies to a device: uint8 [bytes]. Of exactly that
// size where the kernels for the device can be asked for it; PyTorch's
// allocator rounds up to a power of two.
at::Tensor pinned_memory(uint64_t bytes, c10::Device device);

}  // namespace distorch
