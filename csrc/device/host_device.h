// SPDX-License-Identifier: Apache-2.0
// The host as a compute device.
#pragma once

#include <memory>

#include "engine/host_transfer.h"

namespace distorch {

// Its memory is mapped: exactly as large as asked, and the system's again when it is freed. Weights
// are decoded by the threads of torch's own operators.
class HostDevice : public HostTransfer {
 public:
  std::shared_ptr<std::byte> allocate(uint64_t bytes) override;
  bool in_use(const Slot& slot) const override;
  bool brings_ahead(const Source& source) const override;

 protected:
  std::shared_ptr<void> wrap(std::byte* data, uint64_t bytes, std::shared_ptr<void> block) override;
  void decode_all(const Decoder& decoder, const std::byte* encoded, std::byte* into) override;
};

}  // namespace distorch
