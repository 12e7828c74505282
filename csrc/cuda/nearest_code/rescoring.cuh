#pragma once

// Float64.

#include <climits>
#include <cmath>
#include <string>

#include "launch.h"
#include "matrix.cuh"
#include "warp.cuh"

namespace ncfast::cuda {
namespace {

constexpr int kAmbiguous = -1;

// |z - e|^2 by one warp, in all lanes. Equal codes have bitwise equal distances.
template <int kUnroll>
__device__ __forceinline__ double exact_distance(const Matrix& z, int64_t row, const float* code, int D) {
  double distance = 0;
#pragma unroll kUnroll
  for (int d = threadIdx.x % 32; d < D; d += 32) {
    const double difference = double(load1(z, row * D + d)) - double(code[d]);
    distance = fma(difference, difference, distance);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) distance += __shfl_xor_sync(kAllLanes, distance, step);
  return distance;
}

// The nearest of all codes by one warp, a code a lane; 0 where no distance is finite.
__device__ __forceinline__ int scan_all_codes(const Matrix& z, int64_t row,
                                              const float* codebook,  // [K, D]
                                              int K, int D) {
  double nearest = INFINITY;
  int index = INT_MAX;
#pragma unroll 1
  for (int code = threadIdx.x % 32; code < K; code += 32) {
    double distance = 0;
#pragma unroll 2
    for (int d = 0; d < D; ++d) {
      const double difference = double(load1(z, row * D + d)) - double(codebook[int64_t(code) * D + d]);
      distance = fma(difference, difference, distance);
    }
    if (distance < nearest) {
      nearest = distance;
      index = code;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const double distance = __shfl_xor_sync(kAllLanes, nearest, step);
    const int other = __shfl_xor_sync(kAllLanes, index, step);
    if (distance < nearest || (distance == nearest && other < index)) {
      nearest = distance;
      index = other;
    }
  }
  return index == INT_MAX ? 0 : index;
}

constexpr int kRescoreThreads = 512;
constexpr int kRescoreRows = 128;   // rows of one block
constexpr int kGroup = 4;           // rows measured at once: every code is loaded and widened once for all of them
constexpr int kRescoreSlice = 256;  // dimensions of z held in shared memory

struct Nearest {
  double distance;
  int index;
};

// A NaN or infinite distance is never nearer; of equal distances the lowest index is.
__device__ __forceinline__ void offer(Nearest& nearest, double distance, int index) {
  const bool wins = distance < nearest.distance || (distance == nearest.distance && index < nearest.index);
  nearest.distance = wins ? distance : nearest.distance;
  nearest.index = wins ? index : nearest.index;
}

// Replaces every kAmbiguous. A thread sums the squared differences of one code in order of d, whichever code it is:
// equal codes have bitwise equal distances.
template <class T, class E, bool kAligned>
__global__ void __launch_bounds__(kRescoreThreads) rescore(const T* __restrict__ z,         // [H, M, D]
                                                           const E* __restrict__ codebook,  // [H, K, D]
                                                           int64_t M, int K, int D,
                                                           int64_t* __restrict__ indices) {  // [H, M]
  constexpr int kPack = kAligned ? 16 / sizeof(E) : 1;
  struct alignas(kPack * sizeof(E)) Pack {
    E x[kPack];
  };
  __shared__ __align__(16) double z_slices[kGroup][kRescoreSlice];
  __shared__ Nearest warp_nearest[kRescoreThreads / 32][kGroup];

  const int64_t row_blocks = (M + kRescoreRows - 1) / kRescoreRows;
  const int64_t head = blockIdx.x / row_blocks;
  const int64_t first_row = blockIdx.x % row_blocks * kRescoreRows;
  z += (head * M + first_row) * D;
  codebook += head * K * D;
  indices += head * M + first_row;
  const int rows = int(min(int64_t(kRescoreRows), M - first_row));

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  if (!__syncthreads_or(thread < rows && indices[thread] == kAmbiguous)) return;

  for (int chunk = 0; chunk < rows; chunk += 32) {
    // Every warp sees the same rows. None of the chunk is written before all warps have looked: barriers lie between.
    unsigned ambiguous =
        __ballot_sync(kAllLanes, chunk + lane < rows && indices[min(chunk + lane, rows - 1)] == kAmbiguous);
    while (ambiguous != 0) {
      int row[kGroup];  // the last group repeats its first row
      Nearest nearest[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        nearest[g] = {INFINITY, INT_MAX};
        row[g] = ambiguous != 0 ? chunk + __ffs(int(ambiguous)) - 1 : row[0];
        ambiguous &= ambiguous - 1;
      }

      for (int first_code = 0; first_code < K; first_code += kRescoreThreads) {
        const int code = first_code + thread;
        const E* e = codebook + int64_t(min(code, K - 1)) * D;
        double distance[kGroup] = {};
        for (int first_d = 0; first_d < D; first_d += kRescoreSlice) {
          const int length = min(kRescoreSlice, D - first_d);
          if (first_code == 0 || D > kRescoreSlice) {
            __syncthreads();
#pragma unroll
            for (int g = 0; g < kGroup; ++g) {
              for (int d = thread; d < length; d += kRescoreThreads) {
                z_slices[g][d] = double(z[int64_t(row[g]) * D + first_d + d]);
              }
            }
            __syncthreads();
          }
#pragma unroll 4
          for (int d = 0; d < length; d += kPack) {
            const Pack pack = *reinterpret_cast<const Pack*>(e + first_d + d);
#pragma unroll
            for (int p = 0; p < kPack; ++p) {
#pragma unroll
              for (int g = 0; g < kGroup; ++g) {
                const double difference = z_slices[g][d + p] - double(pack.x[p]);
                distance[g] = fma(difference, difference, distance[g]);
              }
            }
          }
        }
        if (code < K) {
#pragma unroll
          for (int g = 0; g < kGroup; ++g) offer(nearest[g], distance[g], code);
        }
      }

#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        for (int step = 16; step > 0; step /= 2) {
          const double distance = __shfl_xor_sync(kAllLanes, nearest[g].distance, step);
          const int index = __shfl_xor_sync(kAllLanes, nearest[g].index, step);
          offer(nearest[g], distance, index);
        }
        if (lane == 0) warp_nearest[warp][g] = nearest[g];
      }
      __syncthreads();
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (thread != g) continue;
        for (const auto& other : warp_nearest) offer(nearest[g], other[g].distance, other[g].index);
        // Without a finite distance the row holds a NaN or an infinity, or every code does.
        indices[row[g]] = isfinite(nearest[g].distance) ? nearest[g].index : 0;
      }
    }
  }
}

template <class T, class E, bool kAligned>
void launch_rescore(const T* z, const E* codebook, int64_t H, int64_t M, int K, int D, cudaStream_t stream,
                    int64_t* indices) {
  const unsigned blocks = grid_size(H * ceil_div(M, kRescoreRows));
  rescore<T, E, kAligned><<<blocks, kRescoreThreads, 0, stream>>>(z, codebook, M, K, D, indices);
  check(cudaGetLastError(), "float64 pass");
}

}  // namespace
}  // namespace ncfast::cuda
