// scores [padded] = u + s (c - u) over temperature, -infinity beyond K. Returns the largest, or NaN if one is NaN.
inline double make_scores(const float* c, const float* u, double guidance_scale, double temperature, int64_t K,
                          int64_t padded, double* scores) {
  if (u == nullptr) {
    for (int64_t k = 0; k < K; ++k) scores[k] = c[k];
  } else {
    for (int64_t k = 0; k < K; ++k) {
      const double with = c[k], without = u[k], mixed = without + guidance_scale * (with - without);
      scores[k] = with == without ? with : mixed;  // -infinity on both sides is no NaN
    }
  }
  if (temperature != 1) {
    for (int64_t k = 0; k < K; ++k) scores[k] /= temperature;
  }
  for (int64_t k = K; k < padded; ++k) scores[k] = -INFINITY;
  // Lane by lane, so that the maximum is not one long chain.
  double highest[kLanes], most = -INFINITY;
  int64_t unsound = 0, nans[kLanes] = {};
  for (int64_t lane = 0; lane < kLanes; ++lane) highest[lane] = -INFINITY;
  for (int64_t k = 0; k < padded; k += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double score = scores[k + lane];
      highest[lane] = score > highest[lane] ? score : highest[lane];
      nans[lane] |= score != score;
    }
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    most = highest[lane] > most ? highest[lane] : most;
    unsound |= nans[lane];
  }
  return unsound ? NAN : most;
}

// To the nearest integer, ties to even, for 0 <= x <= 2^52.
inline double rounded(double x) {
  constexpr double kInteger = 0x1p52;
  return (x + kInteger) - kInteger;
}

// scale exp(score - top) in place, and the sum of what they round to. Cody and Waite's reduction and Taylor's
// polynomial of degree 13, whose remainder is below 2^-57; what is below exp(-40) rounds to zero anyway.
// ncfast/ops/triton/unmask_step.py repeats it operation by operation: change both.
inline double exponentiate(double* scores, double top, double scale, int64_t padded) {
  constexpr double kRound = 0x1.8p52;
  double sums[kLanes] = {};
  for (int64_t begin = 0; begin < padded; begin += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double difference = scores[begin + lane] - top, x = difference > -40.0 ? difference : -40.0;
      const double shifted = x * 0x1.71547652b82fep+0 + kRound, n = shifted - kRound;
      const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
      double p = 1.0 / 6227020800.0;
      p = p * r + 1.0 / 479001600.0;
      p = p * r + 1.0 / 39916800.0;
      p = p * r + 1.0 / 3628800.0;
      p = p * r + 1.0 / 362880.0;
      p = p * r + 1.0 / 40320.0;
      p = p * r + 1.0 / 5040.0;
      p = p * r + 1.0 / 720.0;
      p = p * r + 1.0 / 120.0;
      p = p * r + 1.0 / 24.0;
      p = p * r + 1.0 / 6.0;
      p = p * r + 0.5;
      p = p * r + 1.0;
      p = p * r + 1.0;
      // n stands in the low bits of `shifted`; what is above them leaves at the top.
      uint64_t bits;
      __builtin_memcpy(&bits, &shifted, sizeof(double));
      bits = (bits + 1023) << 52;
      double power;
      __builtin_memcpy(&power, &bits, sizeof(double));
      const double weight = p * (power * scale);
      scores[begin + lane] = weight;
      sums[lane] += rounded(weight);
    }
  }
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// The first k whose rounded weights up to and with it sum to more than `threshold`, which is below their total.
inline int64_t find_code(const double* weights, double threshold, int64_t padded) {
  double before = 0;
  int64_t k = 0;
  for (; k + kScan < padded; k += kScan) {
    double sums[kLanes] = {}, sum = before;
    for (int64_t i = k; i < k + kScan; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += rounded(weights[i + lane]);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    if (sum > threshold) break;
    before = sum;
  }
  while ((before += rounded(weights[k])) <= threshold) ++k;
  return k;
}

inline Kernel kernel() { return {&make_scores, &exponentiate, &find_code}; }
