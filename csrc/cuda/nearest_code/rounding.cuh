#pragma once

// Centring, scaling and rounding to fp16.

#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>

#include "../tensor_core.cuh"
#include "launch.h"
#include "matrix.cuh"
#include "warp.cuh"

namespace ncfast::cuda {
namespace {

constexpr int kWarpgroup = 128;  // threads
constexpr int kGroupRows = 64;   // rows of z that a warpgroup takes, 16 a warp
constexpr int kGroupTileBytes = kGroupRows * kTileRowBytes;
constexpr int kMaxChunks = 8;

// What the scores need to know of a codebook, in its scaled units.
struct Spread {
  int exponent;    // codes are scaled by 2 to it
  float norm;      // largest |e^| of the fp16 codes
  float residual;  // largest |e' - e^|
  float bias;      // largest |e'|^2 / 2
};

// What the scores need to know of a row.
struct RowScale {
  float bias_scale;  // turns a bias into the units of the row's products
  float window;      // twice the error, or one of these
};
constexpr float kPastEnd = -1;
constexpr float kNotFinite = -2;

// Scales `largest` to between 2^top and 2^(top + 1). fp16 ends at 65504; of kTop, what is 2^28 times smaller is still
// normal.
constexpr int kTop = 14;
__device__ __forceinline__ int scale_exponent(float largest, int top = kTop) {
  const int exponent = largest > 0 && largest <= FLT_MAX ? top - ilogbf(largest) : 0;
  return max(-126, min(126, exponent));
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Rounds eight scaled numbers to fp16 and adds up the squares of the results and of what the rounding took.
__device__ __forceinline__ uint4 round8(const float (&y)[8], float& square, float& residual) {
  union {
    __half2 pairs[4];
    uint4 words;
  } pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pack.pairs[i] = __floats2half2_rn(y[2 * i], y[2 * i + 1]);
    const float2 rounded = __half22float2(pack.pairs[i]);
    const float rest[2] = {y[2 * i] - rounded.x, y[2 * i + 1] - rounded.y};  // exact
    square = fmaf(rounded.x, rounded.x, square);
    square = fmaf(rounded.y, rounded.y, square);
    residual = fmaf(rest[0], rest[0], residual);
    residual = fmaf(rest[1], rest[1], residual);
  }
  return pack.words;
}

// A warp writes 16 rows of z into the rows `tile_row` on of `tiles`: eight lanes a row, kRows rows of each at a time
// and kUnroll chunks of each, so that as many loads are under way.
template <bool kAligned, int kRows, int kUnroll>
__device__ __forceinline__ void stage_rows(const Matrix& z,  // [.., D]
                                           int64_t first_row, int left, int D, int chunks,
                                           const float* mean,  // [64 chunks], shared
                                           const Spread& codes, float accumulation, bool exact,
                                           char* tiles,  // [chunks][64][64] fp16
                                           int tile_row,
                                           RowScale* scales) {  // [16]
  const int octet = lane_again() / 8;
  const int piece = lane_again() % 8;
  // A warp without any row reads the last one before; its window says that there is none.
  first_row += min(0, left - 1);
  const int last = max(0, min(15, left - 1));
#pragma unroll 1
  for (int pass = 0; pass < 16; pass += 4 * kRows) {
    const int first = pass + octet;
    float x[kRows][8];
    float largest[kRows] = {};
    float nothing[kRows] = {};  // becomes NaN with the first NaN or infinity
    const auto load_centred = [&](int chunk, bool again) {
      const int d = chunk * kTileColumns + piece * 8;
      load_rows<kAligned>(z, first_row, [&](int i) { return min(first + 4 * i, last); }, d, D, x);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int p = 0; p < 8; ++p) {
          if (!again) nothing[i] = fmaf(x[i][p], 0.f, nothing[i]);
          x[i][p] -= mean[d + p];
        }
      }
    };

#pragma unroll kUnroll
    for (int chunk = 0; chunk < chunks; ++chunk) {
      load_centred(chunk, false);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int p = 0; p < 8; ++p) largest[i] = fmaxf(largest[i], fabsf(x[i][p]));
      }
    }
    int exponent[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) exponent[i] = min(scale_exponent(octet_max(largest[i])), codes.exponent + 100);

    float square[kRows] = {}, residual[kRows] = {};
#pragma unroll kUnroll
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) load_centred(chunk, true);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float scale = power_of_two(exponent[i]);
#pragma unroll
        for (int p = 0; p < 8; ++p) x[i][p] *= scale;
        *reinterpret_cast<uint4*>(tiles + chunk * kGroupTileBytes + swizzled(tile_row + first + 4 * i, piece)) =
            round8(x[i], square[i], residual[i]);
      }
    }

    // A lane for each row.
    const float norm = sqrtf(octet_sums<kRows>(square));
    const float rest = sqrtf(octet_sums<kRows>(residual));
    const bool row_finite = octet_sums<kRows>(nothing) == 0;
    int own_exponent = exponent[0];
#pragma unroll
    for (int i = 1; i < kRows; ++i) {
      const int other = exponent[i];
      if (piece % kRows == i) own_exponent = other;
    }
    const int row_in_warp = first + piece % kRows * 4;
    const float bias_scale = power_of_two(max(own_exponent - codes.exponent, -100));
    const float code_norm = codes.norm + codes.residual;
    const float magnitude = norm * code_norm;
    // The last term is for a bias scale that was cut off.
    const float error = norm * codes.residual + rest * code_norm + accumulation * magnitude +
                        (chunks * 8 + 24) * 0x1p-24f * (magnitude + codes.bias * bias_scale) + codes.bias * 0x1p-99f;
    float window = 2.002f * error;
    if (!exact && window <= FLT_MAX) window = 0;
    if (row_in_warp >= left) {
      window = kPastEnd;
    } else if (!row_finite) {
      window = kNotFinite;
    }
    if (piece < kRows) scales[row_in_warp] = {bias_scale, window};
  }
}

struct CodeFacts {
  float square, residual, bias;
};

__device__ __forceinline__ CodeFacts larger(const CodeFacts& a, const CodeFacts& b) {
  return {fmaxf(a.square, b.square), fmaxf(a.residual, b.residual), fmaxf(a.bias, b.bias)};
}

// Eight lanes pack kCount codes, every `stride`th from `first_code` on, as fp16 into rows of tiles; past the last code
// they pack zeros that cannot win. Returns the largest facts of these codes.
constexpr int kPackAtOnce = 4;

// Codes of few columns share tile rows: a code takes `steps` times 16 columns (1, 2 or 4), beside it lie those of the
// tiles that follow.
template <bool kAligned, int kTileCodes>
__device__ __forceinline__ CodeFacts pack_codes(const float* codebook,  // [.., D]
                                                int64_t head_row, int first_code, int stride, int K, int padded, int D,
                                                int chunks, int steps,
                                                const float* mean,  // [64 chunks]
                                                float scale,
                                                char* tiles,    // [padded / kTileCodes][chunks][kTileCodes][64] fp16
                                                float* bias) {  // [padded]
  const int piece = threadIdx.x % 8;
  float square[kPackAtOnce] = {}, residual[kPackAtOnce] = {}, exact_square[kPackAtOnce] = {};
  float nothing[kPackAtOnce] = {};  // becomes NaN with the first NaN or infinity
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int d = chunk * kTileColumns + piece * 8;
    float x[kPackAtOnce][8];
    load_rows<kAligned>(
        Matrix{codebook, DType::f32}, head_row, [&](int i) { return min(first_code + i * stride, K - 1); }, d, D, x);
#pragma unroll
    for (int i = 0; i < kPackAtOnce; ++i) {
      const int code = first_code + i * stride;
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        nothing[i] = fmaf(x[i][p], 0.f, nothing[i]);
        x[i][p] = code < K ? (x[i][p] - mean[d + p]) * scale : 0.f;
        exact_square[i] = fmaf(x[i][p], x[i][p], exact_square[i]);
      }
      const uint4 rounded = round8(x[i], square[i], residual[i]);
      const int shared_by = kStepsPerTile / steps;
      const int tile_number = code / kTileCodes;
      char* tile = tiles + (int64_t(tile_number / shared_by) * chunks + chunk) * (kTileCodes * kTileRowBytes);
      const int place = tile_number % shared_by * 2 * steps + piece;
      if (code < padded && piece < 2 * steps) {
        *reinterpret_cast<uint4*>(tile + swizzled(code % kTileCodes, place)) = rounded;
      }
    }
  }
  CodeFacts facts{0, 0, 0};
#pragma unroll
  for (int i = 0; i < kPackAtOnce; ++i) {
    const int code = first_code + i * stride;
    const CodeFacts own{octet_sum(square[i]), octet_sum(residual[i]), 0.5f * octet_sum(exact_square[i])};
    const bool usable = octet_sum(nothing[i]) == 0 && code < K;
    // With a bias of NaN or -inf no score of the code compares as good as another.
    if (piece == 0 && code < padded) bias[code] = usable ? -own.bias : code < K ? NAN : -INFINITY;
    if (usable) facts = larger(facts, own);
  }
  return facts;
}

__device__ __forceinline__ Spread spread_of(int exponent, const CodeFacts& largest) {
  return {exponent, sqrtf(largest.square), sqrtf(largest.residual), largest.bias};
}

// The largest of each fact over all threads of the block, in all of them.
__device__ __forceinline__ CodeFacts block_max(CodeFacts x, CodeFacts* scratch) {  // [warps], shared
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    x = larger(x, {__shfl_xor_sync(kAllLanes, x.square, step), __shfl_xor_sync(kAllLanes, x.residual, step),
                   __shfl_xor_sync(kAllLanes, x.bias, step)});
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x = larger(x, scratch[warp]);
  return x;
}

// Sum, least and greatest of the finite elements of a column; elements come in already divided by their number.
struct ColumnStats {
  float mean = 0, least = INFINITY, greatest = -INFINITY;

  __device__ __forceinline__ void add(float x, float inverse_count) {
    const bool finite = fabsf(x) <= FLT_MAX;
    mean = fmaf(finite ? x : 0.f, inverse_count, mean);
    least = fminf(least, finite ? x : INFINITY);
    greatest = fmaxf(greatest, finite ? x : -INFINITY);
  }
  __device__ __forceinline__ void add(const ColumnStats& other) {
    mean += other.mean;
    least = fminf(least, other.least);
    greatest = fmaxf(greatest, other.greatest);
  }
  // Largest distance of an element to the mean.
  __device__ __forceinline__ float reach() const { return fmaxf(0.f, fmaxf(greatest - mean, mean - least)); }
};

// Error of a tensor core's sum, in units of the product of the norms.
float accumulation_error(int D) { return 1.5f * float(ceil_div(D, 16) * 16 + 16) * 0x1p-23f; }

}  // namespace
}  // namespace ncfast::cuda
