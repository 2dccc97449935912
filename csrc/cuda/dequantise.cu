// SPDX-License-Identifier: Apache-2.0
#include "cuda/dequantise.cuh"

#include <cuda_runtime.h>

#include "cuda/dequantise_run.h"
#include "cuda/round.cuh"

namespace distorch::cuda {
namespace {

constexpr int kThreads = 256;

// --- kernels ---

// A thread stores its run as one or two words of 16 bytes.
template <class Out>
struct alignas(16) Run {
  Out numbers[kRun];
};

template <class Type, class Out>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const uint8_t* __restrict__ blocks, int64_t runs, const float* __restrict__ table,
                  Run<Out>* __restrict__ into) {
  const int64_t run = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (run >= runs) return;
  float numbers[kRun];
  decode_run<Type>(blocks, run, table, numbers);
  Run<Out> rounded;
#pragma unroll
  for (int i = 0; i < kRun; ++i) round_to(numbers[i], &rounded.numbers[i]);
  into[run] = rounded;
}

template <class Type, class Out>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const uint8_t* __restrict__ from, int64_t count, Out* __restrict__ into) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) round_to(Type::number(from, i), into + i);
}

// --- launchers ---

unsigned grid_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

template <class Type, class Out>
void launch_decode(const uint8_t* from, int64_t blocks, const float* table, Out* into,
                   cudaStream_t stream) {
  const int64_t runs = blocks * (Type::kElements / kRun);
  decode_kernel<Type, Out><<<grid_for(runs), kThreads, 0, stream>>>(
      from, runs, table, reinterpret_cast<Run<Out>*>(into));
}

template <class Type, class Out>
void launch_convert(const uint8_t* from, int64_t count, Out* into, cudaStream_t stream) {
  convert_kernel<Type, Out><<<grid_for(count), kThreads, 0, stream>>>(from, count, into);
}

template <class Out>
void launch(BlockType type, const uint8_t* from, int64_t blocks, const float* table, Out* into,
            cudaStream_t stream) {
  switch (type) {
    case BlockType::kF32:
      return launch_convert<PlainFloat32>(from, blocks, into, stream);
    case BlockType::kF16:
      return launch_convert<PlainFloat16>(from, blocks, into, stream);
    case BlockType::kBF16:
      return launch_convert<PlainBFloat16>(from, blocks, into, stream);
#define DISTORCH_LAUNCH(name) \
  case BlockType::k##name:    \
    return launch_decode<blocks::name>(from, blocks, table, into, stream);
      DISTORCH_BLOCK_TYPES(DISTORCH_LAUNCH)
#undef DISTORCH_LAUNCH
  }
}

}  // namespace

int dequantise(BlockType type, const void* from, int64_t blocks, const float* table,
               Element out_type, void* into, CUstream_st* stream) {
  if (blocks == 0) return cudaSuccess;
  const auto* bytes = static_cast<const uint8_t*>(from);
  switch (out_type) {
    case Element::kFloat32:
      launch(type, bytes, blocks, table, static_cast<float*>(into), stream);
      break;
    case Element::kFloat16:
      launch(type, bytes, blocks, table, static_cast<__half*>(into), stream);
      break;
    case Element::kBFloat16:
      launch(type, bytes, blocks, table, static_cast<__nv_bfloat16*>(into), stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace distorch::cuda
