#pragma once

// Candidates of a streamed codebook: the codes of a row that score at most its window less than the best. Four lanes
// share a row. While the tiles pass, each lists the candidates that it meets in shared memory; at the end their lists
// are joined in global memory, and `choose_nearest` chooses among those of all blocks.

#include <cfloat>
#include <climits>
#include <cmath>

#include "rounding.cuh"

namespace ncfast::cuda {

struct Candidate {
  float score;
  int code;
};

constexpr int kSlots = 4;       // candidates that a thread keeps of a row
constexpr int kListLength = 8;  // candidates of a row that one block hands on
constexpr int kListEnd = -1;
constexpr int kListOverflow = -2;  // there are more; the score is the best of them

// Of one of the two rows of a thread. best and threshold are the same in its four lanes.
struct RowState {
  float best;
  float threshold;  // lower scores are no candidates
  int count;        // of candidates; kSlots + 1 if some were not kept
};

constexpr int kListEntries = 2 * kSlots * kWarpgroup;  // of a warpgroup

// Candidate i of row h = 0 or 1 of the thread whose lists start at `lists`.
NCFAST_DEVICE Candidate& slot(Candidate* lists, int h, int i) { return lists[(h * kSlots + i) * kWarpgroup]; }

NCFAST_DEVICE void start_row(RowState& row, const RowScale& scale) {
  // No score reaches the threshold of a row without a window.
  const bool scored = scale.window >= 0 && scale.window <= FLT_MAX;
  row = {scored ? -INFINITY : INFINITY, scored ? -FLT_MAX : INFINITY, 0};
}

// Raises the best score and drops the candidates that are then below the threshold.
NCFAST_DEVICE void raise_best(RowState& row, float best, float window, Candidate* lists, int h) {
  const float threshold = fmaxf(best - window, -FLT_MAX);
  if (threshold > row.best) {
    row.count = 0;
  } else if (row.count <= kSlots) {
    int kept = 0;
    for (int i = 0; i < row.count; ++i) {
      const Candidate candidate = slot(lists, h, i);
      if (candidate.score >= threshold) slot(lists, h, kept++) = candidate;
    }
    row.count = kept;
  }
  row.best = best;
  row.threshold = threshold;
}

constexpr int kSearchCodes = 64;  // codes that are searched together, 16 by each lane

// Lists the codes of a tile of scores that reach the threshold of row h.
template <int kCodes>
NCFAST_DEVICE void list_candidates(const float (&acc)[kCodes / 2], const float (&top)[2][kCodes / kSearchCodes],
                                   int first_code, int h, RowState& row, Candidate* lists) {
#pragma unroll
  for (int search = 0; search < kCodes / kSearchCodes; ++search) {
    if (!(top[h][search] >= row.threshold)) continue;
    unsigned hits = 0;
#pragma unroll
    for (int i = 0; i < kSearchCodes / 4; ++i) {
      if (acc[search * (kSearchCodes / 2) + 4 * (i / 2) + 2 * h + i % 2] >= row.threshold) hits |= 1u << i;
    }
    for (; hits != 0; hits &= hits - 1) {
      const int i = __ffs(int(hits)) - 1;
      const int code = first_code + search * kSearchCodes + 8 * (i / 2) + threadIdx.x % 4 * 2 + i % 2;
      // The best of the search stands for the score of each hit: an upper bound, which keeps it a little longer.
      if (row.count < kSlots) slot(lists, h, row.count) = Candidate{top[h][search], code};
      row.count = min(row.count + 1, kSlots + 1);
    }
  }
}

// Turns a tile of products, as `multiply` leaves them, into scores and lists the candidates. Most tiles have no score
// that reaches a threshold, and end at the first branch.
template <int kCodes>
NCFAST_DEVICE void add_tile(float (&acc)[kCodes / 2],
                            const float* bias,  // [kCodes], shared
                            int first_code,
                            const RowScale* scales,  // [16], shared
                            RowState (&rows)[2], Candidate* lists) {
  const int row = threadIdx.x % 32 / 4;
  const float bias_scale[2] = {scales[row].bias_scale, scales[row + 8].bias_scale};
  float top[2][kCodes / kSearchCodes];  // the best score of every 64 codes
#pragma unroll
  for (int j = 0; j < kCodes / 8; ++j) {
    const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + threadIdx.x % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float &x = acc[4 * j + 2 * h], &y = acc[4 * j + 2 * h + 1];
      x = fmaf(b.x, bias_scale[h], x);
      y = fmaf(b.y, bias_scale[h], y);
      float& best = top[h][8 * j / kSearchCodes];
      best = 8 * j % kSearchCodes == 0 ? fmaxf(x, y) : fmaxf(best, fmaxf(x, y));
    }
  }
  float greatest[2] = {top[0][0], top[1][0]};
#pragma unroll
  for (int i = 2; i < 2 * kCodes / kSearchCodes; ++i) greatest[i % 2] = fmaxf(greatest[i % 2], top[i % 2][i / 2]);
  if (!__any_sync(kAllLanes, greatest[0] >= rows[0].threshold || greatest[1] >= rows[1].threshold)) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) greatest[h] = lane_max<4>(greatest[h]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (greatest[h] > rows[h].best) {
      raise_best(rows[h], greatest[h], scales[row + 8 * h].window, lists, h);
    }
    list_candidates<kCodes>(acc, top, first_code, h, rows[h], lists);
  }
}

// Four lanes join their lists of a row, of which the first block (`first`) also writes what has no candidates.
NCFAST_DEVICE void write_candidates(const RowState& row, float window, Candidate* lists, int h, bool first,
                                    Candidate* out) {  // [kListLength]
  const int lane = threadIdx.x % 32;
  const unsigned quad = 0xfu << (lane & ~3);
  int before = 0, total = 0, most_of_a_lane = 0;
#pragma unroll
  for (int other = 0; other < 4; ++other) {
    const int count = __shfl_sync(quad, row.count, other, 4);
    before += other < lane % 4 ? count : 0;
    total += count;
    most_of_a_lane = max(most_of_a_lane, count);
  }
  const int first_code = lane_min<4>(row.count > 0 ? slot(lists, h, 0).code : INT_MAX, quad);

  Candidate only{row.best, kListOverflow};  // also of a row without a window
  bool one = most_of_a_lane > kSlots || total > kListLength || !(window <= FLT_MAX);
  if (window == kNotFinite) {
    only = first ? Candidate{0, 0} : Candidate{-INFINITY, kListEnd};
    one = true;
  } else if (window == 0 && total > 0) {  // all candidates score the same, and each list is in order
    only.code = first_code;
    one = true;
  }
  if (!one) {
    for (int i = 0; i < row.count; ++i) out[before + i] = slot(lists, h, i);
    if (lane % 4 == 0 && total < kListLength) out[total] = {-INFINITY, kListEnd};
  } else if (lane % 4 == 0) {
    out[0] = only;
    out[1] = {-INFINITY, kListEnd};
  }
}

}  // namespace ncfast::cuda
