// SPDX-License-Identifier: Apache-2.0
#include "core/blocks.h"

#include "core/block_list.h"

namespace distorch {
namespace {

constexpr BlockType kTypes[] = {
    BlockType::kF32,     BlockType::kF16,    BlockType::kQ4_0,    BlockType::kQ4_1,
    BlockType::kQ5_0,    BlockType::kQ5_1,   BlockType::kQ8_0,    BlockType::kQ2_K,
    BlockType::kQ3_K,    BlockType::kQ4_K,   BlockType::kQ5_K,    BlockType::kQ6_K,
    BlockType::kIQ2_XXS, BlockType::kIQ2_XS, BlockType::kIQ3_XXS, BlockType::kIQ1_S,
    BlockType::kIQ4_NL,  BlockType::kIQ3_S,  BlockType::kIQ2_S,   BlockType::kIQ4_XS,
    BlockType::kIQ1_M,   BlockType::kBF16,   BlockType::kTQ1_0,   BlockType::kTQ2_0,
    BlockType::kMXFP4,   BlockType::kNVFP4,  BlockType::kFP4x16,  BlockType::kFP8x32,
    BlockType::kW4x16,   BlockType::kW6x16,  BlockType::kI4x16,
};

constexpr BlockInfo info_of(BlockType type) {
  switch (type) {
    case BlockType::kF32:
      return {"F32", 1, 4};
    case BlockType::kF16:
      return {"F16", 1, 2};
    case BlockType::kBF16:
      return {"BF16", 1, 2};
#define DISTORCH_INFO(name) \
  case BlockType::k##name:  \
    return {#name, blocks::name::kElements, blocks::name::kBytes, blocks::kTableOf<blocks::name>};
      DISTORCH_BLOCK_TYPES(DISTORCH_INFO)
#undef DISTORCH_INFO
  }
  return {"unknown", 1, 1};
}

constexpr int kNumbers = 205;

struct Infos {
  BlockInfo of[kNumbers] = {};
  constexpr Infos() {
    for (const BlockType type : kTypes) of[static_cast<int>(type)] = info_of(type);
  }
};
constexpr Infos kInfos;

}  // namespace

const BlockInfo& block_info(BlockType type) { return kInfos.of[static_cast<int>(type)]; }

std::span<const BlockType> block_types() { return kTypes; }

std::optional<BlockType> block_type_named(std::string_view name) {
  for (const BlockType type : kTypes) {
    if (name == block_info(type).name) return type;
  }
  return std::nullopt;
}

}  // namespace distorch
