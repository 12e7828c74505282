#include "masked_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace ncfast::cpu {
namespace {

constexpr int64_t kWidest = 16;       // lanes of the widest register: rows are padded to a multiple of it
constexpr int64_t kMostRows = 14;     // queries that are worked on together, at most
constexpr float kLeastNorm = 1e-12f;  // that of F.normalize

int64_t padded(int64_t count) { return (count + kWidest - 1) / kWidest * kWidest; }

// One head of one sequence. Rows of q, k, v and their gradients are qkv_stride apart, those of the output out_stride.
struct Head {
  int64_t S, d;
  int64_t qkv_stride, out_stride;
  float scale;
  const float *q, *k, *v;          // [S, d]
  const uint8_t* key_mask;         // [S] or null
  int64_t length;                  // of the keys, at most S
  const float *q_scale, *k_scale;  // [d] or null
  const float *null_k, *null_v;    // [d] or null
};

// Gradients of what all sequences share, [d] each, written by every head for itself and added up afterwards.
struct SharedGradients {
  float *q_scale, *k_scale, *null_k, *null_v;
};
constexpr int64_t kShared = 4;

struct Scratch {
  float* floats;  // cache line by cache line
  int32_t* kept;  // [S]: the positions of the keys

  static int64_t size(int64_t S, int64_t d) {
    const int64_t P = padded(S + 1), C = padded(d);
    return 4 * P * C + 2 * S * (P + C) + kMostRows * C + 2 * C;  // of the backward pass; the forward pass needs less
  }
};

// The functions of one instruction set.
struct Kernel {
  void (*forward)(const Head&, const Scratch&, float* out);
  void (*backward)(const Head&, const Scratch&, const float* grad_out, float* grad_q, float* grad_k, float* grad_v,
                   const SharedGradients&);
};

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "masked_attention_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {
namespace {

Head head_of(const AttentionInput& input, int64_t b, int64_t h) {
  const int64_t row = input.H * input.d;
  Head head{};
  head.S = input.S, head.d = input.d, head.scale = input.scale;
  head.qkv_stride = 3 * row, head.out_stride = row;
  head.q = input.qkv + b * input.S * 3 * row + h * input.d, head.k = head.q + row, head.v = head.k + row;
  head.length = input.S;
  if (input.lengths != nullptr) head.length = std::clamp(input.lengths[b], int64_t(0), input.S);
  if (input.key_mask != nullptr) head.key_mask = input.key_mask + b * input.S;
  head.q_scale = input.q_scale, head.k_scale = input.k_scale;
  if (input.null_kv != nullptr) head.null_k = input.null_kv + h * input.d, head.null_v = head.null_k + row;
  return head;
}

// body(sequence, head, scratch), in parallel.
template <class Body>
void for_each_head(const AttentionInput& input, int threads, const Body& body) {
  // A thread costs microseconds to wake: none for less than that many.
  const double work = double(input.B) * double(input.H) * double(input.S) * double(input.S + 16) * double(input.d);
  threads = std::max(1, std::min(threads, int(std::min(work / 2e5, 1e6))));
  const int64_t size = padded(Scratch::size(input.S, input.d));
  const std::unique_ptr<float[]> floats(new float[threads * size + kWidest]);  // not zeroed: every use writes first
  std::vector<int32_t> kept(threads * input.S);
  // A register that straddles two cache lines takes two loads.
  float* aligned = floats.get() + (kWidest - reinterpret_cast<std::uintptr_t>(floats.get()) / sizeof(float) % kWidest);
  parallel_for(input.B * input.H, threads, [&](int64_t task, int thread) {
    body(task / input.H, task % input.H, Scratch{aligned + thread * size, kept.data() + thread * input.S});
  });
}

// to[c] = the sum over i of from[i * stride + c], in that order.
void sum_rows(const float* from, int64_t stride, int64_t count, int64_t columns, float* to) {
  std::vector<double> sums(columns);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < columns; ++c) sums[c] += from[i * stride + c];
  }
  for (int64_t c = 0; c < columns; ++c) to[c] = float(sums[c]);
}

}  // namespace

void masked_attention(const AttentionInput& input, int threads, float* out) {
  if (input.B * input.S * input.H * input.d == 0) return;
  const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
  for_each_head(input, threads, [&](int64_t b, int64_t h, const Scratch& scratch) {
    kernel.forward(head_of(input, b, h), scratch, out + (b * input.S * input.H + h) * input.d);
  });
}

void masked_attention_backward(const AttentionInput& input, const float* grad_out, int threads, float* grad_qkv,
                               float* grad_q_scale, float* grad_k_scale, float* grad_null_kv) {
  const int64_t B = input.B, S = input.S, H = input.H, d = input.d;
  const bool normalised = input.q_scale != nullptr, has_null = input.null_kv != nullptr;
  const int64_t heads = B * S * H * d == 0 ? 0 : B * H;
  std::vector<float> shared(normalised || has_null ? heads * kShared * d : 0);
  if (heads > 0) {
    const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
    for_each_head(input, threads, [&](int64_t b, int64_t h, const Scratch& scratch) {
      float* grad_q = grad_qkv + (b * S * 3 * H + h) * d;
      float* own = shared.data() + (b * H + h) * kShared * d;
      kernel.backward(head_of(input, b, h), scratch, grad_out + (b * S * H + h) * d, grad_q, grad_q + H * d,
                      grad_q + 2 * H * d, {own, own + d, own + 2 * d, own + 3 * d});
    });
  }
  if (normalised) {
    sum_rows(shared.data(), kShared * d, heads, d, grad_q_scale);
    sum_rows(shared.data() + d, kShared * d, heads, d, grad_k_scale);
  }
  for (int64_t h = 0; has_null && h < H; ++h) {
    for (int64_t part = 0; part < 2; ++part) {
      sum_rows(shared.data() + (h * kShared + 2 + part) * d, H * kShared * d, heads / H, d,
               grad_null_kv + (part * H + h) * d);
    }
  }
}

}  // namespace ncfast::cpu
