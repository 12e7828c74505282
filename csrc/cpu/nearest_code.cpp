#include "nearest_code.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace ncfast::cpu {
namespace {

constexpr int kMaxCandidates = 8;               // more near ties than this, and the row is searched again in double
constexpr int64_t kPanelBlockBytes = 16 << 10;  // half of an L1 cache
constexpr int64_t kRowBlockBytes = 256 << 10;   // a part of an L2 cache
constexpr int64_t kMaxBlockTiles = 28;
constexpr int64_t kSerialPacking = 1 << 15;  // fewer elements are packed in the time it takes to wake a thread

// One codebook, packed in panels of N codes; the last panel is padded with codes that cannot win.
template <class T>
struct Codebook {
  const T* codes;   // [K, D]
  const T* center;  // [D], subtracted from codes and rows; null for none
  T* panels;        // [ceil(K / N), D, N]
  T* bias;          // [ceil(K / N), N]: -|e|²/2, -infinity for a code that cannot win
  int64_t K, D;
  double max_norm;  // largest |e|
  double growth;    // error_growth(D)
};

template <class T>
struct Row {
  T best;
  T margin;                            // 2 eps, infinite where there is no bound
  int64_t count;                       // codes within 2 eps of the best; only the first kMaxCandidates are kept
  int64_t candidates[kMaxCandidates];  // ascending
};

// The functions of one instruction set.
template <class T>
struct Kernel {
  int panel_codes, tile_rows;
  double (*pack_panel)(const Codebook<T>&, int64_t panel);
  void (*score_block)(const Codebook<T>&, const T* z, int64_t M, T* threshold, Row<T>* rows);
  double (*squared_distance)(const T* z, const T* e, int64_t D);
  void (*widen)(const void* from, DType dtype, float* to, int64_t count);
};

template <class T>
bool all_finite(const T* x, int64_t D) {
  for (int64_t d = 0; d < D; ++d) {
    if (!std::isfinite(x[d])) return false;
  }
  return true;
}

template <class T>
double squared_norm(const T* x, const T* center, int64_t D) {
  constexpr int kLanes = 8;
  double sums[kLanes] = {};
  for (int64_t begin = 0; begin < D; begin += kLanes) {
    const int lanes = int(std::min<int64_t>(kLanes, D - begin));
    for (int i = 0; i < lanes; ++i) {
      const double value = center == nullptr ? x[begin + i] : T(x[begin + i] - center[begin + i]);
      sums[i] += value * value;
    }
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

// γ of nearest_code_kernel.h; infinite where so many roundings leave no bound.
template <class T>
double error_growth(int64_t D) {
  const double roundings = double(D + 8) * std::numeric_limits<T>::epsilon() / 2;
  return roundings < 0.5 ? roundings / (1 - roundings) : INFINITY;
}

// 2 eps for a row with this |z|²; infinite when scores may overflow.
template <class T>
inline T score_margin(const Codebook<T>& book, T squared_norm) {
  constexpr double min = std::numeric_limits<T>::min(), max = std::numeric_limits<T>::max();
  const double norm = std::sqrt(double(squared_norm) * (1 + book.growth) + double(book.D) * min);
  const double reach = book.max_norm * (book.max_norm + norm);
  return reach < 0.25 * max ? T(2.001 * (book.growth * reach + double(book.D + 2) * min)) : T(INFINITY);
}

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "nearest_code_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {
namespace {

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

template <class T>
std::unique_ptr<T[], AlignedDelete> aligned_array(int64_t count) {
  return std::unique_ptr<T[], AlignedDelete>(
      static_cast<T*>(::operator new(std::max<int64_t>(1, count) * sizeof(T), std::align_val_t(64))));
}

// The mean of some codes, to subtract from codes and rows, or empty when the codes lie around the origin. Distances do
// not change, but far from the origin |z| |e| dwarfs the differences between scores: every code would be a candidate.
template <class T>
std::vector<T> find_center(const T* codes, int64_t K, int64_t D) {  // codes [K, D]
  const int64_t samples = std::min<int64_t>(K, 64), stride = K / samples;
  std::vector<double> sums(D), squares(D);
  int64_t used = 0;
  for (int64_t sample = 0; sample < samples; ++sample) {
    const T* e = codes + sample * stride * D;
    if (!all_finite(e, D)) continue;
    ++used;
    for (int64_t d = 0; d < D; ++d) {
      sums[d] += double(e[d]);
      squares[d] += double(e[d]) * double(e[d]);
    }
  }
  if (used < 2) return {};
  std::vector<T> center(D);
  double distance = 0, spread = 0;
  for (int64_t d = 0; d < D; ++d) {
    const double mean = sums[d] / double(used);
    center[d] = T(mean);
    distance += mean * mean;
    spread += squares[d] / double(used) - mean * mean;
  }
  if (!(distance < INFINITY) || distance <= 4 * spread) center.clear();
  return center;
}

// Rows [first, first + rows) of z as T: where they lie, or in `scratch`.
template <class T>
const T* rows_as(const Kernel<T>& kernel, const void* z, DType dtype, int64_t first, int64_t rows, int64_t D,
                 T* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype != DType::f32) {
      kernel.widen(static_cast<const uint16_t*>(z) + first * D, dtype, scratch, rows * D);
      return scratch;
    }
  }
  return static_cast<const T*>(z) + first * D;
}

// Decides a row with several candidates among them, and one without a usable list among all codes.
template <class T>
int64_t nearest_of(const Kernel<T>& kernel, const Codebook<T>& book, const T* z, const Row<T>& row) {
  const bool few = row.count >= 1 && row.count <= kMaxCandidates;
  if (!few && !all_finite(z, book.D)) return 0;
  const int64_t count = few ? row.count : book.K;
  int64_t nearest = -1;
  double least = INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t code = few ? row.candidates[i] : i;
    const double distance = kernel.squared_distance(z, book.codes + code * book.D, book.D);
    if (distance < least) {
      least = distance;
      nearest = code;
    }
  }
  return std::max<int64_t>(0, nearest);
}

template <class T>
void nearest_code_as(const void* z, DType dtype, const T* codebook, int64_t H, int64_t M, int64_t K, int64_t D,
                     int threads, int64_t* indices) {
  const Kernel<T> kernel = NCFAST_FOR_ISA(chosen_isa(), kernel<T>());
  const int64_t N = kernel.panel_codes, R = kernel.tile_rows, panels = (K + N - 1) / N;
  // Four tasks a thread even out their speeds.
  const int64_t tiles = (M + R - 1) / R, wanted = (tiles + 4 * threads - 1) / (4 * threads);
  const int64_t fitting = std::min(kMaxBlockTiles, kRowBlockBytes / std::max<int64_t>(1, R * D * int64_t(sizeof(T))));
  const int64_t rows = R * std::max<int64_t>(1, std::min(wanted, fitting)), tasks = (M + rows - 1) / rows;

  const auto packed = aligned_array<T>(panels * N * D), bias = aligned_array<T>(panels * N);
  std::vector<double> largest(panels);
  std::vector<T> copies;
  std::vector<T> thresholds(threads * rows);
  std::vector<Row<T>> states(threads * rows);

  for (int64_t h = 0; h < H; ++h) {
    const T* codes = codebook + h * K * D;
    const std::vector<T> center = find_center(codes, K, D);
    Codebook<T> book{
        codes, center.empty() ? nullptr : center.data(), packed.get(), bias.get(), K, D, 0, error_growth<T>(D)};
    const int packers = K * D < kSerialPacking ? 1 : threads;
    parallel_for(panels, packers, [&](int64_t panel, int) { largest[panel] = kernel.pack_panel(book, panel); });
    book.max_norm = std::sqrt(*std::max_element(largest.begin(), largest.end()));
    const bool half = dtype == DType::f16 || dtype == DType::bf16;
    if (half || book.center != nullptr) copies.resize(threads * rows * D);

    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      T* copy = copies.empty() ? nullptr : copies.data() + thread * rows * D;
      T* threshold = thresholds.data() + thread * rows;
      Row<T>* state = states.data() + thread * rows;
      const int64_t first = h * M + task * rows, count = std::min(rows, M - task * rows);
      const T* block = rows_as(kernel, z, dtype, first, count, D, copy);  // [count, D]
      if (book.center != nullptr) {
        for (int64_t m = 0; m < count; ++m) {
          for (int64_t d = 0; d < D; ++d) copy[m * D + d] = block[m * D + d] - book.center[d];
        }
        block = copy;
      }
      kernel.score_block(book, block, count, threshold, state);
      for (int64_t m = 0; m < count; ++m) {
        int64_t& index = indices[first + m];
        index = state[m].candidates[0];
        if (state[m].count == 1) continue;
        const T* row = rows_as(kernel, z, dtype, first + m, 1, D, copy);  // [D], before centring
        index = nearest_of(kernel, book, row, state[m]);
      }
    });
  }
}

}  // namespace

void nearest_code(const void* z, DType dtype, const void* codebook, int64_t H, int64_t M, int64_t K, int64_t D,
                  int threads, int64_t* indices) {
  if (M == 0) return;
  // A thread costs microseconds to wake: none for less than that many.
  const double work = double(M) * double(K) * double(D + 1);
  threads = std::max(1, std::min(threads, int(std::min(work / 1e5, 1e6))));
  if (dtype == DType::f64) {
    nearest_code_as(z, dtype, static_cast<const double*>(codebook), H, M, K, D, threads, indices);
  } else {
    nearest_code_as(z, dtype, static_cast<const float*>(codebook), H, M, K, D, threads, indices);
  }
}

}  // namespace ncfast::cpu
