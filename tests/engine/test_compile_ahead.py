"""Kernels are compiled before they are launched: for a GPU of which only the description is here."""

import os
import subprocess
import sys

import pytest
import torch

from ncfast.engine import step
from ncfast.engine.compile_ahead import compile_ahead

pytest.importorskip("triton")

# In a process of its own, as Triton compiles there, where the tests have it interpret. A launch does nothing.
PROGRAM = """
import types
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448}, load_binary=lambda *_: (1, 1, 0, 0, 1024)
    )
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    launcher_cls = staticmethod(lambda source, metadata: lambda *_: launched.append(source.fn.__name__))

driver.set_active(Driver())
compiled, launched = [], []
knobs.compilation.listener = lambda *, src, cache_hit, **_: None if cache_hit else compiled.append(src.fn.__name__)

from ncfast.engine.compile_ahead import compile_ahead
from ncfast.ops import dispatch
from ncfast.ops.triton.batch_norm import batch_norm_triton
from ncfast.ops.triton.code_stats import code_stats_triton
from ncfast.ops.triton.unmask_step import unmask_step_triton

def step():
    x = torch.randn(4, 16, 3, 5).contiguous(memory_format=torch.channels_last)
    vectors, empty = [torch.ones(16) for _ in range(4)], torch.empty(0)
    for residual, then in ((None, None), (x, 0.1)):
        saved = torch.empty(2, 2, 16)
        outputs = torch.empty_like(x), empty if then is None else torch.empty_like(x), torch.empty_like(x), saved
        batch_norm_triton(x, residual, *vectors, 2, 0.1, 1e-5, 0.2, then, False, *outputs)
    code_stats_triton(torch.randn(1, 50, 16), torch.zeros(1, 50, dtype=torch.int64), 8)
    indices.append(dispatch.empty_indices(1000, device=x.device))

indices, gpu = [], torch.device("cuda", 0)
compile_ahead(step, gpu)
assert (compiled, launched) == ([], []) and not dispatch.kernels_left_out, (compiled, launched)
assert (indices[0] == 0).all()
step()
assert compiled == [] and len(launched) == 6, (compiled, launched)
compile_ahead(step, gpu)  # an ordinary call
assert compiled == [] and len(launched) == 12, (compiled, launched)
print("ok")
"""


@pytest.mark.slow
def test_launches_find_what_was_compiled_for_them(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.stdout == "ok\n", result.stderr


def test_without_a_gpu_nothing_runs():
    compile_ahead(lambda: pytest.fail("called"), torch.device("cpu"))


def test_a_pass_leaves_modules_as_they_were():
    norm = torch.nn.BatchNorm1d(3)
    norm.attribute = "first"
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with step.as_before(norm):
        norm(torch.randn(5, 3))
        norm.attribute = "second"
        norm.register_buffer("running_mean", torch.ones(3))
    assert norm.attribute == "first"
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
