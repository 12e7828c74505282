"""What every program shares: one-line errors, exit codes, the choice of device."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from ncfast.engine.device import usable_device
from ncfast.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def run(main: Callable[[], None], on_interrupt: str = "interrupted") -> NoReturn:
    """Runs a program: 0 when done, 2 and one line after a user's mistake, 130 after Ctrl-C."""
    try:
        main()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except OSError as error:
        # About a file that is named it is the system's word on what the user asked for, not a mistake in the program.
        if error.filename is None or error.strerror is None:
            raise
        print_error(UserError(f"{error.filename}: {error.strerror}; check this path"))
        sys.exit(2)
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def print_error(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def choose_device(name: str, local_rank: int | None = None) -> tuple[torch.device, str]:
    """The device and why: "auto" is the GPU when torch sees one.

    local_rank: of several processes on this machine, which take a GPU each.
    """
    if local_rank is not None and name != "cpu" and (name != "auto" or torch.cuda.is_available()):
        return gpu_of_process(name, local_rank)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"torch sees {torch.cuda.get_device_name()}"
        threads = torch.get_num_threads()
        return torch.device("cpu"), f"torch {torch.__version__} sees no GPU; {threads} threads"
    return usable_device(name), "as asked"


def gpu_of_process(name: str, local_rank: int) -> tuple[torch.device, str]:
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: of several processes each takes its own GPU; give --device cuda, or cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torch sees {torch.cuda.device_count()} GPUs for {local_rank + 1} processes or more; start as many "
            "processes as GPUs, or give --device cpu"
        )
    return torch.device("cuda", local_rank), f"{torch.cuda.get_device_name(local_rank)}; a GPU for each process"
