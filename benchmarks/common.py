"""What the benchmark files share: timing that alternates between peers, a Markdown table, the machine in words."""

import ctypes
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ncfast.ops import dispatch


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float = 3.0, rounds: int = 3, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that what else the machine does falls on all of them alike.

    Rounds go on for `seconds`, at least `rounds` of them, after one that only warms up. A short call is made twice and
    timed once: it starts with its own data in cache and its own threads awake, whoever had the turn before.
    """
    times = {name: [] for name in calls}
    first = {name: timed(call, device) for name, call in calls.items()}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            if first[name] < 0.1:
                call()
            times[name].append(timed(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(call: Callable[[], object], device: str = "cpu") -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory(call: Callable[[], object], device: str = "cpu") -> float:
    """MiB that a call adds at most: by CUDA's allocator, or by growth of the process, sampled about every 0.2 ms."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    statm, page = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE")
    start = peak = int(statm.read_text().split()[1])
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(2e-4):
            peak = max(peak, int(statm.read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return (peak - start) * page / 2**20


def fma_peak(seconds: float = 0.2) -> float | None:
    """GFLOP/s of float32 multiply-adds on torch's number of threads; None without the C++ module."""
    module, _ = dispatch.load_module("_C")
    return module and module.fma_peak(torch.get_num_threads(), seconds)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first two are numbers."""
    lines = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine(device: str = "cpu") -> str:
    """Processor, instruction set of the kernels, threads and versions: what a table must say to be compared."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    processor = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    module, reason = dispatch.load_module("_C")
    isa = os.environ.get("NCFAST_ISA") or module.isas()[0] if module else f"no C++ module: {reason}"
    return f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} cores, {isa}, torch {torch.__version__}"
