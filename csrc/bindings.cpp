// The only file that knows Python. Compiled twice: as ncfast._C, and with NCFAST_CUDA_MODULE as ncfast._C_cuda. CMake
// defines Py_LIMITED_API, so that one build serves every Python from 3.10 on.
// Tensors arrive as addresses; ncfast/ops checks shapes, types and contiguity before it calls. What an address and a
// number can show to be wrong raises ValueError here: a null pointer, one that is not aligned to its element type, an
// unknown element type, a negative size. The size of the memory behind an address cannot be checked.
#include <Python.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#ifdef NCFAST_CUDA_MODULE
#include "cuda/masked_attention.h"
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

using ncfast::DType;

namespace {

struct Raised {};  // Python's exception is set

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// What Python passes for a parameter of a kernel; a seed is an int64_t there.
template <class P>
P convert(PyObject* value) {
  if constexpr (std::is_pointer_v<P>) {
    const unsigned long long address = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred()) throw Raised();
    if constexpr (!std::is_void_v<std::remove_pointer_t<P>>) {
      if (address % alignof(std::remove_pointer_t<P>) != 0) {
        throw std::invalid_argument("pointer is not aligned to its element type");
      }
    }
    return reinterpret_cast<P>(std::uintptr_t(address));
  } else if constexpr (std::is_floating_point_v<P>) {
    const double number = PyFloat_AsDouble(value);
    if (PyErr_Occurred()) throw Raised();
    return P(number);
  } else {
    const long long number = PyLong_AsLongLong(value);
    if (PyErr_Occurred()) throw Raised();
    if constexpr (std::is_same_v<P, DType>) {
      if (number < 0 || number > int(DType::bf16)) throw std::invalid_argument("unknown element type");
    }
    if constexpr (std::is_same_v<P, int>) {
      if (number < std::numeric_limits<int>::min() || number > std::numeric_limits<int>::max()) {
        PyErr_SetString(PyExc_OverflowError, "int too large for 32 bits");
        throw Raised();
      }
    }
    return P(number);
  }
}

template <class P>
void check_size(P value, int& sizes_left, bool& empty) {
  if constexpr (std::is_same_v<P, int64_t>) {
    if (sizes_left-- <= 0) return;
    if (value < 0) throw std::invalid_argument("negative size");
    empty |= value == 0;
  }
}

template <int... kOptional, class P>
void check_pointer(P value, int& index, bool empty) {
  if constexpr (std::is_pointer_v<P>) {
    const bool may_be_null = empty || ((index == kOptional) || ...);
    if (value == nullptr && !may_be_null) throw std::invalid_argument("null pointer");
    ++index;
  }
}

PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
PyObject* to_python(double value) { return PyFloat_FromDouble(value); }

template <auto kernel>
struct Function;

template <class R, class... P, R (*kernel)(P...)>
struct Function<kernel> {
  template <int kSizes, int... kOptional>
  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t count) {
    try {
      if (count != Py_ssize_t(sizeof...(P))) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments; got %zd", Py_ssize_t(sizeof...(P)), count);
        throw Raised();
      }
      return run<kSizes, kOptional...>(values, std::index_sequence_for<P...>());
    } catch (const Raised&) {
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  template <int kSizes, int... kOptional, size_t... I>
  static PyObject* run(PyObject* const* values, std::index_sequence<I...>) {
    const std::tuple<P...> all{convert<P>(values[I])...};  // braces keep the order
    int sizes_left = kSizes, index = 0;
    bool empty = false;
    (check_size(std::get<I>(all), sizes_left, empty), ...);
    (check_pointer<kOptional...>(std::get<I>(all), index, empty), ...);
    if constexpr (std::is_void_v<R>) {
      {
        const WithoutGil released;
        kernel(std::get<I>(all)...);
      }
      Py_RETURN_NONE;
    } else {
      return to_python([&] {
        const WithoutGil released;
        return kernel(std::get<I>(all)...);
      }());
    }
  }
};

// `kernel` for Python. Its first kSizes int64_t are sizes, which may be 0; of its pointers those numbered kOptional may
// be null, and all where a size is 0.
template <auto kernel, int kSizes = 0, int... kOptional>
PyMethodDef define(const char* name) {
  const auto call = &Function<kernel>::template call<kSizes, kOptional...>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
}

#ifdef NCFAST_CUDA_MODULE

PyMethodDef functions[] = {
    define<&ncfast::cuda::masked_attention, 3, 1, 2, 3>("masked_attention"),  // mask, lengths, stream may be null
    define<&ncfast::cuda::masked_attention_backward, 3, 2, 3, 4>("masked_attention_backward"),
    define<&ncfast::cuda::nearest_code_workspace_bytes>("nearest_code_workspace_bytes"),
    define<&ncfast::cuda::nearest_code, 4, 2, 3>("nearest_code"),  // stream and workspace may be null
    {},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&definition); }

#else

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

int64_t saved_numel(int64_t N, int64_t D) { return GramShape(N, D).saved(); }

PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  const char* compiler = "gcc " __VERSION__;
#else
  const char* compiler = "unknown";
#endif
#ifdef _OPENMP
  PyObject* openmp = Py_True;
#else
  PyObject* openmp = Py_False;
#endif
  return Py_BuildValue("{s:s,s:O}", "compiler", compiler, "openmp", openmp);
}

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const std::string& isa : available_isas()) {
    PyObject* name = PyUnicode_FromString(isa.c_str());
    if (names == nullptr || name == nullptr || PyList_Append(names, name) != 0) return nullptr;
    Py_DECREF(name);
  }
  return names;
}

PyObject* philox4x32(PyObject*, PyObject* arguments) {
  unsigned counter[4], key[2];
  if (!PyArg_ParseTuple(arguments, "(IIII)(II)", &counter[0], &counter[1], &counter[2], &counter[3], &key[0], &key[1]))
    return nullptr;
  const auto [word] = ncfast::philox::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return Py_BuildValue("(IIII)", word[0], word[1], word[2], word[3]);
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, nullptr},
    {"isas", isas, METH_NOARGS, nullptr},
    {"philox4x32", philox4x32, METH_VARARGS, nullptr},
    define<&fma_peak>("fma_peak"),
    define<&saved_numel>("barlow_twins_loss_saved_numel"),
    define<&saved_numel>("vicreg_loss_saved_numel"),
    define<&saved_numel>("vibcreg_loss_saved_numel"),
    define<&nearest_code, 4>("nearest_code"),
    define<&code_stats, 4>("code_stats"),
    define<&rotate_to_code, 4>("rotate_to_code"),
    define<&rotate_to_code_backward, 3>("rotate_to_code_backward"),
    define<&barlow_twins_loss, 2>("barlow_twins_loss"),
    define<&barlow_twins_loss_backward, 2>("barlow_twins_loss_backward"),
    define<&vicreg_loss, 2>("vicreg_loss"),
    define<&vicreg_loss_backward, 2>("vicreg_loss_backward"),
    define<&vibcreg_loss, 2>("vibcreg_loss"),
    define<&vibcreg_loss_backward, 2>("vibcreg_loss_backward"),
    define<&fused_linear, 3, 2, 3, 4, 6>("fused_linear"),  // bias, norm_weight, residual, pre
    define<&rms_norm_backward, 2, 4, 5>("rms_norm_backward"),
    define<&attend, 4, 1, 2, 3, 4, 5>("masked_attention"),                              // all but qkv and out
    define<&attend_backward, 4, 1, 2, 3, 4, 5, 8, 9, 10>("masked_attention_backward"),  // and the gradients of these
    define<&iter_norm, 3, 2>("iter_norm"),                                              // saved
    define<&iter_norm_backward, 3>("iter_norm_backward"),
    define<&unmask_step, 4, 1, 4, 5, 7>("unmask_step"),  // unconditional, positions, counts, remaining
    {},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }

#endif
