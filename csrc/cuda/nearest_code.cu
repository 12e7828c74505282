// Nearest code. Scores on tensor cores, with an error bound, leave few codes of a row to choose between; float64
// distances choose (nearest_code_tensor.cuh). A codebook that fits in shared memory takes one launch.
//
// Codes too long for that are scored in float32, where only the two best scores of a row are kept: where they are
// further apart than twice the rounding error can be, the best code is the nearest one. Float64 data are not scored.
//
// In either case a row that is still open is marked in the output itself and a last pass measures it against every code
// in float64: the host never waits and the launches do not depend on the data.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "nearest_code.h"
#include "nearest_code_tensor.cuh"

namespace ncfast::cuda {
namespace {

constexpr int kAmbiguous = -1;
constexpr unsigned kWholeWarp = 0xffffffffu;

constexpr int kScoreThreads = 256;  // 16 x 16
constexpr int kThreadTile = 8;      // rows, and codes, of one thread
constexpr int kTileRows = 128;
constexpr int kTileCodes = 128;
constexpr int kSlice = 8;              // dimensions staged in shared memory at a time
constexpr int kPitch = kTileRows + 4;  // keeps float4 alignment and spreads the transposing stores over all banks

// Up to this D the second-order terms of the rounding error stay within the 2 % added in `rounding`.
constexpr int64_t kMaxScoredDim = 65536;

struct Top2 {
  float best;
  float second;
  int index;  // of the best
};

// A NaN score changes nothing. Of equal scores the first wins, and the gap of zero sends the row to the second pass.
__device__ __forceinline__ void offer(Top2& top, float score, int index) {
  const bool wins = score > top.best;
  top.second = fmaxf(top.second, wins ? top.best : score);
  top.best = wins ? score : top.best;
  top.index = wins ? index : top.index;
}

// Elements d .. d + 3 of a row of D, zeros past its end.
template <bool kAligned, class T>
__device__ __forceinline__ float4 load4(const T* row, int d, int D) {
  if constexpr (kAligned) {  // then D is a multiple of 4 as well
    struct alignas(4 * sizeof(T)) Pack {
      T x[4];
    };
    if (d >= D) return make_float4(0.f, 0.f, 0.f, 0.f);
    const Pack pack = *reinterpret_cast<const Pack*>(row + d);
    return make_float4(float(pack.x[0]), float(pack.x[1]), float(pack.x[2]), float(pack.x[3]));
  } else {
    return make_float4(d < D ? float(row[d]) : 0.f, d + 1 < D ? float(row[d + 1]) : 0.f,
                       d + 2 < D ? float(row[d + 2]) : 0.f, d + 3 < D ? float(row[d + 3]) : 0.f);
  }
}

// -|e|²/2 of every code, one warp a code. NaN marks a code with a NaN or an infinity: its scores are NaN and never win.
// A finite code whose square overflows float32 gives -inf, which makes every row of its codebook ambiguous.
__global__ void __launch_bounds__(kScoreThreads) compute_bias(const float* __restrict__ codebook,  // [codes, D]
                                                              int64_t codes, int D,
                                                              float* __restrict__ bias) {  // [codes]
  const int64_t code = int64_t(blockIdx.x) * (kScoreThreads / 32) + threadIdx.x / 32;
  if (code >= codes) return;
  double square = 0;
  for (int d = threadIdx.x % 32; d < D; d += 32) {
    const double x = codebook[code * D + d];
    square = fma(x, x, square);
  }
  for (int lane = 16; lane > 0; lane /= 2) square += __shfl_xor_sync(kWholeWarp, square, lane);
  if (threadIdx.x % 32 == 0) bias[code] = isfinite(square) ? float(-0.5 * square) : NAN;
}

// One block takes 128 rows of one head past all codes, 128 at a time. Thread (tx, ty) of 16 x 16 holds the scores of
// rows 4 ty .. 4 ty + 3 and 64 + those with codes 4 tx .. 4 tx + 3 and 64 + those.
//
// A score is D fused multiply-adds on top of the bias, so with u = 2^-24 its error is at most
//   gamma_D (|h| + |z| |e|) + u |h| + D 2^-150,   gamma_D = D u / (1 - D u),   h = -|e|²/2;
// the caller passes `rounding` >= gamma_D + a few u and `underflow` >= (D + 1) 2^-150.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score(const T* __restrict__ z,             // [H, M, D]
          const float* __restrict__ codebook,  // [H, K, D]
          const float* __restrict__ bias,      // [H, K]
          int64_t M, int K, int D, float rounding, float underflow,
          int64_t* __restrict__ indices) {  // [H, M], kAmbiguous where the second pass decides
  __shared__ __align__(16) float z_slices[2][kSlice][kPitch];
  __shared__ __align__(16) float code_slices[2][kSlice][kPitch];
  __shared__ float row_squares[kTileRows];
  // What each thread has found so far, touched once a tile: with the scores it would not fit in 128 registers.
  __shared__ float bests[kThreadTile][kScoreThreads];
  __shared__ float seconds[kThreadTile][kScoreThreads];
  __shared__ int best_codes[kThreadTile][kScoreThreads];

  const int64_t row_blocks = (M + kTileRows - 1) / kTileRows;
  const int64_t head = blockIdx.x / row_blocks;
  const int64_t first_row = blockIdx.x % row_blocks * kTileRows;
  z += head * M * D;
  codebook += head * K * D;
  bias += head * K;
  indices += head * M;

  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;

  // Each thread stages four dimensions of one row and of one code. Past the last row or code it repeats the last: no
  // result is written for such a row, and the bias of such a code is NaN.
  const int staged = threadIdx.x / 2;
  const int staged_d = threadIdx.x % 2 * 4;
  const T* z_row = z + min(first_row + staged, M - 1) * D;

  float square = 0;
  for (int d = staged_d; d < D; d += kSlice) {
    const float4 x = load4<kAligned>(z_row, d, D);
    square = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, square))));
  }
  square += __shfl_xor_sync(kWholeWarp, square, 1);
  if (staged_d == 0) row_squares[staged] = square;

  float4 z_next, code_next;
  const auto fetch = [&](int first_code, int d) {
    z_next = load4<kAligned>(z_row, d + staged_d, D);
    code_next = load4<kAligned>(codebook + int64_t(min(first_code + staged, K - 1)) * D, d + staged_d, D);
  };
  const auto stage = [&](int buffer) {
    z_slices[buffer][staged_d + 0][staged] = z_next.x;
    z_slices[buffer][staged_d + 1][staged] = z_next.y;
    z_slices[buffer][staged_d + 2][staged] = z_next.z;
    z_slices[buffer][staged_d + 3][staged] = z_next.w;
    code_slices[buffer][staged_d + 0][staged] = code_next.x;
    code_slices[buffer][staged_d + 1][staged] = code_next.y;
    code_slices[buffer][staged_d + 2][staged] = code_next.z;
    code_slices[buffer][staged_d + 3][staged] = code_next.w;
  };

  for (int i = 0; i < kThreadTile; ++i) {
    bests[i][threadIdx.x] = seconds[i][threadIdx.x] = -INFINITY;
    best_codes[i][threadIdx.x] = 0;
  }
  float bias_max = 0;  // largest |h| of the usable codes

  fetch(0, 0);
  stage(0);
  __syncthreads();
  int buffer = 0;
  for (int first_code = 0; first_code < K; first_code += kTileCodes) {
    float scores[kThreadTile][kThreadTile];
#pragma unroll
    for (int j = 0; j < kThreadTile; ++j) {
      const int code = first_code + j / 4 * 64 + tx * 4 + j % 4;
      const float h = code < K ? bias[code] : NAN;
      bias_max = fmaxf(bias_max, -h);  // fmaxf drops a NaN
#pragma unroll
      for (int i = 0; i < kThreadTile; ++i) scores[i][j] = h;
    }

    for (int d = 0; d < D; d += kSlice) {
      // The next slice, of this tile or of the next one, travels while this one is multiplied.
      const bool tile_ends = d + kSlice >= D;
      const bool more = !tile_ends || first_code + kTileCodes < K;
      if (more) fetch(tile_ends ? first_code + kTileCodes : first_code, tile_ends ? 0 : d + kSlice);
#pragma unroll 2  // more of them in flight would not fit in 128 registers
      for (int s = 0; s < kSlice; ++s) {
        const float4 a0 = *reinterpret_cast<const float4*>(&z_slices[buffer][s][ty * 4]);
        const float4 a1 = *reinterpret_cast<const float4*>(&z_slices[buffer][s][64 + ty * 4]);
        const float4 b0 = *reinterpret_cast<const float4*>(&code_slices[buffer][s][tx * 4]);
        const float4 b1 = *reinterpret_cast<const float4*>(&code_slices[buffer][s][64 + tx * 4]);
        const float a[kThreadTile] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
        const float b[kThreadTile] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
        for (int i = 0; i < kThreadTile; ++i) {
#pragma unroll
          for (int j = 0; j < kThreadTile; ++j) scores[i][j] = fmaf(a[i], b[j], scores[i][j]);
        }
      }
      if (more) stage(buffer ^ 1);
      __syncthreads();
      buffer ^= 1;
    }

#pragma unroll
    for (int i = 0; i < kThreadTile; ++i) {
      Top2 top{bests[i][threadIdx.x], seconds[i][threadIdx.x], best_codes[i][threadIdx.x]};
#pragma unroll
      for (int j = 0; j < kThreadTile; ++j) offer(top, scores[i][j], first_code + j / 4 * 64 + tx * 4 + j % 4);
      bests[i][threadIdx.x] = top.best;
      seconds[i][threadIdx.x] = top.second;
      best_codes[i][threadIdx.x] = top.index;
    }
  }

  // The 16 threads of a row are neighbours in one warp.
  for (int lane = 8; lane > 0; lane /= 2) bias_max = fmaxf(bias_max, __shfl_xor_sync(kWholeWarp, bias_max, lane));
#pragma unroll
  for (int i = 0; i < kThreadTile; ++i) {
    Top2 top{bests[i][threadIdx.x], seconds[i][threadIdx.x], best_codes[i][threadIdx.x]};
    for (int lane = 8; lane > 0; lane /= 2) {
      const float second = __shfl_xor_sync(kWholeWarp, top.second, lane);
      const float best = __shfl_xor_sync(kWholeWarp, top.best, lane);
      const int index = __shfl_xor_sync(kWholeWarp, top.index, lane);
      offer(top, best, index);
      top.second = fmaxf(top.second, second);
    }
    const int row = i / 4 * 64 + ty * 4 + i % 4;
    if (tx != 0 || first_row + row >= M) continue;
    // FLT_MIN is more than the squares can have lost to underflow, so neither norm comes out too small.
    const float magnitude = bias_max + sqrtf(row_squares[row] + FLT_MIN) * sqrtf(2 * bias_max + FLT_MIN);
    const float error = rounding * magnitude + underflow;
    // False for every NaN, and where a partial sum could have overflowed.
    const bool certain = magnitude <= FLT_MAX / 4 && top.best - top.second > 2 * error;
    indices[first_row + row] = certain ? top.index : kAmbiguous;
  }
}

constexpr int kRescoreThreads = 512;
constexpr int kRescoreRows = 128;   // rows of one block
constexpr int kGroup = 4;           // rows measured at once: every code is loaded and widened once for all of them
constexpr int kRescoreSlice = 256;  // dimensions of z held in shared memory

struct Nearest {
  double distance;
  int index;
};

// A NaN or infinite distance is never nearer; of equal distances the lowest index is.
__device__ __forceinline__ void offer(Nearest& nearest, double distance, int index) {
  const bool wins = distance < nearest.distance || (distance == nearest.distance && index < nearest.index);
  nearest.distance = wins ? distance : nearest.distance;
  nearest.index = wins ? index : nearest.index;
}

// Replaces every kAmbiguous. A thread sums the squared differences of one code in order of d, whichever code it is:
// equal codes have bitwise equal distances.
template <class T, class E, bool kAligned>
__global__ void __launch_bounds__(kRescoreThreads) rescore(const T* __restrict__ z,         // [H, M, D]
                                                           const E* __restrict__ codebook,  // [H, K, D]
                                                           int64_t M, int K, int D,
                                                           int64_t* __restrict__ indices) {  // [H, M]
  constexpr int kPack = kAligned ? 16 / sizeof(E) : 1;
  struct alignas(kPack * sizeof(E)) Pack {
    E x[kPack];
  };
  __shared__ __align__(16) double z_slices[kGroup][kRescoreSlice];
  __shared__ Nearest warp_nearest[kRescoreThreads / 32][kGroup];

  const int64_t row_blocks = (M + kRescoreRows - 1) / kRescoreRows;
  const int64_t head = blockIdx.x / row_blocks;
  const int64_t first_row = blockIdx.x % row_blocks * kRescoreRows;
  z += (head * M + first_row) * D;
  codebook += head * K * D;
  indices += head * M + first_row;
  const int rows = int(min(int64_t(kRescoreRows), M - first_row));

  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  if (!__syncthreads_or(thread < rows && indices[thread] == kAmbiguous)) return;

  for (int chunk = 0; chunk < rows; chunk += 32) {
    // Every warp sees the same rows. None of the chunk is written before all warps have looked: barriers lie between.
    unsigned ambiguous =
        __ballot_sync(kWholeWarp, chunk + lane < rows && indices[min(chunk + lane, rows - 1)] == kAmbiguous);
    while (ambiguous != 0) {
      int row[kGroup];  // the last group repeats its first row
      Nearest nearest[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        nearest[g] = {INFINITY, INT_MAX};
        row[g] = ambiguous != 0 ? chunk + __ffs(int(ambiguous)) - 1 : row[0];
        ambiguous &= ambiguous - 1;
      }

      for (int first_code = 0; first_code < K; first_code += kRescoreThreads) {
        const int code = first_code + thread;
        const E* e = codebook + int64_t(min(code, K - 1)) * D;
        double distance[kGroup] = {};
        for (int first_d = 0; first_d < D; first_d += kRescoreSlice) {
          const int length = min(kRescoreSlice, D - first_d);
          if (first_code == 0 || D > kRescoreSlice) {
            __syncthreads();
#pragma unroll
            for (int g = 0; g < kGroup; ++g) {
              for (int d = thread; d < length; d += kRescoreThreads) {
                z_slices[g][d] = double(z[int64_t(row[g]) * D + first_d + d]);
              }
            }
            __syncthreads();
          }
#pragma unroll 4
          for (int d = 0; d < length; d += kPack) {
            const Pack pack = *reinterpret_cast<const Pack*>(e + first_d + d);
#pragma unroll
            for (int p = 0; p < kPack; ++p) {
#pragma unroll
              for (int g = 0; g < kGroup; ++g) {
                const double difference = z_slices[g][d + p] - double(pack.x[p]);
                distance[g] = fma(difference, difference, distance[g]);
              }
            }
          }
        }
        if (code < K) {
#pragma unroll
          for (int g = 0; g < kGroup; ++g) offer(nearest[g], distance[g], code);
        }
      }

#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        for (int step = 16; step > 0; step /= 2) {
          const double distance = __shfl_xor_sync(kWholeWarp, nearest[g].distance, step);
          const int index = __shfl_xor_sync(kWholeWarp, nearest[g].index, step);
          offer(nearest[g], distance, index);
        }
        if (lane == 0) warp_nearest[warp][g] = nearest[g];
      }
      __syncthreads();
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (thread != g) continue;
        for (const auto& other : warp_nearest) offer(nearest[g], other[g].distance, other[g].index);
        // Without a finite distance the row holds a NaN or an infinity, or every code does.
        indices[row[g]] = isfinite(nearest[g].distance) ? nearest[g].index : 0;
      }
    }
  }
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("nearest_code: ") + what + ": " + cudaGetErrorString(error));
  }
}

unsigned grid_size(int64_t blocks) {
  if (blocks > INT_MAX) {
    throw std::runtime_error("nearest_code: a launch of " + std::to_string(blocks) +
                             " blocks is over CUDA's limit of " + std::to_string(INT_MAX) +
                             "; pass fewer rows at a time");
  }
  return unsigned(blocks);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class T, class E, bool kAligned>
void launch_rescore(const T* z, const E* codebook, int64_t H, int64_t M, int K, int D, cudaStream_t stream,
                    int64_t* indices) {
  const unsigned blocks = grid_size(H * ceil_div(M, kRescoreRows));
  rescore<T, E, kAligned><<<blocks, kRescoreThreads, 0, stream>>>(z, codebook, M, K, D, indices);
  check(cudaGetLastError(), "float64 pass");
}

template <class T, bool kAligned>
void launch_certified(const T* z, const float* codebook, int64_t H, int64_t M, int K, int D, cudaStream_t stream,
                      float* bias, int64_t* indices) {
  compute_bias<<<grid_size(ceil_div(H * K, kScoreThreads / 32)), kScoreThreads, 0, stream>>>(codebook, H * K, D, bias);
  check(cudaGetLastError(), "codebook norms");
  const double rounding = D <= kMaxScoredDim ? 1.02 * (D + 4.0) * 0x1p-24 : INFINITY;
  const double underflow = 1.02 * (D + 4.0) * 0x1p-149;
  const unsigned blocks = grid_size(H * ceil_div(M, kTileRows));
  score<T, kAligned>
      <<<blocks, kScoreThreads, 0, stream>>>(z, codebook, bias, M, K, D, float(rounding), float(underflow), indices);
  check(cudaGetLastError(), "float32 pass");
  launch_rescore<T, float, kAligned>(z, codebook, H, M, K, D, stream, indices);
}

struct Device {
  int processors;
  int shared_bytes;  // that a block can have
  bool hopper;       // wgmma
};

// NCFAST_CUDA_ISA=mma has a Hopper GPU run what the GPUs before it do.
Device current_device() {
  int device, processors, shared_bytes, major;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "the device's processors");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "the shared memory");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "the device's capability");
  const char* isa = std::getenv("NCFAST_CUDA_ISA");
  return {processors, shared_bytes, major == 9 && !(isa != nullptr && std::string(isa) == "mma")};
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

// Error of a tensor core's sum, in units of the product of the norms.
float accumulation_error(int D) { return 1.5f * float(ceil_div(D, 16) * 16 + 16) * 0x1p-23f; }

template <class Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
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

template <class T>
void dispatch(const void* z, DType dtype, const void* codebook, int64_t H, int64_t M, int K, int D, bool exact,
              cudaStream_t stream, void* workspace, int64_t* indices) {
  const T* rows = static_cast<const T*>(z);
  if constexpr (std::is_same_v<T, double>) {
    static_assert(kAmbiguous == -1, "the memset below writes it as bytes of ones");
    check(cudaMemsetAsync(indices, 0xff, H * M * sizeof(int64_t), stream), "marking the rows");
    const double* codes = static_cast<const double*>(codebook);
    if (D % 2 == 0 && is_aligned(codes, 16)) {
      launch_rescore<T, double, true>(rows, codes, H, M, K, D, stream, indices);
    } else {
      launch_rescore<T, double, false>(rows, codes, H, M, K, D, stream, indices);
    }
  } else {
    const float* codes = static_cast<const float*>(codebook);
    const bool aligned = D % 4 == 0 && is_aligned(rows, 4 * sizeof(T)) && is_aligned(codes, 16);
    const Device device = current_device();
    const Matrix z_matrix{rows, dtype};
    const Matrix code_matrix{codes, DType::f32};
    const bool vectors = D % 8 == 0 && is_aligned(rows, 16) && is_aligned(codes, 16);
    const auto resident = device.hopper ? (vectors ? launch_resident<true, true> : launch_resident<true, false>)
                                        : (vectors ? launch_resident<false, true> : launch_resident<false, false>);
    char* bytes = static_cast<char*>(workspace);
    if (resident(z_matrix, code_matrix, H, M, K, D, exact, device, stream, indices)) return;
    const auto streamed = device.hopper ? (vectors ? launch_stream<true, true> : launch_stream<true, false>)
                                        : (vectors ? launch_stream<false, true> : launch_stream<false, false>);
    if (streamed(z_matrix, code_matrix, H, M, K, D, exact, device, stream, bytes, indices)) {
      const auto last_pass = aligned ? launch_rescore<T, float, true> : launch_rescore<T, float, false>;
      return last_pass(rows, codes, H, M, K, D, stream, indices);
    }
    const auto certified = aligned ? launch_certified<T, true> : launch_certified<T, false>;
    certified(rows, codes, H, M, K, D, stream, static_cast<float*>(workspace), indices);
  }
}

}  // namespace

int64_t nearest_code_workspace_bytes(int64_t H, int64_t M, int64_t K, int64_t D) {
  const int64_t scored = H * K * int64_t(sizeof(float));  // in float32
  if (H == 0 || M == 0 || D == 0 || D > kMaxChunks * kTileColumns) return scored;
  return std::max({scored, StreamPlan(H, M, K, D, kMostProcessors, true).bytes,
                   StreamPlan(H, M, K, D, kMostProcessors, false).bytes});
}

void nearest_code(const void* z, DType dtype, const void* codebook, int64_t H, int64_t M, int64_t K, int64_t D,
                  bool exact, void* stream_handle, void* workspace, int64_t* indices) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (H == 0 || M == 0) return;
  if (K > INT_MAX / 2 || D > INT_MAX / 2) {
    throw std::runtime_error("nearest_code: K and D are below 2^30 on CUDA; got K = " + std::to_string(K) +
                             ", D = " + std::to_string(D));
  }
  if (D == 0) {  // every distance is zero
    check(cudaMemsetAsync(indices, 0, H * M * sizeof(int64_t), stream), "zeroing the indices");
    return;
  }
  switch (dtype) {
    case DType::f32:
      return dispatch<float>(z, dtype, codebook, H, M, int(K), int(D), exact, stream, workspace, indices);
    case DType::f64:
      return dispatch<double>(z, dtype, codebook, H, M, int(K), int(D), exact, stream, workspace, indices);
    case DType::f16:
      return dispatch<__half>(z, dtype, codebook, H, M, int(K), int(D), exact, stream, workspace, indices);
    case DType::bf16:
      return dispatch<__nv_bfloat16>(z, dtype, codebook, H, M, int(K), int(D), exact, stream, workspace, indices);
  }
}

}  // namespace ncfast::cuda
