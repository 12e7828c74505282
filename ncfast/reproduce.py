"""Run the paper's table again: python -m ncfast.reproduce --datasets ECG5000 TwoPatterns

Every cell is a data set, a method, its views and a seed: both stages are trained, then measured. A cell that is done is
not done again, so the same command continues what was interrupted; torchrun shares the cells among GPUs, --jobs among
processes on each, --streams among threads of a process.
"""

import argparse
import sys
from pathlib import Path

from ncfast.cli.flags import add_config_arguments, add_data_arguments
from ncfast.cli.parser import Parser, run, words
from ncfast.cli.startup import start_driver
from ncfast.config import MEASURES, METHODS, PAPER_METHODS, PRESETS, SLOW_MEASURES

PAPER = (
    *("ElectricDevices", "FordB", "FordA", "Wafer", "TwoPatterns", "StarLightCurves", "UWaveGestureLibraryAll"),
    *("ECG5000", "ShapesAll", "Mallat", "Symbols", "SonyAIBORobotSurface1", "SonyAIBORobotSurface2"),
)
VIEWS = ("gauss", "slice", "warp")
ABLATIONS = ("authors-masking", "random-embeddings", "views")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m ncfast.reproduce",
        description="Train and measure data sets x methods x views x seeds: results.csv, and table.md beside the "
        "authors' means. The same command continues.",
    )
    parser.add_argument("--datasets", nargs="+", default=PAPER, metavar="NAME", help="names or files [the paper's 13]")
    add_data_arguments(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(PAPER_METHODS),
        choices=METHODS,
        help=f"values of --ssl [the paper's: {' '.join(PAPER_METHODS)}]",
    )
    parser.add_argument(
        "--views", nargs="+", default=list(VIEWS), metavar="RECIPE", help="of the SSL methods [all three]"
    )
    parser.add_argument("--seeds", type=seeds, default=[1, 2, 3, 4], metavar="N,N,...", help="runs a cell [1,2,3,4]")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="values of all options not given [paper]")
    parser.add_argument("--budget", type=fraction, default=1.0, metavar="X", help="share of the epochs, up to 1 [1]")
    parser.add_argument(
        "--authors-masking",
        action="store_true",
        help="train the prior of `none` with 36 %% of the tokens masked, as the authors did; else all priors alike",
    )
    parser.add_argument(
        "--ablations",
        nargs="+",
        default=[],
        choices=ABLATIONS,
        help="more cells: `none` with the authors' masking; every method with random token embeddings; views "
        "reconstructed without an SSL loss",
    )
    parser.add_argument(
        "--holdout",
        type=fraction,
        metavar="X",
        help="measure on this share of the train split, and leave the test split alone",
    )
    parser.add_argument(
        "--measures",
        type=words,
        metavar="A,B,...",
        help=f"out of {', '.join(MEASURES)}, or all [all but {', '.join(SLOW_MEASURES)}]",
    )
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="draws of series a run [1, as the authors]")
    parser.add_argument("--fcn-epochs", type=int, metavar="N", help="epochs of each classifier [20, or 600 steps]")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder of trained evaluators")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="[runs/reproduce]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the device [1]")
    parser.add_argument(
        "--streams", type=int, default=1, metavar="S", help="trainings at a time in each process; they share a GPU [1]"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the cells, do nothing")
    add_config_arguments(parser, default="of the preset", without=("ssl", "augment", "seed"))
    return parser


def seeds(text: str) -> list[int]:
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or len(set(values)) < len(values) or min(values) < 0:
        raise argparse.ArgumentTypeError(f"different integers with commas between them, such as 1,2,3,4; got {text!r}")
    return values


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0, at most 1; got {text!r}")
    return value


def main(command_line: list[str] | None = None) -> None:
    parser = make_parser()
    parser.answer_help(command_line)
    arguments = parser.parse_args(command_line)
    start_driver(arguments.device)
    from ncfast.jobs.reproduction import reproduce

    reproduce(arguments, sys.argv[1:] if command_line is None else command_line)


if __name__ == "__main__":
    run(main, on_interrupt="interrupted; the same command again continues")
