// Attention on tensor cores: a warp takes 16 of a head's rows, so that 76 are padded to 80; one launch each way.
//
// Backward, with queries among the warps: P = softmax(scale Q K^T), dP = G V^T, dS = P (dP - sum P dP), dQ = scale dS
// K; P and dS go to shared memory; then with keys among the warps: dV = P^T G, dK = scale dS^T Q. Five products,
// nothing twice, no atomics.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "masked_attention.h"
#include "tensor_core.cuh"

namespace ncfast::cuda {
namespace {

constexpr int kDim = 64;  // elements of a head: a row of a tile
constexpr float kLog2E = 1.4426950408889634f;
// Warps that a multiprocessor shall hold, which bounds their registers.
constexpr int kForwardWarps = 20, kBackwardWarps = 15;

__device__ __forceinline__ void copy16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void wait_copies_but_last() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

__device__ __forceinline__ void load_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_16x8x16(d, a, b0, b1);
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
__device__ __forceinline__ uint32_t pack(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
  __half2 v = __floats2half2_rn(x, y);
  return *reinterpret_cast<uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
  __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<uint32_t*>(&v);
}

// ex2 may flush subnormal results: weights of 1e-38 of the largest.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Starts copying the kept of kTiles * 16 rows, `stride` elements apart, into a tile.
template <class T, int kTiles, bool kMasked>
__device__ __forceinline__ void copy_rows(char* tile, const T* rows, int64_t stride, int S, const bool* kept) {
  const int piece = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = threadIdx.x / 8 + i * 4 * kTiles;
    const bool there = kMasked && kept != nullptr ? kept[row] : row < S;
    copy16(tile + swizzled(row, piece), rows + (there ? row * stride + piece * 8 : 0), there);
  }
}

// acc [16, 16 kTiles] = a [16, 64] bᵀ: rows first .. first + 15 of tile a with all rows of tile b.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&acc)[2 * kTiles][4], const char* a, int first, const char* b) {
  const int lane = threadIdx.x % 32;
  uint32_t parts[4][4];
#pragma unroll
  for (int step = 0; step < 4; ++step)
    load_matrices(parts[step], a + swizzled(first + lane % 16, 2 * step + lane / 16));
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) acc[2 * j][c] = acc[2 * j + 1][c] = 0;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t x[4];
      load_matrices(x, b + swizzled(16 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      mma<T>(acc[2 * j], parts[step], x[0], x[1]);
      mma<T>(acc[2 * j + 1], parts[step], x[2], x[3]);
    }
  }
}

// acc [16, 64] += a [16, 16] times rows first .. first + 15 of tile b.
template <class T>
__device__ __forceinline__ void multiply_columns(float (&acc)[8][4], const uint32_t (&a)[4], const char* b, int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    uint32_t x[4];
    load_transposed(x, b + swizzled(first + lane % 16, 2 * n + lane / 16));
    mma<T>(acc[2 * n], a, x[0], x[1]);
    mma<T>(acc[2 * n + 1], a, x[2], x[3]);
  }
}

// Scores [16, 16 kTiles] to weights before normalisation; returns one over the sums of rows lane / 4 and 8 + lane / 4.
template <int kTiles, bool kMasked>
__device__ __forceinline__ float2 softmax(float (&s)[2 * kTiles][4], float scale, int S, const bool* kept) {
  const int lane = threadIdx.x % 32;
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = 8 * n + lane % 4 * 2 + c;
      // Of keys that are all there nothing has to be asked: S is more than 16 (kTiles - 1).
      const bool keep = kMasked ? kept[key] : n < 2 * kTiles - 2 || key < S;
      s[n][c] = keep ? s[n][c] * scale : -INFINITY;
      s[n][2 + c] = keep ? s[n][2 + c] * scale : -INFINITY;
      most[0] = fmaxf(most[0], s[n][c]);
      most[1] = fmaxf(most[1], s[n][2 + c]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = quad_max(most[r]);
    most[r] = most[r] == -INFINITY ? 0 : most[r];  // no key: weights of 0, not NaN
  }
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      s[n][c] = exp2_fast(s[n][c] - most[c / 2]);
      total[c / 2] += s[n][c];
    }
  }
  float2 inverse;
  total[0] = quad_sum(total[0]);
  total[1] = quad_sum(total[1]);
  inverse.x = total[0] == 0 ? 0 : 1 / total[0];
  inverse.y = total[1] == 0 ? 0 : 1 / total[1];
  return inverse;
}

// To rows first .. first + 15 of `rows`, those below S, by way of 16 rows of shared memory that the warp has for
// itself.
template <class T, bool kSwizzled>
__device__ __forceinline__ void store_rows(T* rows, int64_t stride, int S, int first, char* own, int own_stride,
                                           const float (&acc)[8][4], float2 scale) {
  const int lane = threadIdx.x % 32;
  const auto at = [&](int row, int piece) {
    return own + (kSwizzled ? row * kTileRowBytes + ((piece ^ (row & 7)) << 4) : row * own_stride + piece * 16);
  };
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    *reinterpret_cast<uint32_t*>(at(lane / 4, n) + lane % 4 * 4) = pack<T>(acc[n][0] * scale.x, acc[n][1] * scale.x);
    *reinterpret_cast<uint32_t*>(at(lane / 4 + 8, n) + lane % 4 * 4) =
        pack<T>(acc[n][2] * scale.y, acc[n][3] * scale.y);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 8 + 4 * i;
    if (first + row < S)
      *reinterpret_cast<uint4*>(rows + (first + row) * stride + lane % 8 * 8) =
          *reinterpret_cast<const uint4*>(at(row, lane % 8));
  }
  __syncwarp();
}

template <int kTiles>
__device__ __forceinline__ void find_kept(bool* kept, const uint8_t* key_mask, const int64_t* lengths, int b, int S) {
  for (int key = threadIdx.x; key < 16 * kTiles; key += 32 * kTiles) {
    bool keep = key < S;
    if (key_mask != nullptr) keep = keep && 0 != key_mask[int64_t(b) * S + key];
    if (lengths != nullptr) keep = keep && key < lengths[b];
    kept[key] = keep;
  }
  __syncthreads();
}

// Programs of so many warps. Of seven there are as few as of eight: registers are given to four warps at a time.
constexpr int programs(int warps, int tiles) { return tiles >= 7 && warps < 16 ? 1 : warps / tiles; }

template <class T, int kTiles, bool kMasked>
__global__ void __launch_bounds__(32 * kTiles, programs(kForwardWarps, kTiles))
    forward_kernel(const T* qkv, const uint8_t* key_mask, const int64_t* lengths, int S, int H, float scale, T* out) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ bool kept[16 * kTiles];
  constexpr int kTile = 16 * kTiles * kTileRowBytes;
  char *q = shared, *k = q + kTile, *v = k + kTile;
  const int b = blockIdx.x / H, h = blockIdx.x % H, first = threadIdx.x / 32 * 16;
  const int64_t row = int64_t(H) * kDim;
  const T* head = qkv + int64_t(b) * S * 3 * row + h * kDim;
  if (kMasked) find_kept<kTiles>(kept, key_mask, lengths, b, S);
  copy_rows<T, kTiles, false>(q, head, 3 * row, S, nullptr);
  copy_rows<T, kTiles, kMasked>(k, head + row, 3 * row, S, kept);
  commit_copies();
  copy_rows<T, kTiles, kMasked>(v, head + 2 * row, 3 * row, S, kept);
  commit_copies();
  wait_copies_but_last();
  __syncthreads();
  float s[2 * kTiles][4];
  multiply_rows<T, kTiles>(s, q, first, k);
  const float2 inverse = softmax<kTiles, kMasked>(s, scale * kLog2E, S, kept);
  wait_copies();
  __syncthreads();
  float acc[8][4] = {};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const uint32_t a[4] = {pack<T>(s[2 * j][0], s[2 * j][1]), pack<T>(s[2 * j][2], s[2 * j][3]),
                           pack<T>(s[2 * j + 1][0], s[2 * j + 1][1]), pack<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
    multiply_columns<T>(acc, a, v, 16 * j);
  }
  store_rows<T, true>(out + int64_t(b) * S * row + h * kDim, row, S, first, q + first * kTileRowBytes, 0, acc, inverse);
}

template <class T, int kTiles, bool kMasked>
__global__ void __launch_bounds__(32 * kTiles, programs(kBackwardWarps, kTiles))
    backward_kernel(const T* grad_out, const T* qkv, const uint8_t* key_mask, const int64_t* lengths, int S, int H,
                    float scale, T* grad_qkv) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ bool kept[16 * kTiles];
  constexpr int kTile = 16 * kTiles * kTileRowBytes;
  constexpr int kStride = 32 * kTiles + 16;  // of P and dS: 16 bytes more, so that rows start in banks of their own
  char *q = shared, *k = q + kTile, *g = k + kTile, *v = g + kTile, *p = v + kTile, *ds = p + 16 * kTiles * kStride;
  const int b = blockIdx.x / H, h = blockIdx.x % H, first = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  const int64_t row = int64_t(H) * kDim;
  const T* head = qkv + int64_t(b) * S * 3 * row + h * kDim;
  T* grad_head = grad_qkv + int64_t(b) * S * 3 * row + h * kDim;
  if (kMasked) find_kept<kTiles>(kept, key_mask, lengths, b, S);
  copy_rows<T, kTiles, false>(q, head, 3 * row, S, nullptr);
  copy_rows<T, kTiles, kMasked>(k, head + row, 3 * row, S, kept);
  commit_copies();
  copy_rows<T, kTiles, kMasked>(v, head + 2 * row, 3 * row, S, kept);
  copy_rows<T, kTiles, false>(g, grad_out + int64_t(b) * S * row + h * kDim, row, S, nullptr);
  commit_copies();
  wait_copies_but_last();
  __syncthreads();
  float s[2 * kTiles][4];
  multiply_rows<T, kTiles>(s, q, first, k);
  const float2 inverse = softmax<kTiles, kMasked>(s, scale * kLog2E, S, kept);
  wait_copies();
  __syncthreads();
  {
    float of_p[2 * kTiles][4];
    multiply_rows<T, kTiles>(of_p, g, first, v);
    float mean[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[n][c] *= c < 2 ? inverse.x : inverse.y;
        mean[c / 2] += s[n][c] * of_p[n][c];
      }
    }
    mean[0] = quad_sum(mean[0]);
    mean[1] = quad_sum(mean[1]);
    char* own_p = p + (first + lane / 4) * kStride + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      *reinterpret_cast<uint32_t*>(own_p + 16 * n) = pack<T>(s[n][0], s[n][1]);
      *reinterpret_cast<uint32_t*>(own_p + 8 * kStride + 16 * n) = pack<T>(s[n][2], s[n][3]);
#pragma unroll
      for (int c = 0; c < 4; ++c) s[n][c] *= of_p[n][c] - mean[c / 2];
    }
  }
  {
    float acc[8][4] = {};
    uint32_t parts[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      parts[j][0] = pack<T>(s[2 * j][0], s[2 * j][1]);
      parts[j][1] = pack<T>(s[2 * j][2], s[2 * j][3]);
      parts[j][2] = pack<T>(s[2 * j + 1][0], s[2 * j + 1][1]);
      parts[j][3] = pack<T>(s[2 * j + 1][2], s[2 * j + 1][3]);
      multiply_columns<T>(acc, parts[j], k, 16 * j);
    }
    if constexpr (kTiles >= 4) {  // a row of dS has room for one of dQ
      store_rows<T, false>(grad_head, 3 * row, S, first, ds + first * kStride, kStride, acc, make_float2(scale, scale));
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (first + lane / 4 + 8 * r < S)
            *reinterpret_cast<uint32_t*>(grad_head + (first + lane / 4 + 8 * r) * 3 * row + 8 * n + lane % 4 * 2) =
                pack<T>(acc[n][2 * r] * scale, acc[n][2 * r + 1] * scale);
        }
      }
    }
    char* own_ds = ds + (first + lane / 4) * kStride + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      *reinterpret_cast<uint32_t*>(own_ds + 32 * j) = parts[j][0];
      *reinterpret_cast<uint32_t*>(own_ds + 8 * kStride + 32 * j) = parts[j][1];
      *reinterpret_cast<uint32_t*>(own_ds + 32 * j + 16) = parts[j][2];
      *reinterpret_cast<uint32_t*>(own_ds + 8 * kStride + 32 * j + 16) = parts[j][3];
    }
  }
  __syncthreads();
  // Rows first .. first + 15 are keys from here on.
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    const char *a = turn == 0 ? p : ds, *x = turn == 0 ? g : q;
    float acc[8][4] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint32_t part[4];
      load_transposed(part, a + (16 * j + lane / 16 * 8 + lane % 8) * kStride + first * 2 + lane / 8 % 2 * 16);
      multiply_columns<T>(acc, part, x, 16 * j);
    }
    const float factor = turn == 0 ? 1 : scale;
    store_rows<T, true>(grad_head + (2 - turn) * row, 3 * row, S, first, (turn == 0 ? v : k) + first * kTileRowBytes, 0,
                        acc, make_float2(factor, factor));
  }
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("masked_attention: ") + what + ": " + cudaGetErrorString(error));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int bytes, int64_t heads, int threads, void* stream, A... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  kernel<<<unsigned(heads), threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), "launch");
}

// grad_out null: forward.
template <class T, int kTiles, bool kMasked>
void run(const void* grad_out, const void* qkv, const uint8_t* key_mask, const int64_t* lengths, int64_t B, int S,
         int H, float scale, void* stream, void* out) {
  constexpr int tile = 16 * kTiles * kTileRowBytes, threads = 32 * kTiles, weights = 16 * kTiles * (32 * kTiles + 16);
  const T* x = static_cast<const T*>(qkv);
  if (grad_out == nullptr) {
    launch(forward_kernel<T, kTiles, kMasked>, 3 * tile, B * H, threads, stream, x, key_mask, lengths, S, H, scale,
           static_cast<T*>(out));
  } else {
    launch(backward_kernel<T, kTiles, kMasked>, 4 * tile + 2 * weights, B * H, threads, stream,
           static_cast<const T*>(grad_out), x, key_mask, lengths, S, H, scale, static_cast<T*>(out));
  }
}

template <class T, int kTiles = 1>
void choose(const void* grad_out, const void* qkv, const uint8_t* key_mask, const int64_t* lengths, int64_t B, int S,
            int H, float scale, void* stream, void* out) {
  if constexpr (kTiles <= 8) {
    if (S > 16 * kTiles) return choose<T, kTiles + 1>(grad_out, qkv, key_mask, lengths, B, S, H, scale, stream, out);
    const auto chosen = key_mask != nullptr || lengths != nullptr ? run<T, kTiles, true> : run<T, kTiles, false>;
    chosen(grad_out, qkv, key_mask, lengths, B, S, H, scale, stream, out);
  } else {
    throw std::runtime_error("masked_attention: sequences are of 128 at most");
  }
}

}  // namespace

void masked_attention(const void* qkv, DType dtype, const uint8_t* key_mask, const int64_t* lengths, int64_t B,
                      int64_t S, int64_t H, double scale, void* stream, void* out) {
  if (B * S * H == 0) return;
  const auto chosen = dtype == DType::bf16 ? choose<__nv_bfloat16> : choose<__half>;
  chosen(nullptr, qkv, key_mask, lengths, B, int(S), int(H), float(scale), stream, out);
}

void masked_attention_backward(const void* grad_out, const void* qkv, DType dtype, const uint8_t* key_mask,
                               const int64_t* lengths, int64_t B, int64_t S, int64_t H, double scale, void* stream,
                               void* grad_qkv) {
  if (B * S * H == 0) return;
  const auto chosen = dtype == DType::bf16 ? choose<__nv_bfloat16> : choose<__half>;
  chosen(grad_out, qkv, key_mask, lengths, B, int(S), int(H), float(scale), stream, grad_qkv);
}

}  // namespace ncfast::cuda
