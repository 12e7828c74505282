#include "multiply_kernel.h"

using Register = Vec<float>;

// The keys of a head, packed: the null key first, then those that are not masked. What is left out costs nothing and
// cannot matter, whatever it holds.
struct Keys {
  int64_t count;  // the null key included
  int64_t nulls;  // 0 or 1
  int64_t P;      // count, padded to registers
  int64_t C;      // d, padded to registers
};

inline Keys pack_keys(const Head& head, int32_t* kept) {
  constexpr int W = Register::width;
  int64_t count = 0;
  for (int64_t j = 0; j < head.length; ++j) {
    if (head.key_mask == nullptr || head.key_mask[j]) kept[count++] = int32_t(j);
  }
  const int64_t nulls = head.null_k != nullptr;
  count += nulls;
  return {count, nulls, (count + W - 1) / W * W, (head.d + W - 1) / W * W};
}

// to[0..C) = from[0..d), zeros beyond.
inline void copy_row(const float* from, int64_t d, int64_t C, float* to) {
  constexpr int W = Register::width;
  int64_t c = 0;
  for (; c + W <= d; c += W) Register::load(from + c).store(to + c);
  for (; c < d; ++c) to[c] = from[c];
  for (; c < C; ++c) to[c] = 0;
}

// to[0..d) = factor * from[0..d).
inline void store_row(const float* from, float factor, int64_t d, float* to) {
  constexpr int W = Register::width;
  const Register x = Register::broadcast(factor);
  int64_t c = 0;
  for (; c + W <= d; c += W) Register::multiply(Register::load(from + c), x).store(to + c);
  for (; c < d; ++c) to[c] = factor * from[c];
}

inline void zero_row(int64_t d, float* to) {
  for (int64_t c = 0; c < d; ++c) to[c] = 0;
}

// a · b of padded rows.
inline float dot_row(const float* a, const float* b, int64_t C) {
  Register sum = Register::broadcast(0);
  for (int64_t c = 0; c < C; c += Register::width) {
    sum = Register::multiply_add(Register::load(a + c), Register::load(b + c), sum);
  }
  return sum.sum();
}

inline float norm_of_row(const float* x, int64_t C) { return __builtin_sqrtf(dot_row(x, x, C)); }

inline float inverse_norm(float norm) { return 1 / (norm < kLeastNorm ? kLeastNorm : norm); }

// A padded row becomes row / |row| * scale, where there is a scale.
inline void normalise_row(const float* scale, int64_t d, int64_t C, float* row) {
  if (scale == nullptr) return;
  const float inverse = inverse_norm(norm_of_row(row, C));
  for (int64_t c = 0; c < d; ++c) row[c] = row[c] * inverse * scale[c];
}

// The gradient of a row of q or k, in place of that of its normalised form. Adds to that of the scale.
//   n = x / |x|, y = n scale:   grad_scale += grad_y n,   grad_x = (grad_y scale - n (n · grad_y scale)) / |x|
inline void normalise_row_backward(const float* x, const float* scale, const Head& head, int64_t C, float* rows,
                                   float* grad, float* grad_scale) {
  const int64_t d = head.d;
  float *n = rows, *of_n = rows + C;  // [C] each
  copy_row(x, d, C, n);
  copy_row(grad, d, C, of_n);
  const float norm = norm_of_row(n, C), inverse = inverse_norm(norm);
  for (int64_t c = 0; c < d; ++c) {
    n[c] *= inverse;
    grad_scale[c] += of_n[c] * n[c];
    of_n[c] *= scale[c];
  }
  // A row shorter than the least norm is divided by a constant.
  const float along = norm < kLeastNorm ? 0 : dot_row(n, of_n, C);
  for (int64_t c = 0; c < d; ++c) grad[c] = inverse * (of_n[c] - along * n[c]);
}

// to [P, C] = the packed rows of k or v, normalised if it has a scale; zeros beyond.
inline void pack_rows(const float* from, const float* null_row, const float* scale, const Head& head, const Keys& keys,
                      const int32_t* kept, float* to) {
  for (int64_t j = 0; j < keys.P; ++j) {
    float* row = to + j * keys.C;
    const int64_t key = j - keys.nulls;
    if (j >= keys.count) {
      zero_row(keys.C, row);
      continue;
    }
    copy_row(key < 0 ? null_row : from + kept[key] * head.qkv_stride, head.d, keys.C, row);
    normalise_row(scale, head.d, keys.C, row);
  }
}

// to [C, P] = factor * from [P, C], transposed.
inline void transpose(const float* from, float factor, const Keys& keys, float* to) {
  constexpr int W = Register::width;
  const Register x = Register::broadcast(factor);
  for (int64_t j = 0; j < keys.P; j += W) {
    for (int64_t c = 0; c < keys.C; c += W) {
      Register square[W];
      NCFAST_UNROLL
      for (int i = 0; i < W; ++i) square[i] = Register::load(from + (j + i) * keys.C + c);
      Register::transpose(square);
      NCFAST_UNROLL
      for (int i = 0; i < W; ++i) Register::multiply(square[i], x).store(to + (c + i) * keys.P + j);
    }
  }
}

// 2^x for x <= 0, within 2 units in the last place; 0 below -126.5 and NaN of NaN. A minimax polynomial on what is left
// of x when it is rounded, times a power of two.
inline Register exp2(Register x) {
  const Register shift = Register::broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = Register::max(Register::broadcast(-127.0f), x);
  const Register shifted = Register::add(x, shift);
  const Register r = Register::subtract(x, Register::subtract(shifted, shift));
  Register p = Register::broadcast(0x1.41fbbcp-13f);
  p = Register::multiply_add(p, r, Register::broadcast(0x1.5f3e52p-10f));
  p = Register::multiply_add(p, r, Register::broadcast(0x1.3b2d4cp-7f));
  p = Register::multiply_add(p, r, Register::broadcast(0x1.c6aee8p-5f));
  p = Register::multiply_add(p, r, Register::broadcast(0x1.ebfbdcp-3f));
  p = Register::multiply_add(p, r, Register::broadcast(0x1.62e430p-1f));
  p = Register::multiply_add(p, r, Register::broadcast(1.0f));
  return Register::multiply(p, Register::power_of_two(shifted));
}

// N rows of scores in units of log2 become weights before normalisation; inverse[i] is one over the sum of row i.
// `padding` is 0 for the keys of the last register and -inf for what is beyond. The rows advance side by side, for each
// alone would wait for its own chain of operations.
template <int N>
inline void exponentiate_rows(Register padding, int64_t P, float* rows, float* inverse) {
  constexpr int W = Register::width;
  Register most[N], sum[N];
  NCFAST_UNROLL
  for (int i = 0; i < N; ++i) {
    most[i] = Register::add(Register::load(rows + i * P + P - W), padding);
    most[i].store(rows + i * P + P - W);
  }
  for (int64_t j = 0; j < P - W; j += W) {
    NCFAST_UNROLL
    for (int i = 0; i < N; ++i) most[i] = Register::max(most[i], Register::load(rows + i * P + j));
  }
  NCFAST_UNROLL
  for (int i = 0; i < N; ++i) {
    most[i] = Register::broadcast(most[i].largest());
    sum[i] = Register::broadcast(0);
  }
  for (int64_t j = 0; j < P; j += W) {
    NCFAST_UNROLL
    for (int i = 0; i < N; ++i) {
      const Register weight = exp2(Register::subtract(Register::load(rows + i * P + j), most[i]));
      weight.store(rows + i * P + j);
      sum[i] = Register::add(sum[i], weight);
    }
  }
  NCFAST_UNROLL
  for (int i = 0; i < N; ++i) inverse[i] = 1 / sum[i].sum();
}

inline void exponentiate(Register padding, int64_t count, int64_t P, float* rows, float* inverse) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) exponentiate_rows<4>(padding, P, rows + i * P, inverse + i);
  for (; i < count; ++i) exponentiate_rows<1>(padding, P, rows + i * P, inverse + i);
}

inline Register padding_of(const Keys& keys) {
  constexpr int W = Register::width;
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = keys.P - W + i < keys.count ? 0 : -INFINITY;
  return Register::load(lanes);
}

// Queries worked on together, so that their scores stay in the nearest cache: blocks of about as many rows each.
constexpr int64_t kRows = Register::tile_rows;
static_assert(kRows <= kMostRows);

constexpr float kLog2E = 1.44269504f;

inline void forward_head(const Head& head, const Scratch& scratch, float* out) {
  const Keys keys = pack_keys(head, scratch.kept);
  const int64_t S = head.S, d = head.d, P = keys.P, C = keys.C;
  if (keys.count == 0) {
    for (int64_t i = 0; i < S; ++i) zero_row(d, out + i * head.out_stride);
    return;
  }
  float* k_transposed = scratch.floats;  // [C, P]
  float* values = k_transposed + C * P;  // [P, C]
  float* queries = values + P * C;       // [kRows, C]
  float* weights = queries + kRows * C;  // [kRows, P]
  float* result = weights + kRows * P;   // [kRows, C]
  pack_rows(head.k, head.null_k, head.k_scale, head, keys, scratch.kept, values);
  transpose(values, head.scale * kLog2E, keys, k_transposed);
  pack_rows(head.v, head.null_v, nullptr, head, keys, scratch.kept, values);
  const Register padding = padding_of(keys);
  const int64_t blocks = (S + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = S * block / blocks, rows = S * (block + 1) / blocks - first;
    for (int64_t i = 0; i < rows; ++i) {
      copy_row(head.q + (first + i) * head.qkv_stride, d, C, queries + i * C);
      normalise_row(head.q_scale, d, C, queries + i * C);
    }
    multiply<false>(queries, C, 1, k_transposed, P, d, rows, P, weights, P);
    float inverse[kRows];
    exponentiate(padding, rows, P, weights, inverse);
    multiply<false>(weights, P, 1, values, C, keys.count, rows, C, result, C);
    for (int64_t i = 0; i < rows; ++i) store_row(result + i * C, inverse[i], d, out + (first + i) * head.out_stride);
  }
}

// The gradient of the scores, over their scale, in place of that of the weights; and the weights, normalised.
inline void softmax_backward(float inverse, int64_t P, float* weight, float* grad) {
  constexpr int W = Register::width;
  const Register factor = Register::broadcast(inverse);
  Register sum = Register::broadcast(0);
  for (int64_t j = 0; j < P; j += W) {
    const Register w = Register::multiply(Register::load(weight + j), factor);
    w.store(weight + j);
    sum = Register::multiply_add(w, Register::load(grad + j), sum);
  }
  const Register mean = Register::broadcast(sum.sum());
  for (int64_t j = 0; j < P; j += W) {
    const Register of_score = Register::subtract(Register::load(grad + j), mean);
    Register::multiply(Register::load(weight + j), of_score).store(grad + j);
  }
}

inline void backward_head(const Head& head, const Scratch& scratch, const float* grad_out, float* grad_q, float* grad_k,
                          float* grad_v, const SharedGradients& shared) {
  const Keys keys = pack_keys(head, scratch.kept);
  const int64_t S = head.S, d = head.d, P = keys.P, C = keys.C, stride = head.qkv_stride;
  if (head.q_scale != nullptr) {
    zero_row(d, shared.q_scale);
    zero_row(d, shared.k_scale);
  }
  if (keys.count - keys.nulls < S) {
    for (int64_t j = 0; j < S; ++j) {
      zero_row(d, grad_k + j * stride);
      zero_row(d, grad_v + j * stride);
    }
  }
  if (keys.count == 0) {
    for (int64_t i = 0; i < S; ++i) zero_row(d, grad_q + i * stride);
    return;
  }
  float* k_transposed = scratch.floats;        // [C, P]
  float* v_transposed = k_transposed + C * P;  // [C, P]
  float* k_rows = v_transposed + C * P;        // [P, C]
  float* result = k_rows + P * C;              // [P, C]
  float* q_rows = result + P * C;              // [S, C]
  float* g_rows = q_rows + S * C;              // [S, C]
  float* weights = g_rows + S * C;             // [S, P]
  float* grads = weights + S * P;              // [S, P]: of the weights, then of the scores
  float* block_result = grads + S * P;         // [kRows, C]
  float* row = block_result + kRows * C;       // [2, C]
  pack_rows(head.v, head.null_v, nullptr, head, keys, scratch.kept, result);
  transpose(result, 1, keys, v_transposed);
  pack_rows(head.k, head.null_k, head.k_scale, head, keys, scratch.kept, k_rows);
  transpose(k_rows, head.scale * kLog2E, keys, k_transposed);
  const Register padding = padding_of(keys);
  const int64_t blocks = (S + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = S * block / blocks, rows = S * (block + 1) / blocks - first;
    for (int64_t i = first; i < first + rows; ++i) {
      copy_row(head.q + i * stride, d, C, q_rows + i * C);
      normalise_row(head.q_scale, d, C, q_rows + i * C);
      copy_row(grad_out + i * head.out_stride, d, C, g_rows + i * C);
    }
    float *weight = weights + first * P, *grad = grads + first * P;
    multiply<false>(q_rows + first * C, C, 1, k_transposed, P, d, rows, P, weight, P);
    multiply<false>(g_rows + first * C, C, 1, v_transposed, P, d, rows, P, grad, P);
    float inverse[kRows];
    exponentiate(padding, rows, P, weight, inverse);
    for (int64_t i = 0; i < rows; ++i) softmax_backward(inverse[i], P, weight + i * P, grad + i * P);
    multiply<false>(grad, P, 1, k_rows, C, keys.count, rows, C, block_result, C);
    for (int64_t i = 0; i < rows; ++i) {
      float *of_row = block_result + i * C, *to = grad_q + (first + i) * stride;
      store_row(of_row, head.scale, d, to);
      if (head.q_scale != nullptr) {
        normalise_row_backward(head.q + (first + i) * stride, head.q_scale, head, C, row, to, shared.q_scale);
      }
    }
  }
  multiply<false>(weights, 1, P, g_rows, C, S, keys.count, C, result, C);
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = j - keys.nulls;
    store_row(result + j * C, 1, d, key < 0 ? shared.null_v : grad_v + scratch.kept[key] * stride);
  }
  multiply<false>(grads, 1, P, q_rows, C, S, keys.count, C, result, C);
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t key = j - keys.nulls, at = key < 0 ? 0 : scratch.kept[key] * stride;
    float* to = key < 0 ? shared.null_k : grad_k + at;
    store_row(result + j * C, head.scale, d, to);
    if (head.k_scale != nullptr) {
      normalise_row_backward(key < 0 ? head.null_k : head.k + at, head.k_scale, head, C, row, to, shared.k_scale);
    }
  }
}

inline Kernel kernel() { return {&forward_head, &backward_head}; }
