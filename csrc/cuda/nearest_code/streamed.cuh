#pragma once

// Nearest code with any codebook of up to 512 columns: rounded once (packing.cuh), then streamed through shared memory.
// A block keeps 128 rows and lists their candidates while all codes pass.

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "candidates.cuh"
#include "packing.cuh"
#include "rescoring.cuh"

namespace ncfast::cuda {

// Codes of a tile. Two sets of accumulators fit with wgmma, one with mma.sync, which keeps operands in registers too.
__host__ __device__ constexpr int stream_codes(bool hopper) { return hopper ? 128 : 256; }
// Steps of 16 columns that a product takes. With wgmma, codes of up to 32 columns share tile rows and take fewer.
__host__ __device__ constexpr int stream_steps(bool hopper, int64_t D) {
  return hopper && D <= 16 ? 1 : hopper && D <= 32 ? 2 : kStepsPerTile;
}
// The number of tiles of a block is a multiple of this: of the tiles that share rows, or of a pair for wgmma.
__host__ __device__ constexpr int tile_multiple(bool hopper, int steps) {
  return steps == 1 ? kStepsPerTile : hopper ? 2 : 1;
}

constexpr int kStreamRows = 2 * kWarpgroupRows;
constexpr int kMaxStages = 8;    // tiles of 64 columns in shared memory
constexpr int kBiasBuffers = 3;  // of a warpgroup

struct StreamBuffers : Buffers {  // in shared memory
  char* rows;                     // [2 warpgroups, chunks, 64, 64] fp16
  char* stages;                   // [stages, codes, 64] fp16
  Candidate* lists;               // [2 warpgroups, 2 rows, kSlots, 128 threads]
  float* bias;                    // [2 warpgroups, kBiasBuffers, codes]
  RowScale* scales;               // [2 warpgroups, 64]
  float* mean;                    // [chunks * 64]
  CodeNorms* scratch;
  CodebookScale* codebook;
  int64_t* first_rows;     // [warps]
  uint64_t *full, *empty;  // [kMaxStages] barriers

  __host__ __device__ StreamBuffers(char* memory, int chunks, int num_stages, int codes) : Buffers{memory} {
    place(rows, 2 * chunks * kRowTileBytes);
    place(stages, num_stages * codes * kTileRowBytes);
    place(lists, 2 * kListEntries);
    place(bias, 2 * kBiasBuffers * codes);
    place(scales, kStreamRows);
    place(mean, chunks * kTileColumns);
    place(scratch, 32);
    place(codebook, 1);
    place(first_rows, 2 * kWarpgroup / 32);
    place(full, kMaxStages);
    place(empty, kMaxStages);
  }
};

// With wgmma a ninth warp copies.
constexpr int stream_threads(bool hopper) { return 2 * kWarpgroup + (hopper ? 32 : 0); }

struct StreamShape {
  int64_t M;
  int D, chunks, tiles, splits, stages;
};

// A block scores 128 rows of a head with one of `splits` equal parts of the tiles. There is one part, unless there are
// too few rows to fill the GPU.
template <bool kHopper, bool kReleaseEarly, bool kAligned, int kSteps>
__global__ void __launch_bounds__(stream_threads(kHopper), 1)
    score_stream(Matrix z,                             // [H, M, D]
                 const char* __restrict__ packed,      // [H, tiles, chunks, kCodes, 64] fp16
                 const float* __restrict__ bias,       // [H, tiles * kCodes]
                 const float* __restrict__ mean,       // [H, 64 chunks]
                 const int* __restrict__ exponents,    // [H]
                 const CodeNorms* __restrict__ norms,  // [H, parts]
                 const StreamShape shape, float accumulation, bool exact,
                 float* __restrict__ windows,         // [H, M]
                 Candidate* __restrict__ candidates)  // [H, M, splits, kListLength]
{
  if constexpr (kHopper && !kCompilesWgmma) return;
  constexpr bool kWgmma = kHopper && kCompilesWgmma;
  constexpr int kCodes = stream_codes(kHopper);
  constexpr int kStageBytes = kCodes * kTileRowBytes;
  constexpr int kTilesPerStage = kStepsPerTile / kSteps;  // side by side
  constexpr int kTileMultiple = tile_multiple(kHopper, kSteps);
  const int chunks = shape.chunks;
  const StreamBuffers shared(tile_memory(), chunks, shape.stages, kCodes);
  char* stages = shared.stages;

  const int64_t M = shape.M;
  const int split = blockIdx.x % shape.splits;
  const int64_t row_blocks = (M + kStreamRows - 1) / kStreamRows;
  const int64_t head = blockIdx.x / shape.splits / row_blocks;
  const int64_t block_row = blockIdx.x / shape.splits % row_blocks * kStreamRows;
  const int multiples = shape.tiles / kTileMultiple;
  const int first_tile = int(int64_t(multiples) * split / shape.splits) * kTileMultiple;
  const int num_tiles = int(int64_t(multiples) * (split + 1) / shape.splits) * kTileMultiple - first_tile;
  packed += (head * shape.tiles + first_tile) / kTilesPerStage * chunks * kStageBytes;
  bias += (head * shape.tiles + first_tile) * kCodes;

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int group = thread / kWarpgroup;
  const int warp = thread / 32 % 4;

  if (kWgmma && thread == 0) {
    for (int i = 0; i < shape.stages; ++i) {
      init_barrier(shared.full + i, 1);
      init_barrier(shared.empty + i, 2 * kWarpgroup / 32);
    }
    publish_barriers();
  }
  for (int d = thread; d < chunks * kTileColumns; d += blockDim.x) {
    shared.mean[d] = mean[head * chunks * kTileColumns + d];
  }
  const int parts = shape.tiles * (kCodes / kPackedCodes);
  CodeNorms most{0, 0, 0};
  for (int part = thread; part < parts; part += blockDim.x) {
    most = max_norms(most, norms[head * parts + part]);
  }
  most = block_max(most, shared.scratch);
  if (thread == 0) *shared.codebook = CodebookScale(exponents[head], most);
  __syncthreads();

  int stage = 0, parity = 0;
  const auto next_stage = [&] {
    if (++stage == shape.stages) stage = 0, parity ^= 1;
  };
  if (kWgmma && thread >= 2 * kWarpgroup) {
    if (lane != 0) return;
    for (int64_t chunk = 0; chunk < int64_t(num_tiles / kTilesPerStage) * chunks; ++chunk) {
      wait(shared.empty + stage, parity ^ 1);
      arrive_and_expect(shared.full + stage, kStageBytes);
      copy_bulk(stages + stage * kStageBytes, packed + chunk * kStageBytes, kStageBytes, shared.full + stage);
      next_stage();
    }
    return;
  }

  char* row_tiles = shared.rows + group * chunks * kRowTileBytes;
  RowScale* scales = shared.scales + group * kWarpgroupRows + warp * 16;
  float* group_bias = shared.bias + group * kBiasBuffers * kCodes;
  Candidate* lists = shared.lists + group * kListEntries + thread % kWarpgroup;
  constexpr int kThreads = 2 * kWarpgroup;
  const int64_t first_row = block_row + group * kWarpgroupRows + warp * 16;
  // In shared memory, since it is needed only at the end and registers are short.
  int64_t* first_index = shared.first_rows + thread / 32;
  if (lane == 0) *first_index = head * M + first_row;
  stage_rows<kAligned, kAligned ? 4 : 1, kAligned ? 2 : 1>(
      z, head * M + first_row, int(min(M - first_row, int64_t(16))), shape.D, chunks, shared.mean, *shared.codebook,
      accumulation, exact, row_tiles, warp * 16, scales);
  fence_async_proxy();
  sync_threads(1 + group, kWarpgroup);
  RowState rows[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) start_row(rows[h], scales[lane / 4 + 8 * h]);

  if constexpr (kWgmma) {
    // While one tile is multiplied, the scores of the one before are searched.
    float acc[2][kCodes / 2];
    // Lets the copying warp overwrite the stages from the first_ago-th before this one to the last_ago-th.
    const auto release = [&](int first_ago, int last_ago) {
      __syncwarp();
      if (lane != 0) return;
      for (int ago = first_ago; ago >= last_ago; --ago) {
        arrive(shared.empty + stage - ago + (stage < ago ? shape.stages : 0));
      }
    };
    float next_bias = bias[thread % kWarpgroup];
    const auto start = [&](float (&products)[kCodes / 2], int tile) {
      wait(shared.full + stage, parity);
      if constexpr (kTilesPerStage > 1) {
        start_products<false, kSteps>(
            products, tile_descriptor(row_tiles),
            tile_descriptor(stages + stage * kStageBytes) + 2 * kSteps * (tile % kTilesPerStage));
      } else {
        multiply<kWgmma, false, kCodes>(products, row_tiles, stages + stage * kStageBytes, kStepsPerTile);
        next_stage();
      }
#pragma unroll 1
      for (int chunk = 1; kTilesPerStage == 1 && chunk < chunks; ++chunk) {
        wait(shared.full + stage, parity);
        multiply<kWgmma, true, kCodes>(products, row_tiles + chunk * kRowTileBytes, stages + stage * kStageBytes,
                                       kStepsPerTile);
        next_stage();
        if constexpr (kReleaseEarly) {
          wgmma_wait<1>();
          release(2, 2);
        }
      }
      // Its buffer was last read two searches ago, before the barrier of the previous start.
      group_bias[tile % kBiasBuffers * kCodes + thread % kWarpgroup] = next_bias;
      next_bias = bias[min(tile + 1, num_tiles - 1) * kCodes + thread % kWarpgroup];  // takes longer than a search
      sync_threads(1 + group, kWarpgroup);
    };
    const auto finish = [&](float (&products)[kCodes / 2], int tile) {
      finish_products<true>(products);
      if (tile % kTilesPerStage != kTilesPerStage - 1) return;
      if constexpr (kTilesPerStage > 1) next_stage();
      release(kReleaseEarly ? 1 : chunks, 1);
    };
    const auto search = [&](float (&products)[kCodes / 2], int tile) {
      add_tile<kCodes>(products, group_bias + tile % kBiasBuffers * kCodes, (first_tile + tile) * kCodes, scales, rows,
                       lists);
    };
    // Tiles come in pairs. With a branch between a start and its finish the compiler would make the products wait.
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
  } else {
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
          multiply<kWgmma, false, kCodes>(acc, row_tiles, code_tile, steps);
        } else {
          multiply<kWgmma, true, kCodes>(acc, row_tiles + chunk * kRowTileBytes, code_tile, steps);
        }
      }
      add_tile<kCodes>(acc, tile_bias, (first_tile + tile) * kCodes, scales, rows, lists);
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float window = scales[lane / 4 + 8 * h].window;
    if (window == kPastEnd) continue;  // for all four lanes
    const int64_t index = *first_index + 8 * h + lane / 4;
    if (split == 0 && lane % 4 == 0) windows[index] = fmaxf(window, 0.f);
    write_candidates(rows[h], window, lists, h, split == 0, candidates + (index * shape.splits + split) * kListLength);
  }
}

// The sizes of a streamed call, and its buffers in the workspace.
struct StreamPlan : Buffers {
  int chunks, steps, tiles, splits, stat_blocks, codes_per_stat_block, pack_blocks;
  char* packed;
  float *bias, *windows, *mean, *reach;
  Candidate* candidates;
  ColumnStats* partial;
  CodeNorms* norms;
  int* exponents;

  StreamPlan(int64_t H, int64_t M, int64_t K, int64_t D, int processors, bool hopper, char* workspace = nullptr)
      : Buffers{workspace} {
    const int tile_codes = stream_codes(hopper);
    constexpr int64_t kMaxSplits = 16;
    chunks = int(ceil_div(D, kTileColumns));
    steps = stream_steps(hopper, D);
    const int multiple = tile_multiple(hopper, steps);
    tiles = int(ceil_div(K, tile_codes * multiple)) * multiple;
    const int64_t row_blocks = H * ceil_div(M, kStreamRows);
    splits = int(std::max<int64_t>(1, std::min({processors / row_blocks, int64_t(tiles / multiple), kMaxSplits})));
    codes_per_stat_block = int(ceil_div(K, std::min<int64_t>(kMaxStatBlocks, ceil_div(K, 64))));
    stat_blocks = int(ceil_div(K, codes_per_stat_block));
    pack_blocks = tiles * (tile_codes / kPackedCodes);

    place(packed, H * tiles * chunks * tile_codes * kTileRowBytes);
    place(bias, H * tiles * tile_codes);
    place(candidates, H * M * splits * kListLength);
    place(windows, H * M);
    place(partial, H * stat_blocks * D);
    place(mean, H * chunks * kTileColumns);
    place(reach, H * chunks * kTileColumns);
    place(norms, H * pack_blocks);
    place(exponents, H);
  }
};

constexpr int kMaxProcessors = 1024;  // the workspace is sized for it, since its device is not known

// Whether the codes are short enough, and so the kernels were launched.
template <bool kHopper, bool kAligned>
bool launch_streamed(const Call& call, const Device& device) {
  constexpr int kCodes = stream_codes(kHopper);
  const auto [H, M, K, D] = std::tuple(call.H, call.M, call.K, call.D);
  const StreamPlan plan(H, M, K, D, std::min(device.processors, kMaxProcessors), kHopper, call.workspace);
  if (plan.chunks > kMaxChunks) return false;
  // With wgmma a tile keeps its stages until it is done while the next tile fills as many. Codes too long for that
  // release theirs early.
  const bool release_early = kHopper && 2 * plan.chunks > kMaxStages;
  const auto shared_bytes = [&](int stages) {
    return int(StreamBuffers(nullptr, plan.chunks, stages, kCodes).bytes) + kTileAlignment;
  };
  int stages = kHopper ? kMaxStages : 2;
  const int fewest_stages = kHopper && !release_early ? 2 * plan.chunks : 2;
  while (stages >= fewest_stages && shared_bytes(stages) > device.shared_bytes) --stages;
  if (stages < fewest_stages) return false;

  const auto run = [&](const char* what, auto* kernel, int64_t blocks, int threads, int shared_bytes,
                       auto... arguments) {
    launch(what, kernel, grid_size(blocks), threads, shared_bytes, call.stream, arguments...);
  };
  run("codebook statistics", column_stats, H * plan.stat_blocks, kStatThreads, 0, call.codes(), K, D, plan.stat_blocks,
      plan.codes_per_stat_block, plan.partial);
  const int padded = plan.chunks * kTileColumns;
  run("codebook mean", combine_stats, H * padded / 32, kStatThreads, 0, plan.partial, D, padded, plan.stat_blocks,
      plan.mean, plan.reach);
  run("packing the codebook", pack_codebook<kAligned, kCodes>, H * plan.pack_blocks, kPackThreads, 0, call.codes(), K,
      D, plan.chunks, plan.steps, plan.tiles, plan.mean, plan.reach, plan.packed, plan.bias, plan.exponents,
      plan.norms);
  constexpr int kOne = stream_steps(kHopper, 16), kTwo = stream_steps(kHopper, 32);
  const auto kernel = release_early     ? score_stream<kHopper, kHopper, kAligned, kStepsPerTile>
                      : plan.steps == 1 ? score_stream<kHopper, false, kAligned, kOne>
                      : plan.steps == 2 ? score_stream<kHopper, false, kAligned, kTwo>
                                        : score_stream<kHopper, false, kAligned, kStepsPerTile>;
  const StreamShape shape{M, D, plan.chunks, plan.tiles, plan.splits, stages};
  run("tensor-core pass", kernel, H * ceil_div(M, kStreamRows) * plan.splits, stream_threads(kHopper),
      shared_bytes(stages), call.z, plan.packed, plan.bias, plan.mean, plan.exponents, plan.norms, shape,
      accumulation_error(D), call.exact, plan.windows, plan.candidates);
  run("float64 choice", choose_nearest, ceil_div(H * M, kChooseThreads / 32 * kChooseRows), kChooseThreads, 0, call.z,
      call.codes(), H * M, M, K, D, plan.splits, plan.windows, plan.candidates, call.indices);
  launch_rescore_undecided<float>(call);
  return true;
}

}  // namespace ncfast::cuda
