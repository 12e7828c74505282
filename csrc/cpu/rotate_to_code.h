#pragma once

#include <cstdint>

#include "../dtype.h"

namespace ncfast::cpu {

// q = codebook[indices] in the type of z, zeros where an index is not in [0, K), and the mean of (z - q)² over the
// other rows. Sums run over blocks of rows of a fixed size: the result does not depend on `threads`.
void rotate_to_code(const void* z,           // [H, M, D] of `dtype`, contiguous
                    DType dtype,             //
                    const void* codebook,    // [H, K, D] float, or double when dtype is f64, contiguous
                    const int64_t* indices,  // [H, M]
                    int64_t H, int64_t M, int64_t K, int64_t D, int threads,
                    // outputs; loss and inverse_count are float, or double when dtype is f64
                    void* q,               // [H, M, D] of `dtype`
                    void* loss,            // 1
                    void* inverse_count);  // 1: one over the number of elements in the mean; 0 when there is none

// The gradient of z: of q, through the rotation (or straight through), plus that of the loss.
void rotate_to_code_backward(const void* grad_q,         // [H, M, D] of `dtype`, contiguous
                             const void* grad_loss,      // 1, as loss
                             const void* z,              // [H, M, D] of `dtype`, contiguous
                             const void* q,              // [H, M, D] of `dtype`, contiguous
                             const int64_t* indices,     // [H, M]
                             const void* inverse_count,  // 1
                             DType dtype, int64_t rows, int64_t K, int64_t D, bool rotate, int threads,
                             // output
                             void* grad_z);  // [H, M, D] of `dtype`

}  // namespace ncfast::cpu
