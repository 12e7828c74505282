#pragma once

// A call of nearest_code, and how its kernels are launched.

#include <cuda_runtime.h>

#include <climits>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "matrix.cuh"

namespace ncfast::cuda {

struct Call {
  Matrix z;              // [H, M, D]
  const void* codebook;  // [H, K, D] float64 where z is, float32 otherwise
  int64_t H, M;
  int K, D;
  bool exact;
  cudaStream_t stream;
  char* workspace;
  int64_t* indices;  // [H, M]

  __host__ NCFAST_DEVICE const float* codes() const { return static_cast<const float*>(codebook); }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("nearest_code: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline unsigned grid_size(int64_t blocks) {
  if (blocks > INT_MAX) {
    throw std::runtime_error("nearest_code: a launch of " + std::to_string(blocks) +
                             " blocks is over CUDA's limit of " + std::to_string(INT_MAX) +
                             "; pass fewer rows at a time");
  }
  return unsigned(blocks);
}

template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 0) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), what);
}

// Consecutive buffers from `memory` on, at multiples of 16 bytes. Without memory only their size is of use.
struct Buffers {
  char* memory;
  int64_t bytes = 0;

  template <class T>
  __host__ NCFAST_DEVICE void place(T*& buffer, int64_t count) {
    buffer = reinterpret_cast<T*>(memory + bytes);
    bytes += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
  }
};

struct Device {
  int processors;
  int shared_bytes;  // that a block can have
  bool hopper;       // wgmma
};

// With NCFAST_CUDA_ISA=mma a Hopper GPU runs the kernels of the GPUs before it.
inline Device current_device() {
  int device, processors, shared_bytes, major;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "the device's processors");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "the shared memory");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "the device's capability");
  const char* isa = std::getenv("NCFAST_CUDA_ISA");
  return {processors, shared_bytes, major == 9 && !(isa != nullptr && std::string(isa) == "mma")};
}

}  // namespace ncfast::cuda
