"""The device that a user names."""

import torch

from ncfast.errors import UserError


def usable_device(device: str | torch.device) -> torch.device:
    """The device, once something could be put there.

    Raises:
        UserError: no device of that name, or one that this machine or this torch does not have.
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--device {device} cannot be used: {reason}; `python -m ncfast.info` lists what can"
        ) from error
    return device
