#include "fma_peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

#define NCFAST_KERNEL "fma_peak_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {

double fma_peak(int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const Isa isa = chosen_isa();
  threads = std::max(1, threads);
  std::vector<double> rates(threads);
  parallel_for(threads, threads, [&](int64_t task, int) {
    constexpr int64_t kRounds = 1 << 18;  // about a millisecond
    float sink = 0;
    const Clock::time_point start = Clock::now();
    for (Clock::time_point before = start; std::chrono::duration<double>(before - start).count() < seconds;) {
      const double operations = NCFAST_FOR_ISA(isa, multiply_adds(kRounds, &sink));
      const Clock::time_point after = Clock::now();
      rates[task] = std::max(rates[task], operations / std::chrono::duration<double>(after - before).count());
      before = after;
    }
    volatile float used = sink;
    (void)used;
  });
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum * 1e-9;
}

}  // namespace ncfast::cpu
