#pragma once

#include <cstdint>

#include "../dtype.h"

namespace ncfast::cuda {

// Attention of heads of 64 elements, S <= 128, on `stream` (a cudaStream_t) of the current device. Allocates nothing
// and waits for nothing. Throws std::runtime_error with CUDA's own message when a launch fails.
void masked_attention(const void* qkv,          // [B, S, 3, H, 64] of `dtype`, contiguous, 16-byte aligned
                      DType dtype,              // f16 or bf16
                      const uint8_t* key_mask,  // [B, S] or null
                      const int64_t* lengths,   // [B] or null
                      int64_t B, int64_t S, int64_t H, double scale, void* stream,
                      void* out);  // [B, S, H, 64], 16-byte aligned

// Its gradient of qkv.
void masked_attention_backward(const void* grad_out,     // [B, S, H, 64], 16-byte aligned
                               const void* qkv,          // [B, S, 3, H, 64], as above
                               DType dtype,              //
                               const uint8_t* key_mask,  // [B, S] or null
                               const int64_t* lengths,   // [B] or null
                               int64_t B, int64_t S, int64_t H, double scale, void* stream,
                               void* grad_qkv);  // [B, S, 3, H, 64], 16-byte aligned

}  // namespace ncfast::cuda
