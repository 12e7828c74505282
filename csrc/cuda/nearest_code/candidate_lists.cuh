#pragma once

// Candidates.

#include "rounding.cuh"

namespace ncfast::cuda {
namespace {

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

constexpr int kKept = 8;  // candidates of a row that one block hands on
constexpr int kNone = -1;
constexpr int kUnlisted = -2;  // there are more; the score is the best of them

}  // namespace
}  // namespace ncfast::cuda
