"""How a program starts: the choice of device, and what can begin beside the imports."""

import contextlib
import ctypes
import os
import sys
import threading
from typing import TYPE_CHECKING

from ncfast.errors import UserError

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def check_instruction_set() -> None:
    """Raises UserError for one in NCFAST_ISA that this machine does not have."""
    from ncfast.ops import dispatch

    module, _ = dispatch.load_module("_C")
    asked = os.environ.get("NCFAST_ISA")
    if module is not None and asked and asked not in module.isas():
        raise UserError(f"NCFAST_ISA is one of {', '.join(module.isas())} on this machine; got {asked!r}")


def start_driver(device: str) -> None:
    """Has the driver of a GPU start beside the imports that follow: it takes half a second."""
    if device == "cpu" or sys.platform != "linux":
        return

    def start() -> None:
        with contextlib.suppress(OSError, AttributeError):  # there is none
            ctypes.CDLL("libcuda.so.1").cuInit(0)

    threading.Thread(target=start, daemon=True).start()


def choose_device(name: str, local_rank: int | None = None) -> "tuple[torch.device, str]":
    """The device and why: "auto" is the GPU when torch sees one. A GPU becomes the current one: nothing lands on
    another by default. For programs alone: torch's compiler is left out, and on a CPU freed memory kept.

    local_rank: of several processes on this machine, which take a GPU each.
    """
    import torch

    check_instruction_set()
    leave_compiler_out()
    device, reason = find_device(name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        threading.Thread(target=prepare_triton, daemon=True).start()
    else:
        keep_freed_memory()
    return device, reason


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next tensors, and not hand it to the system, which clears it each time: a
    tenth of a training step on a CPU. A program's memory is then its peak to its end."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that all versions take


def leave_compiler_out() -> None:
    """Has optimisers not import torch.compile's modules, for a second or several, only to tell it to leave them alone.
    For programs, which compile nothing with it."""
    from torch.optim import Optimizer

    for method in vars(Optimizer).values():
        function, code = getattr(method, "__wrapped__", None), getattr(method, "__code__", None)
        if function is not None and code is not None and code.co_filename.endswith("_compile.py"):
            setattr(function, "__dynamo_disable", function)


def prepare_triton() -> None:
    """Triton hashes itself before it looks for the first kernel, a third of a second; beside what comes before that."""
    with contextlib.suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()


def find_device(name: str, local_rank: int | None) -> "tuple[torch.device, str]":
    import torch

    from ncfast.engine.device import usable_device

    if local_rank is not None and name != "cpu" and (name != "auto" or torch.cuda.is_available()):
        return gpu_of_process(name, local_rank)
    if name == "auto":
        if torch.cuda.is_available():
            device = usable_device("cuda")
            return device, f"torch sees {torch.cuda.get_device_name(device)}"
        threads = torch.get_num_threads()
        return torch.device("cpu"), f"torch {torch.__version__} sees no GPU; {threads} threads"
    return usable_device(name), "as asked"


def gpu_of_process(name: str, local_rank: int) -> "tuple[torch.device, str]":
    import torch

    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: of several processes each takes its own GPU; give --device cuda, or cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torch sees {torch.cuda.device_count()} GPUs for {local_rank + 1} processes or more; start as many "
            "processes as GPUs, or give --device cpu"
        )
    return torch.device("cuda", local_rank), f"{torch.cuda.get_device_name(local_rank)}; a GPU for each process"
