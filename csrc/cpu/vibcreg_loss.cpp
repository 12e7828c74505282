#include "vibcreg_loss.h"

#include <cmath>
#include <cstdint>

#include "gram.h"

namespace ncfast::cpu {
namespace {

struct Loss {
  double var, cov, eps;
  static constexpr bool gram_of_other = false;
};

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "vibcreg_loss_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {

void vibcreg_loss(const float* za, const float* zb, int64_t N, int64_t D, double sim, double var, double cov,
                  double eps, int threads, float* loss, float* saved) {
  const GramShape shape(N, D);
  const Loss of{var, cov, eps};
  GramSums sums;
  GramEnergy energy;
  gram_forward(of, NCFAST_FOR_ISA(chosen_isa(), kernel()), shape, za, zb, gram_threads(shape, threads), saved, &sums,
               &energy);
  const double off_diagonal = energy.aa + energy.bb - sums.terms[2];
  *loss = float(sim * sums.terms[0] / (double(N) * double(D)) + var * sums.terms[1] / double(D) +
                cov * off_diagonal / (double(D) * double(D)));
}

void vibcreg_loss_backward(const float* grad_loss, const float* za, const float* zb, const float* saved, int64_t N,
                           int64_t D, double sim, double var, double cov, double eps, int threads, float* grad_za,
                           float* grad_zb) {
  const GramShape shape(N, D);
  const Loss of{var, cov, eps};
  gram_backward(of, NCFAST_FOR_ISA(chosen_isa(), kernel()), shape, za, zb, saved, *grad_loss,
                float(*grad_loss * 2 * sim / (double(N) * double(D))), gram_threads(shape, threads), grad_za, grad_zb);
}

}  // namespace ncfast::cpu
