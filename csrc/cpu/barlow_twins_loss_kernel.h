#include "gram_kernel.h"

// Scalars of a column: C_ii, then for each view 1/s and what the deviation's own gradient takes off.
inline void standardise_column(const Loss& loss, const GramShape& shape, float* a, float* b, float* scalars,
                               GramSums* sums) {
  float* views[2] = {a, b};
  for (int view = 0; view < 2; ++view) {
    float* x = views[view];
    center(x, shape.N);
    const double std = std::sqrt(dot(x, x, shape.N) / double(shape.N - loss.ddof) + loss.eps), s = std + loss.eps_std;
    const float inverse = float(1 / s);
    for (int64_t n = 0; n < shape.N; ++n) x[n] *= inverse;
    scalars[(1 + 2 * view) * shape.D] = inverse;
    scalars[(2 + 2 * view) * shape.D] = std > 0 ? float(s / (double(shape.N - loss.ddof) * std)) : 0.0f;
  }
  const double c = dot(a, b, shape.N) / double(shape.N);
  scalars[0] = float(c);
  sums->terms[0] += (1 - c) * (1 - c);
  sums->terms[1] += c * c;
}

inline GramGradient column_gradient(const Loss& loss, const GramShape& shape, int view, const float* scalars,
                                    float gram_dot_own) {
  const double c = scalars[0], inverse = scalars[(1 + 2 * view) * shape.D], own = scalars[(2 + 2 * view) * shape.D];
  const double N = double(shape.N), of_gram = loss.scale * 2 * loss.lambd / (N * N);
  const double of_diagonal = loss.scale * (-2 * (1 - c) - 2 * loss.lambd * c) / N;
  const double along = of_gram * gram_dot_own + of_diagonal * N * c;
  return {float(inverse * of_gram), float(-inverse * own * along), float(inverse * of_diagonal)};
}
