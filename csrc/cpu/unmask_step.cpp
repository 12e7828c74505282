#include "unmask_step.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "../philox.h"
#include "isa.h"
#include "parallel.h"

namespace ncfast::cpu {
namespace {

constexpr int64_t kLanes = 16;  // padding of the codes
constexpr int64_t kScan = 64;   // codes that the search for the drawn one passes at once

// The functions of one instruction set.
struct Kernel {
  double (*make_scores)(const float* c, const float* u, double guidance_scale, double temperature, int64_t K,
                        int64_t padded, double* scores);
  double (*exponentiate)(double* scores, double top, double scale, int64_t padded);
  int64_t (*find_code)(const double* weights, double threshold, int64_t padded);
};

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "unmask_step_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {
namespace {

// A position that is drawn in this step.
struct Drawn {
  double confidence;
  int64_t position;
};

bool less_confident(const Drawn& a, const Drawn& b) {
  return a.confidence < b.confidence || (a.confidence == b.confidence && a.position < b.position);
}

// Sums of K integers up to it are exact.
double weight_scale(int64_t K) {
  int bits = 1;
  while (int64_t(1) << bits < K) ++bits;
  return std::ldexp(1.0, 53 - bits);
}

// All but the `top_k` highest scores become -infinity; of equal ones the first stay.
void keep_highest(double* scores, int64_t K, int64_t top_k, double* scratch) {
  std::copy(scores, scores + K, scratch);
  std::nth_element(scratch, scratch + top_k - 1, scratch + K, std::greater<double>());
  const double last = scratch[top_k - 1];
  int64_t room = top_k - std::count_if(scores, scores + K, [&](double score) { return score > last; });
  for (int64_t k = 0; k < K; ++k) {
    if (scores[k] > last || (scores[k] == last && room-- > 0)) continue;
    scores[k] = -INFINITY;
  }
}

}  // namespace

void unmask_step(const float* logits, const float* unconditional, const int64_t* tokens, const int64_t* sample,
                 const int64_t* positions, const int64_t* counts, int64_t B, int64_t m, int64_t n, int64_t K,
                 uint64_t seed, int64_t step, int64_t num_masked, double choice_temperature, double guidance_scale,
                 double temperature, int64_t top_k, bool google, int64_t width, int threads, int64_t* out,
                 int64_t* remaining) {
  const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
  const int64_t padded = (K + kLanes - 1) / kLanes * kLanes;
  const double scale = weight_scale(K);
  // A thread costs microseconds to wake: none for less than that many.
  threads = std::max(1, std::min(threads, int(std::min(double(B) * double(m) * double(K + 64) / 2e4, 1e6))));
  std::vector<double> scratch(2 * padded * threads);
  std::vector<Drawn> drawn_scratch(m * threads);

  parallel_for(B, threads, [&](int64_t row, int thread) {
    double* scores = scratch.data() + 2 * padded * thread;
    Drawn* drawn = drawn_scratch.data() + m * thread;
    const int64_t* before = tokens + row * n;
    int64_t *after = out + row * n, *masked = remaining + row * width, num_drawn = 0;
    const int64_t wanted = counts == nullptr ? num_masked : counts[row];
    std::copy(before, before + n, after);
    for (int64_t j = 0; j < m; ++j) {
      const int64_t position = positions == nullptr ? j : positions[row * m + j];
      if (position < 0 || position >= n || before[position] != K) continue;
      const int64_t at = (row * m + j) * K;
      const double top = kernel.make_scores(logits + at, unconditional == nullptr ? nullptr : unconditional + at,
                                            guidance_scale, temperature, K, padded, scores);
      const bool sound = std::isfinite(top);
      int64_t code = 0;
      double probability = 0;
      if (sound) {
        if (0 < top_k && top_k < K) keep_highest(scores, K, top_k, scores + padded);
        const double total = kernel.exponentiate(scores, top, scale, padded);
        const double u = philox::uniform(seed, sample[row], step, position, philox::Stream::tokens);
        code = kernel.find_code(scores, u * total, padded);
        probability = scores[code] / total;
      }
      after[position] = code;
      double confidence = -INFINITY;
      if (sound && wanted > 0) {
        confidence = std::log(google ? probability : probability + 1e-5);
        if (choice_temperature != 0) {
          // 1 - u is exact, so its logarithm is as good as log1p(-u).
          const double u = philox::uniform(seed, sample[row], step, position, philox::Stream::confidence);
          confidence += choice_temperature * -std::log(-std::log(1 - u));
        }
      }
      drawn[num_drawn++] = {confidence, position};
    }

    int64_t again = std::min(std::max<int64_t>(wanted, 0), num_drawn);
    if (google && wanted > 0) {
      again = std::min(std::max<int64_t>(std::min(wanted, num_drawn - 1), 1), num_drawn);
    }
    if (again > 0 && again < num_drawn) {
      std::nth_element(drawn, drawn + again, drawn + num_drawn, less_confident);
    }
    for (int64_t i = 0; i < again; ++i) {
      // Those as confident as the threshold are not below it.
      if (google && again < num_drawn && drawn[i].confidence == drawn[again].confidence) continue;
      after[drawn[i].position] = K;
    }
    int64_t count = 0;
    for (int64_t position = 0; position < n && count < width; ++position) {
      if (after[position] == K) masked[count++] = position;
    }
    std::fill(masked + count, masked + width, n);
  });
}

}  // namespace ncfast::cpu
