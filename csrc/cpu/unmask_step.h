#pragma once

#include <cstdint>

namespace ncfast::cpu {

// One step of iterative decoding, as ncfast/ops/unmask_step.py defines it; all arrays contiguous. Every row is computed
// by one thread, in float64 without fused multiply-adds: the result depends neither on `threads` nor on the
// instruction set.
void unmask_step(const float* logits,         // [B, m, K]
                 const float* unconditional,  // [B, m, K], or null
                 const int64_t* tokens,       // [B, n] in [0, K]; K marks a masked position
                 const int64_t* sample,       // [B]: addresses of the random numbers
                 const int64_t* positions,    // [B, m] ascending, what is not in [0, n) is padding; null: m = n
                 const int64_t* counts,       // [B]: num_masked of each row, or null
                 int64_t B, int64_t m, int64_t n, int64_t K, uint64_t seed, int64_t step, int64_t num_masked,
                 double choice_temperature, double guidance_scale, double temperature,
                 int64_t top_k,  // 0: all codes
                 bool google,    // the convention
                 int64_t width, int threads,
                 // outputs
                 int64_t* out,         // [B, n]
                 int64_t* remaining);  // [B, width]: what is masked in `out`, ascending, filled up with n

}  // namespace ncfast::cpu
