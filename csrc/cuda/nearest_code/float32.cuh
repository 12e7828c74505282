#pragma once

// Float32.

#include <cfloat>
#include <cmath>

#include "launch.h"
#include "rescoring.cuh"

namespace ncfast::cuda {
namespace {

constexpr int kScoreThreads = 256;  // 16 x 16
constexpr int kThreadTile = 8;      // rows, and codes, of one thread
constexpr int kTileRows = 128;
constexpr int kTileCodes = 128;
constexpr int kSlice = 8;              // dimensions staged in shared memory at a time
constexpr int kPitch = kTileRows + 4;  // keeps float4 alignment and spreads the transposing stores over all banks

// Up to this D the second-order terms of the rounding error stay within the 2 % added in `rounding`.
constexpr int64_t kMaxScoredDim = 65536;

struct Top2 {
  float best;
  float second;
  int index;  // of the best
};

// A NaN score changes nothing. Of equal scores the first wins, and the gap of zero sends the row to the second pass.
__device__ __forceinline__ void offer(Top2& top, float score, int index) {
  const bool wins = score > top.best;
  top.second = fmaxf(top.second, wins ? top.best : score);
  top.best = wins ? score : top.best;
  top.index = wins ? index : top.index;
}

// Elements d .. d + 3 of a row of D, zeros past its end.
template <bool kAligned, class T>
__device__ __forceinline__ float4 load4(const T* row, int d, int D) {
  if constexpr (kAligned) {  // then D is a multiple of 4 as well
    struct alignas(4 * sizeof(T)) Pack {
      T x[4];
    };
    if (d >= D) return make_float4(0.f, 0.f, 0.f, 0.f);
    const Pack pack = *reinterpret_cast<const Pack*>(row + d);
    return make_float4(float(pack.x[0]), float(pack.x[1]), float(pack.x[2]), float(pack.x[3]));
  } else {
    return make_float4(d < D ? float(row[d]) : 0.f, d + 1 < D ? float(row[d + 1]) : 0.f,
                       d + 2 < D ? float(row[d + 2]) : 0.f, d + 3 < D ? float(row[d + 3]) : 0.f);
  }
}

// -|e|²/2 of every code, one warp a code. NaN marks a code with a NaN or an infinity: its scores are NaN and never win.
// A finite code whose square overflows float32 gives -inf, which makes every row of its codebook ambiguous.
__global__ void __launch_bounds__(kScoreThreads) compute_bias(const float* __restrict__ codebook,  // [codes, D]
                                                              int64_t codes, int D,
                                                              float* __restrict__ bias) {  // [codes]
  const int64_t code = int64_t(blockIdx.x) * (kScoreThreads / 32) + threadIdx.x / 32;
  if (code >= codes) return;
  double square = 0;
  for (int d = threadIdx.x % 32; d < D; d += 32) {
    const double x = codebook[code * D + d];
    square = fma(x, x, square);
  }
  for (int lane = 16; lane > 0; lane /= 2) square += __shfl_xor_sync(kAllLanes, square, lane);
  if (threadIdx.x % 32 == 0) bias[code] = isfinite(square) ? float(-0.5 * square) : NAN;
}

// One block takes 128 rows of one head past all codes, 128 at a time. Thread (tx, ty) of 16 x 16 holds the scores of
// rows 4 ty .. 4 ty + 3 and 64 + those with codes 4 tx .. 4 tx + 3 and 64 + those.
//
// A score is D fused multiply-adds on top of the bias, so with u = 2^-24 its error is at most
//   gamma_D (|h| + |z| |e|) + u |h| + D 2^-150,   gamma_D = D u / (1 - D u),   h = -|e|²/2;
// the caller passes `rounding` >= gamma_D + a few u and `underflow` >= (D + 1) 2^-150.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score(const T* __restrict__ z,             // [H, M, D]
          const float* __restrict__ codebook,  // [H, K, D]
          const float* __restrict__ bias,      // [H, K]
          int64_t M, int K, int D, float rounding, float underflow,
          int64_t* __restrict__ indices) {  // [H, M], kAmbiguous where the second pass decides
  __shared__ __align__(16) float z_slices[2][kSlice][kPitch];
  __shared__ __align__(16) float code_slices[2][kSlice][kPitch];
  __shared__ float row_squares[kTileRows];
  // What each thread has found so far, touched once a tile: with the scores it would not fit in 128 registers.
  __shared__ float bests[kThreadTile][kScoreThreads];
  __shared__ float seconds[kThreadTile][kScoreThreads];
  __shared__ int best_codes[kThreadTile][kScoreThreads];

  const int64_t row_blocks = (M + kTileRows - 1) / kTileRows;
  const int64_t head = blockIdx.x / row_blocks;
  const int64_t first_row = blockIdx.x % row_blocks * kTileRows;
  z += head * M * D;
  codebook += head * K * D;
  bias += head * K;
  indices += head * M;

  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;

  // Each thread stages four dimensions of one row and of one code. Past the last row or code it repeats the last: no
  // result is written for such a row, and the bias of such a code is NaN.
  const int staged = threadIdx.x / 2;
  const int staged_d = threadIdx.x % 2 * 4;
  const T* z_row = z + min(first_row + staged, M - 1) * D;

  float square = 0;
  for (int d = staged_d; d < D; d += kSlice) {
    const float4 x = load4<kAligned>(z_row, d, D);
    square = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, square))));
  }
  square += __shfl_xor_sync(kAllLanes, square, 1);
  if (staged_d == 0) row_squares[staged] = square;

  float4 z_next, code_next;
  const auto fetch = [&](int first_code, int d) {
    z_next = load4<kAligned>(z_row, d + staged_d, D);
    code_next = load4<kAligned>(codebook + int64_t(min(first_code + staged, K - 1)) * D, d + staged_d, D);
  };
  const auto stage = [&](int buffer) {
    z_slices[buffer][staged_d + 0][staged] = z_next.x;
    z_slices[buffer][staged_d + 1][staged] = z_next.y;
    z_slices[buffer][staged_d + 2][staged] = z_next.z;
    z_slices[buffer][staged_d + 3][staged] = z_next.w;
    code_slices[buffer][staged_d + 0][staged] = code_next.x;
    code_slices[buffer][staged_d + 1][staged] = code_next.y;
    code_slices[buffer][staged_d + 2][staged] = code_next.z;
    code_slices[buffer][staged_d + 3][staged] = code_next.w;
  };

  for (int i = 0; i < kThreadTile; ++i) {
    bests[i][threadIdx.x] = seconds[i][threadIdx.x] = -INFINITY;
    best_codes[i][threadIdx.x] = 0;
  }
  float bias_max = 0;  // largest |h| of the usable codes

  fetch(0, 0);
  stage(0);
  __syncthreads();
  int buffer = 0;
  for (int first_code = 0; first_code < K; first_code += kTileCodes) {
    float scores[kThreadTile][kThreadTile];
#pragma unroll
    for (int j = 0; j < kThreadTile; ++j) {
      const int code = first_code + j / 4 * 64 + tx * 4 + j % 4;
      const float h = code < K ? bias[code] : NAN;
      bias_max = fmaxf(bias_max, -h);  // fmaxf drops a NaN
#pragma unroll
      for (int i = 0; i < kThreadTile; ++i) scores[i][j] = h;
    }

    for (int d = 0; d < D; d += kSlice) {
      // The next slice, of this tile or of the next one, travels while this one is multiplied.
      const bool tile_ends = d + kSlice >= D;
      const bool more = !tile_ends || first_code + kTileCodes < K;
      if (more) fetch(tile_ends ? first_code + kTileCodes : first_code, tile_ends ? 0 : d + kSlice);
#pragma unroll 2  // more of them in flight would not fit in 128 registers
      for (int s = 0; s < kSlice; ++s) {
        const float4 a0 = *reinterpret_cast<const float4*>(&z_slices[buffer][s][ty * 4]);
        const float4 a1 = *reinterpret_cast<const float4*>(&z_slices[buffer][s][64 + ty * 4]);
        const float4 b0 = *reinterpret_cast<const float4*>(&code_slices[buffer][s][tx * 4]);
        const float4 b1 = *reinterpret_cast<const float4*>(&code_slices[buffer][s][64 + tx * 4]);
        const float a[kThreadTile] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
        const float b[kThreadTile] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
        for (int i = 0; i < kThreadTile; ++i) {
#pragma unroll
          for (int j = 0; j < kThreadTile; ++j) scores[i][j] = fmaf(a[i], b[j], scores[i][j]);
        }
      }
      if (more) stage(buffer ^ 1);
      __syncthreads();
      buffer ^= 1;
    }

#pragma unroll
    for (int i = 0; i < kThreadTile; ++i) {
      Top2 top{bests[i][threadIdx.x], seconds[i][threadIdx.x], best_codes[i][threadIdx.x]};
#pragma unroll
      for (int j = 0; j < kThreadTile; ++j) offer(top, scores[i][j], first_code + j / 4 * 64 + tx * 4 + j % 4);
      bests[i][threadIdx.x] = top.best;
      seconds[i][threadIdx.x] = top.second;
      best_codes[i][threadIdx.x] = top.index;
    }
  }

  // The 16 threads of a row are neighbours in one warp.
  for (int lane = 8; lane > 0; lane /= 2) bias_max = fmaxf(bias_max, __shfl_xor_sync(kAllLanes, bias_max, lane));
#pragma unroll
  for (int i = 0; i < kThreadTile; ++i) {
    Top2 top{bests[i][threadIdx.x], seconds[i][threadIdx.x], best_codes[i][threadIdx.x]};
    for (int lane = 8; lane > 0; lane /= 2) {
      const float second = __shfl_xor_sync(kAllLanes, top.second, lane);
      const float best = __shfl_xor_sync(kAllLanes, top.best, lane);
      const int index = __shfl_xor_sync(kAllLanes, top.index, lane);
      offer(top, best, index);
      top.second = fmaxf(top.second, second);
    }
    const int row = i / 4 * 64 + ty * 4 + i % 4;
    if (tx != 0 || first_row + row >= M) continue;
    // FLT_MIN is more than the squares can have lost to underflow, so neither norm comes out too small.
    const float magnitude = bias_max + sqrtf(row_squares[row] + FLT_MIN) * sqrtf(2 * bias_max + FLT_MIN);
    const float error = rounding * magnitude + underflow;
    // False for every NaN, and where a partial sum could have overflowed.
    const bool certain = magnitude <= FLT_MAX / 4 && top.best - top.second > 2 * error;
    indices[first_row + row] = certain ? top.index : kAmbiguous;
  }
}

template <class T, bool kAligned>
void launch_certified(const T* z, const float* codebook, int64_t H, int64_t M, int K, int D, cudaStream_t stream,
                      float* bias, int64_t* indices) {
  compute_bias<<<grid_size(ceil_div(H * K, kScoreThreads / 32)), kScoreThreads, 0, stream>>>(codebook, H * K, D, bias);
  check(cudaGetLastError(), "codebook norms");
  const double rounding = D <= kMaxScoredDim ? 1.02 * (D + 4.0) * 0x1p-24 : INFINITY;
  const double underflow = 1.02 * (D + 4.0) * 0x1p-149;
  const unsigned blocks = grid_size(H * ceil_div(M, kTileRows));
  score<T, kAligned>
      <<<blocks, kScoreThreads, 0, stream>>>(z, codebook, bias, M, K, D, float(rounding), float(underflow), indices);
  check(cudaGetLastError(), "float32 pass");
  launch_rescore<T, float, kAligned>(z, codebook, H, M, K, D, stream, indices);
}

}  // namespace
}  // namespace ncfast::cuda
