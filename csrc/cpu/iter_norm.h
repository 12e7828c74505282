#pragma once

#include <cstdint>

namespace ncfast::cpu {

// Iterative whitening (arXiv 1904.03441, algorithm 1) of each group of d = D / groups columns. The result does not
// depend on `threads`: one thread computes a group from beginning to end.
void iter_norm(const float* x,  // [N, D], contiguous
               int64_t N, int64_t D, int64_t groups, int64_t iterations, double eps, int threads,
               // outputs
               float* y,       // [N, D]
               float* saved);  // [groups, d + 2, d]: per group the covariance, and the mean as a sum of two rows

// The gradient of x from that of y. The iteration is computed again from the covariance rather than read back: that is
// a quarter of the work here, and 3 `iterations` matrices a group would leave the caches in between.
void iter_norm_backward(const float* grad_y,  // [N, D], contiguous
                        const float* x,       // [N, D], contiguous
                        const float* saved,   // [groups, d + 2, d]
                        int64_t N, int64_t D, int64_t groups, int64_t iterations, int threads,
                        // output
                        float* grad_x);  // [N, D]

}  // namespace ncfast::cpu
