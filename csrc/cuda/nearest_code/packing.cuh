#pragma once

// Packing.

#include "rounding.cuh"

namespace ncfast::cuda {
namespace {

constexpr int kMaxStatBlocks = 256;
constexpr int kStatThreads = 256;
constexpr int kPackedCodes = 128;     // by one block
constexpr int kPackThreads = 32 * 8;  // of that block, 4 codes by eight lanes

__global__ void __launch_bounds__(kStatThreads) column_stats(const float* __restrict__ codebook,  // [H, K, D]
                                                             int K, int D, int blocks_per_head, int codes_per_block,
                                                             ColumnStats* __restrict__ partial) {  // [H, blocks, D]
  __shared__ ColumnStats sums[kStatThreads];
  const int64_t head = blockIdx.x / blocks_per_head;
  const int first = blockIdx.x % blocks_per_head * codes_per_block;
  const int last = min(first + codes_per_block, K);
  codebook += head * K * D;
  partial += int64_t(blockIdx.x) * D;
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

__global__ void __launch_bounds__(kStatThreads) combine_stats(const ColumnStats* __restrict__ partial,  // [H, parts, D]
                                                              int D, int padded, int parts,
                                                              float* __restrict__ mean,     // [H, padded]
                                                              float* __restrict__ reach) {  // [H, padded]
  __shared__ ColumnStats sums[kStatThreads];
  const int blocks = padded / 32;
  const int64_t head = blockIdx.x / blocks;
  const int d = blockIdx.x % blocks * 32 + threadIdx.x % 32;
  ColumnStats stats;
  if (d < D) {
#pragma unroll 4
    for (int part = threadIdx.x / 32; part < parts; part += kStatThreads / 32) {
      stats.add(partial[(head * parts + part) * D + d]);
    }
  }
  sums[threadIdx.x] = stats;
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int s = 1; s < kStatThreads / 32; ++s) stats.add(sums[s * 32 + threadIdx.x]);
    mean[head * padded + d] = stats.mean;
    reach[head * padded + d] = d < D ? stats.reach() : 0.f;
  }
}

template <bool kAligned, int kTileCodes>
__global__ void __launch_bounds__(kPackThreads)
    pack_codebook(Matrix codebook,  // [H, K, D] float32
                  int K, int D, int chunks, int steps, int tiles,
                  const float* __restrict__ mean,   // [H, 64 chunks]
                  const float* __restrict__ reach,  // [H, 64 chunks]
                  char* __restrict__ packed,        // [H, tiles, chunks, kTileCodes, 64] fp16
                  float* __restrict__ bias,         // [H, tiles * kTileCodes]
                  int* __restrict__ exponents,      // [H]
                  CodeFacts* __restrict__ facts) {  // [H, blocks]
  __shared__ CodeFacts scratch[32];
  __shared__ __align__(16) float shared_mean[kMaxChunks * kTileColumns];
  const int blocks = tiles * kTileCodes / kPackedCodes;
  const int64_t head = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  const int columns = chunks * kTileColumns;
  float largest = 0;
  for (int d = threadIdx.x; d < columns; d += blockDim.x) {
    shared_mean[d] = mean[head * columns + d];
    largest = fmaxf(largest, reach[head * columns + d]);
  }
  const int exponent = scale_exponent(block_max({largest, 0, 0}, scratch).square);
  const int64_t padded = int64_t(tiles) * kTileCodes;
  CodeFacts most = pack_codes<kAligned, kTileCodes>(
      static_cast<const float*>(codebook.data), head * K, block * kPackedCodes + threadIdx.x / 8,
      kPackedCodes / kPackAtOnce, K, int(padded), D, chunks, steps, shared_mean, power_of_two(exponent),
      packed + head * padded * chunks * kTileRowBytes / (kStepsPerTile / steps), bias + head * padded);
  most = block_max(most, scratch);
  if (threadIdx.x == 0) {
    facts[blockIdx.x] = most;
    if (block == 0) exponents[head] = exponent;
  }
}

}  // namespace
}  // namespace ncfast::cuda
