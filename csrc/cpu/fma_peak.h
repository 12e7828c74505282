#pragma once

namespace ncfast::cpu {

// The float32 multiply-add rate of `threads` threads, in GFLOP/s: the ceiling that benchmarks compare kernels with. The
// best of the short stretches that fit in `seconds`, with the instruction set that the kernels use.
double fma_peak(int threads, double seconds);

}  // namespace ncfast::cpu
