// Scores are z·e - |e|²/2, largest for the nearest code: the accumulators start at -|e|²/2. Codes are packed in panels
// of two registers, so a tile is `tile_rows` rows by one panel, and K x D is read once a block of rows.
//
// What makes the answer exact. Let u be the unit roundoff of T, and s the exact score of the inputs. Rounding the D
// products and D sums (a fused multiply-add rounds once, so it is covered), |e|²/2 (summed in double, also where T is
// double), the subtraction of `center` from both operands, and the threshold itself perturb a score by at most
//     eps = γ |e|max (|e|max + |z|) + (D + 2) min,   γ = (D + 8) u / (1 - (D + 8) u),   min the smallest normal number.
// So every code that may be the nearest scores within 2 eps of the best computed score. Those are kept as candidates,
// and distances in double decide among them.

#include "half_kernel.h"

// -|e|²/2 for each code of one panel, and its codes transposed. Returns the largest |e|², infinite on overflow.
template <class T>
double pack_panel(const Codebook<T>& book, int64_t panel) {
  constexpr int N = 2 * Vec<T>::width;
  const int64_t D = book.D;
  T* packed = book.panels + panel * D * N;  // [D, N]
  T* bias = book.bias + panel * N;          // [N]
  double largest = 0;
  bool used[N];
  for (int n = 0; n < N; ++n) {
    const int64_t code = panel * N + n;
    used[n] = false;
    bias[n] = -INFINITY;
    if (code >= book.K) continue;
    const T* e = book.codes + code * D;  // [D]
    const double norm = squared_norm(e, book.center, D);
    used[n] = norm < INFINITY;
    if (used[n]) bias[n] = T(-0.5 * norm);
    if (norm > largest || (!used[n] && all_finite(e, D))) largest = used[n] ? norm : INFINITY;
  }
  // Step by step through D, so that the lines of a panel stay in cache while all codes write to them.
  constexpr int64_t kStep = 16;
  for (int64_t begin = 0; begin < D; begin += kStep) {
    const int64_t end = begin + kStep < D ? begin + kStep : D;
    for (int n = 0; n < N; ++n) {
      if (!used[n]) {
        for (int64_t d = begin; d < end; ++d) packed[d * N + n] = 0;
        continue;
      }
      const T* e = book.codes + (panel * N + n) * D;  // [D]
      if (book.center == nullptr) {
        for (int64_t d = begin; d < end; ++d) packed[d * N + n] = e[d];
      } else {
        for (int64_t d = begin; d < end; ++d) packed[d * N + n] = e[d] - book.center[d];
      }
    }
  }
  return largest;
}

template <class T>
inline uint32_t lanes_at_least(const T* scores, T threshold) {  // scores [N]
  constexpr int W = Vec<T>::width;
  return Vec<T>::load(scores).lanes_at_least(threshold) | Vec<T>::load(scores + W).lanes_at_least(threshold) << W;
}

// Takes in a row's scores of some panels, 32 at most; codes below `threshold` = best - 2 eps are out.
template <class T>
NCFAST_NOINLINE void update(Row<T>& row, T& threshold, const T* scores, int panels, int64_t first_code) {
  using V = Vec<T>;
  constexpr int N = 2 * V::width;
  V highest = V::load(scores);
  for (int i = V::width; i < panels * N; i += V::width) highest = V::max(highest, V::load(scores + i));
  const T best = highest.largest();
  if (best > row.best) {
    threshold = best - row.margin;
    if (!(row.best >= threshold)) row.count = 0;
    row.best = best;
  }
  // Most often one code in one panel is left: no branch depends on which.
  uint32_t hits = 0;
  for (int panel = 0; panel < panels; ++panel) {
    const T* of_panel = scores + panel * N;
    hits |= uint32_t(V::any_at_least(V::load(of_panel), V::load(of_panel + V::width), threshold)) << panel;
  }
  for (; hits != 0; hits &= hits - 1) {
    const int first = lowest_bit(hits) * N;
    for (uint32_t lanes = lanes_at_least<T>(scores + first, threshold); lanes != 0; lanes &= lanes - 1) {
      if (row.count < kMaxCandidates) row.candidates[row.count] = first_code + first + lowest_bit(lanes);
      ++row.count;
    }
  }
}

// The scores of R rows and one panel; `scores` holds those of row r from scores + r * stride on. With `Filter`, rows
// that reach their threshold nowhere are left out, and the others are set in the mask returned.
template <class T, int R, bool Filter>
inline uint32_t score_tile(const T* z, int64_t D, const T* panel, const T* bias, const T* threshold, T* scores,
                           int stride) {
  using V = Vec<T>;
  constexpr int W = V::width;
  const V bias0 = V::load(bias), bias1 = V::load(bias + W);
  V acc[R][2];
  NCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    acc[r][0] = bias0;
    acc[r][1] = bias1;
  }
  for (int64_t d = 0; d < D; ++d) {
    const V e0 = V::load(panel + d * 2 * W), e1 = V::load(panel + d * 2 * W + W);
    NCFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      const V x = V::broadcast(z[r * D + d]);
      acc[r][0] = V::multiply_add(x, e0, acc[r][0]);
      acc[r][1] = V::multiply_add(x, e1, acc[r][1]);
    }
  }
  uint32_t hits = 0;
  NCFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    if (!Filter || V::any_at_least(acc[r][0], acc[r][1], threshold[r])) {
      acc[r][0].store(scores + r * stride);
      acc[r][1].store(scores + r * stride + W);
      hits |= 1u << r;
    }
  }
  return hits;
}

template <class T, int R, bool Filter>
NCFAST_NOINLINE uint32_t call_score_tile(const T* z, int64_t D, const T* panel, const T* bias, const T* threshold,
                                         T* scores, int stride) {
  return score_tile<T, R, Filter>(z, D, panel, bias, threshold, scores, stride);
}

// R rows and the panels [begin, end), begin < end.
template <class T, int R>
void score_panels(const Codebook<T>& book, int64_t begin, int64_t end, const T* z, T* threshold, Row<T>* rows) {
  constexpr int N = 2 * Vec<T>::width;
  // A row's best grows often among the first codes and rarely later: take those in at once, then branch.
  constexpr int kFirstPanels = 8, kFirstCodes = kFirstPanels * N;
  // Where D is 8 a call costs a few percent; tiles of many rows lose about as much by being inlined.
  constexpr bool kCall = Vec<T>::tile_rows > 8;
  constexpr auto take = kCall ? &call_score_tile<T, R, false> : &score_tile<T, R, false>;
  constexpr auto filter = kCall ? &call_score_tile<T, R, true> : &score_tile<T, R, true>;
  alignas(64) T scores[R * kFirstCodes];
  int64_t panel = begin;
  if (panel == 0) {
    do {
      take(z, book.D, book.panels + panel * book.D * N, book.bias + panel * N, threshold, scores + panel * N,
           kFirstCodes);
    } while (++panel < end && panel < kFirstPanels);
    for (int r = 0; r < R; ++r) update(rows[r], threshold[r], scores + r * kFirstCodes, int(panel), 0);
  }
  for (; panel < end; ++panel) {
    uint32_t hits = filter(z, book.D, book.panels + panel * book.D * N, book.bias + panel * N, threshold, scores, N);
    for (; hits != 0; hits &= hits - 1) {
      const int r = lowest_bit(hits);
      update(rows[r], threshold[r], scores + r * N, 1, panel * N);
    }
  }
}

template <class T>
inline T sum_of_squares(const T* x, int64_t D) {  // x [D]
  using V = Vec<T>;
  V squares = V::broadcast(0);
  int64_t d = 0;
  for (; d + V::width <= D; d += V::width) squares = V::multiply_add(V::load(x + d), V::load(x + d), squares);
  T sum = squares.sum();
  for (; d < D; ++d) sum += x[d] * x[d];
  return sum;
}

// The best score and the candidates of every row of a block.
template <class T>
void score_block(const Codebook<T>& book, const T* z, int64_t M, T* threshold, Row<T>* rows) {  // z [M, D]
  constexpr int W = Vec<T>::width, R = Vec<T>::tile_rows;
  constexpr T lowest = -std::numeric_limits<T>::max();
  const int64_t D = book.D, panels = (book.K + 2 * W - 1) / (2 * W);
  for (int64_t m = 0; m < M; ++m) {
    rows[m].margin = score_margin(book, sum_of_squares(z + m * D, D));
    rows[m].count = 0;
    // A row without a usable bound gathers no candidates: NaN compares false with everything. Nor does padding become
    // one, at -infinity: a threshold is never less than -max.
    const bool bounded = rows[m].margin < INFINITY;
    rows[m].best = bounded ? T(-INFINITY) : T(NAN);
    threshold[m] = bounded ? lowest : T(NAN);
  }
  // A block of panels stays in the L1 cache while all rows pass over it.
  const int64_t panel_bytes = int64_t(sizeof(T)) * 2 * W * (D + 1);
  const int64_t step = panel_bytes < kPanelBlockBytes ? kPanelBlockBytes / panel_bytes : 1;
  for (int64_t begin = 0; begin < panels; begin += step) {
    const int64_t end = begin + step < panels ? begin + step : panels;
    int64_t m = 0;
    for (; m + R <= M; m += R) score_panels<T, R>(book, begin, end, z + m * D, threshold + m, rows + m);
    for (; m + 4 <= M; m += 4) score_panels<T, 4>(book, begin, end, z + m * D, threshold + m, rows + m);
    for (; m < M; ++m) score_panels<T, 1>(book, begin, end, z + m * D, threshold + m, rows + m);
  }
}

// |z - e|² in double; one order of summation and one copy of the code, so that equal codes give equal distances.
template <class T>
NCFAST_NOINLINE double squared_distance(const T* z, const T* e, int64_t D) {  // z [D], e [D]
  constexpr int kLanes = 16;
  double sums[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const double difference = double(z[d + i]) - double(e[d + i]);
      sums[i] += difference * difference;
    }
  }
  for (; d < D; ++d) {
    const double difference = double(z[d]) - double(e[d]);
    sums[d % kLanes] += difference * difference;
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

template <class T>
Kernel<T> kernel() {
  return {2 * Vec<T>::width, Vec<T>::tile_rows, &pack_panel<T>, &score_block<T>, &squared_distance<T>, &widen};
}
