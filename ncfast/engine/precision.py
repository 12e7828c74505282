"""In which number format products and convolutions are computed: `--precision`. Weights are float32 in all of them.

fp32: float32.
tf32: operands rounded to TF32 (10 bits of mantissa); sums and everything else float32.
bf16: operands and activations bfloat16 (7 bits); sums, transforms, codebook, statistics and losses as in tf32.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch

from ncfast.config import PRECISIONS
from ncfast.engine.cuda_graph import RETIRED
from ncfast.errors import UserError

ON_CPU, ON_GPU = "fp32", "tf32"  # of what is not said
# Flags, captures and Triton's hooks are the process's: threads take turns in what launches kernels one by one or
# captures them. Replays of CUDA graphs are outside.
ONE_AT_A_TIME = threading.RLock()


def resolve_precision(asked: str | None, device: torch.device, *, fall_back: bool = False) -> str:
    """The precision on a device.

    Args:
        asked: None for the device's own.
        fall_back: take the device's own where it does not have what is asked for.

    Raises:
        UserError: a precision that the device does not have.
    """
    own = ON_GPU if device.type == "cuda" else ON_CPU
    reason = why_not(asked, device)
    if asked is None or (reason is not None and fall_back):
        return own if why_not(own, device) is None else "fp32"
    if reason is not None:
        raise UserError(f"--precision {asked}: {reason}; use --precision fp32")
    return asked


def why_not(precision: str | None, device: torch.device) -> str | None:
    if precision not in (None, *PRECISIONS):
        return f"there are {', '.join(PRECISIONS)}"
    if precision == "tf32" and device.type != "cuda":
        return f"TF32 is a format of NVIDIA GPUs, and the device is {device.type}"
    if precision in ("tf32", "bf16") and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no tensor cores for it"
    return None


@contextlib.contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Inside the block convolutions and products are of that precision, and convolutions always sum in one order. A GPU
    is the current one, and no other thread is inside: whatever launches convolutions, products or Triton kernels on a
    GPU, or captures, is in such a block, and nothing that takes long besides. On a CPU that goes for bf16 alone.

    For bf16 the function that computes needs `autocast` as well: a block that is left and entered again for each call,
    since inside one the rounded weights are kept.
    """
    if device.type != "cuda":
        with ONE_AT_A_TIME if precision == "bf16" else keeping_rounded_weights():
            if precision == "bf16":
                torch.clear_autocast_cache()  # of a step before, in a block of fp32
            yield
        return
    rounded = precision != "fp32"
    # cuDNN may otherwise sum in the order in which blocks happen to finish, and PyTorch lets it round to TF32.
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=rounded)
    with ONE_AT_A_TIME:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = rounded
        try:
            with torch.cuda.device(device), flags:
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
            RETIRED.clear()


@contextlib.contextmanager
def keeping_rounded_weights() -> Iterator[None]:
    """What autocast has rounded is the process's, and the end of a thread's outermost block of it, where autocast is
    off too, drops all. Inside this none is the outermost: a step in bf16 of another thread rounds each weight once."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
