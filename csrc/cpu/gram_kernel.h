// Included, once for every instruction set, by the kernel file of a loss, which defines these two for its type Loss.
// scalars[s * D] is a column's own scalar s.
inline void standardise_column(const Loss& loss, const GramShape& shape, float* a, float* b, float* scalars,
                               GramSums* sums);  // a, b [N]
inline GramGradient column_gradient(const Loss& loss, const GramShape& shape, int view, const float* scalars,
                                    float gram_dot_own);

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

// R rows by two registers: to[r][.] (+)= sum over k of left[r * row + k * step] right[k][.].
template <int R, bool Add>
inline void multiply_tile(const float* left, int64_t row, int64_t step, const float* right, int64_t right_stride,
                          int64_t count, float* to, int64_t to_stride) {
  using V = Vec<float>;
  constexpr int W = V::width;
  V acc[R][2];
  NCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    acc[r][0] = Add ? V::load(to + r * to_stride) : V::broadcast(0);
    acc[r][1] = Add ? V::load(to + r * to_stride + W) : V::broadcast(0);
  }
  for (int64_t k = 0; k < count; ++k) {
    const V e0 = V::load(right + k * right_stride), e1 = V::load(right + k * right_stride + W);
    NCFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      const V x = V::broadcast(left[r * row + k * step]);
      acc[r][0] = V::multiply_add(x, e0, acc[r][0]);
      acc[r][1] = V::multiply_add(x, e1, acc[r][1]);
    }
  }
  NCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    acc[r][0].store(to + r * to_stride);
    acc[r][1].store(to + r * to_stride + W);
  }
}

template <int R, bool Add>
NCFAST_NOINLINE void multiply_rows(const float* left, int64_t row, int64_t step, const float* right,
                                   int64_t right_stride, int64_t count, int64_t first, int64_t last, float* to,
                                   int64_t to_stride) {
  constexpr int N = 2 * Vec<float>::width;
  for (int64_t n = first; n < last; n += N) {
    multiply_tile<R, Add>(left, row, step, right + n, right_stride, count, to + n, to_stride);
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
  constexpr int R = Vec<float>::tile_rows;
  const int64_t count = last - first, stride = shape.stride;
  const float *own = saved.columns[view] + first * stride, *others = saved.columns[1 - view] + first * stride;
  const float* gram = saved.gram[loss.gram_of_other ? 1 - view : view];
  int64_t i = 0;
  for (; i + R <= count; i += R) {
    multiply_rows<R, false>(own + i * stride, stride, 1, gram, stride, shape.N, 0, shape.padded, scratch + i * stride,
                            stride);
  }
  for (; i + 4 <= count; i += 4) {
    multiply_rows<4, false>(own + i * stride, stride, 1, gram, stride, shape.N, 0, shape.padded, scratch + i * stride,
                            stride);
  }
  for (; i < count; ++i) {
    multiply_rows<1, false>(own + i * stride, stride, 1, gram, stride, shape.N, 0, shape.padded, scratch + i * stride,
                            stride);
  }
  for (i = 0; i < count; ++i) {
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
    for (i = 0; i < count; ++i) {
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
