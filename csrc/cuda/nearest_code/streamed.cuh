#pragma once

// Streamed.

#include <algorithm>
#include <type_traits>

#include "candidate_lists.cuh"
#include "packing.cuh"
#include "rescoring.cuh"

namespace ncfast::cuda {
namespace {

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

// The shapes of the streamed path and its places in the workspace.
struct StreamPlan {
  int chunks, steps, tiles, splits, stat_blocks, codes_per_stat_block, pack_blocks;
  int64_t packed, bias, candidates, windows, partial, mean, reach, facts, exponents, bytes;

  StreamPlan(int64_t H, int64_t M, int64_t K, int64_t D, int processors, bool hopper) {
    const int tile_codes = stream_codes(hopper);
    constexpr int64_t kMaxSplits = 16;
    chunks = int(ceil_div(D, kTileColumns));
    steps = stream_steps(hopper, D);
    const int unit = tile_unit(hopper, steps);
    tiles = int(ceil_div(K, tile_codes * unit)) * unit;
    const int64_t row_blocks = H * ceil_div(M, kStreamRows);
    splits = int(std::max<int64_t>(1, std::min({processors / row_blocks, int64_t(tiles / unit), kMaxSplits})));
    codes_per_stat_block = int(ceil_div(K, std::min<int64_t>(kMaxStatBlocks, ceil_div(K, 64))));
    stat_blocks = int(ceil_div(K, codes_per_stat_block));
    pack_blocks = tiles * (tile_codes / kPackedCodes);

    bytes = 0;
    const auto place = [this](int64_t size) {
      const int64_t start = bytes;
      bytes += ceil_div(size, 16) * 16;
      return start;
    };
    packed = place(H * tiles * chunks * tile_codes * kTileRowBytes);
    bias = place(H * tiles * tile_codes * int64_t(sizeof(float)));
    candidates = place(H * M * splits * kKept * int64_t(sizeof(Candidate)));
    windows = place(H * M * int64_t(sizeof(float)));
    partial = place(H * stat_blocks * D * int64_t(sizeof(ColumnStats)));
    mean = place(H * chunks * kTileColumns * int64_t(sizeof(float)));
    reach = place(H * chunks * kTileColumns * int64_t(sizeof(float)));
    facts = place(H * pack_blocks * int64_t(sizeof(CodeFacts)));
    exponents = place(H * int64_t(sizeof(int)));
  }
};

constexpr int kMostProcessors = 1024;  // the workspace is measured for it, since its device is not known

// Whether the codes were short enough, and so the work was launched, up to the pass over what is still open.
template <bool kHopper, bool kAligned>
bool launch_stream(const Matrix& z, const Matrix& codebook, int64_t H, int64_t M, int K, int D, bool exact,
                   const Device& device, cudaStream_t stream, char* workspace, int64_t* indices) {
  constexpr int kCodes = stream_codes(kHopper);
  const StreamPlan plan(H, M, K, D, std::min(device.processors, kMostProcessors), kHopper);
  if (plan.chunks > kMaxChunks) return false;
  // With wgmma a tile keeps its stages until it is done and the next one needs as many; codes too long for that give
  // theirs back on the way.
  const bool longer = kHopper && 2 * plan.chunks > kMaxStages;
  int stages = kHopper ? kMaxStages : 2;
  const int fewest_stages = kHopper && !longer ? 2 * plan.chunks : 2;
  while (stages >= fewest_stages && StreamLayout(plan.chunks, stages, kCodes).bytes > device.shared_bytes) --stages;
  if (stages < fewest_stages) return false;

  const auto* codes = static_cast<const float*>(codebook.data);
  char* packed = workspace + plan.packed;
  const auto place = [workspace](int64_t offset, auto*& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + offset);
  };
  float *bias, *windows, *mean, *reach;
  Candidate* candidates;
  ColumnStats* partial;
  CodeFacts* facts;
  int* exponents;
  place(plan.bias, bias);
  place(plan.windows, windows);
  place(plan.mean, mean);
  place(plan.reach, reach);
  place(plan.candidates, candidates);
  place(plan.partial, partial);
  place(plan.facts, facts);
  place(plan.exponents, exponents);

  column_stats<<<grid_size(H * plan.stat_blocks), kStatThreads, 0, stream>>>(codes, K, D, plan.stat_blocks,
                                                                             plan.codes_per_stat_block, partial);
  check(cudaGetLastError(), "codebook statistics");
  const int padded = plan.chunks * kTileColumns;
  combine_stats<<<grid_size(H * padded / 32), kStatThreads, 0, stream>>>(partial, D, padded, plan.stat_blocks, mean,
                                                                         reach);
  check(cudaGetLastError(), "codebook mean");
  pack_codebook<kAligned, kCodes><<<grid_size(H * plan.pack_blocks), kPackThreads, 0, stream>>>(
      codebook, K, D, plan.chunks, plan.steps, plan.tiles, mean, reach, packed, bias, exponents, facts);
  check(cudaGetLastError(), "packing the codebook");

  const int shared_bytes = StreamLayout(plan.chunks, stages, kCodes).bytes;
  const StreamShape shape{M, K, D, plan.chunks, plan.tiles, plan.splits, stages};
  constexpr int kOne = stream_steps(kHopper, 16), kTwo = stream_steps(kHopper, 32);
  const auto kernel = longer            ? score_stream<kHopper, kHopper, kAligned, kStepsPerTile>
                      : plan.steps == 1 ? score_stream<kHopper, false, kAligned, kOne>
                      : plan.steps == 2 ? score_stream<kHopper, false, kAligned, kTwo>
                                        : score_stream<kHopper, false, kAligned, kStepsPerTile>;
  allow_shared(kernel, shared_bytes);
  kernel<<<grid_size(H * ceil_div(M, kStreamRows) * plan.splits), stream_threads(kHopper), shared_bytes, stream>>>(
      z, packed, bias, mean, exponents, facts, shape, accumulation_error(D), exact, windows, candidates);
  check(cudaGetLastError(), "tensor-core pass");
  decide<<<grid_size(ceil_div(H * M, kDecideThreads / 32 * kDecideRows)), kDecideThreads, 0, stream>>>(
      z, codes, H * M, M, K, D, plan.splits, windows, candidates, kAmbiguous, indices);
  check(cudaGetLastError(), "float64 choice");
  return true;
}

}  // namespace
}  // namespace ncfast::cuda
