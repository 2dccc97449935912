// SPDX-License-Identifier: Apache-2.0
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

// A copy, on the current streams of both devices. Autograd does not see it.
void copy_bytes(const at::Tensor& from, const at::Tensor& to, bool non_blocking);

// Host memory for bytes that are read from `offset` of a file: its address is
// that of the file modulo kPage, and the page on either side is nobody's.
c10::Storage memory_in_phase(uint64_t bytes, uint64_t offset);

}  // namespace distorch
