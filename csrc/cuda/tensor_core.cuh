#pragma once

// Tensor-core products and the copies that feed them, one instruction a function.
//
// Operands lie in shared memory as tiles of 64 fp16 columns: a row is 128 bytes, its eight pieces of 16 bytes permuted
// by the row number ("128-byte swizzle"), so that neither ldmatrix nor wgmma meets a bank conflict. Tiles start at
// multiples of 1024 bytes.

#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define NCFAST_HOPPER 1  // wgmma, and bulk copies that complete on an mbarrier
#else
#define NCFAST_HOPPER 0
#endif

namespace ncfast::cuda {

constexpr int kTileColumns = 64;
constexpr int kTileRowBytes = 128;
constexpr int kStepsPerTile = 4;  // products take 16 columns at a time

// Where the 16 bytes of columns 8 piece .. 8 piece + 7 of a row lie in its tile.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * kTileRowBytes + ((piece ^ (row & 7)) << 4); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier of `threads` threads; 0 is __syncthreads.
__device__ __forceinline__ void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_some(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The lesser, or NaN where either is.
__device__ __forceinline__ float min_or_nan(float x, float y) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
  return least;
}

// ---- sm_80: mma.sync, cp.async ----

__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void mma_16x8x16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- sm_90a: wgmma, mbarrier, bulk copies ----

#if NCFAST_HOPPER

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Makes ordinary stores to shared memory visible to wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accumulators across a fence or a wait.
template <int kSize>
__device__ __forceinline__ void pin(float (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// 128-byte swizzle, rows along k, 1024 bytes from one group of eight rows to the next.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile) {
  const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
  return address | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define NCFAST_FLOATS8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define NCFAST_FLOATS64(c)                                                                                         \
  NCFAST_FLOATS8(c, 0), NCFAST_FLOATS8(c, 8), NCFAST_FLOATS8(c, 16), NCFAST_FLOATS8(c, 24), NCFAST_FLOATS8(c, 32), \
      NCFAST_FLOATS8(c, 40), NCFAST_FLOATS8(c, 48), NCFAST_FLOATS8(c, 56)
#define NCFAST_WGMMA_64x128x16(add)                                                  \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
  "}, %64, %65, " add ", 1, 1, 0, 0;\n"

// d = a b^T + d, or without kAdd a b^T, whatever d was; a [64, 16], b [128, 16]
template <bool kAdd>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (kAdd) {
    asm volatile(NCFAST_WGMMA_64x128x16("1") : NCFAST_FLOATS64("+f") : "l"(a), "l"(b));
  } else {
    asm volatile(NCFAST_WGMMA_64x128x16("0") : NCFAST_FLOATS64("=f") : "l"(a), "l"(b));
  }
}

#undef NCFAST_WGMMA_64x128x16
#undef NCFAST_FLOATS64
#undef NCFAST_FLOATS8

#endif  // NCFAST_HOPPER

// acc = a b^T (kAdd: + acc) over the first 16 steps columns of a tile a [64, 64] and a tile b [kCodes, 64], by the four
// warps of a warpgroup, each for 16 of the rows. Of those, a thread holds rows lane / 4 and 8 + lane / 4: with c in 0,
// 1, acc[4 j + c] and acc[4 j + 2 + c] are their products with row 8 j + 2 (lane % 4) + c of b. With wgmma the call
// only starts the work: it is there after wgmma_wait.
template <bool kHopper, bool kAdd, int kCodes>
__device__ __forceinline__ void multiply(float (&acc)[kCodes / 2], const char* a, const char* b, int steps) {
  if constexpr (kHopper) {
#if NCFAST_HOPPER
    const uint64_t a_tile = tile_descriptor(a);
    const uint64_t b_tile = tile_descriptor(b);
    wgmma_fence();
    if (steps == kStepsPerTile) {  // without branches between them the products need no words with each other
      wgmma<kAdd>(acc, a_tile, b_tile);
#pragma unroll
      for (int step = 1; step < kStepsPerTile; ++step) wgmma<true>(acc, a_tile + 2 * step, b_tile + 2 * step);
    } else {
      wgmma<kAdd>(acc, a_tile, b_tile);
#pragma unroll 1
      for (int step = 1; step < steps; ++step) {
        wgmma_fence();
        wgmma<true>(acc, a_tile + 2 * step, b_tile + 2 * step);
      }
    }
    wgmma_commit();
#endif
  } else {
    const int lane = threadIdx.x % 32;
    const int a_row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const int b_row = lane / 16 * 8 + lane % 8;
    if constexpr (!kAdd) {
#pragma unroll
      for (float& x : acc) x = 0;
    }
    for (int step = 0; step < steps; ++step) {
      uint32_t a_part[4];
      load_matrices(a_part, a + swizzled(a_row, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < kCodes / 16; ++j) {
        uint32_t b_part[4];
        load_matrices(b_part, b + swizzled(16 * j + b_row, 2 * step + lane / 8 % 2));
        mma_16x8x16(acc + 8 * j, a_part, b_part[0], b_part[1]);
        mma_16x8x16(acc + 8 * j + 4, a_part, b_part[2], b_part[3]);
      }
    }
  }
}

#if NCFAST_HOPPER

// The same with wgmma, of the first 16 kSteps columns of a with as many columns of b from 16 kSteps part on.
template <int kSteps>
__device__ __forceinline__ void multiply_part(float (&acc)[64], const char* a, const char* b, int part) {
  const uint64_t a_tile = tile_descriptor(a);
  const uint64_t b_tile = tile_descriptor(b) + 2 * kSteps * part;
  wgmma_fence();
  wgmma<false>(acc, a_tile, b_tile);
#pragma unroll
  for (int step = 1; step < kSteps; ++step) wgmma<true>(acc, a_tile + 2 * step, b_tile + 2 * step);
  wgmma_commit();
}

#endif

}  // namespace ncfast::cuda
