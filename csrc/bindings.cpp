// The only file that knows Python. Compiled twice: as ncfast._C, and with NCFAST_CUDA_MODULE as ncfast._C_cuda.
// Tensors arrive as addresses; ncfast/ops checks shapes, types and contiguity before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#ifdef NCFAST_CUDA_MODULE
#include "cuda/nearest_code.h"
#else
#include "cpu/fma_peak.h"
#include "cpu/isa.h"
#include "cpu/nearest_code.h"
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
}

#endif
