// The only file that knows Python. Compiled twice: as ncfast._C, and with NCFAST_CUDA_MODULE as ncfast._C_cuda.
// Tensors arrive as addresses; ncfast/ops checks shapes, types and contiguity before it calls. What an address and a
// number can show to be wrong raises ValueError here: no address, one between two elements, an element type that is
// none, a size below zero. How much memory there is behind an address nobody can tell.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#ifdef NCFAST_CUDA_MODULE
#include "cuda/nearest_code.h"
#else
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
#include "philox.h"
#endif

namespace py = pybind11;
using ncfast::DType;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  if constexpr (!std::is_void_v<T>) {
    if (address % alignof(T) != 0) throw std::invalid_argument("an address that is none of an element");
  }
  return reinterpret_cast<T*>(address);
}

DType element(int dtype) {
  if (dtype < 0 || dtype > int(DType::bf16)) throw std::invalid_argument("an element type that is none");
  return DType(dtype);
}

// Sizes, and the addresses that must be there unless there is nothing to do.
void check(std::initializer_list<int64_t> sizes, std::initializer_list<std::uintptr_t> addresses) {
  bool empty = false;
  for (int64_t size : sizes) {
    if (size < 0) throw std::invalid_argument("a size below zero");
    empty |= size == 0;
  }
  for (std::uintptr_t address : addresses) {
    if (address == 0 && !empty) throw std::invalid_argument("no address");
  }
}

}  // namespace

#ifdef NCFAST_CUDA_MODULE

PYBIND11_MODULE(_C_cuda, m) {
  m.def("nearest_code_workspace_bytes", &ncfast::cuda::nearest_code_workspace_bytes);
  m.def(
      "nearest_code",
      [](std::uintptr_t z, int dtype, std::uintptr_t codebook, int64_t H, int64_t M, int64_t K, int64_t D, bool exact,
         std::uintptr_t stream, std::uintptr_t workspace, std::uintptr_t indices) {
        ncfast::cuda::nearest_code(pointer<const void>(z), element(dtype), pointer<const void>(codebook), H, M, K, D,
                                   exact, pointer<void>(stream), pointer<void>(workspace), pointer<int64_t>(indices));
      },
      py::call_guard<py::gil_scoped_release>());
}

#else

namespace {

ncfast::cpu::AttentionInput attention_input(std::uintptr_t qkv, std::uintptr_t key_mask, std::uintptr_t lengths,
                                            std::uintptr_t q_scale, std::uintptr_t k_scale, std::uintptr_t null_kv,
                                            int64_t B, int64_t S, int64_t H, int64_t d, float scale) {
  return {pointer<const float>(qkv),
          pointer<const uint8_t>(key_mask),
          pointer<const int64_t>(lengths),
          pointer<const float>(q_scale),
          pointer<const float>(k_scale),
          pointer<const float>(null_kv),
          B,
          S,
          H,
          d,
          scale};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc " __VERSION__;
#else
    info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
  });
  m.def("isas", &ncfast::cpu::available_isas);
  m.def("fma_peak", &ncfast::cpu::fma_peak, py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "nearest_code",
      [](std::uintptr_t z, int dtype, std::uintptr_t codebook, int64_t H, int64_t M, int64_t K, int64_t D, int threads,
         std::uintptr_t indices) {
        check({H, M, K, D}, {z, codebook, indices});
        ncfast::cpu::nearest_code(pointer<const void>(z), element(dtype), pointer<const void>(codebook), H, M, K, D,
                                  threads, pointer<int64_t>(indices));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "code_stats",
      [](std::uintptr_t z, int dtype, std::uintptr_t indices, int64_t H, int64_t M, int64_t K, int64_t D, int threads,
         std::uintptr_t counts, std::uintptr_t sums) {
        check({H, M, K, D}, {z, indices, counts, sums});
        ncfast::cpu::code_stats(pointer<const void>(z), element(dtype), pointer<const int64_t>(indices), H, M, K, D,
                                threads, pointer<void>(counts), pointer<void>(sums));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rotate_to_code",
      [](std::uintptr_t z, int dtype, std::uintptr_t codebook, std::uintptr_t indices, int64_t H, int64_t M, int64_t K,
         int64_t D, int threads, std::uintptr_t q, std::uintptr_t loss, std::uintptr_t inverse_count) {
        check({H, M, K, D}, {z, codebook, indices, q, loss, inverse_count});
        ncfast::cpu::rotate_to_code(pointer<const void>(z), element(dtype), pointer<const void>(codebook),
                                    pointer<const int64_t>(indices), H, M, K, D, threads, pointer<void>(q),
                                    pointer<void>(loss), pointer<void>(inverse_count));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rotate_to_code_backward",
      [](std::uintptr_t grad_q, std::uintptr_t grad_loss, std::uintptr_t z, std::uintptr_t q, std::uintptr_t indices,
         std::uintptr_t inverse_count, int dtype, int64_t rows, int64_t K, int64_t D, bool rotate, int threads,
         std::uintptr_t grad_z) {
        check({rows, K, D}, {grad_q, grad_loss, z, q, indices, inverse_count, grad_z});
        ncfast::cpu::rotate_to_code_backward(pointer<const void>(grad_q), pointer<const void>(grad_loss),
                                             pointer<const void>(z), pointer<const void>(q),
                                             pointer<const int64_t>(indices), pointer<const void>(inverse_count),
                                             element(dtype), rows, K, D, rotate, threads, pointer<void>(grad_z));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("barlow_twins_loss_saved_numel", [](int64_t N, int64_t D) { return ncfast::cpu::GramShape(N, D).saved(); });
  m.def(
      "barlow_twins_loss",
      [](std::uintptr_t za, std::uintptr_t zb, int64_t N, int64_t D, double lambd, int64_t ddof, double eps,
         double eps_std, double scale, int threads, std::uintptr_t loss, std::uintptr_t saved) {
        check({N, D}, {za, zb, loss, saved});
        ncfast::cpu::barlow_twins_loss(pointer<const float>(za), pointer<const float>(zb), N, D, lambd, ddof, eps,
                                       eps_std, scale, threads, pointer<float>(loss), pointer<float>(saved));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "barlow_twins_loss_backward",
      [](std::uintptr_t grad_loss, std::uintptr_t za, std::uintptr_t zb, std::uintptr_t saved, int64_t N, int64_t D,
         double lambd, int64_t ddof, double eps, double eps_std, double scale, int threads, std::uintptr_t grad_za,
         std::uintptr_t grad_zb) {
        check({N, D}, {grad_loss, za, zb, saved, grad_za, grad_zb});
        ncfast::cpu::barlow_twins_loss_backward(pointer<const float>(grad_loss), pointer<const float>(za),
                                                pointer<const float>(zb), pointer<const float>(saved), N, D, lambd,
                                                ddof, eps, eps_std, scale, threads, pointer<float>(grad_za),
                                                pointer<float>(grad_zb));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("vicreg_loss_saved_numel", [](int64_t N, int64_t D) { return ncfast::cpu::GramShape(N, D).saved(); });
  m.def(
      "vicreg_loss",
      [](std::uintptr_t za, std::uintptr_t zb, int64_t N, int64_t D, double sim, double var, double cov, double eps,
         int threads, std::uintptr_t loss, std::uintptr_t saved) {
        check({N, D}, {za, zb, loss, saved});
        ncfast::cpu::vicreg_loss(pointer<const float>(za), pointer<const float>(zb), N, D, sim, var, cov, eps, threads,
                                 pointer<float>(loss), pointer<float>(saved));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "vicreg_loss_backward",
      [](std::uintptr_t grad_loss, std::uintptr_t za, std::uintptr_t zb, std::uintptr_t saved, int64_t N, int64_t D,
         double sim, double var, double cov, double eps, int threads, std::uintptr_t grad_za, std::uintptr_t grad_zb) {
        check({N, D}, {grad_loss, za, zb, saved, grad_za, grad_zb});
        ncfast::cpu::vicreg_loss_backward(pointer<const float>(grad_loss), pointer<const float>(za),
                                          pointer<const float>(zb), pointer<const float>(saved), N, D, sim, var, cov,
                                          eps, threads, pointer<float>(grad_za), pointer<float>(grad_zb));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("vibcreg_loss_saved_numel", [](int64_t N, int64_t D) { return ncfast::cpu::GramShape(N, D).saved(); });
  m.def(
      "vibcreg_loss",
      [](std::uintptr_t za, std::uintptr_t zb, int64_t N, int64_t D, double sim, double var, double cov, double eps,
         int threads, std::uintptr_t loss, std::uintptr_t saved) {
        check({N, D}, {za, zb, loss, saved});
        ncfast::cpu::vibcreg_loss(pointer<const float>(za), pointer<const float>(zb), N, D, sim, var, cov, eps, threads,
                                  pointer<float>(loss), pointer<float>(saved));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "vibcreg_loss_backward",
      [](std::uintptr_t grad_loss, std::uintptr_t za, std::uintptr_t zb, std::uintptr_t saved, int64_t N, int64_t D,
         double sim, double var, double cov, double eps, int threads, std::uintptr_t grad_za, std::uintptr_t grad_zb) {
        check({N, D}, {grad_loss, za, zb, saved, grad_za, grad_zb});
        ncfast::cpu::vibcreg_loss_backward(pointer<const float>(grad_loss), pointer<const float>(za),
                                           pointer<const float>(zb), pointer<const float>(saved), N, D, sim, var, cov,
                                           eps, threads, pointer<float>(grad_za), pointer<float>(grad_zb));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "fused_linear",
      [](std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t norm_weight,
         std::uintptr_t residual, int64_t M, int64_t N, int64_t K, double norm_eps, bool gelu, int threads,
         std::uintptr_t y, std::uintptr_t pre) {
        check({M, N, K}, {x, weight, y});
        ncfast::cpu::fused_linear(pointer<const float>(x), pointer<const float>(weight), pointer<const float>(bias),
                                  pointer<const float>(norm_weight), pointer<const float>(residual), M, N, K, norm_eps,
                                  gelu, threads, pointer<float>(y), pointer<float>(pre));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rms_norm_backward",
      [](std::uintptr_t grad_out, std::uintptr_t x, std::uintptr_t norm_weight, int64_t M, int64_t K, double norm_eps,
         int threads, std::uintptr_t grad_x, std::uintptr_t grad_norm_weight, std::uintptr_t normalised) {
        check({M, K}, {grad_out, x, norm_weight, grad_x});
        ncfast::cpu::rms_norm_backward(
            pointer<const float>(grad_out), pointer<const float>(x), pointer<const float>(norm_weight), M, K, norm_eps,
            threads, pointer<float>(grad_x), pointer<float>(grad_norm_weight), pointer<float>(normalised));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "masked_attention",
      [](std::uintptr_t qkv, std::uintptr_t key_mask, std::uintptr_t lengths, std::uintptr_t q_scale,
         std::uintptr_t k_scale, std::uintptr_t null_kv, int64_t B, int64_t S, int64_t H, int64_t d, float scale,
         int threads, std::uintptr_t out) {
        check({B, S, H, d}, {qkv, out});
        ncfast::cpu::masked_attention(
            attention_input(qkv, key_mask, lengths, q_scale, k_scale, null_kv, B, S, H, d, scale), threads,
            pointer<float>(out));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "masked_attention_backward",
      [](std::uintptr_t qkv, std::uintptr_t key_mask, std::uintptr_t lengths, std::uintptr_t q_scale,
         std::uintptr_t k_scale, std::uintptr_t null_kv, int64_t B, int64_t S, int64_t H, int64_t d, float scale,
         std::uintptr_t grad_out, int threads, std::uintptr_t grad_qkv, std::uintptr_t grad_q_scale,
         std::uintptr_t grad_k_scale, std::uintptr_t grad_null_kv) {
        check({B, S, H, d}, {qkv, grad_out, grad_qkv});
        ncfast::cpu::masked_attention_backward(
            attention_input(qkv, key_mask, lengths, q_scale, k_scale, null_kv, B, S, H, d, scale),
            pointer<const float>(grad_out), threads, pointer<float>(grad_qkv), pointer<float>(grad_q_scale),
            pointer<float>(grad_k_scale), pointer<float>(grad_null_kv));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "iter_norm",
      [](std::uintptr_t x, int64_t N, int64_t D, int64_t groups, int64_t iterations, double eps, int threads,
         std::uintptr_t y, std::uintptr_t saved) {
        check({N, D, groups}, {x, y});
        ncfast::cpu::iter_norm(pointer<const float>(x), N, D, groups, iterations, eps, threads, pointer<float>(y),
                               pointer<float>(saved));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "iter_norm_backward",
      [](std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t saved, int64_t N, int64_t D, int64_t groups,
         int64_t iterations, int threads, std::uintptr_t grad_x) {
        check({N, D, groups}, {grad_y, x, saved, grad_x});
        ncfast::cpu::iter_norm_backward(pointer<const float>(grad_y), pointer<const float>(x),
                                        pointer<const float>(saved), N, D, groups, iterations, threads,
                                        pointer<float>(grad_x));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("philox4x32", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const auto [word] = ncfast::philox::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return std::array<uint32_t, 4>{word[0], word[1], word[2], word[3]};
  });
  m.def(
      "unmask_step",
      [](std::uintptr_t logits, std::uintptr_t unconditional, std::uintptr_t tokens, std::uintptr_t sample,
         std::uintptr_t positions, std::uintptr_t counts, int64_t B, int64_t m, int64_t n, int64_t K, int64_t seed,
         int64_t step, int64_t num_masked, double choice_temperature, double guidance_scale, double temperature,
         int64_t top_k, bool google, int64_t width, int threads, std::uintptr_t out, std::uintptr_t remaining) {
        check({B, m, n, K}, {logits, tokens, sample, out});
        ncfast::cpu::unmask_step(pointer<const float>(logits), pointer<const float>(unconditional),
                                 pointer<const int64_t>(tokens), pointer<const int64_t>(sample),
                                 pointer<const int64_t>(positions), pointer<const int64_t>(counts), B, m, n, K,
                                 uint64_t(seed), step, num_masked, choice_temperature, guidance_scale, temperature,
                                 top_k, google, width, threads, pointer<int64_t>(out), pointer<int64_t>(remaining));
      },
      py::call_guard<py::gil_scoped_release>());
}

#endif
