#pragma once

#include <cstdint>

namespace ncfast::cpu {

// What both passes read. All arrays are contiguous; those that may be null are left out then.
struct AttentionInput {
  const float* qkv;         // [B, S, 3, H, d]
  const uint8_t* key_mask;  // [B, S], 0 or 1; null for all keys
  const int64_t* lengths;   // [B]: keys from there on are left out; null for all keys
  const float* q_scale;     // [d]: q becomes q / |q| times this; null for q as it is
  const float* k_scale;     // [d]: the same for k; null exactly when q_scale is
  const float* null_kv;     // [2, H, d]: one more key and value of every sequence; or null
  int64_t B, S, H, d;
  float scale;  // of the scores
};

// softmax(scale q kᵀ) v of every sequence and head. A sequence without any key gives zeros.
void masked_attention(const AttentionInput& input, int threads,
                      // output
                      float* out);  // [B, S, H, d]

// The weights are computed again: nothing but the input is kept between the passes. The gradients of the scales and of
// null_kv are written where those are given. They are sums over sequences, in the order of these.
void masked_attention_backward(const AttentionInput& input,
                               const float* grad_out,  // [B, S, H, d], contiguous
                               int threads,
                               // output
                               float* grad_qkv,       // [B, S, 3, H, d]
                               float* grad_q_scale,   // [d]
                               float* grad_k_scale,   // [d]
                               float* grad_null_kv);  // [2, H, d]

}  // namespace ncfast::cpu
