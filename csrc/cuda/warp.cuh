#pragma once

// Reductions over neighbouring lanes of a warp; every lane gets the result.

#include <cuda_runtime.h>

#define NCFAST_DEVICE __device__ __forceinline__

namespace ncfast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The lane, hidden from the compiler: what a loop derives from it does not stay in registers all through the loop.
NCFAST_DEVICE int opaque_lane() {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

template <int kLanes, class T>
NCFAST_DEVICE T lane_sum(T x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <int kLanes>
NCFAST_DEVICE float lane_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// `active` are the lanes that call it.
template <int kLanes>
NCFAST_DEVICE int lane_min(int x, unsigned active = kAllLanes) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = min(x, __shfl_xor_sync(active, x, step));
  return x;
}

// Sums over eight lanes of each x[i]; lane l gets that of x[l % kSize].
template <int kSize>
NCFAST_DEVICE float transposed_sums(const float (&x)[kSize]) {
  static_assert(kSize == 1 || kSize == 4);
  if constexpr (kSize == 1) {
    return lane_sum<8>(x[0]);
  } else {  // every lane sends away the sums that are not its own
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const float low = (odd ? x[1] : x[0]) + __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1);
    const float high = (odd ? x[3] : x[2]) + __shfl_xor_sync(kAllLanes, odd ? x[2] : x[3], 1);
    const float sum = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, 2);
    return sum + __shfl_xor_sync(kAllLanes, sum, 4);
  }
}

}  // namespace ncfast::cuda
