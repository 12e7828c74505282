"""What every program shares: one-line errors, exit codes, the choice of device."""

import argparse
import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from ncfast.config import IMPLEMENTATIONS
from ncfast.errors import UserError

if TYPE_CHECKING:
    import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def answer_help(self, command_line: Sequence[str] | None) -> None:
        """Prints the help and ends, if that is asked for: before the imports that take a second."""
        if {"-h", "--help"} & set(sys.argv[1:] if command_line is None else command_line):
            self.parse_args(["--help"])


def run(main: Callable[[], None], on_interrupt: str = "interrupted") -> NoReturn:
    """Runs a program: 0 when done, 2 and one line after a user's mistake, 130 after Ctrl-C."""
    try:
        check_implementation()
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
    end(0)


def check_implementation() -> None:
    """Raises UserError for a word in NCFAST_IMPL that names none."""
    asked = os.environ.get("NCFAST_IMPL", "auto")
    if asked not in IMPLEMENTATIONS:
        raise UserError(f"NCFAST_IMPL is one of {', '.join(IMPLEMENTATIONS)}; got {asked!r}")


def check_instruction_set() -> None:
    """Raises UserError for one in NCFAST_ISA that this machine does not have."""
    from ncfast.ops import dispatch

    module, _ = dispatch.load_module("_C")
    asked = os.environ.get("NCFAST_ISA")
    if module is not None and asked and asked not in module.isas():
        raise UserError(f"NCFAST_ISA is one of {', '.join(module.isas())} on this machine; got {asked!r}")


def end(code: int) -> NoReturn:
    """Ends the process at once: everything is written, and taking libraries down takes half a second. Where other
    processes may be gone, it would also wait for their messages."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def start_driver(device: str) -> None:
    """Has the driver of a GPU start beside the imports that follow: it takes half a second."""
    if device == "cpu" or sys.platform != "linux":
        return

    def start() -> None:
        with contextlib.suppress(OSError, AttributeError):  # there is none
            ctypes.CDLL("libcuda.so.1").cuInit(0)

    threading.Thread(target=start, daemon=True).start()


def print_error(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def choose_device(name: str, local_rank: int | None = None) -> "tuple[torch.device, str]":
    """The device and why: "auto" is the GPU when torch sees one. A GPU becomes the current one: nothing lands on
    another by default.

    local_rank: of several processes on this machine, which take a GPU each.
    """
    import torch

    check_instruction_set()
    device, reason = find_device(name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        threading.Thread(target=prepare_triton, daemon=True).start()
    return device, reason


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
