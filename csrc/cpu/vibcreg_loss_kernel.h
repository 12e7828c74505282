#include "gram_kernel.h"

constexpr double kLeastNorm = 1e-12;  // a shorter column is divided by this, as torch.nn.functional.normalize does

// Scalars of a column: for each view 1/|c|, the squared norm of c/|c|, and what the hinge gives to the gradient.
inline void standardise_column(const Loss& loss, const GramShape& shape, float* a, float* b, float* scalars,
                               GramSums* sums) {
  sums->terms[0] += squared_difference(a, b, shape.N);
  const double degrees = double(shape.N - 1);
  float* views[2] = {a, b};
  for (int view = 0; view < 2; ++view) {
    float* x = views[view];
    center(x, shape.N);
    const double square = dot(x, x, shape.N), norm = std::sqrt(square), floor = norm > kLeastNorm ? norm : kLeastNorm;
    const double std = std::sqrt(square / degrees + loss.eps);
    const bool hinged = std < 1;
    sums->terms[1] += hinged ? 1 - std : 0;
    for (int64_t n = 0; n < shape.N; ++n) x[n] = float(x[n] / floor);
    const double diagonal = dot(x, x, shape.N);
    sums->terms[2] += diagonal * diagonal;
    const double of_hinge = hinged && std > 0 ? loss.var / (double(shape.D) * degrees * std) : 0;
    scalars[3 * view * shape.D] = float(1 / floor);
    scalars[(3 * view + 1) * shape.D] = float(diagonal);
    scalars[(3 * view + 2) * shape.D] = float(-of_hinge * floor);
  }
}

inline GramGradient column_gradient(const Loss& loss, const GramShape& shape, int view, const float* scalars,
                                    float gram_dot_own) {
  const double inverse = scalars[3 * view * shape.D], diagonal = scalars[(3 * view + 1) * shape.D];
  const double of_gram = 4 * loss.cov / (double(shape.D) * double(shape.D)) * inverse;
  // A normalised column moves only across itself, and the diagonal's gradient, which lies along it, drops out.
  const bool normalised = diagonal > 0.5;
  const double along = normalised ? gram_dot_own / diagonal : diagonal;
  return {float(of_gram), float(scalars[(3 * view + 2) * shape.D] - of_gram * along), 0};
}
