"""The device that a user names, and the rule that nothing depends on which GPU happens to be the current one."""

import contextlib

import torch

from ncfast.errors import UserError


def usable_device(device: str | torch.device) -> torch.device:
    """The device, once something could be put there; "cuda" is the current GPU, by its number, and "auto" that where
    torch sees one, else the CPU.

    Raises:
        UserError: no device of that name, or one that this machine or this torch does not have.
    """
    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--device {device} cannot be used: {reason}; `python -m ncfast.info` lists what can"
        ) from error
    return device


def kind(device: torch.device) -> str:
    """Devices of one kind round alike."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside the block a GPU is the current one: for what PyTorch, CUDA or Triton takes from there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
