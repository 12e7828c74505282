#pragma once

// Lanes of a warp: reductions among them.

#include "../tensor_core.cuh"

namespace ncfast::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// The lane, but the compiler does not know that it is the same as before: what is derived of it in a loop is not kept
// in registers all through the loop.
__device__ __forceinline__ int lane_again() {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

__device__ __forceinline__ float octet_sum(float x) {
#pragma unroll
  for (int step = 4; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Sums over the eight lanes of an octet: that of x[lane % kRows] in each lane.
template <int kRows>
__device__ __forceinline__ float octet_sums(const float (&x)[kRows]) {
  static_assert(kRows == 1 || kRows == 4);
  if constexpr (kRows == 1) {
    return octet_sum(x[0]);
  } else {  // every lane gives away the sums that are not its own
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const float low = (odd ? x[1] : x[0]) + __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 1);
    const float high = (odd ? x[3] : x[2]) + __shfl_xor_sync(kAllLanes, odd ? x[2] : x[3], 1);
    const float sum = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, 2);
    return sum + __shfl_xor_sync(kAllLanes, sum, 4);
  }
}

__device__ __forceinline__ float octet_max(float x) {
#pragma unroll
  for (int step = 4; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

}  // namespace
}  // namespace ncfast::cuda
