"""What the benchmark files share: timing that alternates between peers, rows, a Markdown table, the machine in words.

Each `bench_<name>.py` has `cases(device, seconds)`, which yields the rows of one case after the other as dicts, and
`run.py` makes its table and its JSON of them. `pytest benchmarks/ --benchmark-only` times each peer alone.
"""

import ctypes
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ncfast.ops import dispatch

OURS = "ncfast"


class Timing(NamedTuple):
    """Median seconds of a call, None for a peer that cannot take part, and how it was timed, or why not."""

    seconds: float | None
    how: str


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float = 3.0, rounds: int = 3, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that what else the machine does falls on all of them alike.

    Rounds go on for `seconds`, at least `rounds` of them, after two that only warm up. A short call is made twice and
    timed once: it starts with its own data in cache and its own threads awake, whoever had the turn before.
    """
    times = {name: [] for name in calls}
    for call in calls.values():  # compiles what it needs, which would pass for a long call
        call()
    first = {name: timed(call, device) for name, call in calls.items()}
    repeats = dict.fromkeys(calls, 1)
    if device == "cuda":  # an idle GPU waits for the host's first launch, which must not count
        repeats = {name: max(1, min(100, round(1e-3 / timed(call, device)))) for name, call in calls.items()}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            if first[name] < 0.1:
                call()
            times[name].append(timed(call, device, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(call: Callable[[], object], device: str = "cpu", repeats: int = 1) -> float:
    """Seconds of a call; on a GPU the mean of `repeats` of them, by events."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return max(start.elapsed_time(end), 1e-6) * 1e-3 / repeats
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copies(size: int, device: str) -> int:
    """How many inputs of `size` bytes take turns, so that on a GPU they come from memory, not from its cache."""
    return 1 if device == "cpu" else max(1, min(16, 2**28 // max(size, 1)))


def timings(
    peers: dict[str, Sequence[Callable[[], object]]], seconds: float, device: str = "cpu", capture: bool = True
) -> dict[str, Timing]:
    """Times each peer's calls, which do the same with inputs of their own (`copies`); on a CPU the first of them.

    On a GPU they are one CUDA graph, so that the host's time does not count. What cannot be captured, or shall not, is
    called eagerly; what cannot run at all says why.
    """
    if device != "cuda":
        times = interleaved({name: calls[0] for name, calls in peers.items()}, seconds)
        return {name: Timing(time, "eager") for name, time in times.items()}
    running, how = {}, {}
    for name, calls in peers.items():
        try:
            running[name], how[name] = captured(calls) if capture else (one_by_one(calls), "eager")
        except Exception as error:  # which class it is depends on the peer
            how[name] = reason(error)
    times = interleaved(running, seconds, device=device) if running else {}
    return {name: Timing(times[name] / len(peers[name]) if name in times else None, how[name]) for name in peers}


def captured(calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], str]:
    try:
        return graph_of(calls), "graph"
    except Exception as error:
        torch.cuda.synchronize()
        run = one_by_one(calls)
        run()
        return run, f"eager: {reason(error)}"


def one_by_one(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    return run


def graph_of(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Replays all of them, one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles and allocates what it needs
            call()
        torch.cuda.set_sync_debug_mode("error")  # what waits for the GPU fails here, not half-way through a capture
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # On the stream of the warm-up: a backward pass runs where its forward pass did.
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def reason(error: BaseException) -> str:
    """An exception in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]


def rows(
    case: str, times: dict[str, Timing], what: str = "", unit: str = "GFLOP/s", **more: dict[str, object]
) -> list[dict]:
    """One row a peer. `more`: columns that some peers have, by peer: `rate` in `unit`, `mib`, `error`; others are in
    the JSON only.
    """
    ours = times[OURS].seconds if OURS in times else None
    made = []
    for name, (seconds, how) in times.items():
        ratio = seconds / ours if seconds and ours else None
        row = {"case": case, "what": what, "peer": name, "seconds": seconds, "ratio": ratio, "how": how, "unit": unit}
        made.append(row | {column: values[name] for column, values in more.items() if name in values})
    return made


def show(value: float | None, form: str) -> str:
    """A cell, "-" where there is nothing to show."""
    return "-" if value is None else format(value, form)


def flat(cases: Iterable[list[dict]]) -> list[dict]:
    return [row for case in cases for row in case]


def peak_memory(call: Callable[[], object], device: str = "cpu") -> float:
    """MiB that a call adds at most: by CUDA's allocator, or by growth of the process, sampled about every 0.2 ms.

    NaN where the system has no /proc.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return math.nan
    page = os.sysconf("SC_PAGE_SIZE")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
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
