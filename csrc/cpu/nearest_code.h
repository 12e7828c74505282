#pragma once

#include <cstdint>

#include "../dtype.h"

namespace ncfast::cpu {

// For each row of z the index of the code at the smallest float64 distance, lowest index on exact ties; 0 for a row
// that holds a NaN or an infinity. A code that holds one is never chosen while another can be. K >= 1.
void nearest_code(const void* z,         // [H, M, D] of `dtype`, contiguous
                  DType dtype,           //
                  const void* codebook,  // [H, K, D] float32, or float64 when dtype is f64, contiguous
                  int64_t H, int64_t M, int64_t K, int64_t D, int threads,
                  // outputs
                  int64_t* indices);  // [H, M]

}  // namespace ncfast::cpu
