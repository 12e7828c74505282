#pragma once

// Nearest code with a codebook that fits in shared memory, in one launch. Every block rounds the codebook for itself
// and keeps it; its warpgroups then take 64 rows at a time, each at its own pace.

#include <algorithm>

#include "group_keys.cuh"
#include "rescoring.cuh"

namespace ncfast::cuda {

// At most. With mma.sync fewer fit, as it keeps its operands in registers too.
constexpr int resident_threads(bool hopper) { return (hopper ? 4 : 3) * kWarpgroup; }

struct ResidentBuffers : Buffers {  // in shared memory
  char* codes;                      // [tiles, chunks, 128, 64] fp16
  char* rows;                       // [groups, chunks, 64, 64] fp16
  float2* keys;                     // [groups, tiles, 128 threads] best key of rows h = 0 and 1
  float* bias;                      // [tiles * 128], by bias_index
  RowScale* scales;                 // [groups, 64]
  float* mean;                      // [chunks * 64]
  CodeNorms* scratch;
  CodebookScale* codebook;

  __host__ __device__ ResidentBuffers(char* memory, int K, int D, int groups) : Buffers{memory} {
    const int chunks = (D + kTileColumns - 1) / kTileColumns;
    const int tiles = (K + kResidentCodes - 1) / kResidentCodes;
    place(codes, tiles * chunks * kResidentCodes * kTileRowBytes);
    place(rows, groups * chunks * kRowTileBytes);
    place(keys, groups * tiles * kWarpgroup);
    place(bias, tiles * kResidentCodes);
    place(scales, groups * kWarpgroupRows);
    place(mean, chunks * kTileColumns);
    place(scratch, 32);
    place(codebook, 1);
  }
};

// Writes the mean of the codes to `mean` and returns the exponent that scales them.
template <bool kAligned>
NCFAST_DEVICE int centre(const float* codes,  // [K, D]
                         int K, int D, int columns,
                         ColumnStats* partial,  // [strides, columns], 4 a thread, shared
                         float* mean,           // [columns], shared
                         CodeNorms* scratch) {  // [warps], shared
  // Four columns a thread, every so many codes; then the threads of a column are added up.
  const int threads = blockDim.x;
  const int thread = threadIdx.x;
  const int strides = threads / (columns / 4);
  const int first_d = thread % (columns / 4) * 4;
  const int stride = thread / (columns / 4);
  if (stride < strides) {
    ColumnStats stats[4];
    constexpr int kInFlight = 8;  // loads
#pragma unroll 1
    for (int first = stride; first < K; first += kInFlight * strides) {
      float x[kInFlight][4];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
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
      for (int i = 0; i < kInFlight; ++i) {
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

constexpr int kMaxRescored = 16;  // candidates of a row; with more its distances to all codes are computed

template <bool kHopper, bool kAligned>
__global__ void __launch_bounds__(resident_threads(kHopper), 1) score_resident(const Call call, float accumulation) {
  if constexpr (kHopper && !kCompilesWgmma) return;
  constexpr bool kWgmma = kHopper && kCompilesWgmma;
  const Matrix z = call.z;
  const int M = int(call.M), K = call.K, D = call.D;
  const int threads = blockDim.x;
  const ResidentBuffers shared(tile_memory(), K, D, threads / kWarpgroup);
  const char* code_tiles = shared.codes;
  const float* bias = shared.bias;

  const int chunks = (D + kTileColumns - 1) / kTileColumns;
  const int columns = chunks * kTileColumns;
  const int tiles = (K + kResidentCodes - 1) / kResidentCodes;
  const int padded = tiles * kResidentCodes;
  const int tile_bytes = chunks * kResidentCodes * kTileRowBytes;
  const int64_t head = blockIdx.y;
  const float* codes = call.codes() + head * K * D;

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  // Read from one lane, so that the compiler knows that they are the same in all.
  const int group = __shfl_sync(kAllLanes, thread / kWarpgroup, 0);
  const int warp = __shfl_sync(kAllLanes, thread / 32 % 4, 0);
  const int groups = threads / kWarpgroup;
  int first_row = (group * gridDim.x + blockIdx.x) * kWarpgroupRows + warp * 16;  // of this warp
  const int next_row = groups * gridDim.x * kWarpgroupRows;
  prefetch_rows(z, head * M + first_row, M - first_row, D);

  const int exponent =
      centre<kAligned>(codes, K, D, columns, reinterpret_cast<ColumnStats*>(shared.rows), shared.mean, shared.scratch);
  CodeNorms norms{0, 0, 0};
#pragma unroll 1
  for (int first = 0; first < padded; first += threads / 8 * kCodesInFlight) {
    norms = max_norms(
        norms, pack_codes<kAligned, kResidentCodes>(call.codes(), head * K, first + thread / 8, threads / 8, K, padded,
                                                    D, chunks, kStepsPerTile, shared.mean, power_of_two(exponent),
                                                    shared.codes, shared.bias, bias_index));
  }
  norms = block_max(norms, shared.scratch);
  fence_async_proxy();
  if (thread == 0) *shared.codebook = CodebookScale(exponent, norms);
  __syncthreads();

  char* row_tiles = shared.rows + group * chunks * kRowTileBytes;
  RowScale* scales = shared.scales + group * kWarpgroupRows + warp * 16;
  float2* keys = shared.keys + group * tiles * kWarpgroup + thread % kWarpgroup;
  const int last_steps = (D - (chunks - 1) * kTileColumns + 15) / 16;

  for (; first_row - warp * 16 < M; first_row += next_row) {
    prefetch_rows(z, head * M + first_row + next_row, M - first_row - next_row, D);
    stage_rows<kAligned, kAligned ? 4 : 1, 1>(z, head * M + first_row, M - first_row, D, chunks, shared.mean,
                                              *shared.codebook, accumulation, call.exact, row_tiles, warp * 16, scales);
    fence_async_proxy();
    sync_threads(1 + group, kWarpgroup);
    const float bias_scale[2] = {scales[lane / 4].bias_scale, scales[lane / 4 + 8].bias_scale};
    // Of the scores that the thread holds of each row: the best key, its tile and the second best key.
    float best[2] = {-INFINITY, -INFINITY}, second[2] = {-INFINITY, -INFINITY};
    int best_tile[2] = {0, 0};

#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      float acc[kResidentCodes / 2];
      const char* code_tile = code_tiles + tile * tile_bytes;
      multiply<kWgmma, false, kResidentCodes>(acc, row_tiles, code_tile, chunks > 1 ? kStepsPerTile : last_steps);
#pragma unroll 1
      for (int chunk = 1; chunk < chunks; ++chunk) {
        multiply<kWgmma, true, kResidentCodes>(acc, row_tiles + chunk * kRowTileBytes,
                                               code_tile + chunk * (kResidentCodes * kTileRowBytes),
                                               chunk + 1 < chunks ? kStepsPerTile : last_steps);
      }
      finish_products<kWgmma>(acc);
      float tile_best[2], tile_second[2];
      best_two_keys(acc, bias + tile * kResidentCodes, bias_scale, tile_best, tile_second);
      keys[tile * kWarpgroup] = make_float2(tile_best[0], tile_best[1]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        second[h] = fmaxf(fmaxf(second[h], tile_second[h]), min_or_nan(best[h], tile_best[h]));
        if (tile_best[h] > best[h]) best_tile[h] = tile;
        best[h] = fmaxf(best[h], tile_best[h]);
      }
    }
    sync_threads(1 + group, kWarpgroup);  // all warps are done with the row tiles

    // Most rows have one group that can hold the nearest code: its four scores are computed again.
    float threshold[2];
    int first_code[2];
    bool one[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float window = scales[lane / 4 + 8 * h].window;
      const float top = lane_max<4>(best[h]);
      const bool scored = window >= 0 && window <= FLT_MAX && top >= -FLT_MAX;
      threshold[h] = scored ? key_threshold(top, window) : NAN;
      const unsigned reached = __ballot_sync(kAllLanes, best[h] >= threshold[h]) >> (lane & ~3) & 0xf;
      const unsigned others = __ballot_sync(kAllLanes, second[h] >= threshold[h]) >> (lane & ~3) & 0xf;
      one[h] = others == 0 && __popc(reached) == 1;
      const int winner = one[h] ? __ffs(int(reached)) - 1 : 0;
      const int tile = __shfl_sync(kAllLanes, best_tile[h], (lane & ~3) + winner);
      const int g = int(__float_as_uint(top) & kKeyBits);
      first_code[h] = one[h] ? tile * kResidentCodes + g * kGroupCodes + 2 * winner : 0;
    }
    float scores[2][2];
    score_best_groups(row_tiles, code_tiles, chunks, last_steps, first_code, scores);

#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
      const float window = scales[lane / 4 + 8 * h].window;
      const int own_code = (h == 0 ? first_code[0] : first_code[1]) + lane % 2 * 8;
      const float2 b = *reinterpret_cast<const float2*>(bias + bias_index(own_code));
      const bool own = lane / 2 % 2 == lane / 4 % 2;
      const float scale = h == 0 ? bias_scale[0] : bias_scale[1];
      const float x = own ? fmaf(b.x, scale, h == 0 ? scores[0][0] : scores[1][0]) : -INFINITY;
      const float y = own ? fmaf(b.y, scale, h == 0 ? scores[0][1] : scores[1][1]) : -INFINITY;
      const float low = lane_max<4>(fmaxf(x, y)) - window;
      const bool x_reaches = x >= low, y_reaches = y >= low;
      const unsigned quad = 0xfu << (lane & ~3);
      const int count =
          __popc(__ballot_sync(kAllLanes, x_reaches) & quad) + __popc(__ballot_sync(kAllLanes, y_reaches) & quad);
      const int code = lane_min<4>(x_reaches ? own_code : y_reaches ? own_code + 1 : INT_MAX);
      // With a window of 0 the codes that are left score the same.
      const bool decided =
          window == kNotFinite || ((h == 0 ? one[0] : one[1]) && (count == 1 || (window == 0 && count > 0)));
      const bool writes = lane % 4 == 0 && window != kPastEnd;
      if (writes && decided) {
        call.indices[head * M + first_row + 8 * h + lane / 4] = window == kNotFinite ? 0 : code;
      }

      const float lane_threshold = h == 0 ? threshold[0] : threshold[1];
      unsigned open = __ballot_sync(kAllLanes, writes && !decided);
#pragma unroll 1
      for (; open != 0; open &= open - 1) {
        const int leader = __ffs(int(open)) - 1;
        const int row = 8 * h + leader / 4;
        const int64_t open_row = head * M + first_row + row;
        const float row_threshold = __shfl_sync(kAllLanes, lane_threshold, leader);
        const bool by_score = scales[row].window == 0;
        Nearest nearest{INFINITY, INT_MAX};
        int rescored = 0;
        // A share is the 32 codes of a tile whose scores one lane held. Where its best key reaches the threshold it is
        // scored again, a code a lane, and the codes that reach the threshold then are rescored.
#pragma unroll 1
        for (int first = 0; first < 4 * tiles; first += 32) {
          const int share = first + lane;
          const float2* key = keys - lane + leader + share % 4 + share / 4 * kWarpgroup;
          float share_best = NAN;
          if (share < 4 * tiles) share_best = h == 0 ? key->x : key->y;
          unsigned shares = __ballot_sync(kAllLanes, share_best >= row_threshold);
#pragma unroll 1
          for (; shares != 0 && rescored <= kMaxRescored; shares &= shares - 1) {
            const int found = first + __ffs(int(shares)) - 1;
            const int candidate = found / 4 * kResidentCodes + lane / 2 * 8 + found % 4 * 2 + lane % 2;
            const float score = fmaf(bias[bias_index(candidate)], scales[row].bias_scale,
                                     dot(row_tiles, warp * 16 + row, code_tiles, candidate, chunks));
            unsigned reaching = __ballot_sync(kAllLanes, score >= row_threshold);
            if (!by_score) rescored += __popc(reaching);
            if (rescored > kMaxRescored) break;
#pragma unroll 1
            for (; reaching != 0; reaching &= reaching - 1) {
              const int from = __ffs(int(reaching)) - 1;
              const int next = __shfl_sync(kAllLanes, candidate, from);
              const double distance = by_score ? -double(__shfl_sync(kAllLanes, score, from))
                                               : exact_distance<2>(z, open_row, codes + int64_t(next) * D, D);
              offer(nearest, distance, next);
            }
          }
        }
        const bool unknown = nearest.code == INT_MAX || rescored > kMaxRescored;
        const int code = unknown ? nearest_of_all(z, open_row, codes, K, D) : nearest.code;
        if (lane == 0) call.indices[open_row] = code;
      }
    }
  }
}

// Whether the codebook fits in shared memory, and so the kernel was launched.
template <bool kHopper, bool kAligned>
bool launch_resident(const Call& call, const Device& device) {
  const int64_t H = call.H, M = call.M;
  const int K = call.K, D = call.D;
  if (int64_t(K) * D * 2 > device.shared_bytes || H > 65535 || M > INT_MAX / 2) return false;
  if (ceil_div(D, kTileColumns) > kMaxChunks) return false;
  int groups = resident_threads(kHopper) / kWarpgroup;
  while (groups >= 2 && ResidentBuffers(nullptr, K, D, groups).bytes + kTileAlignment > device.shared_bytes) --groups;
  if (groups < 2) return false;
  const int64_t blocks_per_head = std::max<int64_t>(1, std::min(device.processors / H, ceil_div(M, kWarpgroupRows)));
  launch("tensor-core pass", score_resident<kHopper, kAligned>, dim3(unsigned(blocks_per_head), unsigned(H)),
         groups * kWarpgroup, int(ResidentBuffers(nullptr, K, D, groups).bytes) + kTileAlignment, call.stream, call,
         accumulation_error(D));
  return true;
}

}  // namespace ncfast::cuda
