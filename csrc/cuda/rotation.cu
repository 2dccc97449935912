// SPDX-License-Identifier: Apache-2.0
#include "cuda/rotation.cuh"

#include <cuda_runtime.h>

#include "cuda/rotation_run.h"
#include "cuda/round.cuh"

namespace distorch::cuda {
namespace {

// --- kernels ---

__device__ float back(float number) { return number; }
__device__ float back(__half number) { return __half2float(number); }
__device__ float back(__nv_bfloat16 number) { return __bfloat162float(number); }

// A block of threads turns some whole groups in its shared memory. A thread brings and takes
// numbers that are a block's width apart, so that neighbours read and write neighbours.
template <class Rounded>
__global__ void rotate_kernel(float* numbers, int64_t count, int group, float scale) {
  extern __shared__ float held[];
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * threads * 4;
  for (int i = thread; i < 4 * threads; i += threads) {
    Rounded rounded;
    round_to(first + i < count ? numbers[first + i] : 0.0f, &rounded);
    held[i] = back(rounded);
  }
  __syncthreads();
  for (int apart = 1; apart < group; apart *= 4) {
    turn_stage(held, thread, apart);
    __syncthreads();
  }
  for (int i = thread; i < 4 * threads; i += threads) {
    if (first + i < count) numbers[first + i] = held[i] * scale;
  }
}

// --- launchers ---

template <class Rounded>
void launch(float* numbers, int64_t count, int64_t group, cudaStream_t stream) {
  const int64_t held = groups_at_once(group) * group;
  const auto threads = static_cast<unsigned>(held / 4);
  const auto blocks = static_cast<unsigned>((count + held - 1) / held);
  rotate_kernel<Rounded><<<blocks, threads, held * sizeof(float), stream>>>(
      numbers, count, static_cast<int>(group), rotation_scale(group));
}

}  // namespace

int rotate_back(float* numbers, int64_t count, int64_t group, Element rounded_first,
                CUstream_st* stream) {
  if (count == 0) return cudaSuccess;
  switch (rounded_first) {
    case Element::kFloat32:
      launch<float>(numbers, count, group, stream);
      break;
    case Element::kFloat16:
      launch<__half>(numbers, count, group, stream);
      break;
    case Element::kBFloat16:
      launch<__nv_bfloat16>(numbers, count, group, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace distorch::cuda
