// SPDX-License-Identifier: Apache-2.0
// What a weight is made of: bytes on a donor, and a decoder if they are not the weight's own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "core/error.h"
#include "engine/decoder.h"
#include "engine/donor.h"

namespace distorch {

struct Source {
  std::shared_ptr<Donor> donor;
  std::shared_ptr<const Decoder> decoder = nullptr;  // null: the donor has the weight's bytes
  uint64_t alignment = kAlign;  // what the address of fetched bytes is a multiple of

  // Of the weight, in bytes.
  uint64_t size() const { return decoder ? decoder->decoded_bytes() : donor->size(); }
  // Of a row that has `row_bytes` in the weight: its bytes on the donor.
  uint64_t stored_row(uint64_t row_bytes) const {
    return decoder ? decoder->stored_row() : row_bytes;
  }
  // Whether the host decodes it from where it is: nothing of it can be brought ahead.
  bool decodes_memory() const { return decoder != nullptr && donor->host() != nullptr; }

  // Brings the rows of these numbers, one after the other, to `into`. The host decodes them if
  // there is a decoder. `row_bytes` are those of a row of the weight. REQUIRES: rows are within the
  // weight. Throws Error(kFetch).
  void gather(std::span<const int64_t> rows, uint64_t row_bytes, std::byte* into) const;

  // The error of a fetch that failed. It names the weight, its bytes and the donor.
  Error could_not_bring(ErrorKind kind, const std::string& name, const std::string& why) const;
};

// Lets go of a source. The last holder of a donor waits for the copies that devices make from it.
// REQUIRES: no mutex of ours is held (Note [Waiting for threads]).
void let_go(Source source);

}  // namespace distorch
