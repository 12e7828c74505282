#pragma once

// Launch.

#include <cuda_runtime.h>

#include <climits>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ncfast::cuda {
namespace {

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

template <class Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
}

}  // namespace
}  // namespace ncfast::cuda
