// Nearest code (docs/nearest_code_cuda.md). Scores from fp16 products on the tensor cores, with an error bound, leave
// few candidates a row, and float64 distances choose among them. A codebook that fits in shared memory takes one
// launch (resident.cuh); others are streamed through it (streamed.cuh).
//
// Codes too long for that are scored in float32 (float32.cuh). Float64 data are not scored.
//
// Rows that stay undecided are marked in the output itself, and a last kernel takes their float64 distances to all
// codes (rescoring.cuh). So the host never waits and the launches do not depend on the data.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "nearest_code.h"
#include "nearest_code/float32.cuh"
#include "nearest_code/resident.cuh"
#include "nearest_code/streamed.cuh"

namespace ncfast::cuda {
namespace {

// Whether the kernels can take a call of this size, and so were launched.
template <bool kHopper, bool kAligned>
bool launch_tensor_cores(const Call& call, const Device& device) {
  return launch_resident<kHopper, kAligned>(call, device) || launch_streamed<kHopper, kAligned>(call, device);
}

}  // namespace

int64_t nearest_code_workspace_bytes(int64_t H, int64_t M, int64_t K, int64_t D) {
  const int64_t bias = H * K * int64_t(sizeof(float));  // of the float32 kernel
  if (H == 0 || M == 0 || D == 0 || K > INT_MAX / 2 || D > kMaxChunks * kTileColumns) return bias;
  Call call{};
  call.H = H, call.M = M, call.K = int(K), call.D = int(D);
  return std::max({bias, StreamPlan(call, kMaxProcessors, true).bytes, StreamPlan(call, kMaxProcessors, false).bytes});
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
  const Call call{{z, dtype}, codebook, H, M, int(K), int(D), exact, stream, static_cast<char*>(workspace), indices};
  if (dtype == DType::f64) {
    static_assert(kUndecided == -1, "the memset below writes it as bytes of ones");
    check(cudaMemsetAsync(indices, 0xff, H * M * sizeof(int64_t), stream), "marking the rows");
    return launch_rescore_undecided<double>(call);
  }
  const Device device = current_device();
  const bool aligned = D % 8 == 0 && is_aligned(z, 16) && is_aligned(codebook, 16);
  const auto launch = device.hopper ? (aligned ? launch_tensor_cores<true, true> : launch_tensor_cores<true, false>)
                                    : (aligned ? launch_tensor_cores<false, true> : launch_tensor_cores<false, false>);
  if (launch(call, device)) return;
  if (dtype == DType::f32) return launch_float32<float>(call);
  return dtype == DType::f16 ? launch_float32<__half>(call) : launch_float32<__nv_bfloat16>(call);
}

}  // namespace ncfast::cuda
