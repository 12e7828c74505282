"""Which implementation of an operation runs: one knob (`impl=`), one environment variable (NCFAST_IMPL), one rule.

Each operation hands `choose` a table from implementation name to None ("can run this call") or the reason why it
cannot, fastest first. `auto` takes the first that can; a request by name that cannot be met raises, with the reason.
"""

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ncfast.build import NEVER_BUILT, build_record, warn_if_never_built

NAMES = ("auto", "reference", "cpp", "cuda", "triton")
KEYS = {"cpp": ("CPU",), "cuda": ("CUDA",), "triton": ("CUDA", "CPU")}  # where PyTorch looks for them
DEFAULT = os.environ.get("NCFAST_IMPL", "auto")

# The codes of csrc/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# One library holds every operator: torch.ops.ncfast.<stem>_<implementation>.
library = torch.library.Library("ncfast", "DEF")

# While `engine.compile_ahead` runs, Triton kernels that are not compiled yet write nothing.
kernels_left_out = False


def empty_indices(*shape: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """To be filled by a kernel with what others take for indices: none of them ever points nowhere."""
    make = torch.zeros if kernels_left_out else torch.empty
    return make(*shape, dtype=dtype, device=device)


def constant_when_compiled(function: Callable) -> Callable:
    """What torch.compiler.assume_constant_result does, which imports all of TorchDynamo, a second, for it."""
    function._dynamo_marked_constant = True
    return function


@constant_when_compiled  # inside what torch.compile traces, torch 2.10 and 2.11 say that all of it is exported
def exporting() -> bool:
    """Whether torch.export or torch.onnx.export, its older way too, is making a program of what runs."""
    onnx = sys.modules.get("torch.onnx")
    return torch.compiler.is_exporting() or (onnx is not None and onnx.is_in_onnx_export())


def choose(operation: str, impl: str | None, why_not: dict[str, str | None]) -> str:
    """The implementation to run. `impl` None or "auto" defers to NCFAST_IMPL, then to the fastest that can."""
    if impl is None or impl == "auto":
        # The variable is a preference over all operations: it binds those that have such an implementation.
        if DEFAULT not in NAMES:
            raise ValueError(f"NCFAST_IMPL is one of {', '.join(NAMES)}; got {DEFAULT!r}")
        impl = DEFAULT if DEFAULT in why_not else "auto"
        # An exported program runs where this package is not, so it is made of PyTorch's operators.
        if exporting():
            impl = "reference"
    if impl == "auto":
        for name in why_not:
            if why_not[name] is None:
                if name == "reference" and why_not.get("cpp") == NEVER_BUILT:
                    say_never_built()
                return name
    if impl not in why_not:
        raise ValueError(f"{operation} has the implementations {', '.join(why_not)} (or auto); got impl={impl!r}")
    if why_not[impl] is not None:
        raise RuntimeError(f"{operation}: impl={impl!r} cannot run this call: {why_not[impl]}")
    return impl


@constant_when_compiled
def say_never_built() -> None:
    warn_if_never_built()


@functools.cache
def load_module(name: str) -> tuple[ModuleType | None, str | None]:
    """(ncfast.<name>, None), or (None, why it is not there)."""
    fact = build_record()["cuda" if name == "_C_cuda" else "cpp"]
    if not fact["built"]:
        return None, fact["why"]
    try:
        return importlib.import_module(f"ncfast.{name}"), None
    except ImportError as error:
        return None, f"ncfast.{name} was built but does not load ({error}); reinstall ncfast with this Python"


@constant_when_compiled
def why_not_cpp(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}, and this is the CPU implementation"
    return load_module("_C")[1]


@functools.cache
def why_not_cuda_here() -> str | None:
    if not torch.version.cuda:
        return f"this torch ({torch.__version__}) has no CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return load_module("_C_cuda")[1]


@functools.cache
def why_not_cuda_on(device: torch.device) -> str | None:
    """Why a GPU that torch can use cannot run the CUDA module, by what its build recorded."""
    fact = build_record()["cuda"]
    architectures = fact.get("architectures", ["80", "90a"])
    capability = torch.cuda.get_device_capability(device)
    form = form_for(capability, architectures)
    if form is None:
        built, here = ", sm_".join(architectures), "{}{}".format(*capability)
        mend = (
            f"install ncfast again with NCFAST_CUDA_ARCHITECTURES={here}" if capability >= (8, 0) else "sm_80 is needed"
        )
        return f"it was compiled for sm_{built}, and this GPU is sm_{here}: {mend}"
    driver, release = driver_version(), tuple(fact.get("release", (0, 0)))
    # A driver runs what any CUDA of its generation compiled, but PTX only of those that are not newer.
    if driver is not None and driver < (release if form == "ptx" else (release[0], 0)):
        return (
            "the driver is for CUDA {}.{}, and it was compiled by CUDA {}.{}: update the driver, or install ncfast "
            "again with an older nvcc".format(*driver, *release)
        )
    return None


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows; None where it does not say."""
    number = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        failed = driver.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else divmod(number.value // 10, 100)  # 13020 is 13.2


def form_for(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """In which form a GPU can run what was compiled for these: as machine code, which is for one generation from its
    own number on (with an "a", for that number alone), as PTX, which is there of the first one, or not at all."""
    number = 10 * capability[0] + capability[1]
    plain = [int(each) for each in architectures if each.isdigit()]
    if capability[0] == 9:  # where the kernels take wgmma, which only 90a has
        plain = []
    if f"{number}a" in architectures or any(each // 10 == capability[0] and each <= number for each in plain):
        return "cubin"
    return "ptx" if plain and architectures[0].isdigit() and plain[0] <= number else None


@constant_when_compiled
def why_not_cuda(device: torch.device) -> str | None:
    missing = why_not_cuda_here()
    if missing is not None:
        return missing
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and this is the CUDA implementation"
    return why_not_cuda_on(device)


@constant_when_compiled
def shared_memory_of(device: torch.device) -> int:
    """Bytes that a block of a GPU can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def why_not_triton_here() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def triton_interpreted() -> bool:
    """Triton decides at import whether it compiles or interprets, so the variable is read once."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@constant_when_compiled
def why_not_triton(device: torch.device) -> str | None:
    missing = why_not_triton_here()
    if missing is not None:
        return missing
    if device.type != "cuda" and not triton_interpreted():
        return f"the tensors are on {device.type}; off a GPU Triton runs only under TRITON_INTERPRET=1"
    return None


def table(device: torch.device, **unfit: str | None) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run there.

    unfit: by name, the implementations that an operation has beside its reference, and why the one cannot take this
        call, or None.
    """
    # Without a GPU Triton is interpreted, for tests: right, but the slowest of all.
    order = ("cuda", "cpp", "triton", "reference") if device.type == "cuda" else ("cuda", "cpp", "reference", "triton")
    found = {}
    for name in order:
        if name == "reference":
            found[name] = None
        elif name in unfit:
            found[name] = WHY_NOT[name](device) or unfit[name]
    return found


WHY_NOT = {"cuda": why_not_cuda, "cpp": why_not_cpp, "triton": why_not_triton}


def native(module: str, function: str, *arguments: object) -> None:
    """Calls a function of a compiled module. Tensors go as addresses, None as the null one, dtypes as their codes."""
    numbers = [x if type(x) is int else x.data_ptr() if isinstance(x, Tensor) else CODES.get(x, x) for x in arguments]
    getattr(load_module(module)[0], function)(*numbers)


CODES = {**DTYPE_CODES, None: 0}


def triton(name: str, fills: Callable | None = None) -> Callable:
    """The function "stem.function" of `ncfast.ops.triton`, which is imported when it is called.

    fills: the arguments -> empty results; then the function takes these too, and writes them.
    """
    stem, function = name.split(".")

    def call(*arguments):
        kernel = getattr(importlib.import_module(f"ncfast.ops.triton.{stem}"), function)
        if fills is None:
            return kernel(*arguments)
        results = fills(*arguments)
        kernel(*arguments, *((results,) if isinstance(results, Tensor) else results))
        return results

    return call


def operator(schema: str, fake: Callable, **implementations: Callable) -> dict[str, Callable]:
    """Registers the operator `stem_implementation` for each implementation, and returns their overloads.

    schema: "stem(Tensor x, ...) -> Tensor".
    fake: the arguments -> empty results, of which torch.compile asks shapes and dtypes.
    """
    stem, _, signature = schema.partition("(")
    for implementation, function in implementations.items():
        name = f"{stem}_{implementation}"
        library.define(f"{name}({signature}")
        for key in KEYS[implementation]:
            library.impl(name, function, key)
        torch.library.register_fake(f"ncfast::{name}", fake, lib=library)
    return {each: getattr(torch.ops.ncfast, f"{stem}_{each}").default for each in implementations}
