#pragma once

#include <cstdint>

namespace ncfast::cpu {

// The loss of ncfast/ops/barlow_twins_loss.py, by the N x N route; views float32 [N, D], contiguous, N >= 2.
void barlow_twins_loss(const float* za, const float* zb, int64_t N, int64_t D, double lambd, int64_t ddof, double eps,
                       double eps_std, double scale, int threads,
                       // outputs
                       float* loss,    // 1
                       float* saved);  // [GramShape(N, D).saved()], for the backward pass

void barlow_twins_loss_backward(const float* grad_loss,  // 1
                                const float* za, const float* zb,
                                const float* saved,  // as the forward pass left it
                                int64_t N, int64_t D, double lambd, int64_t ddof, double eps, double eps_std,
                                double scale, int threads,
                                // outputs
                                float* grad_za, float* grad_zb);  // [N, D]

}  // namespace ncfast::cpu
