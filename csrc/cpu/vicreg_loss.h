#pragma once

#include <cstdint>

namespace ncfast::cpu {

// The loss of ncfast/ops/vicreg_loss.py, by the N x N route; views float32 [N, D], contiguous, N >= 2.
void vicreg_loss(const float* za, const float* zb, int64_t N, int64_t D, double sim, double var, double cov, double eps,
                 int threads,
                 // outputs
                 float* loss,    // 1
                 float* saved);  // [GramShape(N, D).saved()], for the backward pass

void vicreg_loss_backward(const float* grad_loss,  // 1
                          const float* za, const float* zb,
                          const float* saved,  // as the forward pass left it
                          int64_t N, int64_t D, double sim, double var, double cov, double eps, int threads,
                          // outputs
                          float* grad_za, float* grad_zb);  // [N, D]

}  // namespace ncfast::cpu
