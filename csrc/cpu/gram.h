#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

// What the SSL losses share. Each standardises the columns of both views in its own way, to S_a and S_b, takes the
// energy of their product from the Gram matrices K = S Sᵀ (N x N, see ncfast/ops/gram.py), and has a gradient that is,
// column by column, a combination of K S, S and the other view's S. Columns are kept as rows, [D, stride], so that the
// samples of one lie side by side.
namespace ncfast::cpu {

constexpr int64_t kColumns = 56;  // of a task; four tiles of AVX-512's 14 rows
constexpr int64_t kScalars = 6;   // a loss keeps for each column

struct GramShape {
  int64_t N, D;
  int64_t padded;  // N rounded up to the widest panel; what lies beyond N is zero
  // From column to column, and from row to row of K: 64 bytes more than a power of two, so that neighbours do not fall
  // into the same set of a cache.
  int64_t stride;

  GramShape(int64_t N, int64_t D) : N(N), D(D), padded((N + 31) / 32 * 32), stride(padded + 16) {}
  int64_t columns() const { return D * stride; }
  int64_t gram() const { return padded * stride; }
  int64_t saved() const { return 2 * columns() + 2 * gram() + kScalars * D; }
};

// The parts of `saved`, what a backward pass needs.
struct GramSaved {
  float* columns[2];  // [D, stride] of each view
  float* gram[2];     // [padded, stride] of each view
  float* scalars;     // [kScalars, D]

  GramSaved(float* saved, const GramShape& shape)
      : columns{saved, saved + shape.columns()},
        gram{saved + 2 * shape.columns(), saved + 2 * shape.columns() + shape.gram()},
        scalars{saved + 2 * shape.columns() + 2 * shape.gram()} {}
};

struct GramSums {
  double terms[3] = {0, 0, 0};  // over columns; what they are is up to the loss
};

struct GramEnergy {
  double aa = 0, ab = 0, bb = 0;  // <K_a, K_a>, <K_a, K_b>, <K_b, K_b>
};

// One column's gradient: gram (K S) + own S + other S_other.
struct GramGradient {
  float gram, own, other;
};

// The functions of one instruction set.
template <class Loss>
struct GramKernel {
  void (*standardise)(const Loss&, const GramShape&, const float* za, const float* zb, int64_t first, int64_t last,
                      const GramSaved&, GramSums*);
  void (*add_gram)(const GramShape&, const float* columns, int64_t first, int64_t last, int64_t first_row,
                   int64_t last_row, float* gram);
  void (*gradient)(const Loss&, const GramShape&, int view, int64_t first, int64_t last, const GramSaved&,
                   float grad_loss, float of_difference, const float* z, const float* other, float* scratch,
                   float* grad);
};

// Statistics, both Gram matrices and their products. The division of work depends on the shape alone, and with it
// every order of summation.
template <class Loss>
void gram_forward(const Loss& loss, const GramKernel<Loss>& kernel, const GramShape& shape, const float* za,
                  const float* zb, int threads, float* saved_floats, GramSums* sums, GramEnergy* energy) {
  const GramSaved saved(saved_floats, shape);
  std::fill(saved.scalars, saved.scalars + kScalars * shape.D, 0.0f);  // a loss may use fewer
  const int64_t tasks = (shape.D + kColumns - 1) / kColumns;
  std::vector<GramSums> partial_sums(tasks);
  parallel_for(tasks, threads, [&](int64_t task, int) {
    const int64_t first = task * kColumns, last = std::min(shape.D, first + kColumns);
    kernel.standardise(loss, shape, za, zb, first, last, saved, &partial_sums[task]);
  });
  for (const GramSums& partial : partial_sums) {
    for (int term = 0; term < 3; ++term) sums->terms[term] += partial.terms[term];
  }

  // Blocks of rows of K, and where those are few, groups of columns with a K of their own.
  constexpr int64_t kRows = 128, kTasks = 16;
  const int64_t row_blocks = (shape.padded + kRows - 1) / kRows;
  const int64_t groups = std::max<int64_t>(1, std::min(kTasks / (2 * row_blocks), shape.D / (4 * kColumns)));
  const int64_t group = (shape.D + groups - 1) / groups;
  std::vector<float> partial_grams(2 * (groups - 1) * shape.gram());
  const auto gram_of = [&](int view, int64_t number) {
    return number == 0 ? saved.gram[view] : partial_grams.data() + (2 * (number - 1) + view) * shape.gram();
  };
  parallel_for(2 * groups * row_blocks, threads, [&](int64_t task, int) {
    const int view = int(task % 2);
    const int64_t number = task / 2 % groups, block = task / 2 / groups;
    const int64_t first_row = block * kRows, last_row = std::min(shape.padded, first_row + kRows);
    float* gram = gram_of(view, number);
    std::fill(gram + first_row * shape.stride, gram + last_row * shape.stride, 0.0f);
    kernel.add_gram(shape, saved.columns[view], number * group, std::min(shape.D, (number + 1) * group), first_row,
                    last_row, gram);
  });

  // Only the part right of the diagonal has been made.
  constexpr int64_t kEnergyRows = 16;
  const int64_t bands = shape.padded / kEnergyRows;
  std::vector<GramEnergy> energies(bands);
  parallel_for(bands, threads, [&](int64_t band, int) {
    GramEnergy& of_band = energies[band];
    for (int64_t row = band * kEnergyRows; row < (band + 1) * kEnergyRows; ++row) {
      for (int view = 0; view < 2; ++view) {
        float* to = saved.gram[view] + row * shape.stride;
        for (int64_t number = 1; number < groups; ++number) {
          const float* from = gram_of(view, number) + row * shape.stride;
          for (int64_t n = row; n < shape.padded; ++n) to[n] += from[n];
        }
      }
      const float *a = saved.gram[0] + row * shape.stride, *b = saved.gram[1] + row * shape.stride;
      for (int64_t n = row; n < shape.padded; ++n) {
        const double times = n == row ? 1 : 2;
        of_band.aa += times * a[n] * a[n];
        of_band.ab += times * a[n] * b[n];
        of_band.bb += times * b[n] * b[n];
      }
    }
  });
  for (const GramEnergy& of_band : energies) {
    energy->aa += of_band.aa;
    energy->ab += of_band.ab;
    energy->bb += of_band.bb;
  }
  parallel_for(2 * bands, threads, [&](int64_t task, int) {
    float* gram = saved.gram[task % 2];
    for (int64_t row = task / 2 * kEnergyRows; row < (task / 2 + 1) * kEnergyRows; ++row) {
      for (int64_t n = 0; n < row; ++n) gram[row * shape.stride + n] = gram[n * shape.stride + row];
    }
  });
}

// grad = grad_loss times the gradient of the columns, plus of_difference (z - the other view).
template <class Loss>
void gram_backward(const Loss& loss, const GramKernel<Loss>& kernel, const GramShape& shape, const float* za,
                   const float* zb, const float* saved_floats, float grad_loss, float of_difference, int threads,
                   float* grad_za, float* grad_zb) {
  const GramSaved saved(const_cast<float*>(saved_floats), shape);
  const int64_t chunks = (shape.D + kColumns - 1) / kColumns;
  std::vector<float> scratch(threads * kColumns * shape.stride);
  parallel_for(2 * chunks, threads, [&](int64_t task, int thread) {
    const int view = int(task % 2);
    const int64_t first = task / 2 * kColumns, last = std::min(shape.D, first + kColumns);
    kernel.gradient(loss, shape, view, first, last, saved, grad_loss, of_difference, view == 0 ? za : zb,
                    view == 0 ? zb : za, scratch.data() + thread * kColumns * shape.stride,
                    view == 0 ? grad_za : grad_zb);
  });
}

inline int gram_threads(const GramShape& shape, int threads) {
  // A thread costs microseconds to wake: none for less than that many.
  const double work = double(shape.N) * double(shape.D) * double(shape.N + 16);
  return std::max(1, std::min(threads, int(std::min(work / 4e5, 1e6))));
}

}  // namespace ncfast::cpu
