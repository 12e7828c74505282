"""The implementations of an operation, for its tests: each with its device and its instruction set."""

import importlib.util
import os
from collections.abc import Callable
from contextlib import contextmanager
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


if GPU == "cpu" and importlib.util.find_spec("triton") is not None:
    import interpreter

    interpreter.quicken()
