"""Say how good a trained generator is: python -m ncfast.evaluate --run DIR"""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncfast.cli.flags import READING, WINDOWS, add_data_arguments, reading_options
from ncfast.cli.parser import Parser, run, words
from ncfast.cli.startup import choose_device, start_driver
from ncfast.config import MEASURES, SLOW_MEASURES
from ncfast.errors import UserError

if TYPE_CHECKING:
    from ncfast.data.dataset import Dataset
    from ncfast.data.stats import DataStats


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m ncfast.evaluate",
        description="Measure a trained run on its test set: evaluation.json, report.html and a table.",
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run (--out of ncfast.train)")
    parser.add_argument("--dataset", help="name or path, as ncfast.train takes it [what the run was trained on]")
    add_data_arguments(parser)
    parser.add_argument(
        "--measures",
        type=words,
        metavar="A,B,...",
        help=f"which, out of {', '.join(MEASURES)}; or all of them: all [all but {', '.join(SLOW_MEASURES)}, which "
        "train networks for minutes]",
    )
    parser.add_argument(
        "--num-samples", type=positive, metavar="N", help="series generated for each comparison [as in the test set]"
    )
    parser.add_argument("--seed", type=natural, default=0, help="first seed of the generated series [0]")
    parser.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="seeds, from --seed on; figures are their mean [3]"
    )
    parser.add_argument("--fcn-epochs", type=positive, metavar="N", help="epochs of each classifier [20, or 600 steps]")
    parser.add_argument("--fcn-seed", type=natural, default=0, metavar="N", help="seed of the evaluator [0]")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder of trained evaluators [ncfast in the user's cache]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of evaluation.json and report.html [--run]")
    parser.add_argument("--no-report", action="store_true", help="write no report.html, which takes pictures")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"an integer, 1 or more; got {text!r}")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"an integer, 0 or more and below 2**62; got {text!r}")
    return int(text)


def main() -> None:
    parser = make_parser()
    parser.answer_help(None)
    arguments = parser.parse_args()
    start_driver(arguments.device)
    from ncfast.engine.checkpoint import write_json
    from ncfast.evaluation import table
    from ncfast.evaluation.fcn import Recipe
    from ncfast.evaluation.material import Material
    from ncfast.evaluation.network_cache import default_folder
    from ncfast.evaluation.protocol import chosen, measure
    from ncfast.models.trained import weights_sha256
    from ncfast.ncvqvae import load

    names = chosen(arguments.measures)
    out = arguments.out or arguments.run
    if not out.is_dir():
        raise UserError(f"the folder {out} does not exist")
    if not arguments.no_report:
        require_pictures()
    device, device_reason = choose_device(arguments.device)
    model = load(arguments.run, device)
    dataset = find_dataset(model.data, arguments.dataset, arguments.data_dir, **reading_options(arguments))
    for note in dataset.notes:
        print(f"warning: {note}")
    material = Material(
        model,
        dataset,
        num_samples=arguments.num_samples,
        recipe=Recipe(epochs=arguments.fcn_epochs),
        fcn_seed=arguments.fcn_seed,
        cache=arguments.cache or default_folder(),
    )
    if not same_series(model.data, material.stats):
        print(f"warning: the train series of {dataset.source} are not those that the run was trained on")
    print(f"device     {device} ({device_reason}); {model.precision}", flush=True)

    result = measure(material, names, range(arguments.seed, arguments.seed + arguments.repeats))
    result["run"] = {"folder": str(arguments.run), "weights_sha256": weights_sha256(arguments.run)}
    write_json(out / "evaluation.json", result)
    for name, text in table.summary(result):
        print(f"{name:<10} {text}")
    print(table.as_text(result))
    report = ""
    if not arguments.no_report:
        from ncfast.evaluation.report import write_report

        write_report(out / "report.html", material, result)
        report = f", report: {out / 'report.html'}"
    print(f"wrote {out / 'evaluation.json'}{report}")


def require_pictures() -> None:
    """Before any time is spent.

    Raises:
        UserError: a package that the report needs is not installed.
    """
    for package, module in (("matplotlib", "matplotlib.figure"), ("scikit-learn", "sklearn")):
        try:
            importlib.import_module(module)
        except ImportError:
            raise UserError(f"the report needs {package}: pip install 'ncfast[eval]', or add --no-report") from None


def find_dataset(trained: "DataStats", asked: str | None, data_dir: str | None, **reading: Any) -> "Dataset":
    """The data asked for, or what the run was trained on: where it was then, else by its name."""
    from ncfast.data.sources import load_dataset

    reading["condition_columns"] = reading.get("condition_columns") or [
        column.name for column in trained.user_conditions
    ]
    if asked is not None:
        return load_dataset(asked, data_dir, **reading)
    if trained.source == "arrays":
        raise UserError("this run was trained on arrays, which it does not keep; give --dataset")
    remembered = options_of(trained.reading)
    if remembered and reading.keys() <= {"condition_columns"}:
        told = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in remembered.items())
        print(f"data       read as the run read it: {told}")
        reading |= remembered
    if data_dir is None and Path(trained.source).exists():
        return load_dataset(trained.source, **reading)
    try:
        return load_dataset(trained.name, data_dir, **reading)
    except UserError as error:
        raise UserError(f"the data of the run, {trained.source}, is not found ({error}); give --dataset") from error


def options_of(reading: str) -> dict[str, Any]:
    """Of `DataStats.reading`; what is no longer an option, or damaged, is left out."""
    try:
        options = json.loads(reading) if reading else {}
    except ValueError:
        return {}
    return {name: value for name, value in options.items() if name in (*READING, *WINDOWS)}


def same_series(trained: "DataStats", given: "DataStats") -> bool:
    return dataclasses.replace(trained.identity, name="") == dataclasses.replace(given.identity, name="")


if __name__ == "__main__":
    run(main)
