// SPDX-License-Identifier: Apache-2.0
#include "device/host_device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "core/decode.h"
#include "core/error.h"
#include "core/host_memory.h"
#include "device/device_donor.h"
#include "device/storages.h"
#include "device/threads.h"

namespace distorch {

std::shared_ptr<std::byte> HostDevice::allocate(uint64_t bytes) {
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(ErrorKind::kFetch, "there is no memory for a weight of " + std::to_string(bytes) +
                                       " bytes: " + std::strerror(errno) +
                                       "; it does not fit into the RAM of this machine");
  }
  prefer_huge_pages(memory, bytes);
  return {static_cast<std::byte*>(memory), [bytes](std::byte* at) { ::munmap(at, bytes); }};
}

bool HostDevice::in_use(const Slot& slot) const { return slot_in_use(slot.wrapped); }

bool HostDevice::brings_ahead(const Source& source) const {
  return HostTransfer::brings_ahead(source) && !in_place_memory(source, c10::Device(c10::kCPU));
}

std::shared_ptr<void> HostDevice::wrap(std::byte* data, uint64_t bytes,
                                       std::shared_ptr<void> block) {
  return slot_storage(data, bytes, std::move(block), c10::Device(c10::kCPU));
}

void HostDevice::decode_all(const Decoder& decoder, const std::byte* encoded, std::byte* into) {
  const auto rows = static_cast<int64_t>(decoder.rows());
  const int64_t step = decoder.in_place() ? kTileRows : kPanelRows;
  const int64_t each = rows_per_part(rows, static_cast<int64_t>(decoder.decoded_row()), step,
                                     static_cast<int64_t>(compute_threads()));
  for_parts_on_compute_threads(divide_up(rows, each), [&](uint64_t part) {
    const uint64_t begin = part * each, end = std::min<uint64_t>(begin + each, rows);
    decoder.decode(begin, end, encoded + begin * decoder.stored_row(),
                   into + begin * decoder.decoded_row());
  });
}

}  // namespace distorch
