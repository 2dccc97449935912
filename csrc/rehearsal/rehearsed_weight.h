// SPDX-License-Identifier: Apache-2.0
// Donors and decoders without bytes.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "engine/donor.h"
#include "rehearsal/rehearsal.h"

namespace distorch {

// The pieces of a weight. Whoever reads from it gets nothing, and is not told.
class RehearsedDonor : public Donor {
 public:
  // `memory`: where the host would find the bytes; null: it does not use them in place.
  RehearsedDonor(const std::vector<Script::Piece>& pieces, std::shared_ptr<std::byte> memory)
      : pieces_(pieces), memory_(std::move(memory)) {
    for (const Script::Piece& piece : pieces) bytes_ += piece.bytes;
  }

  std::string tier() const override { return pieces_.front().place; }
  uint64_t size() const override { return bytes_; }
  std::string describe() const override { return "a donor of a rehearsal"; }
  std::byte* host() override { return memory_.get(); }
  std::shared_ptr<std::byte> map() override { throw std::logic_error("no bytes to map"); }
  std::vector<Extent> extents() const override {
    std::vector<Extent> found;
    if (pieces_.front().place == "disk") return found;
    uint64_t begin = 0;
    for (const Script::Piece& piece : pieces_) {
      found.push_back({begin, piece.bytes, piece.place,
                       reinterpret_cast<const std::byte*>(piece.address),
                       reinterpret_cast<const void*>(piece.owner), nullptr});
      begin += piece.bytes;
    }
    return found;
  }
  void read(uint64_t, uint64_t, std::byte*, bool) const override {}
  bool writable() const override { return false; }
  void write(uint64_t, uint64_t, const std::byte*) override {
    throw std::logic_error("a rehearsal writes nothing");
  }

 private:
  const std::vector<Script::Piece>& pieces_;
  const std::shared_ptr<std::byte> memory_;
  uint64_t bytes_ = 0;
};

// As long as the weight says, and nothing else.
class RehearsedDecoder : public Decoder {
 public:
  explicit RehearsedDecoder(const Script::Weight& weight) : weight_(weight) {
    for (const Script::Piece& piece : weight.pieces) stored_ += piece.bytes;
  }
  Time seconds() const { return weight_.decode_seconds; }
  const std::string& name() const { return weight_.name; }

  uint64_t rows() const override { return 1; }
  uint64_t stored_row() const override { return stored_; }
  uint64_t decoded_row() const override { return weight_.bytes; }
  bool in_place() const override { return weight_.in_place; }
  void decode(uint64_t, uint64_t, const std::byte*, std::byte*) const override {}
  void decode_on_device(const std::byte*, std::byte*) const override {}

 private:
  const Script::Weight& weight_;
  uint64_t stored_ = 0;
};

}  // namespace distorch
