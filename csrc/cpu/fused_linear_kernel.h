#include "multiply_kernel.h"

constexpr int kColumns = 2 * Vec<float>::width;  // of a panel: two registers

// Rows [begin, end) of the panels: panel[p][k][c] = weight[p * kColumns + c][k] (times norm_weight[k]), zeros beyond N.
inline void pack_panel(const Linear& layer, int64_t p, float* panel) {
  for (int64_t c = 0; c < kColumns; ++c) {
    const int64_t n = p * kColumns + c;
    if (n >= layer.N) {
      for (int64_t k = 0; k < layer.K; ++k) panel[k * kColumns + c] = 0;
      continue;
    }
    const float* row = layer.weight + n * layer.K;
    if (layer.norm_weight == nullptr) {
      for (int64_t k = 0; k < layer.K; ++k) panel[k * kColumns + c] = row[k];
    } else {
      for (int64_t k = 0; k < layer.K; ++k) panel[k * kColumns + c] = row[k] * layer.norm_weight[k];
    }
  }
}

// The sum of a[k] b[k], lane by lane.
inline float row_product(const float* a, const float* b, int64_t K) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {}, sum = 0;
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[k + lane] * b[k + lane];
  }
  for (; k < K; ++k) sum += a[k] * b[k];
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// 1 / rms(x) of one row.
inline float inverse_rms(const float* x, int64_t K, float eps) {
  return 1 / __builtin_sqrtf(row_product(x, x, K) / float(K) + eps);
}

// exp(t) for -87 <= t <= 0, within 2 units in the last place. Cody and Waite's reduction, a polynomial of degree 6.
inline float exp_of_negative(float t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (t * 1.44269504f + kRound) - kRound;
  const float r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
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
  return p * power;
}

// x Φ(x), by erfc(z) = t exp(-z² + P(t)), t = 1 / (1 + z / 2), for z >= 0: a Chebyshev fit with a relative error of
// 1.2e-7 (Press et al., Numerical Recipes, section 6.2).
inline float gelu(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float z = 0.707106781f * magnitude;
  const float t = 1 / (1 + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float exponent = -z * z + p;
  const float tail = 0.5f * t * exp_of_negative(exponent > -87.0f ? exponent : -87.0f);  // Φ(-|x|)
  const float value = x < 0 ? x * tail : x - x * tail;
  return x != x ? x : value;
}

// What comes after the product, for `columns` elements of one row from column n on.
inline void finish_row(const Linear& layer, const float* product, float scale, int64_t row, int64_t n,
                       int64_t columns) {
  float values[kColumns];
  const int64_t at = row * layer.N + n;
  for (int64_t c = 0; c < kColumns; ++c) values[c] = scale * product[c];
  if (layer.bias != nullptr) {
    for (int64_t c = 0; c < columns; ++c) values[c] += layer.bias[n + c];
  }
  if (layer.pre != nullptr) {
    for (int64_t c = 0; c < columns; ++c) layer.pre[at + c] = values[c];
  }
  if (layer.gelu) {
    for (int64_t c = 0; c < kColumns; ++c) values[c] = gelu(values[c]);
  }
  if (layer.residual != nullptr) {
    for (int64_t c = 0; c < columns; ++c) values[c] += layer.residual[at + c];
  }
  for (int64_t c = 0; c < columns; ++c) layer.y[at + c] = values[c];
}

// products[r][.] (+)= the product of `depth` elements of R rows of x with a part of a panel.
template <int R>
inline void multiply_part(const Linear& layer, const float* x, const float* panel, int64_t depth, bool add,
                          float* products) {
  if (add) {
    multiply_tile<R, 2, true>(x, layer.K, 1, panel, kColumns, depth, products, kColumns);
  } else {
    multiply_tile<R, 2, false>(x, layer.K, 1, panel, kColumns, depth, products, kColumns);
  }
}

// Rows [begin, end) of y. The rows pass by one part of a panel after the other, each small enough for the first cache.
NCFAST_NOINLINE void linear_rows(const Linear& layer, const float* panels, int64_t begin, int64_t end) {
  constexpr int R = Vec<float>::tile_rows;
  constexpr int64_t kDepth = 128;
  float scales[kRowsPerTask], products[kRowsPerTask * kColumns];
  for (int64_t row = begin; row < end; ++row) {
    scales[row - begin] =
        layer.norm_weight == nullptr ? 1 : inverse_rms(layer.x + row * layer.K, layer.K, layer.norm_eps);
  }
  for (int64_t n = 0; n < layer.N; n += kColumns, panels += layer.K * kColumns) {
    for (int64_t k = 0; k == 0 || k < layer.K; k += kDepth) {
      const int64_t depth = layer.K - k < kDepth ? layer.K - k : kDepth;
      const float *x = layer.x + begin * layer.K + k, *panel = panels + k * kColumns;
      const int64_t rows = end - begin;
      int64_t r = 0;
      for (; r + R <= rows; r += R)
        multiply_part<R>(layer, x + r * layer.K, panel, depth, k > 0, products + r * kColumns);
      for (; r + 4 <= rows; r += 4)
        multiply_part<4>(layer, x + r * layer.K, panel, depth, k > 0, products + r * kColumns);
      for (; r < rows; ++r) multiply_part<1>(layer, x + r * layer.K, panel, depth, k > 0, products + r * kColumns);
    }
    const int64_t columns = layer.N - n < kColumns ? layer.N - n : kColumns;
    for (int64_t row = begin; row < end; ++row) {
      finish_row(layer, products + (row - begin) * kColumns, scales[row - begin], row, n, columns);
    }
  }
}

// With x̂ = x / rms(x) and g the gradient of x̂: grad_x = (g - x̂ mean(g x̂)) / rms(x).
NCFAST_NOINLINE void rms_norm_backward_row(const float* grad_out, const float* x, const float* norm_weight, int64_t K,
                                           float eps, float* grad_x, float* grad_norm_weight, float* normalised) {
  const float scale = inverse_rms(x, K, eps);
  for (int64_t k = 0; k < K; ++k) {
    const float unit = x[k] * scale;
    normalised[k] = unit * norm_weight[k];
    grad_norm_weight[k] += grad_out[k] * unit;
  }
  const float mean = row_product(grad_out, normalised, K) / float(K);
  for (int64_t k = 0; k < K; ++k) grad_x[k] = scale * (grad_out[k] * norm_weight[k] - x[k] * scale * mean);
}

inline Kernel kernel() { return {kColumns, &pack_panel, &linear_rows, &rms_norm_backward_row}; }
