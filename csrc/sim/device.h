// SPDX-License-Identifier: Apache-2.0
// The simulated accelerator as a PyTorch device: streams, guard, allocators.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <utility>

#include "device/decode.h"
#include "sim/machine.h"

namespace distorch::sim {

inline constexpr c10::DeviceType kSim = c10::DeviceType::PrivateUse1;

// The machine's stream behind a PyTorch stream of a device.
int machine_stream(c10::Stream stream);
// Where work for this device goes now, on this thread.
int current_stream(c10::DeviceIndex device);

// Tells PyTorch: guard, allocators, hooks. Once per process.
void register_device();
// The operators that the fallback does not reach.
void register_kernels();
// A DecodeKernel (device/decode.h), for the engine's library.
void decode_on_sim(const DecodeJob& job);

// From here on, work on this thread's current stream counts as being captured in a graph.
void begin_capture();
// Ends that. False: somebody has broken the capture.
bool end_capture();

// Events that PyTorch's users have recorded, and waits for them that were put on streams.
std::pair<uint64_t, uint64_t> event_counts();

// New streams are the first ones again: a configuration starts like any other.
void restart_streams();

// An error for PyTorch where a fault was injected.
void check_alive(c10::DeviceIndex device);

struct MemoryNumbers {
  uint64_t capacity, used, peak;
};
MemoryNumbers memory_numbers(int device);
void reset_peak(int device);

}  // namespace distorch::sim
