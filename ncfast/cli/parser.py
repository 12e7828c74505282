"""What every program shares: one-line errors and exit codes."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ncfast.build import warn_if_never_built
from ncfast.config import IMPLEMENTATIONS
from ncfast.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but for values that begin with a minus and a digit, such as --labels -1,1: they are no flags."""
        joined: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if re.match(r"-\.?\d", word) and joined and re.fullmatch(r"--[\w-]+", joined[-1]):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_args(joined, namespace)

    def answer_help(self, command_line: Sequence[str] | None) -> None:
        """Prints the help and ends, if that is asked for: before the imports that take a second."""
        if {"-h", "--help"} & set(sys.argv[1:] if command_line is None else command_line):
            self.parse_args(["--help"])


def words(text: str) -> list[str]:
    """The type of an argument "a,b,c"."""
    return [word.strip() for word in text.split(",") if word.strip()]


def run(main: Callable[[], None], on_interrupt: str = "interrupted") -> NoReturn:
    """Runs a program: 0 when done, 2 and one line after a user's mistake, 130 after Ctrl-C."""
    try:
        check_implementation()
        warn_if_never_built(program=True)
        main()
    except UserError as error:
        print_error(error)
        end(2)
    except BrokenPipeError:  # what read the output, such as `head`, has ended
        os._exit(141)
    except OSError as error:
        # About a file that is named it is the system's word on what the user asked for, not a mistake in the program.
        if error.filename is None or error.strerror is None:
            raise
        print_error(UserError(f"{error.filename}: {error.strerror}; check this path"))
        end(2)
    except KeyboardInterrupt:
        print(on_interrupt, file=sys.stderr)
        end(130)
    end(0)


def check_implementation() -> None:
    """Raises UserError for a word in NCFAST_IMPL that names none."""
    asked = os.environ.get("NCFAST_IMPL", "auto")
    if asked not in IMPLEMENTATIONS:
        raise UserError(f"NCFAST_IMPL is one of {', '.join(IMPLEMENTATIONS)}; got {asked!r}")


def end(code: int) -> NoReturn:
    """Ends the process at once: everything is written, and taking libraries down takes half a second. Where other
    processes may be gone, it would also wait for their messages, and a thread that still imports a library aborts."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def print_error(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
