"""The kernels in CUDA, and nearest_code's in Triton, compile and keep their registers on a machine without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from offline import compile_offline, needs_triton

ROOT = Path(__file__).resolve().parents[2]


@needs_triton
@pytest.mark.parametrize("z", ["*fp32", "*bf16"])
def test_triton_kernels_compile_offline(z):
    from ncfast.ops.triton.nearest_code import kernel_blocks

    types = {"z": z, "codebook": "*fp32", "indices": "*i64"}
    types |= dict.fromkeys(("products", "squares", "underflow"), "fp32")
    jobs = [
        ("nearest_code_kernel", types, {**kernel_blocks(K, D), "K": K, "D": D})
        for K, D in ((32, 64), (64, 64), (1024, 256))
    ]
    for used in compile_offline("ncfast.ops.triton.nearest_code", jobs):
        assert used["stack"] == 0
        assert used["fused_float64"] == 0  # or of equal codes one may be nearer than the other


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", ["masked_attention", "nearest_code"])
def test_cuda_kernels_do_not_spill(source, tmp_path):
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-c", str(ROOT / f"csrc/cuda/{source}.cu")]
    for architecture in ("80", "90a"):
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert set(re.findall(r"for '(sm_\w+)'", done.stderr)) == {"sm_80", "sm_90a"}
    assert set(spills) == {("0", "0")}, done.stderr
    # What ptxas says when products on the tensor cores would wait for each other.
    assert "serialized" not in done.stderr, done.stderr
