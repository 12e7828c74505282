// Small matrix products in registers: to[r][n] (+)= sum over k of left[r * row + k * step] right[k * right_stride + n].

// R rows by V registers.
template <int R, int V, bool Add>
inline void multiply_tile(const float* left, int64_t row, int64_t step, const float* right, int64_t right_stride,
                          int64_t count, float* to, int64_t to_stride) {
  using Register = Vec<float>;
  constexpr int W = Register::width;
  Register acc[R][V];
  NCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    NCFAST_UNROLL
    for (int v = 0; v < V; ++v) {
      acc[r][v] = Add ? Register::load(to + r * to_stride + v * W) : Register::broadcast(0);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    Register e[V];
    NCFAST_UNROLL
    for (int v = 0; v < V; ++v) e[v] = Register::load(right + k * right_stride + v * W);
    NCFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      const Register x = Register::broadcast(left[r * row + k * step]);
      NCFAST_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = Register::multiply_add(x, e[v], acc[r][v]);
    }
  }
  NCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    NCFAST_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v].store(to + r * to_stride + v * W);
  }
}

template <int R, bool Add>
NCFAST_NOINLINE void multiply_rows(const float* left, int64_t row, int64_t step, const float* right,
                                   int64_t right_stride, int64_t count, int64_t first, int64_t last, float* to,
                                   int64_t to_stride) {
  constexpr int W = Vec<float>::width;
  int64_t n = first;
  for (; n + 2 * W <= last; n += 2 * W) {
    multiply_tile<R, 2, Add>(left, row, step, right + n, right_stride, count, to + n, to_stride);
  }
  for (; n < last; n += W) {
    multiply_tile<R, 1, Add>(left, row, step, right + n, right_stride, count, to + n, to_stride);
  }
}

// multiply_rows for a number of rows that is known at run time, 1 to R.
template <int R, bool Add>
inline void multiply_up_to(int64_t rows, const float* left, int64_t row, int64_t step, const float* right,
                           int64_t right_stride, int64_t count, int64_t columns, float* to, int64_t to_stride) {
  if constexpr (R > 1) {
    if (rows < R) {
      multiply_up_to<R - 1, Add>(rows, left, row, step, right, right_stride, count, columns, to, to_stride);
      return;
    }
  }
  multiply_rows<R, Add>(left, row, step, right, right_stride, count, 0, columns, to, to_stride);
}

// `rows` rows and the columns [0, columns), a multiple of the register's width. The rows are shared out evenly: a tile
// of a few rows takes as long as one of twice as many.
template <bool Add>
inline void multiply(const float* left, int64_t row, int64_t step, const float* right, int64_t right_stride,
                     int64_t count, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  constexpr int R = Vec<float>::tile_rows;
  const int64_t tiles = (rows + R - 1) / R;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t r = rows * tile / tiles, next = rows * (tile + 1) / tiles;
    multiply_up_to<R, Add>(next - r, left + r * row, row, step, right, right_stride, count, columns, to + r * to_stride,
                           to_stride);
  }
}
