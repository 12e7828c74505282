// With S = Σ / tr Σ, the iteration P' = 1.5 P - 0.5 P³ S, P_0 = I, is computed through W = P² S, W_0 = S:
//     V = 1.5 W - 0.5 W W,   W' = 1.5 V - 0.5 V W,   P' = 1.5 P - 0.5 P W.
// It takes as many products as the printed form, and rounding errors that do not commute with S, which P³ S multiplies
// by up to |P|² a step, grow no faster here than the result itself does.
//
// All of these are polynomials of S, so they are symmetric and commute. Three things follow. A product needs its upper
// triangle only. It can be computed as AᵀB, which reads both operands along their rows. And the gradient of a
// polynomial p(S) is its derivative: for symmetric G, the gradient of <G, p(S)> with respect to S is the change of p(S)
// when S changes by G. So the backward pass walks the same recursion forwards, with a second matrix dW, dV, dP beside
// each, and by the product rule two products for each one: P W changes by dP W + P dW, symmetric again.
//
// A matrix is [d, stride] in rows of whole registers, [stride, stride] in all; what pads it is zero.

namespace {

struct Shape {
  int64_t d, stride;
};

inline Shape shape_of(int64_t d) {
  constexpr int W = Vec<float>::width;
  return {d, (d + W - 1) / W * W};
}

// Rows of a tile two registers wide: enough sums to hide the latency of a multiply-add, and a divisor of all widths.
constexpr int kTileRows = Vec<float>::width > 8 ? 8 : 4;

// Where a product goes, and as what.
enum class As { product, sum, step };
struct Output {
  float* c;
  int64_t stride;
  As as;              // product: c = x; sum: c += x; step: c = 1.5 base - 0.5 x
  const float* base;  // as c
};

// R rows by V registers of Σ AᵀB, or of Σ AB when not `Transposed`, over `num_terms` pairs and K values of the inner
// index: from row `row` of the product and column `column`.
template <int R, int V, bool Transposed>
NCFAST_NOINLINE void product_tile(const Term* terms, int num_terms, int64_t row, int64_t column, int64_t K,
                                  int64_t stride, const Output& output) {
  using Lanes = Vec<float>;
  constexpr int W = Lanes::width;
  Lanes acc[R][V];
  NCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    NCFAST_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = Lanes::broadcast(0);
  }
  for (int term = 0; term < num_terms; ++term) {
    const float* a = terms[term].a + (Transposed ? row : row * stride);
    const float* b = terms[term].b + column;
    for (int64_t k = 0; k < K; ++k) {
      Lanes of_b[V];
      NCFAST_UNROLL
      for (int v = 0; v < V; ++v) of_b[v] = Lanes::load(b + k * stride + v * W);
      NCFAST_UNROLL
      for (int r = 0; r < R; ++r) {
        const Lanes of_a = Lanes::broadcast(Transposed ? a[k * stride + r] : a[r * stride + k]);
        NCFAST_UNROLL
        for (int v = 0; v < V; ++v) acc[r][v] = Lanes::multiply_add(of_a, of_b[v], acc[r][v]);
      }
    }
  }
  const Lanes scale = Lanes::broadcast(output.as == As::step ? -0.5f : 1.0f), of_base = Lanes::broadcast(1.5f);
  NCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    NCFAST_UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t offset = (Transposed ? row + r : r) * output.stride + (Transposed ? column : 0) + v * W;
      Lanes base = Lanes::broadcast(0);
      if (output.as == As::sum) base = Lanes::load(output.c + offset);
      if (output.as == As::step) base = Lanes::multiply_add(Lanes::load(output.base + offset), of_base, base);
      Lanes::multiply_add(acc[r][v], scale, base).store(output.c + offset);
    }
  }
}

// The upper triangle, copied to the lower one.
inline void mirror(int64_t stride, float* c) {  // c [stride, stride]
  constexpr int kStep = 4;
  for (int64_t i = 0; i < stride; i += kStep) {
    for (int a = 0; a < kStep; ++a) {
      for (int b = 0; b < a; ++b) c[(i + a) * stride + i + b] = c[(i + b) * stride + i + a];
    }
    for (int64_t j = i + kStep; j < stride; j += kStep) {
      float block[kStep][kStep];
      NCFAST_UNROLL
      for (int a = 0; a < kStep; ++a) {
        NCFAST_UNROLL
        for (int b = 0; b < kStep; ++b) block[b][a] = c[(i + a) * stride + j + b];
      }
      NCFAST_UNROLL
      for (int b = 0; b < kStep; ++b) {
        NCFAST_UNROLL
        for (int a = 0; a < kStep; ++a) c[(j + b) * stride + i + a] = block[b][a];
      }
    }
  }
}

// The upper triangle of Σ AᵀB, where that is symmetric; a and b [K, stride].
inline void upper_product(Shape shape, const Term* terms, int num_terms, int64_t K, const Output& output) {
  constexpr int W = Vec<float>::width, R = kTileRows;
  static_assert(W % R == 0);
  const int64_t stride = shape.stride;
  for (int64_t column = 0; column < stride; column += 2 * W) {
    const bool pair = column + 2 * W <= stride;
    int64_t row = 0;
    if (pair) {
      for (; row < column + W; row += R) {
        product_tile<R, 2, true>(terms, num_terms, row, column, K, stride, output);
      }
    }
    // What is left of the triangle is one register wide.
    const int64_t last = column + (pair ? W : 0);
    for (; row < last + W; row += W) {
      product_tile<W, 1, true>(terms, num_terms, row, last, K, stride, output);
    }
  }
}

// c = 1.5 a - 0.5 a w, for two matrices that commute.
inline void step(Shape shape, const float* a, const float* w, float* c) {
  const Term term{a, w};
  upper_product(shape, &term, 1, shape.d, {c, shape.stride, As::step, a});
  mirror(shape.stride, c);
}

// c = 1.5 da - 0.5 (da w + a dw): how that changes.
inline void step_change(Shape shape, const float* a, const float* da, const float* w, const float* dw, float* c) {
  const Term terms[2] = {{da, w}, {a, dw}};
  upper_product(shape, terms, 2, shape.d, {c, shape.stride, As::step, da});
  mirror(shape.stride, c);
}

// c = scale (xᵀx), or scale (xᵀg + gᵀx) with g; x and g [N, stride].
inline void gram(Shape shape, const float* x, const float* g, int64_t N, float scale, float* c) {
  for (int64_t n = 0; n < N; n += kBlockRows) {
    const float *rows_of_x = x + n * shape.stride, *rows_of_g = g == nullptr ? nullptr : g + n * shape.stride;
    const Term terms[2] = {{rows_of_x, g == nullptr ? rows_of_x : rows_of_g}, {rows_of_g, rows_of_x}};
    const int64_t K = N - n < kBlockRows ? N - n : kBlockRows;
    upper_product(shape, terms, g == nullptr ? 1 : 2, K, {c, shape.stride, n > 0 ? As::sum : As::product, nullptr});
  }
  for (int64_t i = 0; i < shape.stride * shape.stride; ++i) c[i] *= scale;
  mirror(shape.stride, c);
}

// to = Σ A B over pairs of rows a [., stride] and a matrix b: N rows of d columns, D apart. The rows are padded to
// whole tiles.
inline void multiply_rows(Shape shape, const Term* terms, int num_terms, int64_t N, int64_t D, float* to) {
  constexpr int W = Vec<float>::width, R = kTileRows;
  alignas(64) float tile[R * 2 * W];
  const int64_t stride = shape.stride;
  for (int64_t column = 0; column < stride; column += 2 * W) {
    const bool pair = column + 2 * W <= stride;
    const int64_t columns = shape.d - column < 2 * W ? shape.d - column : 2 * W;
    for (int64_t n = 0; n < N; n += R) {
      const int64_t rows = N - n < R ? N - n : R;
      const bool whole = rows == R && columns == (pair ? 2 * W : W);
      const Output output{whole ? to + n * D + column : tile, whole ? D : 2 * W, As::product, nullptr};
      if (pair) {
        product_tile<R, 2, false>(terms, num_terms, n, column, shape.d, stride, output);
      } else {
        product_tile<R, 1, false>(terms, num_terms, n, column, shape.d, stride, output);
      }
      if (whole) continue;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < columns; ++i) to[(n + r) * D + column + i] = tile[r * 2 * W + i];
      }
    }
  }
}

inline double inner_product(Shape shape, const float* a, const float* b) {
  using Lanes = Vec<float>;
  double total = 0;
  for (int64_t i = 0; i < shape.d; ++i) {
    Lanes sum = Lanes::broadcast(0);
    for (int64_t j = 0; j < shape.stride; j += Lanes::width) {
      sum = Lanes::multiply_add(Lanes::load(a + i * shape.stride + j), Lanes::load(b + i * shape.stride + j), sum);
    }
    total += double(sum.sum());
  }
  return total;
}

inline double trace(Shape shape, const float* a) {
  double sum = 0;
  for (int64_t i = 0; i < shape.d; ++i) sum += double(a[i * shape.stride + i]);
  return sum;
}

// p = 1.5 I - 0.5 w, the first step; or I where no step is made.
inline void first_step(Shape shape, const float* w, bool step, float* p) {
  for (int64_t i = 0; i < shape.d * shape.stride; ++i) p[i] = step ? -0.5f * w[i] : 0;
  for (int64_t i = 0; i < shape.d; ++i) p[i * shape.stride + i] += step ? 1.5f : 1;
}

inline void scaled(Shape shape, const float* a, float scale, float* b) {
  for (int64_t i = 0; i < shape.d * shape.stride; ++i) b[i] = scale * a[i];
}

inline void swap(float*& a, float*& b) {
  float* c = a;
  a = b;
  b = c;
}

// Copies the group's columns of x [N, D] to rows of whole registers: in x they are lines far apart.
inline void copy_rows(Shape shape, const float* x, int64_t N, int64_t D, float* to) {  // to [N, stride]
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = 0; i < shape.d; ++i) to[n * shape.stride + i] = x[n * D + i];
    // Again for every group: the one before may have left a NaN.
    for (int64_t i = shape.d; i < shape.stride; ++i) to[n * shape.stride + i] = 0;
  }
}

// x -= mean, row by row; x [N, stride], mean [stride]
inline void subtract(Shape shape, const float* mean, int64_t N, float* x) {
  for (int64_t n = 0; n < N; ++n) {
    float* row = x + n * shape.stride;
    for (int64_t i = 0; i < shape.stride; ++i) row[i] -= mean[i];
  }
}

inline void mean_of_rows(Shape shape, const float* x, int64_t N, float* mean) {  // x [N, stride], mean [stride]
  for (int64_t i = 0; i < shape.stride; ++i) mean[i] = 0;
  for (int64_t n = 0; n < N; ++n) {
    const float* row = x + n * shape.stride;
    for (int64_t i = 0; i < shape.stride; ++i) mean[i] += row[i];
  }
  const float scale = float(1 / double(N));
  for (int64_t i = 0; i < shape.stride; ++i) mean[i] *= scale;
}

// The rows without their mean, which is left as a sum of two rows: the first is rounded as numbers of its size are, and
// what it misses, the mean of what remains, matters where the mean is large beside the deviations.
inline void centre(Shape shape, int64_t N, float* x, float* mean) {  // x [N, stride], mean [2, stride]
  for (int part = 0; part < 2; ++part) {
    mean_of_rows(shape, x, N, mean + part * shape.stride);
    subtract(shape, mean + part * shape.stride, N, x);
  }
}

// Takes scratch piece by piece.
struct Pieces {
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += floats;
    return piece;
  }
};

inline int64_t padded_rows(int64_t N) { return (N + kTileRows - 1) / kTileRows * kTileRows; }

inline int64_t scratch_floats(const Group& group, bool backward) {
  const int64_t stride = shape_of(group.d).stride, rows = padded_rows(group.N);
  return (backward ? 2 : 1) * rows * stride + 2 * stride + (backward ? 10 : 4) * stride * stride;
}

inline void forward(const Group& group, const float* x, float* scratch, float* y, float* saved) {
  const Shape shape = shape_of(group.d);
  const int64_t N = group.N, D = group.D, d = shape.d, stride = shape.stride;
  Pieces pieces{scratch};
  float* rows = pieces.take(padded_rows(N) * stride);
  float* mean = pieces.take(2 * stride);
  float *w = pieces.take(stride * stride), *v = pieces.take(stride * stride), *p = pieces.take(stride * stride);
  float* next = pieces.take(stride * stride);

  copy_rows(shape, x, N, D, rows);
  centre(shape, N, rows, mean);
  gram(shape, rows, nullptr, N, float(1 / double(N)), w);
  for (int64_t i = 0; i < d; ++i) w[i * stride + i] += float(group.eps);
  copy_rows({d, d}, w, d, stride, saved);
  copy_rows({d, d}, mean, 2, stride, saved + d * d);

  const double total = trace(shape, w);
  scaled(shape, w, float(1 / total), w);
  first_step(shape, w, group.iterations > 0, p);
  for (int64_t k = 1; k < group.iterations; ++k) {
    step(shape, w, w, v);
    step(shape, v, w, next);
    swap(w, next);
    step(shape, p, w, v);
    swap(p, v);
  }
  scaled(shape, p, float(1 / sqrt(total)), p);
  const Term term{rows, p};
  multiply_rows(shape, &term, 1, N, D, y);
}

// With t = tr Σ and H the gradient of S:
//     y = X P / √t            G = (Xᵀg + gᵀX) / 2, the gradient of P / √t
//     S = Σ / t               grad_Σ = H / t + c I,   c = -<G, P> / (2 t √t) - <H, S> / t, the gradient of t
//     Σ = eps I + XᵀX / N     grad_X = g P / √t + 2 X grad_Σ / N
// Centring X needs no step of its own when g is centred: then both terms are.
inline void backward(const Group& group, const float* grad_y, const float* x, const float* saved, float* scratch,
                     float* grad_x) {
  const Shape shape = shape_of(group.d);
  const int64_t N = group.N, D = group.D, d = shape.d, stride = shape.stride;
  Pieces pieces{scratch};
  float *rows = pieces.take(padded_rows(N) * stride), *grad = pieces.take(padded_rows(N) * stride);
  float* mean = pieces.take(2 * stride);
  float *w = pieces.take(stride * stride), *dw = pieces.take(stride * stride);
  float *p = pieces.take(stride * stride), *dp = pieces.take(stride * stride);
  float *v = pieces.take(stride * stride), *dv = pieces.take(stride * stride);
  float *next = pieces.take(stride * stride), *next_dw = pieces.take(stride * stride);
  float *s = pieces.take(stride * stride), *g = pieces.take(stride * stride);

  copy_rows(shape, grad_y, N, D, grad);
  centre(shape, N, grad, mean);
  copy_rows(shape, x, N, D, rows);
  for (int part = 0; part < 2; ++part) {
    copy_rows(shape, saved + d * (d + part), 1, d, mean);
    subtract(shape, mean, N, rows);
  }
  copy_rows(shape, saved, d, d, s);
  const double total = trace(shape, s), inverse_root = 1 / sqrt(total);
  scaled(shape, s, float(1 / total), s);
  gram(shape, rows, grad, N, float(0.5 * inverse_root), g);  // with 1 / √t: the gradient of P

  scaled(shape, s, 1, w);
  scaled(shape, g, 1, dw);
  first_step(shape, w, group.iterations > 0, p);
  scaled(shape, dw, group.iterations > 0 ? -0.5f : 0, dp);
  for (int64_t k = 1; k < group.iterations; ++k) {
    step(shape, w, w, v);
    step_change(shape, w, dw, w, dw, dv);
    step(shape, v, w, next);
    step_change(shape, v, dv, w, dw, next_dw);
    swap(w, next);
    swap(dw, next_dw);
    step_change(shape, p, dp, w, dw, dv);
    step(shape, p, w, v);
    swap(dp, dv);
    swap(p, v);
  }

  // dp is H now. The diagonal is small beside both its parts when y hardly depends on the scale of x: in double.
  const double of_trace = -0.5 * inner_product(shape, g, p) / total - inner_product(shape, dp, s) / total;
  const double factor = 2 / double(N);
  scaled(shape, dp, float(factor / total), dp);
  for (int64_t i = 0; i < d; ++i) dp[i * stride + i] += float(factor * of_trace);
  scaled(shape, p, float(inverse_root), p);
  const Term terms[2] = {{grad, p}, {rows, dp}};
  multiply_rows(shape, terms, 2, N, D, grad_x);
}

inline Kernel kernel() { return {&scratch_floats, &forward, &backward}; }

}  // namespace
