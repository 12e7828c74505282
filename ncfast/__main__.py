"""The command `ncfast`: `ncfast train ...` does what `python -m ncfast.train ...` does."""

import argparse
import runpy
import sys
from typing import NoReturn

from ncfast.cli.parser import Parser, run
from ncfast.version import __version__

PROGRAMS = {
    "train": "train both stages on one data set",
    "generate": "write generated series to HDF5",
    "evaluate": "measure a trained run",
    "reproduce": "train and measure the cells of the paper's table",
    "info": "what is installed and what can run here",
}


def make_parser() -> Parser:
    lines = "\n".join(f"  {name:<10} {what}" for name, what in PROGRAMS.items())
    parser = Parser(
        prog="ncfast",
        usage="ncfast PROGRAM [options]",
        description=f"PROGRAM is one of these, each with its own --help:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ncfast {__version__}")
    parser.add_argument("program", choices=PROGRAMS, metavar="PROGRAM", help=argparse.SUPPRESS)
    return parser


def run_program() -> None:
    name = make_parser().parse_args(sys.argv[1:2] or ["--help"]).program
    del sys.argv[1]
    runpy.run_module(f"ncfast.{name}", run_name="__main__", alter_sys=True)


def main() -> NoReturn:
    run(run_program)


if __name__ == "__main__":
    main()
