// SPDX-License-Identifier: Apache-2.0
// What turns the bytes that a donor keeps into a weight's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace distorch {

// Quantised blocks, scaled numbers, a base with its patches: any form from
// which a weight's rows can be had, each row from its own bytes alone. It is
// part of a fetch and never changes; a weight that gets other patches gets
// another decoder.
class Decoder {
 public:
  virtual ~Decoder() = default;

  virtual uint64_t rows() const = 0;
  virtual uint64_t stored_row() const = 0;   // bytes on the donor
  virtual uint64_t decoded_row() const = 0;  // bytes that operators see
  // Whether a row may be decoded where it is stored.
  virtual bool in_place() const = 0;

  uint64_t stored_bytes() const { return rows() * stored_row(); }
  uint64_t decoded_bytes() const { return rows() * decoded_row(); }

  // Rows [begin, end), by the CPU; `stored` and `into` are where row `begin`
  // starts. Throws Error.
  virtual void decode(uint64_t begin, uint64_t end, const std::byte* stored,
                      std::byte* into) const = 0;
  // All rows, by the compute device, in its memory; queued on its current stream. Throws what the
  // device throws. REQUIRES: the decoder was made for a compute device that is not the host.
  virtual void decode_on_device(const std::byte* stored, std::byte* into) const = 0;
};

}  // namespace distorch
