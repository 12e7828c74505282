#include "fused_linear.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace ncfast::cpu {
namespace {

constexpr int64_t kRowsPerTask = 56;  // a multiple of every instruction set's tile but AVX2's

struct Linear {
  const float *x, *weight, *bias, *norm_weight, *residual;
  int64_t M, N, K;
  float norm_eps;
  bool gelu;
  float *y, *pre;
};

// The functions of one instruction set.
struct Kernel {
  int64_t columns;  // of a panel
  void (*pack_panel)(const Linear&, int64_t p, float* panel);
  void (*linear_rows)(const Linear&, const float* panels, int64_t begin, int64_t end);
  void (*rms_norm_backward_row)(const float* grad_out, const float* x, const float* norm_weight, int64_t K, float eps,
                                float* grad_x, float* grad_norm_weight, float* normalised);
};

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "fused_linear_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {

void fused_linear(const float* x, const float* weight, const float* bias, const float* norm_weight,
                  const float* residual, int64_t M, int64_t N, int64_t K, double norm_eps, bool gelu, int threads,
                  float* y, float* pre) {
  if (M * N == 0) return;
  const Linear layer{x, weight, bias, norm_weight, residual, M, N, K, float(norm_eps), gelu, y, pre};
  const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
  // A thread costs microseconds to wake: none for less than that many.
  const double work = double(M) * double(N) * double(K);
  threads = std::max(1, std::min(threads, int(std::min(work / 2e5, 1e6))));
  const int64_t num_panels = (N + kernel.columns - 1) / kernel.columns;
  const std::unique_ptr<float[]> panels(new float[num_panels * kernel.columns * K]);
  parallel_for(num_panels, threads,
               [&](int64_t p, int) { kernel.pack_panel(layer, p, panels.get() + p * kernel.columns * K); });
  // Fewer rows a task where there are too few for all threads.
  const int64_t rows = std::min(kRowsPerTask, std::max<int64_t>(1, (M + threads - 1) / threads));
  parallel_for((M + rows - 1) / rows, threads, [&](int64_t task, int) {
    kernel.linear_rows(layer, panels.get(), task * rows, std::min(M, (task + 1) * rows));
  });
}

void rms_norm_backward(const float* grad_out, const float* x, const float* norm_weight, int64_t M, int64_t K,
                       double norm_eps, int threads, float* grad_x, float* grad_norm_weight, float* normalised) {
  const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
  constexpr int64_t kRows = 256;
  const int64_t blocks = (M + kRows - 1) / kRows;
  threads = std::max(1, std::min(threads, int(std::min(double(M) * double(K) / 2e4, 1e6))));
  const std::unique_ptr<float[]> partial(new float[blocks * K]());  // [blocks, K]
  parallel_for(blocks, threads, [&](int64_t block, int) {
    for (int64_t row = block * kRows; row < std::min(M, (block + 1) * kRows); ++row) {
      kernel.rms_norm_backward_row(grad_out + row * K, x + row * K, norm_weight, K, float(norm_eps), grad_x + row * K,
                                   partial.get() + block * K, normalised + row * K);
    }
  });
  for (int64_t k = 0; k < K; ++k) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partial[block * K + k];
    grad_norm_weight[k] = float(sum);
  }
}

}  // namespace ncfast::cpu
