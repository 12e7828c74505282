#pragma once

#include <cstdint>

#include "../dtype.h"

namespace ncfast::cuda {

// Device memory that a call of this size needs as scratch.
int64_t nearest_code_workspace_bytes(int64_t H, int64_t M, int64_t K, int64_t D);

// As ncfast::cpu::nearest_code, on `stream` (a cudaStream_t) of the current device. Allocates nothing and waits for
// nothing, so it can be captured in a CUDA graph. Throws std::runtime_error with CUDA's own message when a launch
// fails.
void nearest_code(const void* z,         // [H, M, D] of `dtype`, contiguous
                  DType dtype,           //
                  const void* codebook,  // [H, K, D] float32, or float64 when dtype is f64, contiguous
                  int64_t H, int64_t M, int64_t K, int64_t D,
                  bool exact,  // otherwise the best score of one fp16 product decides where it can be had
                  void* stream,
                  void* workspace,  // nearest_code_workspace_bytes(H, M, K, D) bytes, 16-byte aligned
                  // outputs
                  int64_t* indices);  // [H, M]

}  // namespace ncfast::cuda
