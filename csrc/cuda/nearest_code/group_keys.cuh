#pragma once

// Keys.

#include "rounding.cuh"

namespace ncfast::cuda {
namespace {

constexpr int kResidentCodes = 128;  // codes of a tile

// The best scores of a tile are found without a branch. The scores that a thread holds of a row come in eights of
// groups: groups of four codes, 16 g + 2 (lane % 4) + {0, 1, 8, 9}. A group's key is its greatest score with the low
// bits replaced by g, so that the greatest key tells where it came from; how far a key is from its score is part of
// what `reaching` allows for. No key (NaN) comes of a group past the last code or of codes that are not finite.
constexpr int kGroupCodes = 16;  // by the four lanes of a row
constexpr unsigned kKeyBits = kResidentCodes / kGroupCodes - 1;

// The bias of a group's four codes lies together.
__device__ __forceinline__ int bias_place(int code) {
  return (code & ~15) | (code >> 1 & 3) << 2 | (code >> 3 & 1) << 1 | (code & 1);
}

__device__ __forceinline__ void best_groups(const float (&acc)[kResidentCodes / 2],
                                            const float* bias,  // [128], shared, placed
                                            const float (&bias_scale)[2], float (&best)[2], float (&second)[2]) {
#pragma unroll
  for (int g = 0; g < kResidentCodes / kGroupCodes; ++g) {
    const float4 b = *reinterpret_cast<const float4*>(bias + g * kGroupCodes + threadIdx.x % 4 * 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* x = acc + 8 * g + 2 * h;
      const float low = fmaxf(fmaf(b.x, bias_scale[h], x[0]), fmaf(b.y, bias_scale[h], x[1]));
      const float high = fmaxf(fmaf(b.z, bias_scale[h], x[4]), fmaf(b.w, bias_scale[h], x[5]));
      const float key = __uint_as_float((__float_as_uint(fmaxf(low, high)) & ~kKeyBits) | g);
      if (g == 0) {
        best[h] = key;
        continue;
      }
      const float loser = min_or_nan(best[h], key);
      second[h] = g == 1 ? loser : fmaxf(second[h], loser);
      best[h] = fmaxf(best[h], key);
    }
  }
}

// Codes whose group has no such key are out. A key is within 2^-20 of its score, and so is the best one.
__device__ __forceinline__ float lowest_key(float best, float window) {
  return best - (window + 0x1p-18f * (fabsf(best) + window) + 0x1p-140f);
}

// Products of a warp's 16 rows with four codes each: x[h][c] is that of row lane / 4 + 8 h with code
// first[h] + 8 (lane % 2) + c, in the two lanes of four where lane / 2 and lane / 4 are both even or both odd.
__device__ __forceinline__ void multiply_groups(const char* rows, const char* tiles, int chunks, int last_steps,
                                                const int (&first)[2], float (&x)[2][2]) {
  const int lane = lane_again();
  const int a_row = threadIdx.x / 32 % 4 * 16 + lane % 16;
  // Column n of product i is code n % 4 of row 2 i + n / 4; two products share a load.
  const char* codes[4];
  int turn[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int row = 4 * p + lane / 16 * 2 + lane % 8 / 4;
    const int code = __shfl_sync(kAllLanes, first[p / 2], row % 8 * 4) + lane % 4 / 2 * 8 + lane % 2;
    codes[p] = tiles + code / kResidentCodes * chunks * (kResidentCodes * kTileRowBytes) +
               code % kResidentCodes * kTileRowBytes;
    turn[p] = code % 8;
  }
  float acc[8][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int steps = chunk + 1 < chunks ? kStepsPerTile : last_steps;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint32_t a_part[4];
      load_matrices(a_part, rows + chunk * kGroupTileBytes + swizzled(a_row, 2 * step + lane / 16));
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        uint32_t b_part[4];
        load_matrices(
            b_part, codes[p] + chunk * (kResidentCodes * kTileRowBytes) + (((2 * step + lane / 8 % 2) ^ turn[p]) << 4));
        mma_16x8x16(acc[2 * p], a_part, b_part[0], b_part[1]);
        mma_16x8x16(acc[2 * p + 1], a_part, b_part[2], b_part[3]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      x[h][c] = acc[4 * h][2 * h + c];
#pragma unroll
      for (int i = 1; i < 4; ++i) {
        const float other = acc[4 * h + i][2 * h + c];
        if (lane / 8 == i) x[h][c] = other;
      }
    }
  }
}

// Product of a staged row with the codes of each lane.
__device__ __forceinline__ float multiply_one(const char* rows, int row, const char* tiles, int code, int chunks) {
  const char* tile = tiles + code / kResidentCodes * chunks * (kResidentCodes * kTileRowBytes);
  float sum = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll 2
    for (int piece = 0; piece < 8; ++piece) {
      union Pack {
        uint4 words;
        __half2 pairs[4];
      };
      Pack a, b;
      a.words = *reinterpret_cast<const uint4*>(rows + chunk * kGroupTileBytes + swizzled(row, piece));
      b.words = *reinterpret_cast<const uint4*>(tile + chunk * (kResidentCodes * kTileRowBytes) +
                                                swizzled(code % kResidentCodes, piece));
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float2 y = __half22float2(a.pairs[p]), e = __half22float2(b.pairs[p]);
        sum = fmaf(y.x, e.x, sum);
        sum = fmaf(y.y, e.y, sum);
      }
    }
  }
  return sum;
}

}  // namespace
}  // namespace ncfast::cuda
