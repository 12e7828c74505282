#include "multiply_kernel.h"

// to[s][.] = from[s * stride + .], zeros beyond d.
inline void copy_rows(const float* from, int64_t stride, const Head& head, float* to) {
  for (int64_t s = 0; s < head.S; ++s) {
    for (int64_t c = 0; c < head.d; ++c) to[s * head.padded_d + c] = from[s * stride + c];
    for (int64_t c = head.d; c < head.padded_d; ++c) to[s * head.padded_d + c] = 0;
  }
}

// to[c][s] = from[s * stride + c], zeros beyond S.
inline void transpose_rows(const float* from, int64_t stride, const Head& head, float* to) {
  for (int64_t s = 0; s < head.S; ++s) {
    for (int64_t c = 0; c < head.d; ++c) to[c * head.padded_S + s] = from[s * stride + c];
  }
  for (int64_t c = 0; c < head.d; ++c) {
    for (int64_t s = head.S; s < head.padded_S; ++s) to[c * head.padded_S + s] = 0;
  }
}

// exp(x - shift) of a row in place, and the sum. Cody and Waite's reduction, and a polynomial of degree 6: within
// 2 units in the last place for 0 >= x - shift >= -87, and 0 below.
inline float exponentiate(float* x, float shift, int64_t count) {
  constexpr int64_t kLanes = 16;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float sums[kLanes] = {};
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const float t = x[begin + i] - shift, bounded = t > -87.0f ? t : -87.0f;
      const float n = (bounded * 1.44269504f + kRound) - kRound;
      const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
      float p = 1.0f / 720;
      p = p * r + 1.0f / 120;
      p = p * r + 1.0f / 24;
      p = p * r + 1.0f / 6;
      p = p * r + 0.5f;
      p = p * r + 1.0f;
      p = p * r + 1.0f;
      const int32_t bits = (int32_t(n) + 127) << 23;
      float power;
      __builtin_memcpy(&power, &bits, sizeof(float));
      const float value = t <= -87.0f ? 0.0f : t != t ? t : p * power;
      x[begin + i] = value;
      sums[i] += value;
    }
  }
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

// The weights [S, padded_S] of one head, zeros beyond S and where masked.
inline void attention_weights(const Head& head, const float* q, int64_t q_stride, const float* k_transposed,
                              const uint8_t* key_mask, float* weights) {
  const int64_t S = head.S, P = head.padded_S;
  multiply<false>(q, q_stride, 1, k_transposed, P, head.d, S, P, weights, P);
  for (int64_t i = 0; i < S; ++i) {
    // Lane by lane, so that the maximum is not one long chain.
    constexpr int64_t kLanes = 16;
    float *row = weights + i * P, highest[kLanes], most = -INFINITY;
    if (key_mask != nullptr) {
      for (int64_t j = 0; j < S; ++j) row[j] = key_mask[j] ? row[j] : -INFINITY;
    }
    for (int64_t j = S; j < P; ++j) row[j] = -INFINITY;
    for (int64_t lane = 0; lane < kLanes; ++lane) highest[lane] = -INFINITY;
    for (int64_t j = 0; j < P; j += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float score = row[j + lane] * head.scale;
        row[j + lane] = score;
        highest[lane] = score > highest[lane] ? score : highest[lane];
      }
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) most = highest[lane] > most ? highest[lane] : most;
    // No key at all; a NaN, which is no maximum, comes back out of the sum.
    if (most == -INFINITY && key_mask != nullptr) {
      for (int64_t j = 0; j < P; ++j) row[j] = 0;
      continue;
    }
    const float inverse = 1 / exponentiate(row, most, P);
    for (int64_t j = 0; j < P; ++j) row[j] *= inverse;
  }
}

inline void forward_head(const Head& head, const float* q, const float* k, const float* v, const uint8_t* key_mask,
                         float* scratch, float* out) {
  float* k_transposed = scratch;                          // [d, padded_S]
  float* values = k_transposed + head.d * head.padded_S;  // [S, padded_d]
  float* weights = values + head.S * head.padded_d;       // [S, padded_S]
  float* result = weights + head.S * head.padded_S;       // [S, padded_d]
  transpose_rows(k, head.qkv_stride, head, k_transposed);
  copy_rows(v, head.qkv_stride, head, values);
  attention_weights(head, q, head.qkv_stride, k_transposed, key_mask, weights);
  multiply<false>(weights, head.padded_S, 1, values, head.padded_d, head.S, head.S, head.padded_d, result,
                  head.padded_d);
  for (int64_t s = 0; s < head.S; ++s) {
    for (int64_t c = 0; c < head.d; ++c) out[s * head.out_stride + c] = result[s * head.padded_d + c];
  }
}

inline void store_rows(const float* from, const Head& head, float* to) {
  for (int64_t s = 0; s < head.S; ++s) {
    for (int64_t c = 0; c < head.d; ++c) to[s * head.qkv_stride + c] = from[s * head.padded_d + c];
  }
}

inline void backward_head(const Head& head, const float* grad_out, const float* q, const float* k, const float* v,
                          const uint8_t* key_mask, float* scratch, float* grad_q, float* grad_k, float* grad_v) {
  const int64_t S = head.S, P = head.padded_S, C = head.padded_d;
  float* transposed = scratch;            // [d, padded_S], of k and then of v
  float* rows = transposed + head.d * P;  // [S, padded_d], of the right operand
  float* result = rows + S * C;           // [S, padded_d]
  float* weights = result + S * C;        // [S, padded_S]
  float* grad = weights + S * P;          // [S, padded_S]: of the weights, then of the scores
  transpose_rows(k, head.qkv_stride, head, transposed);
  attention_weights(head, q, head.qkv_stride, transposed, key_mask, weights);

  copy_rows(grad_out, head.out_stride, head, rows);
  multiply<false>(weights, 1, P, rows, C, S, S, C, result, C);
  store_rows(result, head, grad_v);

  transpose_rows(v, head.qkv_stride, head, transposed);
  multiply<false>(rows, C, 1, transposed, P, head.d, S, P, grad, P);
  for (int64_t i = 0; i < S; ++i) {
    constexpr int64_t kLanes = 16;
    const float* weight = weights + i * P;
    float *row = grad + i * P, sums[kLanes] = {}, mean = 0;
    for (int64_t j = 0; j < P; j += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += weight[j + lane] * row[j + lane];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) mean += sums[lane];
    for (int64_t j = 0; j < P; ++j) row[j] = head.scale * weight[j] * (row[j] - mean);
  }

  copy_rows(k, head.qkv_stride, head, rows);
  multiply<false>(grad, P, 1, rows, C, S, S, C, result, C);
  store_rows(result, head, grad_q);
  copy_rows(q, head.qkv_stride, head, rows);
  multiply<false>(grad, 1, P, rows, C, S, S, C, result, C);
  store_rows(result, head, grad_k);
}

inline Kernel kernel() { return {&forward_head, &backward_head}; }
