"""Write generated series to HDF5: python -m ncfast.generate --run DIR --num-samples N --out FILE.h5

Large jobs are shards. `torchrun --nproc-per-node N -m ncfast.generate ...` and `--shard i/n` share them among
processes, which need not know of each other. The same command again continues what was interrupted.
"""

import argparse
from pathlib import Path

from ncfast.cli.flags import add_config_arguments
from ncfast.cli.parser import Parser, run
from ncfast.cli.startup import start_driver
from ncfast.config import COMPRESSIONS, DTYPES, FILE_FORMATS, PRECISIONS


def make_parser() -> Parser:
    suffixes = " ".join(f".{name}" for name in FILE_FORMATS)
    parser = Parser(
        prog="python -m ncfast.generate",
        description="Generate series from a trained run into HDF5. The same command again continues a job.",
    )
    # torchrun takes --run, even there, for a short form of options of its own.
    parser.add_argument(
        "--run", "--run-dir", type=Path, required=True, metavar="DIR", help="folder of the run (--out of ncfast.train)"
    )
    parser.add_argument(
        "--num-samples", type=int, metavar="N", help="series to generate; may be left out when --labels has counts"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"the file to write, of the format {suffixes}",
    )
    parser.add_argument(
        "--labels",
        default="train",
        metavar="WHICH",
        help="train: in the train set's proportions; balanced: all classes in turn; none: without a class; "
        '"a,b": these in turn; "a:1000,b:500": so many of each; or JSON, for any names: ["a,b"], {"none": 9} [train]',
    )
    parser.add_argument(
        "--condition",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="of a run with conditions, such as age=63 sex=f; several values of one name are taken in turn [drawn as "
        "the training series have them]",
    )
    parser.add_argument(
        "--condition-file",
        type=Path,
        metavar="FILE",
        help="the same from a table (.csv .tsv .txt .parquet) or .json: columns called as the conditions, rows in turn",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="number format of products and convolutions; another one draws other series [as the run was made]",
    )
    files = parser.add_argument_group("Files")
    files.add_argument(
        "--format",
        choices=FILE_FORMATS,
        help="of --out; all but h5 are made of an HDF5 file that is written first and stays beside it [by the suffix]",
    )
    files.add_argument("--dtype", choices=DTYPES, default="float32", help="of the series [float32]")
    files.add_argument("--compression", choices=COMPRESSIONS, default="none", help="of the data sets [none]")
    files.add_argument(
        "--tokens-only", action="store_true", help="leave out the series; `NCVQVAE.decode` makes them of tokens"
    )
    files.add_argument(
        "--num-shards", type=int, metavar="N", help="files to write [of about 256 MiB, and more where series are long]"
    )
    files.add_argument(
        "--shard", type=part_of_parts, metavar="I/N", help="write the part I of N, I from 0 to N-1, in this process"
    )
    files.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="series written at a time; changes no series [what four forward passes make]",
    )
    files.add_argument("--overwrite", action="store_true", help="replace what another job has left under this name")
    files.add_argument("--dry-run", action="store_true", help="print rows, bytes and shards, write nothing")
    add_config_arguments(parser, "Sampling", default="as the run was made")
    return parser


def part_of_parts(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"I/N with I from 0 to N-1, such as 0/8; got {text!r}")
    return int(part), int(parts)


def main(command_line: list[str] | None = None) -> None:
    parser = make_parser()
    parser.answer_help(command_line)
    arguments = parser.parse_args(command_line)
    start_driver(arguments.device)
    from ncfast.jobs.generation import generate

    generate(arguments)


if __name__ == "__main__":
    run(main, on_interrupt="interrupted; the same command again continues, with the shards that are complete")
