"""What every program shares: one-line errors, exit codes, the choice of device."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from ncfast.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)


def run(main: Callable[[], None], on_interrupt: str = "interrupted") -> NoReturn:
    """Runs a program: 0 when done, 2 and one line after a user's mistake, 130 after Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device and why: "auto" is the GPU when torch sees one."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"torch sees {torch.cuda.get_device_name()}"
        threads = torch.get_num_threads()
        return torch.device("cpu"), f"torch {torch.__version__} sees no GPU; {threads} threads"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device, "as asked"
