"""The implementations of an operation, for its tests: each with its device and its instruction set."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ncfast.ops import dispatch

GPU = "cuda" if torch.cuda.is_available() else "cpu"


class Implementation(NamedTuple):
    operation: Callable
    table: Callable  # (device, *dtypes of the floating-point arguments) -> implementation: None or why it cannot run
    name: str
    device: str = "cpu"
    isa: str | None = None

    def why_not(self, *dtypes):
        reason = self.table(torch.device(self.device), *dtypes)[self.name]
        if reason is None and self.isa is not None and self.isa not in dispatch.load_module("_C")[0].isas():
            return f"this machine has no {self.isa}"
        return reason

    def skip_unless_it_runs(self, *dtypes):
        reason = self.why_not(*dtypes)
        if reason is not None:
            pytest.skip(f"{self.name}: {reason}")

    @property
    def slow(self):
        return self.name == "triton" and self.device == "cpu"  # the interpreter

    def __call__(self, *arguments, **options):
        """The operation by this implementation, back on the CPU; a skip with dispatch's reason where it cannot run."""
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        self.skip_unless_it_runs(*(tensor.dtype for tensor in tensors if tensor.is_floating_point()))
        moved = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in arguments]
        options = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        with isa(self.isa):
            result = self.operation(*moved, impl=self.name, **options)
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(part.cpu() for part in result)


@contextmanager
def isa(name):
    before = os.environ.pop("NCFAST_ISA", None)
    if name is not None:
        os.environ["NCFAST_ISA"] = name
    try:
        yield
    finally:
        os.environ.pop("NCFAST_ISA", None)
        if before is not None:
            os.environ["NCFAST_ISA"] = before


def implementations(operation, table, *, cuda=False):
    """By test id: the reference, C++ with each instruction set, Triton (interpreted without a GPU) and maybe CUDA."""
    by_id = {
        "reference": ("reference",),
        "cpp-avx512": ("cpp", "cpu", "avx512"),
        "cpp-avx2": ("cpp", "cpu", "avx2"),
        "cpp-neon": ("cpp", "cpu", "neon"),
        "cpp-portable": ("cpp", "cpu", "portable"),
        "triton": ("triton", GPU),
        **({"cuda": ("cuda", GPU)} if cuda else {}),
    }
    return {name: Implementation(operation, table, *fields) for name, fields in by_id.items()}


def each(implementations, *names):
    """Parametrizes `run` over all implementations, or over those whose ids start with one of `names`."""
    chosen = {name: run for name, run in implementations.items() if not names or name.startswith(names)}
    return pytest.mark.parametrize("run", chosen.values(), ids=chosen)


@contextmanager
def poisoned_memory():
    """Memory that torch hands out is full of NaN, or the largest integer: an element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def look_through_the_language_once():
    """Triton's interpreter does it again for each call of a function inside a kernel: a third of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    whole = interpreter._patch_lang
    nothing = types.SimpleNamespace(restore=lambda: None)

    def unless_done(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        return whole(fn) if any(tl.core.is_builtin(language.load) for language in languages) else nothing

    interpreter._patch_lang = unless_done


if GPU == "cpu" and importlib.util.find_spec("triton") is not None:
    look_through_the_language_once()

# In a process of its own: in this one triton may have been imported as its interpreter. It answers a line with a line.
COMPILE_TRITON = """
import importlib, json, os, re, subprocess, sys, tempfile, traceback
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(module, jobs, capability):
    for name, types, blocks in jobs:
        kernel = getattr(importlib.import_module(module), name)
        constants = {name: value for name, value in blocks.items() if name in kernel.arg_names}
        options = {name: value for name, value in blocks.items() if name not in kernel.arg_names}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        # Pointers are aligned, as those of torch's allocations are.
        aligned = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(signature.values()) if type.startswith("*")}
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            cuobjdump = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")
            usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        yield {
            "ptx": made.asm["ptx"],
            "shared": made.metadata.shared,
            "stack": int(re.search(r"STACK:([0-9]+)", usage.stdout)[1]),
            "fused_float64": made.asm["ptx"].count("fma.rn.f64"),
        }

for line in sys.stdin:
    try:
        answer = list(compiled(*json.loads(line)))
    except Exception:
        answer = traceback.format_exc()
    print("ANSWER", json.dumps(answer), flush=True)
"""


@functools.cache
def offline_compiler():
    """The process, which ends with this one, and the folder of its cache."""
    cache = tempfile.TemporaryDirectory()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": cache.name, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([sys.executable, "-c", COMPILE_TRITON], env=environment, **pipes), cache


def compile_offline(module, jobs, capability=90):
    """Compiles (kernel, types, constants and options) for sm_90, or what is given, without a GPU; arguments without a
    type are i32.

    Checks what the kernels promise of every GPU: no atomics, and sums that keep their subnormals (exp2 may flush its
    own). Returns for each the bytes of shared memory of a program, and of a thread's stack, where registers go that do
    not fit, and how many sums of float64 are fused with a product.
    """
    process, _ = offline_compiler()
    print(json.dumps([module, jobs, capability]), file=process.stdin, flush=True)
    answer = next((line for line in process.stdout if line.startswith("ANSWER ")), None)
    assert answer is not None, f"the compiler ended with {process.wait()}"
    kernels = json.loads(answer.removeprefix("ANSWER "))
    assert isinstance(kernels, list), kernels
    assert len(kernels) == len(jobs)
    for kernel in kernels:
        assert kernel["ptx"].count(".visible .entry") == 1
        # A float64 logarithm starts from an rcp.approx, a float32 exponential ends in ex2, and a float64 one takes abs
        # of a number's upper half: they have no other form.
        assert not re.search(r"\b(atom|red)\.|(?<!\brcp\.approx)(?<!\bex2\.approx)(?<!\babs)\.ftz", kernel["ptx"])
    return kernels
