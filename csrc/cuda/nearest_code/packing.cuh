#pragma once

// A streamed call, and the three kernels that round its codebook once, for all blocks that stream it: into tiles in
// global memory, as the image that shared memory is to hold.

#include <algorithm>

#include "call.cuh"
#include "candidates.cuh"
#include "rounding.cuh"

namespace ncfast::cuda {

constexpr int kMaxStatBlocks = 256;
constexpr int kStatThreads = 256;
constexpr int kPackedCodes = 128;  // by one block
constexpr int kPackThreads = kPackedCodes / kCodesInFlight * 8;

constexpr int kStreamRows = 2 * kWarpgroupRows;  // of a block

// Codes of a tile. Two sets of accumulators fit with wgmma, one with mma.sync, which keeps operands in registers too.
__host__ __device__ constexpr int stream_codes(bool hopper) { return hopper ? 128 : 256; }
// Steps of 16 columns that a product takes. With wgmma, codes of up to 32 columns share tile rows and take fewer.
__host__ __device__ constexpr int stream_steps(bool hopper, int64_t D) {
  return hopper && D <= 16 ? 1 : hopper && D <= 32 ? 2 : kStepsPerTile;
}
// The number of tiles of a block is a multiple of this: of the tiles that share rows, or of a pair for wgmma.
__host__ __device__ constexpr int tile_multiple(bool hopper, int steps) {
  return steps == 1 ? kStepsPerTile : hopper ? 2 : 1;
}

// A streamed call: its sizes, and its buffers in the workspace.
struct StreamPlan : Buffers {
  Call call;
  int chunks;  // of 64 columns
  int steps;   // of 16 columns
  int tiles;   // of codes
  int splits;  // blocks that share the tiles
  int stat_blocks, codes_per_stat_block;
  int pack_blocks;

  char* packed;           // [H, tiles, chunks, codes of a tile, 64] fp16
  float* bias;            // [H, tiles * codes of a tile]
  Candidate* candidates;  // [H, M, splits, kListLength]
  float* windows;         // [H, M]
  ColumnStats* partial;   // [H, stat_blocks, D]
  float* mean;            // [H, 64 chunks]
  float* reach;           // [H, 64 chunks]
  CodeNorms* norms;       // [H, pack_blocks]
  int* exponents;         // [H]

  StreamPlan(const Call& call, int processors, bool hopper) : Buffers{call.workspace}, call(call) {
    const int64_t H = call.H, M = call.M, K = call.K, D = call.D;
    const int tile_codes = stream_codes(hopper);
    constexpr int64_t kMaxSplits = 16;
    chunks = int(ceil_div(D, kTileColumns));
    steps = stream_steps(hopper, D);
    const int multiple = tile_multiple(hopper, steps);
    tiles = int(ceil_div(K, tile_codes * multiple)) * multiple;
    const int64_t row_blocks = H * ceil_div(M, kStreamRows);
    splits = int(std::max<int64_t>(1, std::min({processors / row_blocks, int64_t(tiles / multiple), kMaxSplits})));
    codes_per_stat_block = int(ceil_div(K, std::min<int64_t>(kMaxStatBlocks, ceil_div(K, 64))));
    stat_blocks = int(ceil_div(K, codes_per_stat_block));
    pack_blocks = tiles * (tile_codes / kPackedCodes);

    place(packed, H * tiles * chunks * tile_codes * kTileRowBytes);
    place(bias, H * tiles * tile_codes);
    place(candidates, H * M * splits * kListLength);
    place(windows, H * M);
    place(partial, H * stat_blocks * D);
    place(mean, H * chunks * kTileColumns);
    place(reach, H * chunks * kTileColumns);
    place(norms, H * pack_blocks);
    place(exponents, H);
  }
};

static __global__ void __launch_bounds__(kStatThreads) column_stats(const StreamPlan plan) {
  const int K = plan.call.K, D = plan.call.D;
  __shared__ ColumnStats sums[kStatThreads];
  const int64_t head = blockIdx.x / plan.stat_blocks;
  const int first = blockIdx.x % plan.stat_blocks * plan.codes_per_stat_block;
  const int last = min(first + plan.codes_per_stat_block, K);
  const float* codebook = plan.call.codes() + head * K * D;
  ColumnStats* partial = plan.partial + int64_t(blockIdx.x) * D;
  int columns = 1;  // threads side by side
  while (columns < D && columns < kStatThreads) columns *= 2;
  const int strides = kStatThreads / columns;
  for (int first_d = 0; first_d < D; first_d += columns) {
    const int d = first_d + int(threadIdx.x) % columns;
    ColumnStats stats;
    if (d < D) {
#pragma unroll 8
      for (int k = first + int(threadIdx.x) / columns; k < last; k += strides) {
        stats.add(codebook[int64_t(k) * D + d], 1.f / K);
      }
    }
    __syncthreads();
    sums[threadIdx.x] = stats;
    __syncthreads();
    if (threadIdx.x < columns && d < D) {
      for (int s = 1; s < strides; ++s) stats.add(sums[s * columns + threadIdx.x]);
      partial[d] = stats;
    }
  }
}

static __global__ void __launch_bounds__(kStatThreads) combine_stats(const StreamPlan plan) {
  const int D = plan.call.D, parts = plan.stat_blocks, columns = plan.chunks * kTileColumns;
  __shared__ ColumnStats sums[kStatThreads];
  const int blocks = columns / 32;
  const int64_t head = blockIdx.x / blocks;
  const int d = blockIdx.x % blocks * 32 + threadIdx.x % 32;
  ColumnStats stats;
  if (d < D) {
#pragma unroll 4
    for (int part = threadIdx.x / 32; part < parts; part += kStatThreads / 32) {
      stats.add(plan.partial[(head * parts + part) * D + d]);
    }
  }
  sums[threadIdx.x] = stats;
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int s = 1; s < kStatThreads / 32; ++s) stats.add(sums[s * 32 + threadIdx.x]);
    plan.mean[head * columns + d] = stats.mean;
    plan.reach[head * columns + d] = d < D ? stats.reach() : 0.f;
  }
}

template <bool kAligned, int kTileCodes>
__global__ void __launch_bounds__(kPackThreads) pack_codebook(const StreamPlan plan) {
  __shared__ CodeNorms scratch[32];
  __shared__ __align__(16) float shared_mean[kMaxChunks * kTileColumns];
  const int64_t head = blockIdx.x / plan.pack_blocks;
  const int block = blockIdx.x % plan.pack_blocks;
  const int K = plan.call.K, chunks = plan.chunks, steps = plan.steps;
  const int columns = chunks * kTileColumns;
  float largest = 0;
  for (int d = threadIdx.x; d < columns; d += blockDim.x) {
    shared_mean[d] = plan.mean[head * columns + d];
    largest = fmaxf(largest, plan.reach[head * columns + d]);
  }
  const int exponent = scale_exponent(block_max({largest, 0, 0}, scratch).square);
  const int64_t padded = int64_t(plan.tiles) * kTileCodes;
  CodeNorms most = pack_codes<kAligned, kTileCodes>(
      plan.call.codes(), head * K, block * kPackedCodes + threadIdx.x / 8, kPackedCodes / kCodesInFlight, K,
      int(padded), plan.call.D, chunks, steps, shared_mean, power_of_two(exponent),
      plan.packed + head * padded * chunks * kTileRowBytes / (kStepsPerTile / steps), plan.bias + head * padded,
      [](int code) { return code; });
  most = block_max(most, scratch);
  if (threadIdx.x == 0) {
    plan.norms[blockIdx.x] = most;
    if (block == 0) plan.exponents[head] = exponent;
  }
}

}  // namespace ncfast::cuda
