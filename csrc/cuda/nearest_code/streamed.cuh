#pragma once

// Nearest code with any codebook of up to 512 columns: rounded once (packing.cuh), then streamed through shared memory.
// A block keeps 128 rows and lists their candidates while all codes pass.

#include <algorithm>
#include <cstdint>

#include "candidates.cuh"
#include "packing.cuh"
#include "rescoring.cuh"

namespace ncfast::cuda {

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

// A block scores 128 rows of a head with one of `splits` equal parts of the tiles. There is one part, unless there are
// too few rows to fill the GPU.
template <bool kHopper, bool kReleaseEarly, bool kAligned, int kSteps>
__global__ void __launch_bounds__(stream_threads(kHopper), 1)
    score_stream(const StreamPlan plan, int num_stages, float accumulation) {
  if constexpr (kHopper && !kCompilesWgmma) return;
  constexpr bool kWgmma = kHopper && kCompilesWgmma;
  constexpr int kCodes = stream_codes(kHopper);
  constexpr int kStageBytes = kCodes * kTileRowBytes;
  constexpr int kTilesPerStage = kStepsPerTile / kSteps;  // side by side
  constexpr int kTileMultiple = tile_multiple(kHopper, kSteps);
  const int chunks = plan.chunks;
  const StreamBuffers shared(tile_memory(), chunks, num_stages, kCodes);
  char* stages = shared.stages;

  const int64_t M = plan.call.M;
  const int split = blockIdx.x % plan.splits;
  const int64_t row_blocks = (M + kStreamRows - 1) / kStreamRows;
  const int64_t head = blockIdx.x / plan.splits / row_blocks;
  const int64_t block_row = blockIdx.x / plan.splits % row_blocks * kStreamRows;
  const int multiples = plan.tiles / kTileMultiple;
  const int first_tile = int(int64_t(multiples) * split / plan.splits) * kTileMultiple;
  const int num_tiles = int(int64_t(multiples) * (split + 1) / plan.splits) * kTileMultiple - first_tile;
  const char* packed = plan.packed + (head * plan.tiles + first_tile) / kTilesPerStage * chunks * kStageBytes;
  const float* bias = plan.bias + (head * plan.tiles + first_tile) * kCodes;

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int group = thread / kWarpgroup;
  const int warp = thread / 32 % 4;

  if (kWgmma && thread == 0) {
    for (int i = 0; i < num_stages; ++i) {
      init_barrier(shared.full + i, 1);
      init_barrier(shared.empty + i, 2 * kWarpgroup / 32);
    }
    publish_barriers();
  }
  for (int d = thread; d < chunks * kTileColumns; d += blockDim.x) {
    shared.mean[d] = plan.mean[head * chunks * kTileColumns + d];
  }
  CodeNorms most{0, 0, 0};
  for (int part = thread; part < plan.pack_blocks; part += blockDim.x) {
    most = max_norms(most, plan.norms[head * plan.pack_blocks + part]);
  }
  most = block_max(most, shared.scratch);
  if (thread == 0) *shared.codebook = CodebookScale(plan.exponents[head], most);
  __syncthreads();

  int stage = 0, parity = 0;
  const auto next_stage = [&] {
    if (++stage == num_stages) stage = 0, parity ^= 1;
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
      plan.call.z, head * M + first_row, int(min(M - first_row, int64_t(16))), plan.call.D, chunks, shared.mean,
      *shared.codebook, accumulation, plan.call.exact, row_tiles, warp * 16, scales);
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
        arrive(shared.empty + stage - ago + (stage < ago ? num_stages : 0));
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
    const int last_steps = (plan.call.D - (chunks - 1) * kTileColumns + 15) / 16;
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
    if (split == 0 && lane % 4 == 0) plan.windows[index] = fmaxf(window, 0.f);
    write_candidates(rows[h], window, lists, h, split == 0,
                     plan.candidates + (index * plan.splits + split) * kListLength);
  }
}

constexpr int kChooseThreads = 128;
constexpr int kChooseRows = 8;  // of a warp

// Chooses among the candidates of all splits: a thread a row by their scores, then, where several are left, a warp a
// row by their float64 distances.
static __global__ void __launch_bounds__(kChooseThreads, 8) choose_nearest(const StreamPlan plan) {
  const int64_t M = plan.call.M;
  const int K = plan.call.K, D = plan.call.D;
  const int64_t warp_row = (int64_t(blockIdx.x) * (kChooseThreads / 32) + threadIdx.x / 32) * kChooseRows;
  const int lane = threadIdx.x % 32;
  const auto each = [&](int64_t row, auto&& use) {
    for (int split = 0; split < plan.splits; ++split) {
      const Candidate* list = plan.candidates + (row * plan.splits + split) * kListLength;
      for (int i = 0; i < kListLength; ++i) {
        const Candidate candidate = list[i];
        if (candidate.code == kListEnd) break;
        use(candidate);
        if (candidate.code == kListOverflow) break;
      }
    }
  };

  bool open = false;
  float threshold = 0;
  if (lane < kChooseRows && warp_row + lane < plan.call.H * M) {
    const int64_t row = warp_row + lane;
    const float window = plan.windows[row];
    float best = -INFINITY;
    each(row, [&](const Candidate& candidate) { best = fmaxf(best, candidate.score); });
    threshold = best - window;
    int count = 0, code = INT_MAX;
    bool unlisted = false;
    each(row, [&](const Candidate& candidate) {
      if (!(candidate.score >= threshold)) return;
      unlisted |= candidate.code == kListOverflow;
      code = min(code, candidate.code);
      ++count;
    });
    const bool unknown = unlisted || count == 0;
    open = !unknown && count > 1 && window > 0;
    if (!open) plan.call.indices[row] = unknown ? kUndecided : code;
  }
  for (unsigned pending = __ballot_sync(kAllLanes, open); pending != 0; pending &= pending - 1) {
    const int leader = __ffs(int(pending)) - 1;
    const int64_t row = warp_row + leader;
    const float row_threshold = __shfl_sync(kAllLanes, threshold, leader);
    const float* codes = plan.call.codes() + row / M * K * D;
    Nearest nearest{INFINITY, INT_MAX};
    each(row, [&](const Candidate& candidate) {
      if (!(candidate.score >= row_threshold)) return;
      const double distance = exact_distance<4>(plan.call.z, row, codes + int64_t(candidate.code) * D, D);
      offer(nearest, distance, candidate.code);
    });
    if (lane == 0) plan.call.indices[row] = nearest.code;
  }
}

constexpr int kMaxProcessors = 1024;  // the workspace is sized for it, since its device is not known

// Whether the codes are short enough, and so the kernels were launched.
template <bool kHopper, bool kAligned>
bool launch_streamed(const Call& call, const Device& device) {
  constexpr int kCodes = stream_codes(kHopper);
  const StreamPlan plan(call, std::min(device.processors, kMaxProcessors), kHopper);
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

  const auto run = [&](const char* what, auto* kernel, int64_t blocks, int threads) {
    launch(what, kernel, grid_size(blocks), threads, 0, call.stream, plan);
  };
  const int64_t rows = call.H * call.M;
  run("codebook statistics", column_stats, call.H * plan.stat_blocks, kStatThreads);
  run("codebook mean", combine_stats, call.H * plan.chunks * kTileColumns / 32, kStatThreads);
  run("packing the codebook", pack_codebook<kAligned, kCodes>, call.H * plan.pack_blocks, kPackThreads);
  constexpr int kOne = stream_steps(kHopper, 16), kTwo = stream_steps(kHopper, 32);
  const auto kernel = release_early     ? score_stream<kHopper, kHopper, kAligned, kStepsPerTile>
                      : plan.steps == 1 ? score_stream<kHopper, false, kAligned, kOne>
                      : plan.steps == 2 ? score_stream<kHopper, false, kAligned, kTwo>
                                        : score_stream<kHopper, false, kAligned, kStepsPerTile>;
  launch("tensor-core pass", kernel, grid_size(call.H * ceil_div(call.M, kStreamRows) * plan.splits),
         stream_threads(kHopper), shared_bytes(stages), call.stream, plan, stages, accumulation_error(call.D));
  run("float64 choice", choose_nearest, ceil_div(rows, kChooseThreads / 32 * kChooseRows), kChooseThreads);
  launch_rescore_undecided<float>(call);
  return true;
}

}  // namespace ncfast::cuda
