#include "gram_kernel.h"

// Scalars of a column: for each view, what its variance and the hinge give to the gradient.
inline void standardise_column(const Loss& loss, const GramShape& shape, float* a, float* b, float* scalars,
                               GramSums* sums) {
  sums->terms[0] += squared_difference(a, b, shape.N);
  const double degrees = double(shape.N - 1), D = double(shape.D);
  float* views[2] = {a, b};
  for (int view = 0; view < 2; ++view) {
    float* x = views[view];
    center(x, shape.N);
    const double variance = dot(x, x, shape.N) / degrees, std = std::sqrt(variance + loss.eps);
    const bool hinged = std < 1;
    sums->terms[1] += hinged ? 1 - std : 0;
    sums->terms[2] += variance * variance;
    const double of_hinge = hinged && std > 0 ? loss.var / (D * degrees * std) : 0;
    scalars[view * shape.D] = float(-4 * loss.cov / D * variance / degrees - of_hinge);
  }
}

inline GramGradient column_gradient(const Loss& loss, const GramShape& shape, int view, const float* scalars,
                                    float gram_dot_own) {
  (void)gram_dot_own;
  const double degrees = double(shape.N - 1);
  return {float(4 * loss.cov / (double(shape.D) * degrees * degrees)), scalars[view * shape.D], 0};
}
