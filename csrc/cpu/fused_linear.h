#pragma once

#include <cstdint>

namespace ncfast::cpu {

// y = act(norm(x) Wᵀ + b) + residual. norm divides each row by its root mean square and multiplies it by norm_weight;
// act is the exact GELU. Each element is one chain of multiply-adds over K in the order of K, so a row of y does not
// depend on how many rows there are, on its place among them or on the number of threads.
void fused_linear(const float* x,            // [M, K], contiguous
                  const float* weight,       // [N, K], contiguous
                  const float* bias,         // [N], or null
                  const float* norm_weight,  // [K], or null: no norm
                  const float* residual,     // [M, N], contiguous, or null
                  int64_t M, int64_t N, int64_t K, double norm_eps, bool gelu, int threads,
                  // outputs
                  float* y,     // [M, N]
                  float* pre);  // [M, N], what the GELU was taken of, or null

// The gradient of norm(x), and norm(x) itself, in one pass. The sums over rows are made of blocks in their order.
void rms_norm_backward(const float* grad_out,     // [M, K], contiguous
                       const float* x,            // [M, K], contiguous
                       const float* norm_weight,  // [K]
                       int64_t M, int64_t K, double norm_eps, int threads,
                       // outputs
                       float* grad_x,            // [M, K]
                       float* grad_norm_weight,  // [K]
                       float* normalised);       // [M, K]

}  // namespace ncfast::cpu
