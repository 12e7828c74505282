#pragma once

#include <cstdint>

namespace ncfast::cpu {

// softmax(q kᵀ / sqrt(d)) v of every sequence and head, over all keys or those that key_mask names. A sequence without
// any gives zeros.
void masked_attention(const float* qkv,         // [B, S, 3, H, d], contiguous
                      const uint8_t* key_mask,  // [B, S], 0 or 1; null for all keys
                      int64_t B, int64_t S, int64_t H, int64_t d, int threads,
                      // output
                      float* out);  // [B, S, H, d]

// The weights are computed again: nothing but the input is kept between the passes.
void masked_attention_backward(const float* grad_out,    // [B, S, H, d], contiguous
                               const float* qkv,         // [B, S, 3, H, d], contiguous
                               const uint8_t* key_mask,  // [B, S] or null
                               int64_t B, int64_t S, int64_t H, int64_t d, int threads,
                               // output
                               float* grad_qkv);  // [B, S, 3, H, d]

}  // namespace ncfast::cpu
