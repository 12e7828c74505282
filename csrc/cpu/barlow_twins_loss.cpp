#include "barlow_twins_loss.h"

#include <cmath>
#include <cstdint>

#include "gram.h"

namespace ncfast::cpu {
namespace {

struct Loss {
  double lambd, ddof, eps, eps_std, scale;
  static constexpr bool gram_of_other = true;
};

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "barlow_twins_loss_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {

void barlow_twins_loss(const float* za, const float* zb, int64_t N, int64_t D, double lambd, int64_t ddof, double eps,
                       double eps_std, double scale, int threads, float* loss, float* saved) {
  const GramShape shape(N, D);
  const Loss of{lambd, double(ddof), eps, eps_std, scale};
  GramSums sums;
  GramEnergy energy;
  gram_forward(of, NCFAST_FOR_ISA(chosen_isa(), kernel()), shape, za, zb, gram_threads(shape, threads), saved, &sums,
               &energy);
  const double of_diagonal = sums.terms[0], of_rest = energy.ab / (double(N) * double(N)) - sums.terms[1];
  *loss = float(scale * (of_diagonal + lambd * of_rest));
}

void barlow_twins_loss_backward(const float* grad_loss, const float* za, const float* zb, const float* saved, int64_t N,
                                int64_t D, double lambd, int64_t ddof, double eps, double eps_std, double scale,
                                int threads, float* grad_za, float* grad_zb) {
  const GramShape shape(N, D);
  const Loss of{lambd, double(ddof), eps, eps_std, scale};
  gram_backward(of, NCFAST_FOR_ISA(chosen_isa(), kernel()), shape, za, zb, saved, *grad_loss, 0.0f,
                gram_threads(shape, threads), grad_za, grad_zb);
}

}  // namespace ncfast::cpu
