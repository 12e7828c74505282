"""Compiles Triton's kernels without a GPU, and says what they take."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

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
