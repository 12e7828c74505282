"""What memory there is: sizes that cannot fit are refused before anything is allocated, and running out is one line.

A system that promises more memory than it has ends the process that uses it, without a word; hence the look ahead.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ncfast.errors import UserError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
# In errors that have no type of their own: of PyTorch's allocator on a CPU, of the driver, which Triton and CUDA graphs
# ask too, of cuBLAS and cuDNN when they make their handles and workspaces, of NCCL.
WORDS_OF_EXHAUSTION = (
    *("can't allocate memory", "not enough memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory"),
    *(
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ),
    *("CUFFT_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED", "Cuda failure 2 'out of memory'"),
)


def available_bytes(device: torch.device) -> int | None:
    """How much can still be allocated there; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        available = sum(1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    return min([available, *cgroup_limits()])


def cgroup_limits() -> Iterator[int]:
    """Bytes that a container or a job may use: of this process's control group and those above it, versions 2 and 1."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = root / group.strip("/")  # in a container it may not be there, but the root is the container's own
        for each in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit, or "max"
                yield int((each / name).read_text())
            if each == root:
                break


def check_fits(needed: int, device: torch.device, what: str, advice: str) -> None:
    """Raises UserError when `what` takes more than there is. `needed` is a lower bound: what fits is not refused."""
    available = available_bytes(device)
    if available is not None and needed > available:
        raise UserError(
            f"{what} takes at least {human(needed)} of memory, and {device} has {human(available)}; {advice}"
        )


@contextlib.contextmanager
def exhaustion_explained(advice: str) -> Iterator[None]:
    """Out of memory inside the block, or inside the function that this decorates, is a UserError with the advice."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"out of memory; {advice}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in WORDS_OF_EXHAUSTION):
            raise
        raise UserError(f"out of memory; {advice}") from error


def human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
