#include "rotate_to_code.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace ncfast::cpu {
namespace {

constexpr int64_t kBlockRows = 128;

// The functions of one instruction set.
template <class T>
struct Kernel {
  T (*squared_error)(const T* z, const T* q, int64_t D);
  void (*gradient_row)(const T* g, const T* z, const T* q, int64_t D, bool rotate, T commitment, T* grad_z);
  void (*widen)(const void* from, DType dtype, float* to, int64_t count);
  void (*narrow)(const float* from, DType dtype, void* to, int64_t count);
};

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "rotate_to_code_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {
namespace {

int threads_for(int64_t rows, int64_t D, int threads) {
  // A thread costs microseconds to wake: none for less than that many.
  return std::max(1, std::min(threads, int(std::min(double(rows) * double(D) / 3e4, 1e6))));
}

bool is_half(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16; }

// Row `row` of an array [., D]: where it lies, or widened into `scratch` [D].
template <class T>
const T* row_as(const Kernel<T>& kernel, const void* array, DType dtype, int64_t row, int64_t D, T* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    if (is_half(dtype)) {
      kernel.widen(static_cast<const uint16_t*>(array) + row * D, dtype, scratch, D);
      return scratch;
    }
  }
  return static_cast<const T*>(array) + row * D;
}

template <class T>
void forward_as(const void* z, DType dtype, const T* codebook, const int64_t* indices, int64_t H, int64_t M, int64_t K,
                int64_t D, int threads, void* q, T* loss, T* inverse_count) {
  const Kernel<T> kernel = NCFAST_FOR_ISA(chosen_isa(), kernel<T>());
  const int64_t rows = H * M, blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t element = is_half(dtype) ? 2 : sizeof(T);
  std::vector<T> scratch(is_half(dtype) ? 2 * threads * D : 0);
  std::vector<double> errors(blocks);
  std::vector<int64_t> counts(blocks);

  parallel_for(blocks, threads, [&](int64_t block, int thread) {
    T* row_z = scratch.data() + 2 * thread * D;
    double error = 0;
    int64_t count = 0;
    for (int64_t row = block * kBlockRows; row < std::min(rows, (block + 1) * kBlockRows); ++row) {
      char* to = static_cast<char*>(q) + row * D * element;
      const int64_t index = indices[row];
      if (index < 0 || index >= K) {
        std::fill_n(to, D * element, char(0));  // memset takes no null pointer, not even for no bytes
        continue;
      }
      const T* code = codebook + (row / M * K + index) * D;
      if constexpr (std::is_same_v<T, float>) {
        if (is_half(dtype)) {
          kernel.narrow(code, dtype, to, D);
          code = row_as(kernel, to, dtype, 0, D, row_z + D);
        }
      }
      if (!is_half(dtype)) std::copy_n(reinterpret_cast<const char*>(code), D * element, to);
      error += kernel.squared_error(row_as(kernel, z, dtype, row, D, row_z), code, D);
      ++count;
    }
    errors[block] = error;
    counts[block] = count;
  });

  double error = 0;
  int64_t count = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    error += errors[block];
    count += counts[block];
  }
  const double inverse = count * D > 0 ? 1.0 / (double(count) * double(D)) : 0.0;
  *loss = T(error * inverse);
  *inverse_count = T(inverse);
}

template <class T>
void backward_as(const void* grad_q, T grad_loss, const void* z, const void* q, const int64_t* indices, T inverse_count,
                 DType dtype, int64_t rows, int64_t K, int64_t D, bool rotate, int threads, void* grad_z) {
  const Kernel<T> kernel = NCFAST_FOR_ISA(chosen_isa(), kernel<T>());
  const int64_t element = is_half(dtype) ? 2 : sizeof(T);
  const T commitment = 2 * grad_loss * inverse_count;
  std::vector<T> scratch(is_half(dtype) ? 4 * threads * D : 0);

  parallel_for((rows + kBlockRows - 1) / kBlockRows, threads, [&](int64_t block, int thread) {
    T* buffer = scratch.data() + 4 * thread * D;  // [4, D]
    for (int64_t row = block * kBlockRows; row < std::min(rows, (block + 1) * kBlockRows); ++row) {
      char* to = static_cast<char*>(grad_z) + row * D * element;
      if (indices[row] < 0 || indices[row] >= K) {
        std::fill_n(to, D * element, char(0));
        continue;
      }
      const T* g = row_as(kernel, grad_q, dtype, row, D, buffer);
      const T* x = row_as(kernel, z, dtype, row, D, buffer + D);
      const T* code = row_as(kernel, q, dtype, row, D, buffer + 2 * D);
      if constexpr (std::is_same_v<T, float>) {
        if (is_half(dtype)) {
          kernel.gradient_row(g, x, code, D, rotate, commitment, buffer + 3 * D);
          kernel.narrow(buffer + 3 * D, dtype, to, D);
          continue;
        }
      }
      kernel.gradient_row(g, x, code, D, rotate, commitment, reinterpret_cast<T*>(to));
    }
  });
}

}  // namespace

void rotate_to_code(const void* z, DType dtype, const void* codebook, const int64_t* indices, int64_t H, int64_t M,
                    int64_t K, int64_t D, int threads, void* q, void* loss, void* inverse_count) {
  threads = threads_for(H * M, D, threads);
  if (dtype == DType::f64) {
    forward_as(z, dtype, static_cast<const double*>(codebook), indices, H, M, K, D, threads, q,
               static_cast<double*>(loss), static_cast<double*>(inverse_count));
  } else {
    forward_as(z, dtype, static_cast<const float*>(codebook), indices, H, M, K, D, threads, q,
               static_cast<float*>(loss), static_cast<float*>(inverse_count));
  }
}

void rotate_to_code_backward(const void* grad_q, const void* grad_loss, const void* z, const void* q,
                             const int64_t* indices, const void* inverse_count, DType dtype, int64_t rows, int64_t K,
                             int64_t D, bool rotate, int threads, void* grad_z) {
  threads = threads_for(rows, D, threads);
  if (dtype == DType::f64) {
    backward_as(grad_q, *static_cast<const double*>(grad_loss), z, q, indices,
                *static_cast<const double*>(inverse_count), dtype, rows, K, D, rotate, threads, grad_z);
  } else {
    backward_as(grad_q, *static_cast<const float*>(grad_loss), z, q, indices, *static_cast<const float*>(inverse_count),
                dtype, rows, K, D, rotate, threads, grad_z);
  }
}

}  // namespace ncfast::cpu
