// Nearest code. Scores on tensor cores, with an error bound, leave few codes of a row to choose between; float64
// distances choose (docs/nearest_code_cuda.md). A codebook that fits in shared memory takes one launch.
//
// Codes too long for that are scored in float32, where only the two best scores of a row are kept: where they are
// further apart than twice the rounding error can be, the best code is the nearest one. Float64 data are not scored.
//
// In either case a row that is still open is marked in the output itself and a last pass measures it against every code
// in float64: the host never waits and the launches do not depend on the data.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "nearest_code.h"
#include "nearest_code/float32.cuh"
#include "nearest_code/resident.cuh"
#include "nearest_code/streamed.cuh"

namespace ncfast::cuda {
namespace {

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
