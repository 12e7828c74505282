"""What the benchmark files share: timing that alternates between peers, a Markdown table, the machine in words."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ncfast.ops import dispatch


def interleaved(calls: dict[str, Callable[[], object]], seconds: float = 3.0, rounds: int = 3) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that what else the machine does falls on all of them alike.

    Rounds go on for `seconds`, at least `rounds` of them, after one that only warms up. A short call is made twice and
    timed once: it starts with its own data in cache and its own threads awake, whoever had the turn before.
    """
    times = {name: [] for name in calls}
    first = {name: timed(call) for name, call in calls.items()}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            if first[name] < 0.1:
                call()
            times[name].append(timed(call))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fma_peak(seconds: float = 0.2) -> float | None:
    """GFLOP/s of float32 multiply-adds on torch's number of threads; None without the C++ module."""
    module, _ = dispatch.load_module("_C")
    return module and module.fma_peak(torch.get_num_threads(), seconds)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first two are numbers."""
    lines = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine() -> str:
    """Processor, instruction set of the kernels, threads and versions: what a table must say to be compared."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    processor = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    module, reason = dispatch.load_module("_C")
    isa = os.environ.get("NCFAST_ISA") or module.isas()[0] if module else f"no C++ module: {reason}"
    return f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} cores, {isa}, torch {torch.__version__}"
