#include "half_kernel.h"

// The sum of some rows of z, in the order given.
template <class T>
void sum_rows(const T* z, const int64_t* rows, int64_t count, int64_t D, T* sum) {  // z [., D], rows [count], sum [D]
  using V = Vec<T>;
  constexpr int W = V::width, kVecs = 4;
  // The rows are known, so they can be on their way before they are needed.
  constexpr int64_t kAhead = 8;
  const V one = V::broadcast(1);
  int64_t d = 0;
  for (; d + kVecs * W <= D; d += kVecs * W) {
    V acc[kVecs];
    NCFAST_UNROLL
    for (int v = 0; v < kVecs; ++v) acc[v] = V::broadcast(0);
    for (int64_t i = 0; i < count; ++i) {
      const T* x = z + rows[i] * D + d;
      if (i + kAhead < count) prefetch(z + rows[i + kAhead] * D + d, kVecs * W * sizeof(T));
      NCFAST_UNROLL
      for (int v = 0; v < kVecs; ++v) acc[v] = V::multiply_add(V::load(x + v * W), one, acc[v]);
    }
    NCFAST_UNROLL
    for (int v = 0; v < kVecs; ++v) acc[v].store(sum + d + v * W);
  }
  for (; d + W <= D; d += W) {
    V acc = V::broadcast(0);
    for (int64_t i = 0; i < count; ++i) acc = V::multiply_add(V::load(z + rows[i] * D + d), one, acc);
    acc.store(sum + d);
  }
  for (; d < D; ++d) {
    T acc = 0;
    for (int64_t i = 0; i < count; ++i) acc += z[rows[i] * D + d];
    sum[d] = acc;
  }
}

inline void sum_half_rows(const void* z, DType dtype, const int64_t* rows, int64_t count, int64_t D, float* row,
                          float* sum) {  // z [., D], rows [count], row [D] scratch, sum [D]
  for (int64_t d = 0; d < D; ++d) sum[d] = 0;
  for (int64_t i = 0; i < count; ++i) {
    widen(static_cast<const uint16_t*>(z) + rows[i] * D, dtype, row, D);
    for (int64_t d = 0; d < D; ++d) sum[d] += row[d];
  }
}

template <class T>
Kernel<T> kernel() {
  return {&sum_rows<T>, &sum_half_rows};
}
