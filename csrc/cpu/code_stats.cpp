#include "code_stats.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace ncfast::cpu {
namespace {

constexpr int64_t kBlockRows = 256;  // summed in one accumulator; more rows are summed block by block
constexpr int64_t kTaskRows = 512;

// The functions of one instruction set.
template <class T>
struct Kernel {
  void (*sum_rows)(const T* z, const int64_t* rows, int64_t count, int64_t D, T* sum);
  void (*sum_half_rows)(const void* z, DType dtype, const int64_t* rows, int64_t count, int64_t D, float* row,
                        float* sum);
};

inline void prefetch(const void* address, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(address) + byte);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "code_stats_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {
namespace {

// Some neighbouring codes with at most kBlockRows rows each, or one block of a code with more.
struct Task {
  int64_t first_code, last_code;  // [first_code, last_code); several codes
  int64_t block;                  // or the block of first_code; -1 for several codes
};

template <class T>
void code_stats_as(const void* z, DType dtype, const int64_t* indices, int64_t H, int64_t M, int64_t K, int64_t D,
                   int threads, T* counts, T* sums) {
  const Kernel<T> kernel = NCFAST_FOR_ISA(chosen_isa(), kernel<T>());
  const bool half = dtype == DType::f16 || dtype == DType::bf16;
  std::vector<T> scratch(half ? threads * D : 0);
  std::vector<int64_t> first(K + 1), next(K), order(M), first_block(K);
  std::vector<Task> tasks;
  std::vector<T> blocks;  // [., D]: the sums of the blocks of codes with several

  for (int64_t h = 0; h < H; ++h) {
    const int64_t* index = indices + h * M;
    const char* rows_of_z = static_cast<const char*>(z) + h * M * D * (half ? 2 : sizeof(T));

    // The rows sorted by code, in order within each: code k has order[first[k]] to order[first[k + 1]].
    std::fill(first.begin(), first.end(), 0);
    for (int64_t m = 0; m < M; ++m) {
      if (index[m] >= 0 && index[m] < K) ++first[index[m] + 1];
    }
    for (int64_t k = 0; k < K; ++k) {
      counts[h * K + k] = T(first[k + 1]);
      first[k + 1] += first[k];
      next[k] = first[k];
    }
    for (int64_t m = 0; m < M; ++m) {
      if (index[m] >= 0 && index[m] < K) order[next[index[m]]++] = m;
    }

    tasks.clear();
    int64_t num_blocks = 0;
    for (int64_t k = 0; k < K;) {
      const int64_t count = first[k + 1] - first[k];
      if (count > kBlockRows) {
        first_block[k] = num_blocks;
        for (int64_t begin = 0, block = 0; begin < count; begin += kBlockRows, ++block) {
          tasks.push_back({k, k + 1, block});
          ++num_blocks;
        }
        ++k;
        continue;
      }
      // An unused code costs about a row: it is set to zero.
      const int64_t begin = k;
      for (int64_t work = 0; k < K && first[k + 1] - first[k] <= kBlockRows && work < kTaskRows; ++k) {
        work += 1 + first[k + 1] - first[k];
      }
      tasks.push_back({begin, k, -1});
    }
    blocks.resize(num_blocks * D);

    const auto sum = [&](const int64_t* rows, int64_t count, T* to, int thread) {
      if constexpr (std::is_same_v<T, float>) {
        if (half) {
          kernel.sum_half_rows(rows_of_z, dtype, rows, count, D, scratch.data() + thread * D, to);
          return;
        }
      }
      kernel.sum_rows(reinterpret_cast<const T*>(rows_of_z), rows, count, D, to);
    };
    parallel_for(int64_t(tasks.size()), threads, [&](int64_t number, int thread) {
      const Task task = tasks[number];
      if (task.block >= 0) {
        const int64_t begin = first[task.first_code] + task.block * kBlockRows;
        const int64_t count = std::min(kBlockRows, first[task.last_code] - begin);
        sum(&order[begin], count, blocks.data() + (first_block[task.first_code] + task.block) * D, thread);
        return;
      }
      for (int64_t k = task.first_code; k < task.last_code; ++k) {
        T* to = sums + (h * K + k) * D;
        const int64_t count = first[k + 1] - first[k];
        if (count == 0) {
          std::fill(to, to + D, T(0));
        } else {
          sum(&order[first[k]], count, to, thread);
        }
      }
    });

    if (num_blocks == 0) continue;
    std::vector<double> total(D);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t count = first[k + 1] - first[k];
      if (count <= kBlockRows) continue;
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t block = 0; block * kBlockRows < count; ++block) {
        const T* from = blocks.data() + (first_block[k] + block) * D;
        for (int64_t d = 0; d < D; ++d) total[d] += from[d];
      }
      for (int64_t d = 0; d < D; ++d) sums[(h * K + k) * D + d] = T(total[d]);
    }
  }
}

}  // namespace

void code_stats(const void* z, DType dtype, const int64_t* indices, int64_t H, int64_t M, int64_t K, int64_t D,
                int threads, void* counts, void* sums) {
  // A thread costs microseconds to wake: none for less than that many.
  const double work = double(M + K) * double(D + 1);
  threads = std::max(1, std::min(threads, int(std::min(work / 5e4, 1e6))));
  if (dtype == DType::f64) {
    code_stats_as(z, dtype, indices, H, M, K, D, threads, static_cast<double*>(counts), static_cast<double*>(sums));
  } else {
    code_stats_as(z, dtype, indices, H, M, K, D, threads, static_cast<float*>(counts), static_cast<float*>(sums));
  }
}

}  // namespace ncfast::cpu
