"""VectorQuantize under torch.compile, ours and vector-quantize-pytorch's, each beside itself as it is called plainly.

The time of compiling is in the JSON, as `compile_seconds`.
"""

import time
from collections.abc import Iterator

import torch
from bench_vector_quantize import SHAPES, calls, modules
from common import Timing, rows, timings

CASES = ("K = 1024", "TimeVQVAE")
MODE = "forward + backward"
PLAIN = "{}, not compiled"


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for name in CASES:
        M, K, D, options = SHAPES[name]
        running, compiling = {}, {}
        torch.compiler.reset()
        for whose, module in modules(K, D, options, device).items():
            running[whose] = calls(module, MODE, M, D, device, compiled=True)
            begin = time.perf_counter()
            running[whose][0]()
            compiling[whose] = round(time.perf_counter() - begin, 1)
            running[PLAIN.format(whose)] = calls(module, MODE, M, D, device)
        times = timings(running, seconds, device)
        if "original" not in times:
            times["original"] = Timing(None, "vector-quantize-pytorch is not installed")
        yield rows(f"{name}: {M} x {K} x {D}", times, MODE, compile_seconds=compiling)
