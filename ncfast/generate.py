"""Write generated series to HDF5: python -m ncfast.generate --run DIR --num-samples N --out FILE.h5"""

import dataclasses
import json
from pathlib import Path

import h5py
import torch

from ncfast.cli import Parser, choose_device, run
from ncfast.engine.checkpoint import atomic_path
from ncfast.engine.logging import progress_bar
from ncfast.errors import UserError
from ncfast.ncvqvae import NCVQVAE, load, weights_sha256
from ncfast.version import __version__


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m ncfast.generate", description="Generate series from a trained run into one HDF5 file."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run (--out of ncfast.train)")
    parser.add_argument("--num-samples", type=int, required=True, metavar="N", help="series to generate")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.h5", help="the file to write")
    parser.add_argument(
        "--label", nargs="+", metavar="NAME", help="classes, taken in turn [the train set's proportions]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.h5 if it is there")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    out: Path = arguments.out
    if arguments.num_samples < 1:
        raise UserError(f"--num-samples is at least 1; got {arguments.num_samples}")
    if out.exists() and not arguments.overwrite:
        raise UserError(f"{out} exists; add --overwrite to replace it, or choose another --out")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} of --out does not exist; make it first")
    device, device_reason = choose_device(arguments.device)
    model = load(arguments.run, device)
    model.resolve_labels(arguments.label)
    print(f"device     {device} ({device_reason})", flush=True)

    counts = write_samples(model, arguments.run, out, arguments.num_samples, arguments.label, arguments.seed)
    shape = f"({arguments.num_samples}, {model.data.channels}, {model.data.length})"
    classes = "; " + ", ".join(f"class {k}: {v}" for k, v in counts.items()) if counts else ""
    print(f"wrote {out}: x {shape} float32{classes}")


def write_samples(
    model: NCVQVAE, folder: Path, out: Path, n: int, label: list[str] | None, seed: int
) -> dict[str, int]:
    """Datasets x [n, C, L], tokens [n, T], index [n], y [n], with provenance as attributes. Returns counts by class."""
    C, L, T = model.data.channels, model.data.length, model.vqvae.num_tokens
    names = model.class_names
    counts = dict.fromkeys(names, 0)
    rows = max(1, min(n, 2**20 // (4 * C * L)))  # a chunk of about 1 MiB
    with atomic_path(out) as temporary, h5py.File(temporary, "w") as file:
        x = file.create_dataset("x", (n, C, L), "f4", chunks=(rows, C, L))
        tokens = file.create_dataset("tokens", (n, T), "u2", chunks=(rows, T))
        index = file.create_dataset("index", (n,), "i8")
        y = file.create_dataset("y", (n,), "i8") if names else None
        file.attrs.update(provenance(model, folder, label, seed))
        with progress_bar("generate", n, unit="series") as bar:
            for batch in model.sample_batches(n, label, seed):
                part = slice(batch.index[0], batch.index[-1] + 1)
                x[part], tokens[part], index[part] = batch.x, batch.tokens, batch.index
                if y is not None:
                    y[part] = batch.y
                    for k in batch.y:
                        counts[names[k]] += 1
                file.flush()
                bar.update(len(batch.index))
        file.attrs["complete"] = True
    return counts


def provenance(model: NCVQVAE, folder: Path, label: list[str] | None, seed: int) -> dict:
    """What a lone file needs to explain itself."""
    return {
        "format": 1,
        "ncfast": __version__,
        "torch": str(torch.__version__),
        "device": str(model.device),
        "dataset": model.data.name,
        "class_names": list(model.class_names) or h5py.Empty("S1"),
        "label": label or "train proportions",
        "seed": seed,
        "mean": model.data.mean,
        "std": model.data.std,
        "config": json.dumps(dataclasses.asdict(model.config)),
        "weights_sha256": weights_sha256(folder),
        "complete": False,
    }


if __name__ == "__main__":
    run(main)
