#include "iter_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace ncfast::cpu {
namespace {

// Rows of x that one accumulator of the covariance takes; more are added up block by block, which rounds less.
constexpr int64_t kBlockRows = 256;

struct Group {
  int64_t N, D, d, iterations;
  double eps;
};

// One product of a sum of products.
struct Term {
  const float* a;
  const float* b;
};

// The functions of one instruction set, each with its need of scratch in floats.
struct Kernel {
  int64_t (*scratch)(const Group& group, bool backward);
  void (*forward)(const Group& group, const float* x, float* scratch, float* y, float* saved);
  void (*backward)(const Group& group, const float* grad_y, const float* x, const float* saved, float* scratch,
                   float* grad_x);
};

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "iter_norm_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {
namespace {

int threads_for(const Group& group, int64_t groups, int threads) {
  // A thread costs microseconds to wake: none for less than that many.
  const double d = double(group.d), steps = double(std::max<int64_t>(group.iterations, 1));
  const double work = double(groups) * d * d * (2 * double(group.N) + 3 * d * steps);
  return std::max(1, std::min(threads, int(std::min({work / 2e5, double(groups), 1e6}))));
}

// One zeroed piece of scratch for each thread, on lines of its own.
class Scratch {
 public:
  Scratch(int64_t floats, int threads)
      : step_((floats + kLine - 1) / kLine * kLine), memory_(size_t(threads * step_ + kLine)) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    first_ = memory_.data() + (kLine * sizeof(float) - address % (kLine * sizeof(float))) / sizeof(float) % kLine;
  }
  float* of(int thread) { return first_ + thread * step_; }

 private:
  static constexpr int64_t kLine = 16;
  int64_t step_;
  std::vector<float> memory_;
  float* first_;
};

}  // namespace

void iter_norm(const float* x, int64_t N, int64_t D, int64_t groups, int64_t iterations, double eps, int threads,
               float* y, float* saved) {
  if (N == 0 || D == 0) return;
  const Group group{N, D, D / groups, iterations, eps};
  const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
  threads = threads_for(group, groups, threads);
  Scratch scratch(kernel.scratch(group, false), threads);
  parallel_for(groups, threads, [&](int64_t g, int thread) {
    kernel.forward(group, x + g * group.d, scratch.of(thread), y + g * group.d, saved + g * group.d * (group.d + 2));
  });
}

void iter_norm_backward(const float* grad_y, const float* x, const float* saved, int64_t N, int64_t D, int64_t groups,
                        int64_t iterations, int threads, float* grad_x) {
  if (N == 0 || D == 0) return;
  const Group group{N, D, D / groups, iterations, 0};
  const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
  threads = threads_for(group, groups, threads);
  Scratch scratch(kernel.scratch(group, true), threads);
  parallel_for(groups, threads, [&](int64_t g, int thread) {
    kernel.backward(group, grad_y + g * group.d, x + g * group.d, saved + g * group.d * (group.d + 2),
                    scratch.of(thread), grad_x + g * group.d);
  });
}

}  // namespace ncfast::cpu
