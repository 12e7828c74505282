#pragma once

// Float64 distances, of the data as given: what decides where scores do not. Equal codes have bitwise equal distances,
// since each is summed in the same order, and of equal distances the lowest code wins.

#include <climits>
#include <cmath>
#include <type_traits>

#include "../warp.cuh"
#include "call.cuh"
#include "matrix.cuh"

namespace ncfast::cuda {

constexpr int kUndecided = -1;  // an index that `rescore_undecided` replaces

struct Nearest {
  double distance;
  int code;
};

// A NaN or infinite distance is never nearer.
NCFAST_DEVICE void offer(Nearest& nearest, double distance, int code) {
  const bool wins = distance < nearest.distance || (distance == nearest.distance && code < nearest.code);
  nearest.distance = wins ? distance : nearest.distance;
  nearest.code = wins ? code : nearest.code;
}

NCFAST_DEVICE void offer_from_all_lanes(Nearest& nearest) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const double distance = __shfl_xor_sync(kAllLanes, nearest.distance, step);
    offer(nearest, distance, __shfl_xor_sync(kAllLanes, nearest.code, step));
  }
}

NCFAST_DEVICE double add_square(double distance, float z, float e) {
  const double difference = double(z) - double(e);
  return fma(difference, difference, distance);
}

// |z - e|^2 by one warp, in all lanes.
template <int kUnroll>
NCFAST_DEVICE double exact_distance(const Matrix& z, int64_t row, const float* code, int D) {
  double distance = 0;
#pragma unroll kUnroll
  for (int d = threadIdx.x % 32; d < D; d += 32) distance = add_square(distance, load1(z, row * D + d), code[d]);
  return lane_sum<32>(distance);
}

// The nearest of all codes by one warp, a code a lane; 0 where no distance is finite.
NCFAST_DEVICE int nearest_of_all(const Matrix& z, int64_t row,
                                 const float* codebook,  // [K, D]
                                 int K, int D) {
  Nearest nearest{INFINITY, INT_MAX};
#pragma unroll 1
  for (int code = threadIdx.x % 32; code < K; code += 32) {
    double distance = 0;
#pragma unroll 2
    for (int d = 0; d < D; ++d) {
      distance = add_square(distance, load1(z, row * D + d), codebook[int64_t(code) * D + d]);
    }
    offer(nearest, distance, code);
  }
  offer_from_all_lanes(nearest);
  return nearest.code == INT_MAX ? 0 : nearest.code;
}

constexpr int kRescoreThreads = 512;
constexpr int kRescoreRows = 128;   // of a block
constexpr int kRowsAtOnce = 4;      // every code is loaded and widened once for all of them
constexpr int kRescoreSlice = 256;  // dimensions of z in shared memory, loaded by a thread each
static_assert(kRescoreSlice <= kRescoreThreads);

// An element of z, which is float64 where the codebook is.
template <class E>
NCFAST_DEVICE double load_double(const Matrix& z, int64_t index) {
  if constexpr (std::is_same_v<E, double>) {
    return static_cast<const double*>(z.data)[index];
  } else {
    return load1(z, index);
  }
}

// Replaces every kUndecided by the nearest of all codes. A thread sums the squared differences of one code in order of
// the dimensions.
template <class E, bool kAligned>
__global__ void __launch_bounds__(kRescoreThreads) rescore_undecided(const Call call) {
  constexpr int kPack = kAligned ? 16 / sizeof(E) : 1;
  struct alignas(kPack * sizeof(E)) Pack {
    E x[kPack];
  };
  __shared__ __align__(16) double z_slices[kRowsAtOnce][kRescoreSlice];
  __shared__ Nearest warp_nearest[kRescoreThreads / 32][kRowsAtOnce];

  const int64_t M = call.M;
  const int K = call.K, D = call.D;
  const int64_t row_blocks = (M + kRescoreRows - 1) / kRescoreRows;
  const int64_t head = blockIdx.x / row_blocks;
  const int64_t block_row = blockIdx.x % row_blocks * kRescoreRows;
  const int64_t first_row = head * M + block_row;
  const E* codebook = static_cast<const E*>(call.codebook) + head * K * D;
  int64_t* indices = call.indices + first_row;
  const int rows = int(min(int64_t(kRescoreRows), M - block_row));

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  if (!__syncthreads_or(thread < rows && indices[thread] == kUndecided)) return;

  for (int chunk = 0; chunk < rows; chunk += 32) {
    // Every warp sees the same rows. None of the chunk is written before all warps have looked: barriers lie between.
    unsigned undecided =
        __ballot_sync(kAllLanes, chunk + lane < rows && indices[min(chunk + lane, rows - 1)] == kUndecided);
    while (undecided != 0) {
      int row[kRowsAtOnce];  // the last ones repeat the first
      Nearest nearest[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        nearest[i] = {INFINITY, INT_MAX};
        row[i] = undecided != 0 ? chunk + __ffs(int(undecided)) - 1 : row[0];
        undecided &= undecided - 1;
      }

      for (int first_code = 0; first_code < K; first_code += kRescoreThreads) {
        const int code = first_code + thread;
        const E* e = codebook + int64_t(min(code, K - 1)) * D;
        double distance[kRowsAtOnce] = {};
        for (int first_d = 0; first_d < D; first_d += kRescoreSlice) {
          const int length = min(kRescoreSlice, D - first_d);
          if (first_code == 0 || D > kRescoreSlice) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kRowsAtOnce && thread < length; ++i) {
              z_slices[i][thread] = load_double<E>(call.z, (first_row + row[i]) * D + first_d + thread);
            }
            __syncthreads();
          }
#pragma unroll 4
          for (int d = 0; d < length; d += kPack) {
            const Pack pack = *reinterpret_cast<const Pack*>(e + first_d + d);
#pragma unroll
            for (int p = 0; p < kPack; ++p) {
#pragma unroll
              for (int i = 0; i < kRowsAtOnce; ++i) {
                const double difference = z_slices[i][d + p] - double(pack.x[p]);
                distance[i] = fma(difference, difference, distance[i]);
              }
            }
          }
        }
        if (code < K) {
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) offer(nearest[i], distance[i], code);
        }
      }

#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        offer_from_all_lanes(nearest[i]);
        if (lane == 0) warp_nearest[warp][i] = nearest[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (thread != i) continue;
        for (const auto& other : warp_nearest) offer(nearest[i], other[i].distance, other[i].code);
        // Without a finite distance the row holds a NaN or an infinity, or every code does.
        indices[row[i]] = isfinite(nearest[i].distance) ? nearest[i].code : 0;
      }
    }
  }
}

template <class E>
void launch_rescore_undecided(const Call& call) {
  const bool aligned = call.D * sizeof(E) % 16 == 0 && is_aligned(call.codebook, 16);
  launch("float64 pass", aligned ? rescore_undecided<E, true> : rescore_undecided<E, false>,
         grid_size(call.H * ceil_div(call.M, kRescoreRows)), kRescoreThreads, 0, call.stream, call);
}

}  // namespace ncfast::cuda
