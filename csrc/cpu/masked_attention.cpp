#include "masked_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vec.h"

namespace ncfast::cpu {
namespace {

constexpr int64_t kWidest = 16;  // lanes of the widest register: rows are padded to a multiple of it

struct Head {
  int64_t S, d, padded_S, padded_d;
  int64_t qkv_stride, out_stride;  // from one position to the next
  float scale;

  Head(int64_t S, int64_t H, int64_t d)
      : S(S),
        d(d),
        padded_S((S + kWidest - 1) / kWidest * kWidest),
        padded_d((d + kWidest - 1) / kWidest * kWidest),
        qkv_stride(3 * H * d),
        out_stride(H * d),
        scale(float(1 / std::sqrt(double(d)))) {}
  int64_t scratch() const { return d * padded_S + 2 * S * padded_d + 2 * S * padded_S; }
};

// The functions of one instruction set, for one head of one sequence.
struct Kernel {
  void (*forward)(const Head&, const float* q, const float* k, const float* v, const uint8_t* key_mask, float* scratch,
                  float* out);
  void (*backward)(const Head&, const float* grad_out, const float* q, const float* k, const float* v,
                   const uint8_t* key_mask, float* scratch, float* grad_q, float* grad_k, float* grad_v);
};

}  // namespace
}  // namespace ncfast::cpu

#define NCFAST_KERNEL "masked_attention_kernel.h"
#include "foreach_isa.h"

namespace ncfast::cpu {
namespace {

// body(sequence, head, scratch), in parallel.
template <class Body>
void for_each_head(const Head& head, int64_t B, int64_t H, int threads, const Body& body) {
  // A thread costs microseconds to wake: none for less than that many.
  const double work = double(B) * double(H) * double(head.S) * double(head.S + 16) * double(head.d);
  threads = std::max(1, std::min(threads, int(std::min(work / 2e5, 1e6))));
  std::vector<float> scratch(threads * head.scratch());
  parallel_for(B * H, threads,
               [&](int64_t task, int thread) { body(task / H, task % H, scratch.data() + thread * head.scratch()); });
}

}  // namespace

void masked_attention(const float* qkv, const uint8_t* key_mask, int64_t B, int64_t S, int64_t H, int64_t d,
                      int threads, float* out) {
  if (B * S * H * d == 0) return;
  const Head head(S, H, d);
  const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
  for_each_head(head, B, H, threads, [&](int64_t b, int64_t h, float* scratch) {
    const float* q = qkv + b * S * head.qkv_stride + h * d;
    kernel.forward(head, q, q + H * d, q + 2 * H * d, key_mask == nullptr ? nullptr : key_mask + b * S, scratch,
                   out + b * S * head.out_stride + h * d);
  });
}

void masked_attention_backward(const float* grad_out, const float* qkv, const uint8_t* key_mask, int64_t B, int64_t S,
                               int64_t H, int64_t d, int threads, float* grad_qkv) {
  if (B * S * H * d == 0) return;
  const Head head(S, H, d);
  const Kernel kernel = NCFAST_FOR_ISA(chosen_isa(), kernel());
  for_each_head(head, B, H, threads, [&](int64_t b, int64_t h, float* scratch) {
    const float* q = qkv + b * S * head.qkv_stride + h * d;
    float* grad_q = grad_qkv + b * S * head.qkv_stride + h * d;
    kernel.backward(head, grad_out + b * S * head.out_stride + h * d, q, q + H * d, q + 2 * H * d,
                    key_mask == nullptr ? nullptr : key_mask + b * S, scratch, grad_q, grad_q + H * d,
                    grad_q + 2 * H * d);
  });
}

}  // namespace ncfast::cpu
