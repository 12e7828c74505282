#pragma once

#include <cfenv>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ncfast::cpu {

// Round to nearest, subnormals kept, whatever the caller's thread has set (torch.set_flush_denormal): error bounds and
// ties must not depend on it.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

// body(task, thread) for every task in [0, tasks), handed out one by one. `body` must not throw.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
#pragma omp parallel num_threads(threads)
    {
      DefaultFloatEnvironment environment;
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
    }
    return;
  }
#endif
  (void)threads;
  DefaultFloatEnvironment environment;
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace ncfast::cpu
