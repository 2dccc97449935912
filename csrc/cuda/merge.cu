// SPDX-License-Identifier: Apache-2.0
#include "cuda/merge.cuh"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/merge_run.h"
#include "cuda/round.cuh"

namespace distorch::cuda {
namespace {

// --- kernels ---

__device__ float widen(float value) { return value; }
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Sum, class Base, class Out>
__global__ void __launch_bounds__(kWarp* kWarps, 2)
    merge_kernel(const Base* base, Out* out, int64_t rows, int64_t columns,
                 const __grid_constant__ Terms terms, uint8_t* finite) {
  const int64_t down = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  const Patch patch = merge_patch<Sum>(blockIdx.x, down, threadIdx.x, threadIdx.y, rows, columns);
  Sum tile[kPatchRows<Sum>][kPatchColumns];
#pragma unroll
  for (int i = 0; i < kPatchRows<Sum>; ++i) {
#pragma unroll
    for (int j = 0; j < kPatchColumns; ++j) {
      const int64_t row = patch.row + i, column = patch.column + j * kWarp;
      const bool inside = row < rows && column < columns;
      tile[i][j] = inside ? widen(base[row * columns + column]) : 0.0f;
    }
  }
  if (!add_terms(terms, patch, tile) && finite != nullptr) *finite = 0;
#pragma unroll
  for (int i = 0; i < kPatchRows<Sum>; ++i) {
#pragma unroll
    for (int j = 0; j < kPatchColumns; ++j) {
      const int64_t row = patch.row + i, column = patch.column + j * kWarp;
      if (row < rows && column < columns) round_to(tile[i][j], out + row * columns + column);
    }
  }
}

// Brings terms to the device's memory as arguments of a launch. The launch itself reads arguments,
// so the caller's list may go at once. A copy from host memory might read the list later.
__global__ void store_terms(LowRank* into, const __grid_constant__ Terms terms) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < terms.count) into[i] = terms.of[i];
}

// --- launchers ---

// As many as travel with a launch.
Terms first_of(std::span<const LowRank> terms) {
  Terms some{};
  some.count = static_cast<int>(std::min<size_t>(terms.size(), kInLaunch));
  std::copy_n(terms.begin(), some.count, some.of);
  return some;
}

template <class Sum, class Base, class Out>
void launch(const void* base, void* out, int64_t rows, int64_t columns, const Terms& terms,
            uint8_t* finite, cudaStream_t stream) {
  const MergeGrid blocks = merge_grid<Sum>(rows, columns);
  const dim3 grid(static_cast<unsigned>(blocks.wide), static_cast<unsigned>(blocks.high),
                  static_cast<unsigned>(blocks.stacked));
  merge_kernel<Sum, Base, Out><<<grid, dim3(kWarp, kWarps), 0, stream>>>(
      static_cast<const Base*>(base), static_cast<Out*>(out), rows, columns, terms, finite);
}

}  // namespace

int merge(Element base_type, const void* base, Element out_type, void* out, int64_t rows,
          int64_t columns, std::span<const LowRank> terms, void* more_terms, uint8_t* finite,
          CUstream_st* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  auto* more = static_cast<LowRank*>(more_terms);
  for (size_t done = kInLaunch; done < terms.size(); done += kInLaunch) {
    store_terms<<<1, kInLaunch, 0, stream>>>(more + done - kInLaunch,
                                             first_of(terms.subspan(done)));
  }
  Terms passed = first_of(terms);
  passed.more = more;
  passed.count = static_cast<int>(terms.size());
  const bool wide = base_type == Element::kFloat32;
  if (out_type == Element::kFloat32) {
    launch<double, float, float>(base, out, rows, columns, passed, finite, stream);
  } else if (out_type == Element::kFloat16) {
    const auto run = wide ? launch<float, float, __half> : launch<float, __half, __half>;
    run(base, out, rows, columns, passed, finite, stream);
  } else {
    const auto run =
        wide ? launch<float, float, __nv_bfloat16> : launch<float, __nv_bfloat16, __nv_bfloat16>;
    run(base, out, rows, columns, passed, finite, stream);
  }
  return cudaGetLastError();
}

}  // namespace distorch::cuda
