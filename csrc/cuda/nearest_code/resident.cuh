#pragma once

// Resident.

#include <algorithm>

#include "group_keys.cuh"
#include "rescoring.cuh"

namespace ncfast::cuda {
namespace {

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

// The mean of every `step`th code goes to `mean`; returns the exponent that scales these codes to 2^top.
template <bool kAligned>
__device__ __forceinline__ int centre(const float* codes,  // [K, D]
                                      int K, int step, int top, int D, int columns,
                                      ColumnStats* partial,  // [strides, columns], 4 a thread, shared
                                      float* mean,           // [columns], shared
                                      CodeFacts* scratch) {  // [warps], shared
  // Four columns a thread, every so many codes; then the threads of a column are added up.
  const int threads = blockDim.x;
  const int thread = threadIdx.x;
  const int strides = threads / (columns / 4);
  const int first_d = thread % (columns / 4) * 4;
  const int stride = thread / (columns / 4);
  const int count = (K + step - 1) / step;
  if (stride < strides) {
    ColumnStats stats[4];
    constexpr int kAtOnce = 8;  // loads under way
#pragma unroll 1
    for (int first = stride; first < count; first += kAtOnce * strides) {
      float x[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float* e = codes + int64_t(min(first + i * strides, count - 1)) * step * D;
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
          const bool there = first + i * strides < count && first_d + c < D;
          stats[c].add(there ? x[i][c] : NAN, 1.f / count);
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
  return scale_exponent(block_max({reach, 0, 0}, scratch).square, top);
}

// Mean and scale of so many codes serve for all; only what is 2^7 times larger than these does not fit into fp16.
constexpr int kSampledCodes = 128;
constexpr int kSampledTop = 8;

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

  float* plain = reinterpret_cast<float*>(shared + layout.rows);  // the rows' place is free: the bias before its move
  int exponent;
  CodeFacts facts;
#pragma unroll 1
  for (int step = max(1, K / kSampledCodes);; step = 1) {
    exponent = centre<kAligned>(codes, K, step, step > 1 ? kSampledTop : kTop, D, columns,
                                reinterpret_cast<ColumnStats*>(shared + layout.rows), mean, scratch);
    facts = {0, 0, 0};
#pragma unroll 1
    for (int first = 0; first < padded; first += threads / 8 * kPackAtOnce) {
      facts = larger(facts, pack_codes<kAligned, kResidentCodes>(codebook, head * K, first + thread / 8, threads / 8, K,
                                                                 padded, D, chunks, kStepsPerTile, mean,
                                                                 power_of_two(exponent), code_tiles, plain));
    }
    facts = block_max(facts, scratch);
    // Or else some code is too large for their scale, or all are too small.
    if (step == 1 || (facts.square >= 1 && facts.square <= FLT_MAX)) break;
  }
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

// Whether the codebook fit in shared memory, and so the work was launched.
template <bool kHopper, bool kAligned>
bool launch_resident(const Matrix& z, const Matrix& codebook, int64_t H, int64_t M, int K, int D, bool exact,
                     const Device& device, cudaStream_t stream, int64_t* indices) {
  if (int64_t(K) * D * 2 > device.shared_bytes || H > 65535 || M > INT_MAX / 2) return false;
  if (ceil_div(D, kTileColumns) > kMaxChunks) return false;
  int groups = resident_threads(kHopper) / kWarpgroup;
  while (groups >= 2 && ResidentLayout(K, D, groups).bytes > device.shared_bytes) --groups;
  if (groups < 2) return false;
  const ResidentLayout layout(K, D, groups);
  const int64_t blocks_per_head = std::max<int64_t>(1, std::min(device.processors / H, ceil_div(M, kGroupRows)));
  allow_shared(score_resident<kHopper, kAligned>, layout.bytes);
  score_resident<kHopper, kAligned>
      <<<dim3(unsigned(blocks_per_head), unsigned(H)), groups * kWarpgroup, layout.bytes, stream>>>(
          z, static_cast<const float*>(codebook.data), int(M), K, D, accumulation_error(D), exact, indices);
  check(cudaGetLastError(), "tensor-core pass");
  return true;
}

}  // namespace
}  // namespace ncfast::cuda
