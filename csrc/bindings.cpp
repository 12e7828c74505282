// The only file that knows Python. Compiled twice: as ncfast._C, and with NCFAST_CUDA_MODULE as ncfast._C_cuda.
// Tensors arrive as addresses; ncfast/ops checks shapes, types and contiguity before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#ifdef NCFAST_CUDA_MODULE
#include "cuda/nearest_code.h"
#else
#include "cpu/barlow_twins_loss.h"
#include "cpu/code_stats.h"
#include "cpu/fma_peak.h"
#include "cpu/gram.h"
#include "cpu/isa.h"
#include "cpu/iter_norm.h"
#include "cpu/masked_attention.h"
#include "cpu/nearest_code.h"
#include "cpu/rotate_to_code.h"
#include "cpu/vibcreg_loss.h"
#include "cpu/vicreg_loss.h"
#endif

namespace py = pybind11;
using ncfast::DType;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

#ifdef NCFAST_CUDA_MODULE

PYBIND11_MODULE(_C_cuda, m) {
  m.def("nearest_code_workspace_bytes", &ncfast::cuda::nearest_code_workspace_bytes);
  m.def(
      "nearest_code",
      [](std::uintptr_t z, int dtype, std::uintptr_t codebook, int64_t H, int64_t M, int64_t K, int64_t D,
         std::uintptr_t stream, std::uintptr_t workspace, std::uintptr_t indices) {
        ncfast::cuda::nearest_code(pointer<const void>(z), DType(dtype), pointer<const void>(codebook), H, M, K, D,
                                   pointer<void>(stream), pointer<void>(workspace), pointer<int64_t>(indices));
      },
      py::call_guard<py::gil_scoped_release>());
}

#else

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
        ncfast::cpu::nearest_code(pointer<const void>(z), DType(dtype), pointer<const void>(codebook), H, M, K, D,
                                  threads, pointer<int64_t>(indices));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "code_stats",
      [](std::uintptr_t z, int dtype, std::uintptr_t indices, int64_t H, int64_t M, int64_t K, int64_t D, int threads,
         std::uintptr_t counts, std::uintptr_t sums) {
        ncfast::cpu::code_stats(pointer<const void>(z), DType(dtype), pointer<const int64_t>(indices), H, M, K, D,
                                threads, pointer<void>(counts), pointer<void>(sums));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rotate_to_code",
      [](std::uintptr_t z, int dtype, std::uintptr_t codebook, std::uintptr_t indices, int64_t H, int64_t M, int64_t K,
         int64_t D, int threads, std::uintptr_t q, std::uintptr_t loss, std::uintptr_t inverse_count) {
        ncfast::cpu::rotate_to_code(pointer<const void>(z), DType(dtype), pointer<const void>(codebook),
                                    pointer<const int64_t>(indices), H, M, K, D, threads, pointer<void>(q),
                                    pointer<void>(loss), pointer<void>(inverse_count));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rotate_to_code_backward",
      [](std::uintptr_t grad_q, std::uintptr_t grad_loss, std::uintptr_t z, std::uintptr_t q, std::uintptr_t indices,
         std::uintptr_t inverse_count, int dtype, int64_t rows, int64_t K, int64_t D, bool rotate, int threads,
         std::uintptr_t grad_z) {
        ncfast::cpu::rotate_to_code_backward(pointer<const void>(grad_q), pointer<const void>(grad_loss),
                                             pointer<const void>(z), pointer<const void>(q),
                                             pointer<const int64_t>(indices), pointer<const void>(inverse_count),
                                             DType(dtype), rows, K, D, rotate, threads, pointer<void>(grad_z));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("barlow_twins_loss_saved_numel", [](int64_t N, int64_t D) { return ncfast::cpu::GramShape(N, D).saved(); });
  m.def(
      "barlow_twins_loss",
      [](std::uintptr_t za, std::uintptr_t zb, int64_t N, int64_t D, double lambd, int64_t ddof, double eps,
         double eps_std, double scale, int threads, std::uintptr_t loss, std::uintptr_t saved) {
        ncfast::cpu::barlow_twins_loss(pointer<const float>(za), pointer<const float>(zb), N, D, lambd, ddof, eps,
                                       eps_std, scale, threads, pointer<float>(loss), pointer<float>(saved));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "barlow_twins_loss_backward",
      [](std::uintptr_t grad_loss, std::uintptr_t za, std::uintptr_t zb, std::uintptr_t saved, int64_t N, int64_t D,
         double lambd, int64_t ddof, double eps, double eps_std, double scale, int threads, std::uintptr_t grad_za,
         std::uintptr_t grad_zb) {
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
        ncfast::cpu::vicreg_loss(pointer<const float>(za), pointer<const float>(zb), N, D, sim, var, cov, eps, threads,
                                 pointer<float>(loss), pointer<float>(saved));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "vicreg_loss_backward",
      [](std::uintptr_t grad_loss, std::uintptr_t za, std::uintptr_t zb, std::uintptr_t saved, int64_t N, int64_t D,
         double sim, double var, double cov, double eps, int threads, std::uintptr_t grad_za, std::uintptr_t grad_zb) {
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
        ncfast::cpu::vibcreg_loss(pointer<const float>(za), pointer<const float>(zb), N, D, sim, var, cov, eps, threads,
                                  pointer<float>(loss), pointer<float>(saved));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "vibcreg_loss_backward",
      [](std::uintptr_t grad_loss, std::uintptr_t za, std::uintptr_t zb, std::uintptr_t saved, int64_t N, int64_t D,
         double sim, double var, double cov, double eps, int threads, std::uintptr_t grad_za, std::uintptr_t grad_zb) {
        ncfast::cpu::vibcreg_loss_backward(pointer<const float>(grad_loss), pointer<const float>(za),
                                           pointer<const float>(zb), pointer<const float>(saved), N, D, sim, var, cov,
                                           eps, threads, pointer<float>(grad_za), pointer<float>(grad_zb));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "masked_attention",
      [](std::uintptr_t qkv, std::uintptr_t key_mask, int64_t B, int64_t S, int64_t H, int64_t d, int threads,
         std::uintptr_t out) {
        ncfast::cpu::masked_attention(pointer<const float>(qkv), pointer<const uint8_t>(key_mask), B, S, H, d, threads,
                                      pointer<float>(out));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "masked_attention_backward",
      [](std::uintptr_t grad_out, std::uintptr_t qkv, std::uintptr_t key_mask, int64_t B, int64_t S, int64_t H,
         int64_t d, int threads, std::uintptr_t grad_qkv) {
        ncfast::cpu::masked_attention_backward(pointer<const float>(grad_out), pointer<const float>(qkv),
                                               pointer<const uint8_t>(key_mask), B, S, H, d, threads,
                                               pointer<float>(grad_qkv));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "iter_norm",
      [](std::uintptr_t x, int64_t N, int64_t D, int64_t groups, int64_t iterations, double eps, int threads,
         std::uintptr_t y, std::uintptr_t saved) {
        ncfast::cpu::iter_norm(pointer<const float>(x), N, D, groups, iterations, eps, threads, pointer<float>(y),
                               pointer<float>(saved));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "iter_norm_backward",
      [](std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t saved, int64_t N, int64_t D, int64_t groups,
         int64_t iterations, int threads, std::uintptr_t grad_x) {
        ncfast::cpu::iter_norm_backward(pointer<const float>(grad_y), pointer<const float>(x),
                                        pointer<const float>(saved), N, D, groups, iterations, threads,
                                        pointer<float>(grad_x));
      },
      py::call_guard<py::gil_scoped_release>());
}

#endif
