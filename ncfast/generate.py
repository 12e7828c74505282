"""Write generated series to HDF5: python -m ncfast.generate --run DIR --num-samples N --out FILE.h5"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ncfast.cli import Parser, choose_device, run
from ncfast.config import Config, add_config_arguments, sampling_config, sampling_values
from ncfast.engine.checkpoint import atomic_path
from ncfast.engine.logging import progress_bar
from ncfast.engine.precision import PRECISIONS
from ncfast.errors import UserError
from ncfast.labels import LabelPlan, parse_labels
from ncfast.ncvqvae import NCVQVAE, load, weights_sha256
from ncfast.version import __version__


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m ncfast.generate", description="Generate series from a trained run into one HDF5 file."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run (--out of ncfast.train)")
    parser.add_argument(
        "--num-samples", type=int, metavar="N", help="series to generate; may be left out when --labels has counts"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.h5", help="the file to write")
    parser.add_argument(
        "--labels",
        default="train",
        metavar="WHICH",
        help="train: in the train set's proportions; balanced: all classes in turn; none: without a class; "
        '"a,b": these in turn; "a:1000,b:500": so many of each [train]',
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers [0]")
    parser.add_argument(
        "--batch-size", type=int, default=1024, metavar="N", help="series written at a time; changes no series [1024]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="number format of products and convolutions; another one draws other series [as the run was made]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.h5 if it is there")
    add_config_arguments(parser, "Sampling", default="as the run was made")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    out: Path = arguments.out
    if out.exists() and not arguments.overwrite:
        raise UserError(f"{out} exists; add --overwrite to replace it, or choose another --out")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} of --out does not exist; make it first")
    device, device_reason = choose_device(arguments.device)
    model = load(arguments.run, device, arguments.precision)
    options = sampling_values(model.config)
    given = {name: value for name, value in vars(arguments).items() if name in options}
    config = sampling_config(model.config, given)
    labels = parse_labels(arguments.labels)
    total = LabelPlan(labels, model.class_names, model.data.class_counts).total
    n = total if arguments.num_samples is None else arguments.num_samples
    if n is None:
        raise UserError('say how many: --num-samples N, or counts in --labels, such as "a:1000,b:500"')
    if n < 1 or (total is not None and n > total):
        most = "" if total is None else f" and at most {total}, which the counts of --labels sum to"
        raise UserError(f"--num-samples is at least 1{most}; got {n}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is at least 0 and below 2**63; got {arguments.seed}")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is at least 1; got {arguments.batch_size}")
    print(f"device     {device} ({device_reason}); {model.precision}", flush=True)

    counts = write_samples(model, config, arguments.run, out, n, labels, arguments.seed, arguments.batch_size)
    shape = f"({n}, {model.data.channels}, {model.data.length})"
    classes = "; " + ", ".join(f"class {k}: {v}" for k, v in counts.items()) if counts else ""
    print(f"wrote {out}: x {shape} float32{classes}")


def write_samples(
    model: NCVQVAE, config: Config, folder: Path, out: Path, n: int, labels: Any, seed: int, batch_size: int
) -> dict[str, int]:
    """Datasets x [n, C, L], tokens [n, T], index [n], y [n], with provenance as attributes. Returns counts by class."""
    C, L, T = model.data.channels, model.data.length, model.vqvae.num_tokens
    names = model.class_names
    with_classes = LabelPlan(labels, names, model.data.class_counts).names_classes
    totals = np.zeros(len(names), np.int64)
    rows = max(1, min(n, 2**20 // (4 * C * L)))  # a chunk of about 1 MiB
    sampling = sampling_values(config)
    with atomic_path(out) as temporary, h5py.File(temporary, "w") as file:
        x = file.create_dataset("x", (n, C, L), "f4", chunks=(rows, C, L))
        tokens = file.create_dataset("tokens", (n, T), "u2", chunks=(rows, T))
        index = file.create_dataset("index", (n,), "i8")
        y = file.create_dataset("y", (n,), "i8") if with_classes else None
        file.attrs.update(provenance(model, config, folder, labels, seed))
        with progress_bar("generate", n, unit="series") as bar:
            for batch in model.sample_batches(n, labels, seed, batch_size=batch_size, **sampling):
                part = slice(batch.index[0], batch.index[-1] + 1)
                x[part], tokens[part], index[part] = batch.x, batch.tokens, batch.index
                if y is not None:
                    y[part] = batch.y
                    totals += np.bincount(batch.y, minlength=len(names))
                file.flush()
                bar.update(len(batch.index))
        file.attrs["complete"] = True
    return dict(zip(names, totals.tolist(), strict=True)) if with_classes else {}


def provenance(model: NCVQVAE, config: Config, folder: Path, labels: Any, seed: int) -> dict:
    """What a lone file needs to explain itself."""
    return {
        "format": 1,
        "ncfast": __version__,
        "torch": str(torch.__version__),
        "device": str(model.device),
        "precision": model.precision,
        "dataset": model.data.name,
        "class_names": list(model.class_names) or h5py.Empty("S1"),
        "labels": labels if isinstance(labels, str) else json.dumps(labels),
        "seed": seed,
        "mean": model.data.mean,
        "std": model.data.std,
        "config": json.dumps(dataclasses.asdict(config)),
        "weights_sha256": weights_sha256(folder),
        "complete": False,
    }


if __name__ == "__main__":
    run(main)
