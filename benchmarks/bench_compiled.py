"""VectorQuantize under torch.compile, ours and vector-quantize-pytorch's, each beside itself without it."""

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
        running = {}
        torch.compiler.reset()  # or the second case would be compiled for any shape
        for whose, module in modules(K, D, options, device).items():
            running[whose] = calls(module, MODE, M, D, device, compiled=True)
            running[PLAIN.format(whose)] = calls(module, MODE, M, D, device)
        times = timings(running, seconds, device)
        if "original" not in times:
            times["original"] = Timing(None, "vector-quantize-pytorch is not installed")
        yield rows(f"{name}: {M} x {K} x {D}", times, MODE)
