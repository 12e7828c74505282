"""nearest_code's GPU kernels compile, and keep their registers, on a machine without a GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc/cuda/nearest_code.cu"

COMPILE_TRITON = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ncfast.ops.triton import nearest_code as kernels

types = {"z": sys.argv[1], "codebook": "*fp32", "half_squares": "*fp32", "indices": "*i64", "num_codes": "i64"}
types |= {"M": "i32", "K": "i32", "D": "i32", "rounding": "fp32", "underflow": "fp32"}
for kernel, blocks in (
    (kernels.nearest_code_half_square_kernel, kernels.HALF_SQUARE_BLOCKS),
    (kernels.nearest_code_score_kernel, kernels.SCORE_BLOCKS),
    (kernels.nearest_code_rescore_kernel, kernels.RESCORE_BLOCKS),
):
    constants = {name: value for name, value in blocks.items() if name in kernel.arg_names}
    options = {name: value for name, value in blocks.items() if name not in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = "".join(line for line in compiled.asm["ptx"].splitlines() if "sqrt" not in line)
    print(kernel.__name__, len(compiled.asm["cubin"]) > 0, "tf32" in ptx, ".ftz" in ptx)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("z", ["*fp32", "*bf16"])
def test_triton_kernels_compile_offline(z, tmp_path):
    # In a process of its own: in this one triton may have been imported as its interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE_TRITON, z], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The error bound holds for float32 products, not for TF32, and for sums that keep their subnormals.
    facts = [line.split() for line in done.stdout.splitlines()]
    assert facts == [
        [name, "True", "False", "False"]
        for name in ("nearest_code_half_square_kernel", "nearest_code_score_kernel", "nearest_code_rescore_kernel")
    ]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_cuda_kernels_do_not_spill(architecture, tmp_path):
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++17", "-O3", "-gencode", code, "-Xptxas", "-v", "-c", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills
    assert set(spills) == {("0", "0")}, done.stderr
    # What ptxas says when products on the tensor cores would wait for each other.
    assert "serialized" not in done.stderr, done.stderr
