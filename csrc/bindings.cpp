// The only file that knows Python. Compiled twice: as ncfast._C, and with NCFAST_CUDA_MODULE as ncfast._C_cuda.
// Tensors arrive as addresses; ncfast/ops checks shapes, types and contiguity before it calls. What an address and a
// number can show to be wrong raises ValueError here: a null pointer, one that is not aligned to its element type, an
// unknown element type, a negative size. The size of the memory behind an address cannot be checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
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

// What Python passes for a parameter of a kernel.
template <class P>
struct Argument {
  using Type = P;
  static P convert(P value) { return value; }
};

template <class T>
struct Argument<T*> {
  using Type = std::uintptr_t;
  static T* convert(std::uintptr_t address) {
    if constexpr (!std::is_void_v<T>) {
      if (address % alignof(T) != 0) throw std::invalid_argument("pointer is not aligned to its element type");
    }
    return reinterpret_cast<T*>(address);
  }
};

template <>
struct Argument<DType> {
  using Type = int;
  static DType convert(int dtype) {
    if (dtype < 0 || dtype > int(DType::bf16)) throw std::invalid_argument("unknown element type");
    return DType(dtype);
  }
};

template <>
struct Argument<uint64_t> {  // a seed
  using Type = int64_t;
  static uint64_t convert(int64_t value) { return uint64_t(value); }
};

template <class P, class V>
void check_size(V value, int& sizes_left, bool& empty) {
  if constexpr (std::is_same_v<P, int64_t>) {
    if (sizes_left-- <= 0) return;
    if (value < 0) throw std::invalid_argument("negative size");
    empty |= value == 0;
  }
}

template <class P, int... kOptional, class V>
void check_pointer(V value, int& index, bool empty) {
  if constexpr (std::is_pointer_v<P>) {
    const bool may_be_null = empty || ((index == kOptional) || ...);
    if (value == 0 && !may_be_null) throw std::invalid_argument("null pointer");
    ++index;
  }
}

// `kernel` for Python. Its first kSizes int64_t are sizes, which may be 0; of its pointers those numbered kOptional may
// be null, and all where a size is 0.
template <int kSizes, int... kOptional, class... P>
void define(py::module_& m, const char* name, void (*kernel)(P...)) {
  m.def(
      name,
      [kernel](typename Argument<P>::Type... values) {
        int sizes_left = kSizes, index = 0;
        bool empty = false;
        (check_size<P>(values, sizes_left, empty), ...);
        (check_pointer<P, kOptional...>(values, index, empty), ...);
        kernel(Argument<P>::convert(values)...);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

#ifdef NCFAST_CUDA_MODULE

PYBIND11_MODULE(_C_cuda, m) {
  m.def("nearest_code_workspace_bytes", &ncfast::cuda::nearest_code_workspace_bytes);
  define<4, 2, 3>(m, "nearest_code", &ncfast::cuda::nearest_code);  // stream and workspace may be null
}

#else

namespace {

using namespace ncfast::cpu;

void attend(const float* qkv, const uint8_t* key_mask, const int64_t* lengths, const float* q_scale,
            const float* k_scale, const float* null_kv, int64_t B, int64_t S, int64_t H, int64_t d, float scale,
            int threads, float* out) {
  masked_attention({qkv, key_mask, lengths, q_scale, k_scale, null_kv, B, S, H, d, scale}, threads, out);
}

void attend_backward(const float* qkv, const uint8_t* key_mask, const int64_t* lengths, const float* q_scale,
                     const float* k_scale, const float* null_kv, int64_t B, int64_t S, int64_t H, int64_t d,
                     float scale, const float* grad_out, int threads, float* grad_qkv, float* grad_q_scale,
                     float* grad_k_scale, float* grad_null_kv) {
  masked_attention_backward({qkv, key_mask, lengths, q_scale, k_scale, null_kv, B, S, H, d, scale}, grad_out, threads,
                            grad_qkv, grad_q_scale, grad_k_scale, grad_null_kv);
}

py::dict build_info() {
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
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("isas", &available_isas);
  m.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>());
  m.def("philox4x32", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const auto [word] = ncfast::philox::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return std::array<uint32_t, 4>{word[0], word[1], word[2], word[3]};
  });
  for (const char* name : {"barlow_twins_loss_saved_numel", "vicreg_loss_saved_numel", "vibcreg_loss_saved_numel"}) {
    m.def(name, [](int64_t N, int64_t D) { return GramShape(N, D).saved(); });
  }
  define<4>(m, "nearest_code", &nearest_code);
  define<4>(m, "code_stats", &code_stats);
  define<4>(m, "rotate_to_code", &rotate_to_code);
  define<3>(m, "rotate_to_code_backward", &rotate_to_code_backward);
  define<2>(m, "barlow_twins_loss", &barlow_twins_loss);
  define<2>(m, "barlow_twins_loss_backward", &barlow_twins_loss_backward);
  define<2>(m, "vicreg_loss", &vicreg_loss);
  define<2>(m, "vicreg_loss_backward", &vicreg_loss_backward);
  define<2>(m, "vibcreg_loss", &vibcreg_loss);
  define<2>(m, "vibcreg_loss_backward", &vibcreg_loss_backward);
  define<3, 2, 3, 4, 6>(m, "fused_linear", &fused_linear);  // bias, norm_weight, residual, pre
  define<2, 4, 5>(m, "rms_norm_backward", &rms_norm_backward);
  define<4, 1, 2, 3, 4, 5>(m, "masked_attention", &attend);                              // all but qkv and out
  define<4, 1, 2, 3, 4, 5, 8, 9, 10>(m, "masked_attention_backward", &attend_backward);  // and the gradients of these
  define<3, 2>(m, "iter_norm", &iter_norm);                                              // saved
  define<3>(m, "iter_norm_backward", &iter_norm_backward);
  define<4, 1, 4, 5, 7>(m, "unmask_step", &unmask_step);  // unconditional, positions, counts, remaining
}

#endif
