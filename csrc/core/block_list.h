// SPDX-License-Identifier: Apache-2.0
// Every described block type, for switches that must not forget one.
#pragma once

#include "core/block_types.h"
#include "core/block_types_iq.h"
#include "core/block_types_packed.h"

// X(type) for each type that is stored in groups with a scale: all but F32, F16 and BF16.
// clang-format off
#define DISTORCH_BLOCK_TYPES(X)                                                 \
  X(FP4x16) X(FP8x32) X(W4x16) X(W6x16) X(I4x16)                                \
  X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0)                                       \
  X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K)                                       \
  X(IQ1_S) X(IQ1_M) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S)           \
  X(IQ4_NL) X(IQ4_XS) X(TQ1_0) X(TQ2_0) X(MXFP4) X(NVFP4)
// clang-format on
