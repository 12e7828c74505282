#pragma once

// Nearest code on tensor cores. docs/nearest_code_cuda.md derives the error bound that this relies on.
//
// With mu the codebook's mean, a row z and a code e, the nearest code has the greatest
//   s = (z - mu) (e - mu) - |e - mu|^2 / 2.
// The product is taken of fp16 numbers: z - mu and e - mu, each scaled by a power of two (one a row, one a codebook)
// and rounded. `window` is twice what the computed score can be off by. Codes that score less than the best by more
// than that are out; where several are left, their float64 distances decide.
//
// A thread keeps for each of its rows the best score that its group of four lanes, which share the row, has seen, and a
// list of the codes within the window of it. The lists are touched only by tiles that reach the window.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <climits>
#include <cmath>

#include "../dtype.h"
#include "tensor_core.cuh"

namespace ncfast::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpgroup = 128;  // threads
constexpr int kGroupRows = 64;   // rows of z that a warpgroup takes, 16 a warp
constexpr int kGroupTileBytes = kGroupRows * kTileRowBytes;

// The lane, but the compiler does not know that it is the same as before: what is derived of it in a loop is not kept
// in registers all through the loop.
__device__ __forceinline__ int lane_again() {
  int lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

// ---- Reading ----

struct Matrix {
  const void* data;  // of `dtype`, f64 excluded
  DType dtype;
};

__device__ __forceinline__ float widen(uint16_t bits, DType dtype) {
  // A bf16 is the upper half of a float.
  return dtype == DType::bf16 ? __uint_as_float(uint32_t(bits) << 16) : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ float load1(const Matrix& matrix, int64_t index) {
  if (matrix.dtype == DType::f32) return static_cast<const float*>(matrix.data)[index];
  return widen(static_cast<const uint16_t*>(matrix.data)[index], matrix.dtype);
}

// Elements d .. d + 7 of the rows first + row(0), first + row(1), .., zeros past their ends. `kAligned` says that rows
// are multiples of 8 elements and start at multiples of 16 bytes; the loads of all rows are then under way together.
template <bool kAligned, int kRows, class Row>
__device__ __forceinline__ void load_rows(const Matrix& matrix, int64_t first, const Row& row, int d, int D,
                                          float (&x)[kRows][8]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t start = (first + row(i)) * D + d;
#pragma unroll
      for (int p = 0; p < 8; ++p) x[i][p] = d + p < D ? load1(matrix, start + p) : 0.f;
    }
  } else if (d >= D) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int p = 0; p < 8; ++p) x[i][p] = 0;
    }
  } else if (matrix.dtype == DType::f32) {
    const float* data = static_cast<const float*>(matrix.data) + first * D + d;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float4* from = reinterpret_cast<const float4*>(data + int64_t(row(i)) * D);
      const float4 low = __ldg(from), high = __ldg(from + 1);
      x[i][0] = low.x, x[i][1] = low.y, x[i][2] = low.z, x[i][3] = low.w;
      x[i][4] = high.x, x[i][5] = high.y, x[i][6] = high.z, x[i][7] = high.w;
    }
  } else {
    const uint16_t* data = static_cast<const uint16_t*>(matrix.data) + first * D + d;
    uint4 words[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) words[i] = __ldg(reinterpret_cast<const uint4*>(data + int64_t(row(i)) * D));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t pairs[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int p = 0; p < 8; ++p) x[i][p] = widen(uint16_t(pairs[p / 2] >> (16 * (p % 2))), matrix.dtype);
    }
  }
}

// ---- Centring, scaling and rounding to fp16 ----

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

// Scales `largest` to between 2^14 and 2^15: fp16 ends at 65504, and what is 2^28 times smaller is still normal.
__device__ __forceinline__ int scale_exponent(float largest) {
  const int exponent = largest > 0 && largest <= FLT_MAX ? 14 - ilogbf(largest) : 0;
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

// Has the 16 rows of z from `first` on, or the `left` that there are, on their way to the L2 cache.
__device__ __forceinline__ void prefetch_rows(const Matrix& z,  // [.., D]
                                              int64_t first, int left, int D) {
  const int size = z.dtype == DType::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(z.data) + first * D * size;
  const int bytes = min(16, left) * D * size;
  for (int i = threadIdx.x % 32 * 128; i < bytes; i += 32 * 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
  }
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

// ---- Candidates ----

struct Candidate {
  float score;
  int code;
};

constexpr int kSlots = 4;  // candidates that a thread keeps of a row

// What a thread knows of one of its rows. best and floor are the same in the four lanes that share the row.
struct RowState {
  float best;
  float floor;  // scores below it are out
  int count;    // of candidates; kSlots + 1: some were not kept
};

// Where a thread lists the candidates of its rows h = 0 and 1.
constexpr int kListBytes = 2 * kSlots * kWarpgroup * int(sizeof(Candidate));  // of a warpgroup

__device__ __forceinline__ Candidate& slot(Candidate* lists, int h, int i) {
  return lists[(h * kSlots + i) * kWarpgroup];
}

__device__ __forceinline__ void start_row(RowState& row, const RowScale& scale) {
  // Rows without scores of their own are held above any score.
  const bool scored = scale.window >= 0 && scale.window <= FLT_MAX;
  row = {scored ? -INFINITY : INFINITY, scored ? -FLT_MAX : INFINITY, 0};
}

// Raises the best score and drops the candidates that this puts out.
__device__ __forceinline__ void raise(RowState& row, float best, float window, Candidate* lists, int h) {
  const float floor = fmaxf(best - window, -FLT_MAX);
  if (floor > row.best) {
    row.count = 0;
  } else if (row.count <= kSlots) {
    int kept = 0;
    for (int i = 0; i < row.count; ++i) {
      const Candidate candidate = slot(lists, h, i);
      if (candidate.score >= floor) slot(lists, h, kept++) = candidate;
    }
    row.count = kept;
  }
  row.best = best;
  row.floor = floor;
}

constexpr int kSearched = 64;  // codes of a tile that are searched together, 16 by each lane

// Turns a tile of products, laid out as `multiply` leaves them, into scores and finds the best of each search.
template <int kCodes>
__device__ __forceinline__ void score_tile(float (&acc)[kCodes / 2],
                                           const float* bias,       // [kCodes], shared
                                           const RowScale* scales,  // [16], shared
                                           float (&top)[2][kCodes / kSearched]) {
  const int row = threadIdx.x % 32 / 4;
  const float bias_scale[2] = {scales[row].bias_scale, scales[row + 8].bias_scale};
#pragma unroll
  for (int j = 0; j < kCodes / 8; ++j) {
    const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& x = acc[4 * j + 2 * h];
      float& y = acc[4 * j + 2 * h + 1];
      x = fmaf(b.x, bias_scale[h], x);
      y = fmaf(b.y, bias_scale[h], y);
      float& best = top[h][8 * j / kSearched];
      best = 8 * j % kSearched == 0 ? fmaxf(x, y) : fmaxf(best, fmaxf(x, y));
    }
  }
}

template <int kSize>
__device__ __forceinline__ float greatest_of(const float (&x)[kSize]) {
  float greatest = x[0];
#pragma unroll
  for (int i = 1; i < kSize; ++i) greatest = fmaxf(greatest, x[i]);
  return greatest;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Lists the codes of a scored tile that reach the floor of row h.
template <int kCodes>
__device__ __forceinline__ void search_tile(const float (&acc)[kCodes / 2], const float (&top)[2][kCodes / kSearched],
                                            int first_code, int h, RowState& row, Candidate* lists) {
#pragma unroll
  for (int search = 0; search < kCodes / kSearched; ++search) {
    if (!(top[h][search] >= row.floor)) continue;
    unsigned hits = 0;
#pragma unroll
    for (int i = 0; i < kSearched / 4; ++i) {
      if (acc[search * (kSearched / 2) + 4 * (i / 2) + 2 * h + i % 2] >= row.floor) hits |= 1u << i;
    }
    for (; hits != 0; hits &= hits - 1) {
      const int i = __ffs(int(hits)) - 1;
      const int code = first_code + search * kSearched + 8 * (i / 2) + threadIdx.x % 4 * 2 + i % 2;
      // Where there are several hits their own scores are a little less, which keeps them a little longer.
      if (row.count < kSlots) slot(lists, h, row.count) = Candidate{top[h][search], code};
      row.count = min(row.count + 1, kSlots + 1);
    }
  }
}

// Takes a tile of products of a codebook that is seen once: the best score is not known yet, and rises on the way.
template <int kCodes>
__device__ __forceinline__ void offer_tile(float (&acc)[kCodes / 2],
                                           const float* bias,  // [kCodes], shared
                                           int first_code,
                                           const RowScale* scales,  // [16], shared
                                           RowState (&rows)[2], Candidate* lists) {
  float top[2][kCodes / kSearched];
  score_tile<kCodes>(acc, bias, scales, top);
  float greatest[2] = {greatest_of(top[0]), greatest_of(top[1])};
  if (!__any_sync(kAllLanes, greatest[0] >= rows[0].floor || greatest[1] >= rows[1].floor)) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) greatest[h] = quad_max(greatest[h]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (greatest[h] > rows[h].best) {
      raise(rows[h], greatest[h], scales[threadIdx.x % 32 / 4 + 8 * h].window, lists, h);
    }
    search_tile<kCodes>(acc, top, first_code, h, rows[h], lists);
  }
}

// ---- The float64 decision ----

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

// ---- A codebook that fits in shared memory: every block packs it for itself and keeps it ----

constexpr int kResidentCodes = 128;  // codes of a tile

// At most. Four warpgroups take turns on the tensor cores; mma.sync keeps its operands in registers too.
constexpr int resident_threads(bool hopper) { return (hopper ? 4 : 3) * kWarpgroup; }

struct ResidentLayout {
  int tiles, rows, keys, bias, scales, mean, scratch, spread, bytes;

  __host__ __device__ ResidentLayout(int K, int D, int groups) {
    const int chunks = (D + kTileColumns - 1) / kTileColumns;
    const int num_tiles = (K + kResidentCodes - 1) / kResidentCodes;
    tiles = 0;
    rows = tiles + num_tiles * chunks * kResidentCodes * kTileRowBytes;
    keys = rows + groups * chunks * kGroupTileBytes;
    bias = keys + groups * num_tiles * kWarpgroup * int(sizeof(float2));
    scales = bias + num_tiles * kResidentCodes * 4;
    mean = scales + groups * kGroupRows * int(sizeof(RowScale));
    scratch = mean + chunks * kTileColumns * 4;
    spread = scratch + 32 * int(sizeof(CodeFacts));
    bytes = spread + int(sizeof(Spread)) + 1024;  // to align the first tile
  }
};

// The mean of the codes goes to `mean`; returns the exponent that scales them.
template <bool kAligned>
__device__ __forceinline__ int centre(const float* codes,  // [K, D]
                                      int K, int D, int columns,
                                      ColumnStats* partial,  // [strides, columns], 4 a thread, shared
                                      float* mean,           // [columns], shared
                                      CodeFacts* scratch) {  // [warps], shared
  // Four columns a thread, every so many codes; then the threads of a column are added up.
  const int threads = blockDim.x;
  const int thread = threadIdx.x;
  const int strides = threads / (columns / 4);
  const int first_d = thread % (columns / 4) * 4;
  const int stride = thread / (columns / 4);
  if (stride < strides) {
    ColumnStats stats[4];
    constexpr int kAtOnce = 8;  // loads under way
#pragma unroll 1
    for (int first = stride; first < K; first += kAtOnce * strides) {
      float x[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float* e = codes + int64_t(min(first + i * strides, K - 1)) * D;
        if constexpr (kAligned) {
          const float4 pack = *reinterpret_cast<const float4*>(e + min(first_d, D - 4));
          x[i][0] = pack.x, x[i][1] = pack.y, x[i][2] = pack.z, x[i][3] = pack.w;
        } else {
#pragma unroll
          for (int c = 0; c < 4; ++c) x[i][c] = e[min(first_d + c, D - 1)];
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const bool there = first + i * strides < K && first_d + c < D;
          stats[c].add(there ? x[i][c] : NAN, 1.f / K);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) partial[stride * columns + first_d + c] = stats[c];
  }
  __syncthreads();
  float reach = 0;
  for (int d = thread; d < columns; d += threads) {
    ColumnStats stats;
#pragma unroll 4
    for (int s = 0; s < strides; ++s) stats.add(partial[s * columns + d]);
    mean[d] = stats.mean;
    reach = fmaxf(reach, stats.reach());
  }
  return scale_exponent(block_max({reach, 0, 0}, scratch).square);
}

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

constexpr int kMostMeasured = 16;  // codes of a row, in float64, before measuring all of them is as well

// A block packs the codebook of a head; its warpgroups then go their own ways, 64 rows at a time.
template <bool kHopper, bool kAligned>
__global__ void __launch_bounds__(resident_threads(kHopper), 1)
    score_resident(Matrix z,                            // [H, M, D]
                   const float* __restrict__ codebook,  // [H, K, D]
                   int M, int K, int D, float accumulation, bool exact,
                   int64_t* __restrict__ indices) {  // [H, M]
#if !NCFAST_HOPPER
  if constexpr (kHopper) return;
#endif
  extern __shared__ char unaligned[];
  char* shared = unaligned + ((1024 - shared_address(unaligned) % 1024) & 1023);
  const int threads = blockDim.x;
  const ResidentLayout layout(K, D, threads / kWarpgroup);
  char* code_tiles = shared + layout.tiles;
  float* bias = reinterpret_cast<float*>(shared + layout.bias);
  float* mean = reinterpret_cast<float*>(shared + layout.mean);
  CodeFacts* scratch = reinterpret_cast<CodeFacts*>(shared + layout.scratch);

  const int chunks = (D + kTileColumns - 1) / kTileColumns;
  const int columns = chunks * kTileColumns;
  const int tiles = (K + kResidentCodes - 1) / kResidentCodes;
  const int padded = tiles * kResidentCodes;
  const int tile_bytes = chunks * kResidentCodes * kTileRowBytes;
  const int64_t head = blockIdx.y;
  const float* codes = codebook + head * K * D;

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  // Of a lane, so that the compiler sees them to be the same in all.
  const int group = __shfl_sync(kAllLanes, thread / kWarpgroup, 0);
  const int warp = __shfl_sync(kAllLanes, thread / 32 % 4, 0);
  const int groups = threads / kWarpgroup;
  int first_row = (group * gridDim.x + blockIdx.x) * kGroupRows + warp * 16;  // of this warp
  const int next_row = groups * gridDim.x * kGroupRows;
  prefetch_rows(z, head * M + first_row, M - first_row, D);

  const int exponent =
      centre<kAligned>(codes, K, D, columns, reinterpret_cast<ColumnStats*>(shared + layout.rows), mean, scratch);
  float* plain = reinterpret_cast<float*>(shared + layout.rows);  // the rows' place is free: the bias before its move
  CodeFacts facts{0, 0, 0};
#pragma unroll 1
  for (int first = 0; first < padded; first += threads / 8 * kPackAtOnce) {
    facts = larger(facts, pack_codes<kAligned, kResidentCodes>(codebook, head * K, first + thread / 8, threads / 8, K,
                                                               padded, D, chunks, kStepsPerTile, mean,
                                                               power_of_two(exponent), code_tiles, plain));
  }
  facts = block_max(facts, scratch);
  for (int code = thread; code < padded; code += threads) bias[bias_place(code)] = plain[code];
#if NCFAST_HOPPER
  fence_async_proxy();
#endif
  Spread* spread = reinterpret_cast<Spread*>(shared + layout.spread);
  if (thread == 0) *spread = spread_of(exponent, facts);
  __syncthreads();

  char* row_tiles = shared + layout.rows + group * chunks * kGroupTileBytes;
  RowScale* scales = reinterpret_cast<RowScale*>(shared + layout.scales) + group * kGroupRows + warp * 16;
  float2* keys = reinterpret_cast<float2*>(shared + layout.keys) + group * tiles * kWarpgroup + thread % kWarpgroup;
  const int last_steps = (D - (chunks - 1) * kTileColumns + 15) / 16;

  for (; first_row - warp * 16 < M; first_row += next_row) {
    prefetch_rows(z, head * M + first_row + next_row, M - first_row - next_row, D);
    stage_rows<kAligned, kAligned ? 4 : 1, 1>(z, head * M + first_row, M - first_row, D, chunks, mean, *spread,
                                              accumulation, exact, row_tiles, warp * 16, scales);
#if NCFAST_HOPPER
    fence_async_proxy();
#endif
    sync_some(1 + group, kWarpgroup);
    const float bias_scale[2] = {scales[lane / 4].bias_scale, scales[lane / 4 + 8].bias_scale};
    // Of the thread's share of each row: the best key, its tile and the next best key.
    float best[2] = {-INFINITY, -INFINITY}, second[2] = {-INFINITY, -INFINITY};
    int best_tile[2] = {0, 0};

#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      float acc[kResidentCodes / 2];
      const char* code_tile = code_tiles + tile * tile_bytes;
      multiply<kHopper, false, kResidentCodes>(acc, row_tiles, code_tile, chunks > 1 ? kStepsPerTile : last_steps);
#pragma unroll 1
      for (int chunk = 1; chunk < chunks; ++chunk) {
        multiply<kHopper, true, kResidentCodes>(acc, row_tiles + chunk * kGroupTileBytes,
                                                code_tile + chunk * (kResidentCodes * kTileRowBytes),
                                                chunk + 1 < chunks ? kStepsPerTile : last_steps);
      }
#if NCFAST_HOPPER
      if constexpr (kHopper) {
        wgmma_wait<0>();
        pin(acc);
      }
#endif
      float tile_best[2], tile_second[2];
      best_groups(acc, bias + tile * kResidentCodes, bias_scale, tile_best, tile_second);
      keys[tile * kWarpgroup] = make_float2(tile_best[0], tile_best[1]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        second[h] = fmaxf(fmaxf(second[h], tile_second[h]), min_or_nan(best[h], tile_best[h]));
        if (tile_best[h] > best[h]) best_tile[h] = tile;
        best[h] = fmaxf(best[h], tile_best[h]);
      }
    }
    sync_some(1 + group, kWarpgroup);  // the row tiles are not multiplied any more

    // Most rows have one group that can hold the nearest code.
    float floor[2];
    int first_code[2];
    bool one[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float window = scales[lane / 4 + 8 * h].window;
      const float top = quad_max(best[h]);
      const bool scored = window >= 0 && window <= FLT_MAX && top >= -FLT_MAX;
      floor[h] = scored ? lowest_key(top, window) : NAN;
      const unsigned reached = __ballot_sync(kAllLanes, best[h] >= floor[h]) >> (lane & ~3) & 0xf;
      const unsigned others = __ballot_sync(kAllLanes, second[h] >= floor[h]) >> (lane & ~3) & 0xf;
      one[h] = others == 0 && __popc(reached) == 1;
      const int winner = one[h] ? __ffs(int(reached)) - 1 : 0;
      const int tile = __shfl_sync(kAllLanes, best_tile[h], (lane & ~3) + winner);
      const int g = int(__float_as_uint(top) & kKeyBits);
      first_code[h] = one[h] ? tile * kResidentCodes + g * kGroupCodes + 2 * winner : 0;
    }
    float scores[2][2];
    multiply_groups(row_tiles, code_tiles, chunks, last_steps, first_code, scores);

#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
      const float window = scales[lane / 4 + 8 * h].window;
      const int own_code = (h == 0 ? first_code[0] : first_code[1]) + lane % 2 * 8;
      const float2 b = *reinterpret_cast<const float2*>(bias + bias_place(own_code));
      const bool own = lane / 2 % 2 == lane / 4 % 2;
      const float scale = h == 0 ? bias_scale[0] : bias_scale[1];
      const float x = own ? fmaf(b.x, scale, h == 0 ? scores[0][0] : scores[1][0]) : -INFINITY;
      const float y = own ? fmaf(b.y, scale, h == 0 ? scores[0][1] : scores[1][1]) : -INFINITY;
      const float low = quad_max(fmaxf(x, y)) - window;
      const bool x_reaches = x >= low, y_reaches = y >= low;
      const unsigned quad = 0xfu << (lane & ~3);
      const int count =
          __popc(__ballot_sync(kAllLanes, x_reaches) & quad) + __popc(__ballot_sync(kAllLanes, y_reaches) & quad);
      int code = x_reaches ? own_code : y_reaches ? own_code + 1 : INT_MAX;
      code = min(code, __shfl_xor_sync(kAllLanes, code, 1));
      code = min(code, __shfl_xor_sync(kAllLanes, code, 2));
      // Without a window the codes that are left score the same.
      const bool settled =
          window == kNotFinite || ((h == 0 ? one[0] : one[1]) && (count == 1 || (window == 0 && count > 0)));
      const bool writes = lane % 4 == 0 && window != kPastEnd;
      if (writes && settled) {
        indices[head * M + first_row + 8 * h + lane / 4] = window == kNotFinite ? 0 : code;
      }

      const float lane_floor = h == 0 ? floor[0] : floor[1];
      unsigned open = __ballot_sync(kAllLanes, writes && !settled);
#pragma unroll 1
      for (; open != 0; open &= open - 1) {
        const int leader = __ffs(int(open)) - 1;
        const int row = 8 * h + leader / 4;
        const int64_t open_row = head * M + first_row + row;
        const float row_floor = __shfl_sync(kAllLanes, lane_floor, leader);
        const bool by_score = scales[row].window == 0;
        double nearest = INFINITY;
        int nearest_code = INT_MAX;
        int measured = 0;
        // The share of a tile whose best key reaches the floor is scored again, a code a lane; what reaches it then
        // is measured.
#pragma unroll 1
        for (int first = 0; first < 4 * tiles; first += 32) {
          const int share = first + lane;
          const float2* key = keys - lane + leader + share % 4 + share / 4 * kWarpgroup;
          float share_best = NAN;
          if (share < 4 * tiles) share_best = h == 0 ? key->x : key->y;
          unsigned shares = __ballot_sync(kAllLanes, share_best >= row_floor);
#pragma unroll 1
          for (; shares != 0 && measured <= kMostMeasured; shares &= shares - 1) {
            const int found = first + __ffs(int(shares)) - 1;
            const int candidate = found / 4 * kResidentCodes + lane / 2 * 8 + found % 4 * 2 + lane % 2;
            const float score = fmaf(bias[bias_place(candidate)], scales[row].bias_scale,
                                     multiply_one(row_tiles, warp * 16 + row, code_tiles, candidate, chunks));
            unsigned reaching = __ballot_sync(kAllLanes, score >= row_floor);
            if (!by_score) measured += __popc(reaching);
            if (measured > kMostMeasured) break;
#pragma unroll 1
            for (; reaching != 0; reaching &= reaching - 1) {
              const int from = __ffs(int(reaching)) - 1;
              const int next = __shfl_sync(kAllLanes, candidate, from);
              const double distance = by_score ? -double(__shfl_sync(kAllLanes, score, from))
                                               : exact_distance<2>(z, open_row, codes + int64_t(next) * D, D);
              if (distance < nearest || (distance == nearest && next < nearest_code)) {
                nearest = distance;
                nearest_code = next;
              }
            }
          }
        }
        if (nearest_code == INT_MAX || measured > kMostMeasured)
          nearest_code = scan_all_codes(z, open_row, codes, K, D);
        if (lane == 0) indices[open_row] = nearest_code;
      }
    }
  }
}

// ---- Any codebook: packed once, then streamed through shared memory ----

// Codes of a tile: two sets of accumulators fit with wgmma, one with mma.sync, which keeps its operands in registers
// too.
__host__ __device__ constexpr int stream_codes(bool hopper) { return hopper ? 128 : 256; }
// Products of short codes take as many steps of 16 columns as the code has, one or two; four otherwise.
__host__ __device__ constexpr int stream_steps(bool hopper, int64_t D) {
  return hopper && D <= 16 ? 1 : hopper && D <= 32 ? 2 : kStepsPerTile;
}
// A block takes tiles by so many.
__host__ __device__ constexpr int tile_unit(bool hopper, int steps) {
  return steps == 1 ? kStepsPerTile : hopper ? 2 : 1;
}

constexpr int kStreamRows = 2 * kGroupRows;
constexpr int kMaxStages = 8;
constexpr int kKept = 8;  // candidates of a row that one block hands on
constexpr int kNone = -1;
constexpr int kUnlisted = -2;  // there are more; the score is the best of them
constexpr int kMaxStatBlocks = 256;
constexpr int kStatThreads = 256;
constexpr int kPackedCodes = 128;     // by one block
constexpr int kPackThreads = 32 * 8;  // of that block, 4 codes by eight lanes
constexpr int kMaxChunks = 8;

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

constexpr int kBiasBuffers = 3;  // of each warpgroup

struct StreamLayout {
  int rows, stages, lists, bias, scales, mean, scratch, spread, first_rows, barriers, bytes;

  __host__ __device__ StreamLayout(int chunks, int num_stages, int tile_codes) {
    rows = 0;
    stages = rows + 2 * chunks * kGroupTileBytes;
    lists = stages + num_stages * tile_codes * kTileRowBytes;
    bias = lists + 2 * kListBytes;
    scales = bias + 2 * kBiasBuffers * tile_codes * 4;
    mean = scales + kStreamRows * int(sizeof(RowScale));
    scratch = mean + chunks * kTileColumns * 4;
    spread = scratch + 32 * int(sizeof(CodeFacts));
    first_rows = spread + int(sizeof(Spread));
    barriers = first_rows + 2 * kWarpgroup / 32 * 8;
    bytes = barriers + 2 * kMaxStages * 8 + 1024;  // to align the first tile
  }
};

// With wgmma a ninth warp does nothing but copy.
constexpr int stream_threads(bool hopper) { return 2 * kWarpgroup + (hopper ? 32 : 0); }

struct StreamShape {
  int64_t M;
  int K, D, chunks, tiles, splits, stages;
};

// One block takes 128 rows of one head past a share of the tiles: all of them, unless there are fewer rows than it
// takes to fill the GPU.
template <bool kHopper, bool kLong, bool kAligned, int kSteps>
__global__ void __launch_bounds__(stream_threads(kHopper), 1)
    score_stream(Matrix z,                             // [H, M, D]
                 const char* __restrict__ packed,      // [H, tiles, chunks, kCodes, 64] fp16
                 const float* __restrict__ bias,       // [H, tiles * kCodes]
                 const float* __restrict__ mean,       // [H, 64 chunks]
                 const int* __restrict__ exponents,    // [H]
                 const CodeFacts* __restrict__ facts,  // [H, parts]
                 const StreamShape shape, float accumulation, bool exact,
                 float* __restrict__ windows,         // [H, M]
                 Candidate* __restrict__ candidates)  // [H, M, splits, kKept]
{
#if !NCFAST_HOPPER
  if constexpr (kHopper) return;
#endif
  constexpr int kCodes = stream_codes(kHopper);
  constexpr int kStageBytes = kCodes * kTileRowBytes;
  constexpr int kSharedBy = kStepsPerTile / kSteps;  // tiles of a stage
  constexpr int kUnit = tile_unit(kHopper, kSteps);
  extern __shared__ char unaligned[];
  char* shared = unaligned + ((1024 - shared_address(unaligned) % 1024) & 1023);
  const int chunks = shape.chunks;
  const StreamLayout layout(chunks, shape.stages, kCodes);
  char* stages = shared + layout.stages;
  float* shared_mean = reinterpret_cast<float*>(shared + layout.mean);

  const int64_t M = shape.M;
  const int split = blockIdx.x % shape.splits;
  const int64_t row_blocks = (M + kStreamRows - 1) / kStreamRows;
  const int64_t head = blockIdx.x / shape.splits / row_blocks;
  const int64_t block_row = blockIdx.x / shape.splits % row_blocks * kStreamRows;
  const int units = shape.tiles / kUnit;
  const int first_tile = int(int64_t(units) * split / shape.splits) * kUnit;
  const int num_tiles = int(int64_t(units) * (split + 1) / shape.splits) * kUnit - first_tile;
  packed += (head * shape.tiles + first_tile) / kSharedBy * chunks * kStageBytes;
  bias += (head * shape.tiles + first_tile) * kCodes;

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int group = thread / kWarpgroup;
  const int warp = thread / 32 % 4;

#if NCFAST_HOPPER
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + layout.barriers);
  uint64_t* empty = full + kMaxStages;
  if (kHopper && thread == 0) {
    for (int stage = 0; stage < shape.stages; ++stage) {
      init_barrier(full + stage, 1);
      init_barrier(empty + stage, 2 * kWarpgroup / 32);
    }
    publish_barriers();
  }
#endif
  for (int d = thread; d < chunks * kTileColumns; d += blockDim.x) {
    shared_mean[d] = mean[head * chunks * kTileColumns + d];
  }
  const int parts = shape.tiles * (kCodes / kPackedCodes);
  CodeFacts most{0, 0, 0};
  for (int part = thread; part < parts; part += blockDim.x) {
    most = larger(most, facts[head * parts + part]);
  }
  most = block_max(most, reinterpret_cast<CodeFacts*>(shared + layout.scratch));
  Spread* spread = reinterpret_cast<Spread*>(shared + layout.spread);
  if (thread == 0) *spread = spread_of(exponents[head], most);
  __syncthreads();

#if NCFAST_HOPPER
  if (kHopper && thread >= 2 * kWarpgroup) {
    if (lane != 0) return;
    int stage = 0, parity = 0;
    for (int64_t chunk = 0; chunk < int64_t(num_tiles / kSharedBy) * chunks; ++chunk) {
      wait(empty + stage, parity ^ 1);
      arrive_and_expect(full + stage, kStageBytes);
      copy_bulk(stages + stage * kStageBytes, packed + chunk * kStageBytes, kStageBytes, full + stage);
      if (++stage == shape.stages) stage = 0, parity ^= 1;
    }
    return;
  }
#endif

  char* row_tiles = shared + layout.rows + group * chunks * kGroupTileBytes;
  RowScale* scales = reinterpret_cast<RowScale*>(shared + layout.scales) + group * kGroupRows + warp * 16;
  float* group_bias = reinterpret_cast<float*>(shared + layout.bias) + group * kBiasBuffers * kCodes;
  Candidate* lists = reinterpret_cast<Candidate*>(shared + layout.lists + group * kListBytes) + thread % kWarpgroup;
  constexpr int kThreads = 2 * kWarpgroup;
  const int64_t first_row = block_row + group * kGroupRows + warp * 16;
  // Kept there because registers are short until the end.
  int64_t* first_index = reinterpret_cast<int64_t*>(shared + layout.first_rows) + thread / 32;
  if (lane == 0) *first_index = head * M + first_row;
  stage_rows<kAligned, kAligned ? 4 : 1, kAligned ? 2 : 1>(
      z, head * M + first_row, int(min(M - first_row, int64_t(16))), shape.D, chunks, shared_mean, *spread,
      accumulation, exact, row_tiles, warp * 16, scales);
#if NCFAST_HOPPER
  fence_async_proxy();
#endif
  sync_some(1 + group, kWarpgroup);
  RowState rows[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) start_row(rows[h], scales[lane / 4 + 8 * h]);

#if NCFAST_HOPPER
  if constexpr (kHopper) {
    // While one tile is multiplied, the scores of the one before are searched.
    float acc[2][kCodes / 2];
    int stage = 0, parity = 0;
    const auto give_back = [&](int first_ago, int last_ago) {
      __syncwarp();
      if (lane != 0) return;
      for (int ago = first_ago; ago >= last_ago; --ago) {
        arrive(empty + stage - ago + (stage < ago ? shape.stages : 0));
      }
    };
    float next_bias = bias[thread % kWarpgroup];
    const auto start = [&](float (&products)[kCodes / 2], int tile) {
      wait(full + stage, parity);
      if constexpr (kSharedBy > 1) {
        multiply_part<kSteps>(products, row_tiles, stages + stage * kStageBytes, tile % kSharedBy);
      } else {
        multiply<kHopper, false, kCodes>(products, row_tiles, stages + stage * kStageBytes, kStepsPerTile);
        if (++stage == shape.stages) stage = 0, parity ^= 1;
      }
#pragma unroll 1
      for (int chunk = 1; kSharedBy == 1 && chunk < chunks; ++chunk) {
        wait(full + stage, parity);
        multiply<kHopper, true, kCodes>(products, row_tiles + chunk * kGroupTileBytes, stages + stage * kStageBytes,
                                        kStepsPerTile);
        if (++stage == shape.stages) stage = 0, parity ^= 1;
        if constexpr (kLong) {
          wgmma_wait<1>();
          give_back(2, 2);
        }
      }
      // The buffer was last read two searches ago, before the barrier of the last start.
      group_bias[tile % kBiasBuffers * kCodes + thread % kWarpgroup] = next_bias;
      next_bias = bias[min(tile + 1, num_tiles - 1) * kCodes + thread % kWarpgroup];  // it takes longer than a search
      sync_some(1 + group, kWarpgroup);
    };
    const auto finish = [&](float (&products)[kCodes / 2], int tile) {
      wgmma_wait<0>();
      pin(products);
      if (tile % kSharedBy != kSharedBy - 1) return;
      if (kSharedBy > 1 && ++stage == shape.stages) stage = 0, parity ^= 1;
      give_back(kLong ? 1 : chunks, 1);
    };
    const auto search = [&](float (&products)[kCodes / 2], int tile) {
      offer_tile<kCodes>(products, group_bias + tile % kBiasBuffers * kCodes, (first_tile + tile) * kCodes, scales,
                         rows, lists);
    };
    // Tiles come in pairs. No branch lies between a start and its finish: the compiler would make the tensor cores
    // wait.
    start(acc[0], 0);
    for (int tile = 0; tile + 2 < num_tiles; tile += 2) {
      finish(acc[0], tile);
      start(acc[1], tile + 1);
      search(acc[0], tile);
      finish(acc[1], tile + 1);
      start(acc[0], tile + 2);
      search(acc[1], tile + 1);
    }
    finish(acc[0], num_tiles - 2);
    start(acc[1], num_tiles - 1);
    search(acc[0], num_tiles - 2);
    finish(acc[1], num_tiles - 1);
    search(acc[1], num_tiles - 1);
  }
#endif
  if constexpr (!kHopper) {
    const int last_steps = (shape.D - (chunks - 1) * kTileColumns + 15) / 16;
    float acc[kCodes / 2];
    const auto copy_stage = [&](int64_t chunk) {
      char* to = stages + chunk % 2 * kStageBytes;
      const char* from = packed + chunk * kStageBytes;
#pragma unroll
      for (int i = 0; i < kStageBytes; i += kThreads * 16) copy16_async(to + i + thread * 16, from + i + thread * 16);
      commit_copies();
    };
    const int64_t total = int64_t(num_tiles) * chunks;
    copy_stage(0);
    for (int tile = 0; tile < num_tiles; ++tile) {
      float* tile_bias = group_bias + tile % 2 * kCodes;
      reinterpret_cast<float2*>(tile_bias)[thread % kWarpgroup] =
          reinterpret_cast<const float2*>(bias + tile * kCodes)[thread % kWarpgroup];
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int64_t current = int64_t(tile) * chunks + chunk;
        wait_copies();
        __syncthreads();
        if (current + 1 < total) copy_stage(current + 1);
        const char* code_tile = stages + current % 2 * kStageBytes;
        const int steps = chunk + 1 < chunks ? kStepsPerTile : last_steps;
        if (chunk == 0) {
          multiply<kHopper, false, kCodes>(acc, row_tiles, code_tile, steps);
        } else {
          multiply<kHopper, true, kCodes>(acc, row_tiles + chunk * kGroupTileBytes, code_tile, steps);
        }
      }
      offer_tile<kCodes>(acc, tile_bias, (first_tile + tile) * kCodes, scales, rows, lists);
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const RowState& row = rows[h];
    const float window = scales[lane / 4 + 8 * h].window;
    if (window == kPastEnd) continue;  // for all four lanes
    const unsigned quad = 0xfu << (lane & ~3);
    const int64_t index = *first_index + 8 * h + lane / 4;
    Candidate* out = candidates + (index * shape.splits + split) * kKept;
    if (split == 0 && lane % 4 == 0) windows[index] = fmaxf(window, 0.f);
    int before = 0, total = 0, most_of_a_lane = 0;
#pragma unroll
    for (int other = 0; other < 4; ++other) {
      const int count = __shfl_sync(quad, row.count, other, 4);
      before += other < lane % 4 ? count : 0;
      total += count;
      most_of_a_lane = max(most_of_a_lane, count);
    }
    int first_code = row.count > 0 ? slot(lists, h, 0).code : INT_MAX;
    first_code = min(first_code, __shfl_xor_sync(quad, first_code, 1));
    first_code = min(first_code, __shfl_xor_sync(quad, first_code, 2));

    Candidate only{row.best, kUnlisted};  // also of a row that has no window
    bool one = most_of_a_lane > kSlots || total > kKept || !(window <= FLT_MAX);
    if (window == kNotFinite) {
      only = split == 0 ? Candidate{0, 0} : Candidate{-INFINITY, kNone};
      one = true;
    } else if (window == 0 && total > 0) {  // all candidates score the same, and each list is in order
      only.code = first_code;
      one = true;
    }
    if (one) {
      if (lane % 4 == 0) {
        out[0] = only;
        out[1] = {-INFINITY, kNone};
      }
    } else {
      for (int i = 0; i < row.count; ++i) out[before + i] = slot(lists, h, i);
      if (lane % 4 == 0 && total < kKept) out[total] = {-INFINITY, kNone};
    }
  }
}

// Picks the winner among the candidates of all splits: a thread a row, then a warp a row where several are left.
constexpr int kDecideThreads = 128;
constexpr int kDecideRows = 8;  // of a warp

__global__ void __launch_bounds__(kDecideThreads, 8)
    decide(Matrix z,                            // [H, M, D]
           const float* __restrict__ codebook,  // [H, K, D]
           int64_t rows, int64_t M, int K, int D, int splits,
           const float* __restrict__ windows,         // [H, M]
           const Candidate* __restrict__ candidates,  // [H, M, splits, kKept]
           int open_mark,
           int64_t* __restrict__ indices) {  // [H, M]
  const int64_t warp_row = (int64_t(blockIdx.x) * (kDecideThreads / 32) + threadIdx.x / 32) * kDecideRows;
  const int lane = threadIdx.x % 32;
  const auto each = [&](int64_t row, auto&& use) {
    for (int split = 0; split < splits; ++split) {
      const Candidate* list = candidates + (row * splits + split) * kKept;
      for (int i = 0; i < kKept; ++i) {
        const Candidate candidate = list[i];
        if (candidate.code == kNone) break;
        use(candidate);
        if (candidate.code == kUnlisted) break;
      }
    }
  };

  bool open = false;
  float floor = 0;
  if (lane < kDecideRows && warp_row + lane < rows) {
    const int64_t row = warp_row + lane;
    const float window = windows[row];
    float best = -INFINITY;
    each(row, [&](const Candidate& candidate) { best = fmaxf(best, candidate.score); });
    floor = best - window;
    int count = 0, code = INT_MAX;
    bool unlisted = false;
    each(row, [&](const Candidate& candidate) {
      if (!(candidate.score >= floor)) return;
      unlisted |= candidate.code == kUnlisted;
      code = min(code, candidate.code);
      ++count;
    });
    const bool unknown = unlisted || count == 0;
    open = !unknown && count > 1 && window > 0;
    if (!open) indices[row] = unknown ? open_mark : code;
  }
  for (unsigned pending = __ballot_sync(kAllLanes, open); pending != 0; pending &= pending - 1) {
    const int leader = __ffs(int(pending)) - 1;
    const int64_t row = warp_row + leader;
    const float row_floor = __shfl_sync(kAllLanes, floor, leader);
    const float* codes = codebook + row / M * K * D;
    double nearest = INFINITY;
    int nearest_code = INT_MAX;
    each(row, [&](const Candidate& candidate) {
      if (!(candidate.score >= row_floor)) return;
      const double distance = exact_distance<4>(z, row, codes + int64_t(candidate.code) * D, D);
      if (distance < nearest || (distance == nearest && candidate.code < nearest_code)) {
        nearest = distance;
        nearest_code = candidate.code;
      }
    });
    if (lane == 0) indices[row] = nearest_code;
  }
}

}  // namespace
}  // namespace ncfast::cuda
