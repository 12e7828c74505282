#pragma once

// Matrices of float32, float16 or bfloat16, read as float32.

#include <cuda_fp16.h>

#include <cstdint>

#include "../../dtype.h"

namespace ncfast::cuda {
namespace {

struct Matrix {
  const void* data;  // of `dtype`, f64 excluded
  DType dtype;
};

__device__ __forceinline__ float widen(uint16_t bits, DType dtype) {
  // A bf16 is the upper half of a float.
  return dtype == DType::bf16 ? __uint_as_float(uint32_t(bits) << 16) : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ float load1(const Matrix& matrix, int64_t index) {
  if (matrix.dtype == DType::f32) return static_cast<const float*>(matrix.data)[index];
  return widen(static_cast<const uint16_t*>(matrix.data)[index], matrix.dtype);
}

// Elements d .. d + 7 of the rows first + row(0), first + row(1), .., zeros past their ends. `kAligned` says that rows
// are multiples of 8 elements and start at multiples of 16 bytes; the loads of all rows are then under way together.
template <bool kAligned, int kRows, class Row>
__device__ __forceinline__ void load_rows(const Matrix& matrix, int64_t first, const Row& row, int d, int D,
                                          float (&x)[kRows][8]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t start = (first + row(i)) * D + d;
#pragma unroll
      for (int p = 0; p < 8; ++p) x[i][p] = d + p < D ? load1(matrix, start + p) : 0.f;
    }
  } else if (d >= D) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int p = 0; p < 8; ++p) x[i][p] = 0;
    }
  } else if (matrix.dtype == DType::f32) {
    const float* data = static_cast<const float*>(matrix.data) + first * D + d;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float4* from = reinterpret_cast<const float4*>(data + int64_t(row(i)) * D);
      const float4 low = __ldg(from), high = __ldg(from + 1);
      x[i][0] = low.x, x[i][1] = low.y, x[i][2] = low.z, x[i][3] = low.w;
      x[i][4] = high.x, x[i][5] = high.y, x[i][6] = high.z, x[i][7] = high.w;
    }
  } else {
    const uint16_t* data = static_cast<const uint16_t*>(matrix.data) + first * D + d;
    uint4 words[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) words[i] = __ldg(reinterpret_cast<const uint4*>(data + int64_t(row(i)) * D));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t pairs[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (int p = 0; p < 8; ++p) x[i][p] = widen(uint16_t(pairs[p / 2] >> (16 * (p % 2))), matrix.dtype);
    }
  }
}

// Has the 16 rows of z from `first` on, or the `left` that there are, on their way to the L2 cache.
__device__ __forceinline__ void prefetch_rows(const Matrix& z,  // [.., D]
                                              int64_t first, int left, int D) {
  const int size = z.dtype == DType::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(z.data) + first * D * size;
  const int bytes = min(16, left) * D * size;
  for (int i = threadIdx.x % 32 * 128; i < bytes; i += 32 * 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
  }
}

}  // namespace
}  // namespace ncfast::cuda
