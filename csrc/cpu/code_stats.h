#pragma once

#include <cstdint>

#include "../dtype.h"

namespace ncfast::cpu {

// For each code the number of its rows and their sum. A row whose index is not in [0, K) counts nowhere. The result
// does not depend on `threads`: a code's rows are summed in order, in blocks of a fixed size.
void code_stats(const void* z,           // [H, M, D] of `dtype`, contiguous
                DType dtype,             //
                const int64_t* indices,  // [H, M]
                int64_t H, int64_t M, int64_t K, int64_t D, int threads,
                // outputs: float, or double when dtype is f64
                void* counts,  // [H, K]
                void* sums);   // [H, K, D]

}  // namespace ncfast::cpu
