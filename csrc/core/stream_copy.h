// SPDX-License-Identifier: Apache-2.0
// Copying bytes that nobody reads soon.
#pragma once

#include <cstddef>
#include <cstdint>

namespace distorch {

// memcpy that goes past the caches where the processor can: neither is the
// destination read first nor is anything else thrown out for it.
// REQUIRES: the ranges do not overlap.
void stream_copy(std::byte* into, const std::byte* from, uint64_t bytes);

}  // namespace distorch
