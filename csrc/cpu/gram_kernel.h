// Included, once for every instruction set, by the kernel file of a loss, which defines these two for its type Loss.
// scalars[s * D] is a column's own scalar s.
inline void standardise_column(const Loss& loss, const GramShape& shape, float* a, float* b, float* scalars,
                               GramSums* sums);  // a, b [N]
inline GramGradient column_gradient(const Loss& loss, const GramShape& shape, int view, const float* scalars,
                                    float gram_dot_own);

#include "multiply_kernel.h"

// columns[i][n] = z[n][first + i], zeros beyond N.
inline void columns_from(const float* z, const GramShape& shape, int64_t first, int64_t last, float* columns) {
  constexpr int64_t kSamples = 8;  // rows of z that are read side by side
  int64_t n = 0;
  for (; n + kSamples <= shape.N; n += kSamples) {
    for (int64_t i = 0; i < last - first; ++i) {
      const float* from = z + n * shape.D + first + i;
      float* to = columns + i * shape.stride + n;
      for (int64_t j = 0; j < kSamples; ++j) to[j] = from[j * shape.D];
    }
  }
  for (int64_t i = 0; i < last - first; ++i) {
    float* to = columns + i * shape.stride;
    for (int64_t j = n; j < shape.N; ++j) to[j] = z[j * shape.D + first + i];
    for (int64_t j = shape.N; j < shape.stride; ++j) to[j] = 0;
  }
}

// In double: the mean of [N], which is then taken off.
inline void center(float* x, int64_t N) {
  double sum = 0;
  for (int64_t n = 0; n < N; ++n) sum += x[n];
  const double mean = sum / double(N);
  for (int64_t n = 0; n < N; ++n) x[n] = float(double(x[n]) - mean);
}

inline double dot(const float* x, const float* y, int64_t N) {
  constexpr int64_t kLanes = 16;
  double sums[kLanes] = {};
  int64_t n = 0;
  for (; n + kLanes <= N; n += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += double(x[n + i]) * double(y[n + i]);
  }
  for (; n < N; ++n) sums[n % kLanes] += double(x[n]) * double(y[n]);
  double sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

inline double squared_difference(const float* x, const float* y, int64_t N) {
  constexpr int64_t kLanes = 16;
  double sums[kLanes] = {};
  for (int64_t n = 0; n < N; ++n) {
    const double difference = double(x[n]) - double(y[n]);
    sums[n % kLanes] += difference * difference;
  }
  double sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

inline void standardise(const Loss& loss, const GramShape& shape, const float* za, const float* zb, int64_t first,
                        int64_t last, const GramSaved& saved, GramSums* sums) {
  float *a = saved.columns[0] + first * shape.stride, *b = saved.columns[1] + first * shape.stride;
  columns_from(za, shape, first, last, a);
  columns_from(zb, shape, first, last, b);
  for (int64_t i = 0; i < last - first; ++i) {
    standardise_column(loss, shape, a + i * shape.stride, b + i * shape.stride, saved.scalars + first + i, sums);
  }
}

// The rows [first_row, last_row) of columnsᵀ columns over the columns [first, last), from the diagonal on.
inline void add_gram(const GramShape& shape, const float* columns, int64_t first, int64_t last, int64_t first_row,
                     int64_t last_row, float* gram) {
  constexpr int R = Vec<float>::tile_rows, N = 2 * Vec<float>::width;
  constexpr int64_t kBytes = 64 << 10;  // columns that stay in a cache while the rows pass
  const int64_t fitting = kBytes / (shape.stride * int64_t(sizeof(float))), step = fitting > 32 ? fitting : 32;
  for (int64_t begin = first; begin < last; begin += step) {
    const int64_t count = last - begin < step ? last - begin : step;
    const float* block = columns + begin * shape.stride;
    int64_t m = first_row;
    for (; m + R <= last_row; m += R) {
      multiply_rows<R, true>(block + m, 1, shape.stride, block, shape.stride, count, m / N * N, shape.padded,
                             gram + m * shape.stride, shape.stride);
    }
    for (; m + 2 <= last_row; m += 2) {
      multiply_rows<2, true>(block + m, 1, shape.stride, block, shape.stride, count, m / N * N, shape.padded,
                             gram + m * shape.stride, shape.stride);
    }
  }
}

inline void gradient(const Loss& loss, const GramShape& shape, int view, int64_t first, int64_t last,
                     const GramSaved& saved, float grad_loss, float of_difference, const float* z, const float* other,
                     float* scratch, float* grad) {
  const int64_t count = last - first, stride = shape.stride;
  const float *own = saved.columns[view] + first * stride, *others = saved.columns[1 - view] + first * stride;
  const float* gram = saved.gram[loss.gram_of_other ? 1 - view : view];
  multiply<false>(own, stride, 1, gram, stride, shape.N, count, shape.padded, scratch, stride);
  for (int64_t i = 0; i < count; ++i) {
    float* product = scratch + i * stride;
    const float *s = own + i * stride, *t = others + i * stride;
    const float along = float(dot(product, s, shape.N));
    const GramGradient of = column_gradient(loss, shape, view, saved.scalars + first + i, along);
    const float of_gram = grad_loss * of.gram, of_own = grad_loss * of.own, of_other = grad_loss * of.other;
    for (int64_t n = 0; n < shape.N; ++n) product[n] = of_gram * product[n] + of_own * s[n] + of_other * t[n];
  }
  constexpr int64_t kSamples = 8;  // rows of grad that are written side by side
  for (int64_t n = 0; n < shape.N; n += kSamples) {
    const int64_t samples = shape.N - n < kSamples ? shape.N - n : kSamples;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = n * shape.D + first + i;
      const float* from = scratch + i * stride + n;
      if (of_difference == 0) {
        for (int64_t j = 0; j < samples; ++j) grad[at + j * shape.D] = from[j];
      } else {
        for (int64_t j = 0; j < samples; ++j) {
          const int64_t to = at + j * shape.D;
          grad[to] = from[j] + of_difference * (z[to] - other[to]);
        }
      }
    }
  }
}

inline GramKernel<Loss> kernel() { return {&standardise, &add_gram, &gradient}; }
