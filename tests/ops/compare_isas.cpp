// Every C++ kernel by every instruction set of the machine against the portable one, without Python: what runs for
// another processor under an emulator. Prints a checksum of each result that has the same bits on every machine.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cpu/barlow_twins_loss.h"
#include "cpu/code_stats.h"
#include "cpu/fma_peak.h"
#include "cpu/fused_linear.h"
#include "cpu/gram.h"
#include "cpu/isa.h"
#include "cpu/iter_norm.h"
#include "cpu/masked_attention.h"
#include "cpu/nearest_code.h"
#include "cpu/rotate_to_code.h"
#include "cpu/unmask_step.h"
#include "cpu/vibcreg_loss.h"
#include "cpu/vicreg_loss.h"
#include "dtype.h"

#define NCFAST_KERNEL "half_kernel.h"
#include "cpu/foreach_isa.h"

using namespace ncfast;
using namespace ncfast::cpu;

namespace {

constexpr double kExact = 0;
constexpr int kThreads = 2;
int failures = 0;

struct Random {
  uint64_t state = 1;
  uint32_t next() { return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 33); }
  double uniform() { return (next() + 0.5) / 2147483648.0; }
  double normal() { return uniform() + uniform() + uniform() + uniform() - 2; }
  int64_t below(int64_t limit) { return int64_t(next()) % limit; }
} generator;

std::vector<float> randn(int64_t count) {
  std::vector<float> x(count);
  for (float& value : x) value = float(generator.normal());
  return x;
}

std::vector<int64_t> randint(int64_t low, int64_t high, int64_t count) {
  std::vector<int64_t> x(count);
  for (int64_t& value : x) value = low + generator.below(high - low);
  return x;
}

// Elements of any type, and as numbers.
struct Array {
  DType dtype;
  std::vector<uint8_t> bytes;

  static int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  // Full of NaN: an element left unwritten shows.
  Array(DType dtype, int64_t count) : dtype(dtype), bytes(count * size_of(dtype), 0xff) {}
  Array(DType dtype, const std::vector<float>& x) : Array(dtype, int64_t(x.size())) {
    if (dtype == DType::f32) std::memcpy(bytes.data(), x.data(), bytes.size());
    for (size_t i = 0; dtype == DType::f64 && i < x.size(); ++i) {
      const double value = x[i];
      std::memcpy(bytes.data() + 8 * i, &value, 8);
    }
    if (size_of(dtype) == 2) portable::narrow(x.data(), dtype, bytes.data(), int64_t(x.size()));
  }
  void* data() { return bytes.data(); }
  std::vector<double> numbers() const {
    const size_t count = bytes.size() / size_of(dtype);
    if (dtype == DType::f64) {
      std::vector<double> x(count);
      std::memcpy(x.data(), bytes.data(), bytes.size());
      return x;
    }
    std::vector<float> x(count);
    if (dtype == DType::f32) std::memcpy(x.data(), bytes.data(), bytes.size());
    if (size_of(dtype) == 2) portable::widen(bytes.data(), dtype, x.data(), int64_t(count));
    return std::vector<double>(x.begin(), x.end());
  }
};

// One after the other, as numbers.
using Results = std::vector<std::vector<double>>;
template <class T>
std::vector<double> numbers(const std::vector<T>& x) {
  return std::vector<double>(x.begin(), x.end());
}

uint64_t checksum(uint64_t hash, const std::vector<double>& x) {
  for (const double value : x) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}

// Of each result the largest difference by its largest number; NaN must stand where it stands.
double difference(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 1e-30, most = 0;
  for (const double value : b) largest = std::isfinite(value) ? std::max(largest, std::abs(value)) : largest;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]))) continue;
    const double off = std::abs(a[i] - b[i]) / largest;
    most = off >= most ? off : off < most ? most : INFINITY;
  }
  return most;
}

uint64_t family_checksum = 14695981039346656037u;

void compare(const std::string& name, double tolerance, const std::function<Results()>& call) {
  setenv("NCFAST_ISA", "portable", 1);
  const Results expected = call();
  for (const std::vector<double>& result : expected) family_checksum = checksum(family_checksum, result);
  for (const std::string& isa : available_isas()) {
    setenv("NCFAST_ISA", isa.c_str(), 1);
    const Results results = call();
    for (size_t i = 0; i < results.size(); ++i) {
      const double off = difference(results[i], expected[i]);
      if (off <= tolerance) continue;
      std::printf("%s: result %zu of %s differs from portable by %.1e; at most %.1e\n", name.c_str(), i, isa.c_str(),
                  off, tolerance);
      ++failures;
    }
  }
}

void done(const char* family, bool same_everywhere) {
  std::printf("%s", family);
  if (same_everywhere) std::printf(" %016llx", (unsigned long long)family_checksum);
  std::printf("\n");
  family_checksum = 14695981039346656037u;
}

struct Shape {
  int64_t M, K, D;
};
const DType kTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};
double epsilon_of(DType dtype) {
  return dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 2e-3 : 2e-2;
}

void halves() {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const int64_t count : {65536, 65535, 65533}) {
      compare("widen", kExact, [&] {
        std::vector<uint16_t> half(count);
        std::vector<float> wide(count);
        for (int64_t i = 0; i < count; ++i) half[i] = uint16_t(i);
        NCFAST_FOR_ISA(chosen_isa(), widen(half.data(), dtype, wide.data(), count));
        return Results{numbers(wide)};
      });
    }
    compare("narrow", kExact, [&] {
      std::vector<float> wide;
      for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 2039) {
        const uint32_t word = uint32_t(bits);
        float value;
        std::memcpy(&value, &word, sizeof(value));
        wide.push_back(value);
      }
      for (uint32_t half = 0; half < 65536; ++half) {  // ties, and their neighbours
        for (const uint32_t offset : {0u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u}) {
          const uint32_t word = dtype == DType::f16 ? (half << 13) + 0x30000000u + offset : (half << 16) + offset;
          float value;
          std::memcpy(&value, &word, sizeof(value));
          wide.push_back(value);
        }
      }
      const int64_t count = int64_t(wide.size());
      std::vector<uint16_t> half(count);
      NCFAST_FOR_ISA(chosen_isa(), narrow(wide.data(), dtype, half.data(), count));
      for (int64_t i = 0; i < count; ++i) {  // any NaN is as good as another
        if (std::isnan(wide[i])) {
          float back;
          portable::widen(&half[i], dtype, &back, 1);
          half[i] = std::isnan(back) ? 0x7fff : 0;
        }
      }
      return Results{numbers(half)};
    });
  }
  done("halves", true);
}

void nearest() {
  for (const Shape& s : {Shape{1, 1, 1}, {7, 33, 0}, {129, 7, 17}, {63, 300, 64}, {500, 1031, 3}, {40, 257, 513}}) {
    for (const DType dtype : kTypes) {
      for (const double shift : {0.0, 100.0}) {
        for (const bool spoiled : {false, true}) {
          std::vector<float> z = randn(2 * s.M * s.D), e = randn(2 * s.K * s.D);
          for (int64_t i = s.K / 2 * s.D; i < s.K * s.D; ++i) e[i] = e[i % s.D];  // more ties than candidates
          for (float& value : z) value += float(shift);
          for (float& value : e) value += float(shift);
          for (size_t i = 0; spoiled && i < z.size(); i += 29) z[i] = i % 2 ? NAN : INFINITY;
          for (size_t i = 0; spoiled && i < e.size(); i += 91) e[i] = i % 2 ? NAN : INFINITY;
          compare("nearest_code", kExact, [&] {
            std::vector<int64_t> indices(2 * s.M, -1);
            Array rows(dtype, z), codes(dtype == DType::f64 ? dtype : DType::f32, e);
            nearest_code(rows.data(), dtype, codes.data(), 2, s.M, s.K, s.D, kThreads, indices.data());
            return Results{numbers(indices)};
          });
        }
      }
    }
  }
  done("nearest_code", true);
}

void codes() {
  for (const Shape& s : {Shape{9, 4, 1}, {129, 7, 63}, {2500, 3, 33}, {70, 90, 130}}) {
    for (const DType dtype : kTypes) {
      const DType wide = dtype == DType::f64 ? dtype : DType::f32;
      const std::vector<float> values = randn(2 * s.M * s.D), book = randn(2 * s.K * s.D), grads = randn(2 * s.M * s.D);
      const std::vector<int64_t> indices = randint(-1, s.K + 1, 2 * s.M);
      compare("code_stats", 1e-6, [&] {
        Array z(dtype, values), counts(wide, 2 * s.K), sums(wide, 2 * s.K * s.D);
        code_stats(z.data(), dtype, indices.data(), 2, s.M, s.K, s.D, kThreads, counts.data(), sums.data());
        return Results{counts.numbers(), sums.numbers()};
      });
      for (const bool rotate : {false, true}) {
        if (rotate && s.D == 1) continue;  // a number over its own size is a sign: no gradient is left but rounding
        compare("rotate_to_code", epsilon_of(dtype), [&] {
          Array z(dtype, values), e(wide, book), q(dtype, 2 * s.M * s.D), loss(wide, 1), inverse(wide, 1);
          rotate_to_code(z.data(), dtype, e.data(), indices.data(), 2, s.M, s.K, s.D, kThreads, q.data(), loss.data(),
                         inverse.data());
          Array grad_q(dtype, grads), grad_loss(wide, std::vector<float>{0.7f}), grad_z(dtype, 2 * s.M * s.D);
          rotate_to_code_backward(grad_q.data(), grad_loss.data(), z.data(), q.data(), indices.data(), inverse.data(),
                                  dtype, 2 * s.M, s.K, s.D, rotate, kThreads, grad_z.data());
          return Results{q.numbers(), loss.numbers(), inverse.numbers(), grad_z.numbers()};
        });
      }
    }
  }
  done("code_stats, rotate_to_code", false);
}

void losses() {
  for (const Shape& s : {Shape{7, 0, 70}, {31, 0, 56}, {33, 0, 500}, {130, 0, 57}}) {
    const std::vector<float> za = randn(s.M * s.D), zb = randn(s.M * s.D);
    const float grad = 0.3f;
    for (const int which : {0, 1, 2}) {
      compare("loss " + std::to_string(which), 1e-3, [&] {
        float loss = NAN;
        std::vector<float> saved(GramShape(s.M, s.D).saved(), NAN), ga(s.M * s.D, NAN), gb(s.M * s.D, NAN);
        float *kept = saved.data(), *a = ga.data(), *b = gb.data();
        const float *x = za.data(), *y = zb.data();
        if (which == 0) {
          barlow_twins_loss(x, y, s.M, s.D, 0.005, 0, 1e-5, 0, 1, kThreads, &loss, kept);
          barlow_twins_loss_backward(&grad, x, y, kept, s.M, s.D, 0.005, 0, 1e-5, 0, 1, kThreads, a, b);
        } else if (which == 1) {
          vicreg_loss(x, y, s.M, s.D, 25, 25, 1, 1e-4, kThreads, &loss, kept);
          vicreg_loss_backward(&grad, x, y, kept, s.M, s.D, 25, 25, 1, 1e-4, kThreads, a, b);
        } else {
          vibcreg_loss(x, y, s.M, s.D, 25, 25, 100, 1e-4, kThreads, &loss, kept);
          vibcreg_loss_backward(&grad, x, y, kept, s.M, s.D, 25, 25, 100, 1e-4, kThreads, a, b);
        }
        return Results{{double(loss)}, numbers(ga), numbers(gb)};
      });
    }
  }
  done("losses", false);
}

void norms() {
  for (const Shape& s : {Shape{40, 1, 6}, {300, 2, 130}, {600, 1, 64}, {129, 3, 51}}) {
    const std::vector<float> x = randn(s.M * s.D), grad = randn(s.M * s.D);
    const int64_t d = s.D / s.K;
    compare("iter_norm", 1e-3, [&] {
      std::vector<float> y(s.M * s.D, NAN), saved(s.K * (d + 2) * d, NAN), grad_x(s.M * s.D, NAN);
      iter_norm(x.data(), s.M, s.D, s.K, 5, 1e-5, kThreads, y.data(), saved.data());
      iter_norm_backward(grad.data(), x.data(), saved.data(), s.M, s.D, s.K, 5, kThreads, grad_x.data());
      return Results{numbers(y), numbers(grad_x)};
    });
  }
  done("iter_norm", false);
}

void attention() {
  struct Sizes {
    int64_t B, S, H, d;
  };
  for (const Sizes& s : {Sizes{2, 1, 1, 3}, {3, 7, 2, 17}, {2, 63, 2, 32}, {1, 76, 2, 64}, {1, 128, 1, 8}}) {
    const int64_t rows = s.B * s.S * s.H * s.d;
    const std::vector<float> qkv = randn(3 * rows), grad_out = randn(rows), q_scale = randn(s.d), k_scale = randn(s.d),
                             null_kv = randn(2 * s.H * s.d);
    std::vector<uint8_t> mask(s.B * s.S);
    for (uint8_t& kept : mask) kept = generator.uniform() < 0.6;
    const std::vector<int64_t> lengths = randint(0, s.S + 1, s.B);
    for (int options = 0; options < 8; ++options) {
      const bool normed = options & 1, null = options & 2, masked = options & 4;
      const AttentionInput input = {qkv.data(),
                                    masked ? mask.data() : nullptr,
                                    masked ? lengths.data() : nullptr,
                                    normed ? q_scale.data() : nullptr,
                                    normed ? k_scale.data() : nullptr,
                                    null ? null_kv.data() : nullptr,
                                    s.B,
                                    s.S,
                                    s.H,
                                    s.d,
                                    normed ? 3.0f : 0.3f};
      compare("masked_attention", 1e-4, [&] {
        std::vector<float> out(rows, NAN), grad(3 * rows, NAN), gq(s.d), gk(s.d), gn(2 * s.H * s.d);
        masked_attention(input, kThreads, out.data());
        masked_attention_backward(input, grad_out.data(), kThreads, grad.data(), gq.data(), gk.data(), gn.data());
        return Results{numbers(out), numbers(grad), numbers(gq), numbers(gk), numbers(gn)};
      });
    }
  }
  done("masked_attention", false);
}

void linear() {
  for (const Shape& s : {Shape{1, 1, 1}, {7, 63, 17}, {57, 33, 100}, {60, 35, 600}}) {
    const std::vector<float> x = randn(s.M * s.D), weight = randn(s.K * s.D), bias = randn(s.K), norm = randn(s.D),
                             residual = randn(s.M * s.K), grad = randn(s.M * s.D);
    for (const bool all : {false, true}) {
      compare("fused_linear", 1e-5, [&] {
        std::vector<float> y(s.M * s.K, NAN), pre(s.M * s.K, 0);
        fused_linear(x.data(), weight.data(), all ? bias.data() : nullptr, all ? norm.data() : nullptr,
                     all ? residual.data() : nullptr, s.M, s.K, s.D, 1e-6, all, kThreads, y.data(),
                     all ? pre.data() : nullptr);
        std::vector<float> grad_x(s.M * s.D, NAN), grad_norm(s.D, NAN), normalised(s.M * s.D, NAN);
        rms_norm_backward(grad.data(), x.data(), norm.data(), s.M, s.D, 1e-6, kThreads, grad_x.data(), grad_norm.data(),
                          normalised.data());
        return Results{numbers(y), numbers(pre), s.D == 1 ? std::vector<double>() : numbers(grad_x), numbers(grad_norm),
                       numbers(normalised)};
      });
    }
  }
  done("fused_linear", false);
}

void unmask() {
  for (const Shape& s : {Shape{3, 1, 1}, {3, 30, 33}, {4, 300, 20}, {2, 64, 7}, {2, 65, 7}, {9, 1025, 40}}) {
    const int64_t B = s.M, K = s.K, n = s.D;
    std::vector<float> logits = randn(B * n * K), other = randn(B * n * K);
    for (float& value : logits) value *= 5;
    logits[0] = NAN;
    std::vector<int64_t> tokens = randint(0, K, B * n), sample = randint(0, 1 << 30, B);
    for (int64_t& token : tokens) token = generator.below(3) > 0 ? K : token;
    for (const bool google : {false, true}) {
      for (const int64_t top_k : {0, 1, 9}) {
        for (const bool guided : {false, true}) {
          compare("unmask_step", kExact, [&] {
            std::vector<int64_t> out(B * n, -1), remaining(B * n, -1);
            unmask_step(logits.data(), guided ? other.data() : nullptr, tokens.data(), sample.data(), nullptr, nullptr,
                        B, n, n, K, 12345, 2, n / 3, guided ? 4 : 0, 1.5, guided ? 1 : 0.7, top_k, google, n, kThreads,
                        out.data(), remaining.data());
            return Results{numbers(out), numbers(remaining)};
          });
        }
      }
    }
  }
  done("unmask_step", true);
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    setenv("NCFAST_ISA", isa.c_str(), 1);
    std::printf("%s%s", isa.c_str(), isa == "portable" ? "\n" : ", ");
    if (!(fma_peak(1, 0.01) > 0)) return 1;
  }
  halves();
  nearest();
  codes();
  losses();
  norms();
  attention();
  linear();
  unmask();
  return failures > 0;
}
