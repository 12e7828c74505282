"""Train both stages on one data set: python -m ncfast.train --dataset FordA --ssl vicreg"""

import contextlib
import dataclasses
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ncfast.cli.flags import add_config_arguments, add_data_arguments, given_config_values, reading_options
from ncfast.cli.parser import Parser, run
from ncfast.cli.startup import choose_device, start_driver
from ncfast.config import PRESETS, Config, epochs_text, make_config
from ncfast.errors import UserError
from ncfast.version import __version__

if TYPE_CHECKING:
    import torch

    from ncfast.data.dataset import Dataset
    from ncfast.engine.processes import Processes
    from ncfast.ncvqvae import NCVQVAE


def make_parser() -> Parser:
    parser = Parser(prog="python -m ncfast.train", description="Train both stages of an NC-VQVAE.")
    parser.add_argument(
        "--dataset",
        required=True,
        help="UCR/UEA name, or path of a .tsv .txt .csv .parquet .arff .ts .npz .npy .mat .h5 file or of a folder",
    )
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder of the run [runs/DATASET-SSL]")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--preset", choices=PRESETS, default="default", help="values of all options not given [default]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="epochs between two saved states [checkpointing takes at most 5 %% of the time]",
    )
    parser.add_argument(
        "--no-graph", action="store_true", help="on a GPU, launch each kernel of a step, instead of one CUDA graph"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    add_config_arguments(parser)
    return parser


def main(command_line: list[str] | None = None) -> None:
    make_parser().answer_help(command_line)
    start_driver("cpu" if "cpu" in (sys.argv if command_line is None else command_line) else "auto")
    from ncfast.cli.torchrun import launched

    with launched() as processes:
        train_program(processes, command_line)


def train_program(processes: "Processes", command_line: list[str] | None = None) -> None:
    from ncfast.cli.torchrun import local_rank
    from ncfast.data.sources import load_dataset
    from ncfast.training.fit import columns_reason, level_reason, resolve_config, train

    arguments = make_parser().parse_args(command_line)
    if arguments.checkpoint_every is not None and arguments.checkpoint_every < 1:
        raise UserError(f"--checkpoint-every is at least 1; got {arguments.checkpoint_every}")
    given = make_config(arguments.preset, **given_config_values(arguments))
    device, device_reason = processes.on_every_rank(lambda: choose_device(arguments.device, local_rank()))

    def load() -> "Dataset":
        return load_dataset(arguments.dataset, arguments.data_dir, **reading_options(arguments))

    # The first process before the others: where it has to download, they find the file.
    loaded = processes.on_rank0(load)
    dataset = processes.on_every_rank(lambda: loaded or load())
    for note in dataset.notes:
        print(f"warning: {note}")
    config = resolve_config(given, dataset, device)
    out = arguments.out or Path("runs") / f"{dataset.name}-{config.ssl}"
    reasons = columns_reason(given, config, dataset), level_reason(given, dataset)
    print_plan(config, reasons, dataset, device, device_reason, out, processes)
    if arguments.dry_run:
        return
    if processes.is_first:  # the picture's library, beside the training
        threading.Thread(target=import_quietly, args=("matplotlib.figure",), daemon=True).start()

    model = train(
        config,
        dataset,
        out=out,
        device=device,
        resume=arguments.resume,
        checkpoint_every=arguments.checkpoint_every,
        graph=not arguments.no_graph,
    )
    if not processes.is_first:
        return
    picture = write_picture(model, dataset, out)
    print(f"run: {out}{picture}")
    print(f"next: python -m ncfast.generate --run {out} --num-samples 1000 --out {dataset.name}.h5")


def import_quietly(module: str) -> None:
    """An error comes when it is imported where it is needed."""
    with contextlib.suppress(Exception):
        import_module(module)


def print_plan(
    config: Config,
    reasons: tuple[str, str],
    dataset: "Dataset",
    device: "torch.device",
    device_reason: str,
    out: Path,
    processes: "Processes",
) -> None:
    """Everything that was decided, before any time is spent; reasons: of the columns and of --level."""
    import torch

    from ncfast.engine.loop import batch_ends
    from ncfast.models.trained import on_meta
    from ncfast.nn.meta import without_memory
    from ncfast.ops import dispatch
    from ncfast.ops.nearest_code import why_not
    from ncfast.training.fit import num_trained_on, stats_of
    from ncfast.training.self_supervision import WITHOUT_LOSS, SelfSupervision

    data = stats_of(config, dataset)
    vqvae, prior, refiner = on_meta(config, data)
    with without_memory():
        projector = None if config.ssl in WITHOUT_LOSS else SelfSupervision(config)
    modules = {"VQVAE": vqvae, "prior": prior, "projector": projector, "refiner": refiner}
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items() if m is not None}
    trained_on = num_trained_on(data.num_series, config)
    steps1 = len(batch_ends(trained_on, config.batch_size))
    steps2 = len(batch_ends(trained_on, config.stage2_batch_size))
    classes = f"{len(data.class_names)} classes" if data.class_names else "no labels"
    lookup = dispatch.choose("nearest_code", "auto", why_not(device, torch.float32, num_codes=config.codebook_size))
    print(f"ncfast {__version__}")
    length = f"{data.shortest} to {data.length}" if data.shortest else data.length
    print(f"data       {data.name}: {data.num_series} series [{data.channels}, {length}], {classes} ({data.source})")
    print(f"device     {device} ({device_reason}); {config.precision}; nearest code: {lookup}")
    if not processes.is_alone:
        print(f"processes  {processes.size}, each with its rows of every batch")
    levels = [f"{config.codebook_levels} levels"] if config.codebook_levels > 1 else []
    grid = " x ".join([*levels, *map(str, vqvae.grid)])
    print(
        f"model      {grid} = {vqvae.num_tokens} tokens of {config.codebook_size} codes; parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    )
    print(f"columns    {vqvae.grid[1]} of {vqvae.samples_per_column} samples, {reasons[0]}")
    if config.stretch:
        copies = trained_on // data.num_series
        print(f"copies     {copies} of each series, {copies - 1} of them stretched (--stretch {config.stretch:g})")
    print(f"level      {'of each series apart' if data.levels else 'not apart'}: {reasons[1]}")
    print(
        f"stage 1    {config.stage1_epochs} epochs x {steps1} steps; ssl {config.ssl}, views {' '.join(config.augment)}"
    )
    print(f"stage 2    {config.stage2_epochs} epochs x {steps2} steps")
    if refiner is not None:
        print(f"stage 3    {config.refiner_epochs} epochs x {steps1} steps: the refiner")
    print(f"out        {out}")
    options = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())
    print(f"options    {options}", flush=True)


def write_picture(model: "NCVQVAE", dataset: "Dataset", out: Path) -> str:
    """samples.png, or the reason why there is none."""
    import numpy as np

    from ncfast.evaluation.plots import draw_samples, write_figure

    names = model.class_names
    per_class = 10
    x, y = model.sample(per_class * max(1, len(names)), labels="balanced" if names else "none", seed=model.config.seed)
    labels = None if y is None else np.array([names.index(name) for name in y])
    try:
        title = f"{dataset.name}, {model.config.ssl}: {epochs_text(model.config)} epochs"
        figure = draw_samples(dataset.X_train, dataset.y_train, x, labels, names, title)
        write_figure(figure, out / "samples.png")
    except UserError as error:
        return f" (no picture: {error})"
    return f", picture: {out / 'samples.png'}"


if __name__ == "__main__":
    run(main, on_interrupt="interrupted; the same command with --resume continues from the last saved epoch")
