#pragma once

// Rows and codes as operands of the tensor cores, and what rounding them costs. With mu the codebook's mean, z' = z -
// mu and e' = e - mu are each scaled by a power of two, one a row and one a codebook, and rounded to fp16: z^ and e^. A
// row's `window` is twice the bound of the error of its scores; docs/nearest_code_cuda.md derives it.

#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>

#include "../tensor_core.cuh"
#include "../warp.cuh"
#include "call.cuh"
#include "matrix.cuh"

namespace ncfast::cuda {

constexpr int kWarpgroup = 128;     // threads
constexpr int kWarpgroupRows = 64;  // rows of z that a warpgroup takes, 16 a warp
constexpr int kRowTileBytes = kWarpgroupRows * kTileRowBytes;
constexpr int kMaxChunks = 8;  // of 64 columns

// Of a code, after scaling.
struct CodeNorms {
  float square;    // |e^|^2
  float residual;  // |e' - e^|^2
  float bias;      // |e'|^2 / 2
};

NCFAST_DEVICE CodeNorms max_norms(const CodeNorms& a, const CodeNorms& b) {
  return {fmaxf(a.square, b.square), fmaxf(a.residual, b.residual), fmaxf(a.bias, b.bias)};
}

// The largest norms over all threads of the block, in all of them.
NCFAST_DEVICE CodeNorms block_max(CodeNorms x, CodeNorms* scratch) {  // [32], shared
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    x = max_norms(x, {__shfl_xor_sync(kAllLanes, x.square, step), __shfl_xor_sync(kAllLanes, x.residual, step),
                      __shfl_xor_sync(kAllLanes, x.bias, step)});
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x = max_norms(x, scratch[warp]);
  return x;
}

// The scale of a codebook, and the largest norms of its scaled codes.
struct CodebookScale {
  int exponent;  // of the power of two
  float norm, residual, bias;

  CodebookScale() = default;
  NCFAST_DEVICE CodebookScale(int exponent, const CodeNorms& largest)
      : exponent(exponent), norm(sqrtf(largest.square)), residual(sqrtf(largest.residual)), bias(largest.bias) {}
};

struct RowScale {
  float bias_scale;  // turns a bias into the units of the row's products
  float window;      // or one of these
};
constexpr float kPastEnd = -1;    // there is no such row
constexpr float kNotFinite = -2;  // it holds a NaN or an infinity

// The exponent that takes `largest` to between 2^14 and 2^15: fp16 ends at 65504, and what is 2^28 times smaller is
// still normal.
NCFAST_DEVICE int scale_exponent(float largest) {
  const int exponent = largest > 0 && largest <= FLT_MAX ? 14 - ilogbf(largest) : 0;
  return max(-126, min(126, exponent));
}

NCFAST_DEVICE float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

union Fp16x8 {
  uint4 words;
  __half2 pairs[4];
};

// Rounds eight scaled numbers to fp16 and adds up the squares of the results and of the residuals.
NCFAST_DEVICE uint4 round8(const float (&y)[8], float& square, float& residual) {
  Fp16x8 pack;
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

// A warp rounds 16 rows of z into the rows from `tile_row` on of `tiles`. Eight lanes take a row, kRows rows at a time
// and kUnroll chunks of 64 columns of each, so that as many loads are in flight.
template <bool kAligned, int kRows, int kUnroll>
NCFAST_DEVICE void stage_rows(const Matrix& z,  // [.., D]
                              int64_t first_row, int left, int D, int chunks,
                              const float* mean,  // [64 chunks], shared
                              const CodebookScale& codes, float accumulation, bool exact,
                              char* tiles,  // [chunks][64][64] fp16
                              int tile_row,
                              RowScale* scales) {  // [16]
  const int octet = opaque_lane() / 8;
  const int piece = opaque_lane() % 8;
  // Past the end the last row is read again.
  first_row += min(0, left - 1);
  const int last = max(0, min(15, left - 1));
#pragma unroll 1
  for (int pass = 0; pass < 16; pass += 4 * kRows) {
    const int first = pass + octet;
    float x[kRows][8];
    float largest[kRows] = {};
    float zero_or_nan[kRows] = {};  // NaN once a NaN or an infinity was read
    const auto load_centred = [&](int chunk, bool again) {
      const int d = chunk * kTileColumns + piece * 8;
      load_rows<kAligned>(z, first_row, [&](int i) { return min(first + 4 * i, last); }, d, D, x);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int p = 0; p < 8; ++p) {
          if (!again) zero_or_nan[i] = fmaf(x[i][p], 0.f, zero_or_nan[i]);
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
    for (int i = 0; i < kRows; ++i) exponent[i] = min(scale_exponent(lane_max<8>(largest[i])), codes.exponent + 100);

    float square[kRows] = {}, residual[kRows] = {};
#pragma unroll kUnroll
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) load_centred(chunk, true);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float scale = power_of_two(exponent[i]);
#pragma unroll
        for (int p = 0; p < 8; ++p) x[i][p] *= scale;
        *reinterpret_cast<uint4*>(tiles + chunk * kRowTileBytes + swizzled(tile_row + first + 4 * i, piece)) =
            round8(x[i], square[i], residual[i]);
      }
    }

    // From here on a lane takes one row.
    const float norm = sqrtf(transposed_sums(square));
    const float rest = sqrtf(transposed_sums(residual));
    const bool row_finite = transposed_sums(zero_or_nan) == 0;
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
    // The last term is for a bias scale that was raised to 2^-100.
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

constexpr int kCodesInFlight = 4;

// Eight lanes round kCodesInFlight codes, every `stride`th from `first_code` on, into rows of tiles; past the last code
// they write zeros. Returns the largest norms of these codes. A code takes `steps` times 16 columns (1, 2 or 4) of a
// tile row; with fewer than 4 the following tiles lie beside it. `bias_index` says where the bias of a code goes.
template <bool kAligned, int kTileCodes, class Index>
NCFAST_DEVICE CodeNorms pack_codes(const float* codebook,  // [.., D]
                                   int64_t head_row, int first_code, int stride, int K, int padded, int D, int chunks,
                                   int steps,
                                   const float* mean,  // [64 chunks]
                                   float scale,
                                   char* tiles,  // [padded / kTileCodes][chunks][kTileCodes][64] fp16
                                   float* bias,  // [padded]
                                   const Index& bias_index) {
  const int piece = threadIdx.x % 8;
  float square[kCodesInFlight] = {}, residual[kCodesInFlight] = {}, exact_square[kCodesInFlight] = {};
  float zero_or_nan[kCodesInFlight] = {};  // NaN once a NaN or an infinity was read
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int d = chunk * kTileColumns + piece * 8;
    float x[kCodesInFlight][8];
    load_rows<kAligned>(
        Matrix{codebook, DType::f32}, head_row, [&](int i) { return min(first_code + i * stride, K - 1); }, d, D, x);
#pragma unroll
    for (int i = 0; i < kCodesInFlight; ++i) {
      const int code = first_code + i * stride;
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        zero_or_nan[i] = fmaf(x[i][p], 0.f, zero_or_nan[i]);
        x[i][p] = code < K ? (x[i][p] - mean[d + p]) * scale : 0.f;
        exact_square[i] = fmaf(x[i][p], x[i][p], exact_square[i]);
      }
      const uint4 rounded = round8(x[i], square[i], residual[i]);
      const int tiles_per_stage = kStepsPerTile / steps;
      const int tile_number = code / kTileCodes;
      char* tile = tiles + (int64_t(tile_number / tiles_per_stage) * chunks + chunk) * (kTileCodes * kTileRowBytes);
      const int tile_piece = tile_number % tiles_per_stage * 2 * steps + piece;
      if (code < padded && piece < 2 * steps) {
        *reinterpret_cast<uint4*>(tile + swizzled(code % kTileCodes, tile_piece)) = rounded;
      }
    }
  }
  CodeNorms norms{0, 0, 0};
#pragma unroll
  for (int i = 0; i < kCodesInFlight; ++i) {
    const int code = first_code + i * stride;
    const CodeNorms own{lane_sum<8>(square[i]), lane_sum<8>(residual[i]), 0.5f * lane_sum<8>(exact_square[i])};
    const bool usable = lane_sum<8>(zero_or_nan[i]) == 0 && code < K;
    // A score with a bias of NaN or -inf never reaches a threshold.
    if (piece == 0 && code < padded) bias[bias_index(code)] = usable ? -own.bias : code < K ? NAN : -INFINITY;
    if (usable) norms = max_norms(norms, own);
  }
  return norms;
}

// Mean, least and greatest of the finite elements of a column; the mean counts the others as zeros.
struct ColumnStats {
  float mean = 0, least = INFINITY, greatest = -INFINITY;

  NCFAST_DEVICE void add(float x, float inverse_count) {
    const bool finite = fabsf(x) <= FLT_MAX;
    mean = fmaf(finite ? x : 0.f, inverse_count, mean);
    least = fminf(least, finite ? x : INFINITY);
    greatest = fmaxf(greatest, finite ? x : -INFINITY);
  }
  NCFAST_DEVICE void add(const ColumnStats& other) {
    mean += other.mean;
    least = fminf(least, other.least);
    greatest = fmaxf(greatest, other.greatest);
  }
  // Largest distance of an element to the mean.
  NCFAST_DEVICE float reach() const { return fmaxf(0.f, fmaxf(greatest - mean, mean - least)); }
};

// Error of a tensor core's sum, in units of the product of the norms.
inline float accumulation_error(int D) { return 1.5f * float(ceil_div(D, 16) * 16 + 16) * 0x1p-23f; }

}  // namespace ncfast::cuda
