// SPDX-License-Identifier: Apache-2.0
// Types of blocks: the tensor types of GGUF files, and those that are packed here.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace distorch {

// The numbers are those of GGUF files, or from 200 on our own: see block_types_packed.h.
enum class BlockType : uint8_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ2_XXS = 16,
  kIQ2_XS = 17,
  kIQ3_XXS = 18,
  kIQ1_S = 19,
  kIQ4_NL = 20,
  kIQ3_S = 21,
  kIQ2_S = 22,
  kIQ4_XS = 23,
  kIQ1_M = 29,
  kBF16 = 30,
  kTQ1_0 = 34,
  kTQ2_0 = 35,
  kMXFP4 = 39,
  kNVFP4 = 40,
  kFP4x16 = 200,
  kFP8x32 = 201,
  kW4x16 = 202,
  kW6x16 = 203,
  kI4x16 = 204,
};

// `elements` numbers are stored in `bytes` bytes. Blocks need no alignment. `table`: how many
// numbers (float32) all blocks of a weight share, beside their bytes.
struct BlockInfo {
  const char* name;  // "Q4_K"
  int64_t elements, bytes;
  int64_t table = 0;
};

const BlockInfo& block_info(BlockType type);

// Every type, in the order of their numbers.
std::span<const BlockType> block_types();
// Nothing for a type that cannot be decoded.
std::optional<BlockType> block_type_named(std::string_view name);

}  // namespace distorch
