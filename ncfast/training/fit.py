"""Training all stages: what `python -m ncfast.train` and `ncfast.fit` do between data and model."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ncfast.config import Config, make_config
from ncfast.data.augment import MIN_LENGTH, Augment
from ncfast.data.detail import structure_within
from ncfast.data.layout import Reading
from ncfast.data.level import LEAST_SHARE, level_share
from ncfast.data.sources import Dataset, from_arrays
from ncfast.data.stats import MAX_LENGTH, DataStats
from ncfast.data.stretch import num_copies, stretched_copies
from ncfast.data.windows import refuse_without_window, windows_of
from ncfast.engine.checkpoint import write_tensors
from ncfast.engine.device import current, usable_device
from ncfast.engine.lock import sole_writer
from ncfast.engine.logging import RunLog
from ncfast.engine.loop import batch_ends, derived_seed, train_stage
from ncfast.engine.memory import check_fits, exhaustion_explained
from ncfast.engine.precision import computing, resolve_precision
from ncfast.engine.processes import Processes, current_processes
from ncfast.errors import UserError
from ncfast.models.trained import load_weights, on_meta, size_of
from ncfast.models.vqvae import VQVAE
from ncfast.ncvqvae import NCVQVAE
from ncfast.nn.encoder_decoder import num_downsampling_blocks
from ncfast.nn.meta import without_memory
from ncfast.nn.synchronised import synchronised
from ncfast.options import Options
from ncfast.training.run_folder import prepare_run, record_metrics, run_sha256, saved_state, stage_metrics
from ncfast.training.self_supervision import WITHOUT_LOSS, SelfSupervision
from ncfast.training.stages import make_stage1, make_stage2, make_stage3, new_prior, new_refiner, new_vqvae

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_COLUMNS = 33  # that short columns may make of a series: the prior has to learn them all
# A prior remembers few series sooner: generated ones were nearer to train series than test series are.
STAGE2_STEPS, STEPS_A_SERIES, LEAST_STAGE2_STEPS = 6000, 20, 1000
FEW_IN_A_CLASS, STRETCH = 12, 0.3  # series a class that get stretched copies, and how far these are
# Series without a class are drawn too, and are learned from what is dropped; those without conditions hardly ever.
CLASS_DROPOUT, CLASS_DROPOUT_WITH_CONDITIONS = 0.5, 0.2
REFINER_SHARE = 0.5  # epochs of the refiner over those of stage 1
MAX_CODES = 2**16 - 1  # tokens are uint16 in files
OUT_OF_MEMORY = "lower --batch-size, --stage2-batch-size or the size of the model, or end what else uses it"


def fit(
    X: Any,
    y: Any = None,
    *,
    preset: str = "default",
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    graph: bool = True,
    quiet: bool = False,
    label_column: str | int | None = None,
    layout: Literal["nctd", "ntd", "table"] | None = None,
    index_column: str | int | None = None,
    conditions: Any = None,
    condition_columns: str | Sequence[str] | None = None,
    window: int | None = None,
    stride: int = 1,
    time_column: str | None = None,
    group_column: str | None = None,
    **options: "Unpack[Options]",
) -> NCVQVAE:
    """Trains all stages on arrays.

    Calls in threads of one process run at the same time; on a GPU their kernels do where each thread has a stream of
    its own, `with torch.cuda.stream(torch.cuda.Stream())`.

    Where `torch.distributed` has a default process group of several processes, they train one model together: each
    calls this with the same arguments, but for a device of its own, and gets the trained model; the first writes `out`.

    Args:
        X: series, float [n, L] or [n, C, L], or a list of series of unequal lengths, [L_i] or [C, L_i]; or a table of
            pandas, a row a series. NaN is missing, and the losses count what was observed; where all NaN is at the ends
            of series, they end there.
        y: a label of any type for each series [n], or None.
        preset: "default" or "paper".
        out: folder of the run; None keeps the model in memory only.
        device: "auto" (the current GPU where torch sees one), "cpu", "cuda" or "cuda:N".
        graph: on a GPU, make each training step one CUDA graph.
        quiet: no progress bars.
        label_column: of a table or a matrix [n, L + 1], the labels, by name or place from 0; "none": it has none.
        layout: of X, where it does not tell: "nctd" [n, channels, time], "ntd" [n, time, channels], "table" [n, time].
        index_column: of a table, a column to leave out, or several with commas between; "none" keeps all.
        conditions: what is known of each series besides its class, numbers and categories: a table, a dict of arrays
            [n] by name, or an array [n, k]; `sample(condition=...)` then takes them (`ncfast.data.conditions`).
        condition_columns: the same as columns of a table X, by name.
        window: X is a long recording, a DataFrame or [T, channels] in order of time, and windows of so many rows are
            the series, one every `stride` rows; see `ncfast.data.windows.windows_of`, of the two columns too.
        options: fields of `ncfast.config.Config`, such as ssl="vicreg", stage1_epochs=100.

    Returns:
        The trained model; `.sample(n)` draws series.

    What was decided of the data is a warning, and a note of the model's `data`.

    Raises:
        UserError: data or options that cannot be used or are ambiguous, with the reason.
    """
    reading = Reading(label_column, layout, index_column=index_column, condition_columns=condition_columns)
    if window is None:
        refuse_without_window(stride, time_column, group_column)
        dataset = from_arrays(X, y, reading=reading, conditions=conditions)
    else:
        reading.refuse("X", "label_column", "layout", "index_column")
        if y is not None:
            raise UserError("windows of a recording have no labels of their own; leave out y, or cut them yourself")
        if conditions is not None:
            raise UserError("conditions of windows are columns of the recording: give condition_columns")
        columns = {"time_column": time_column, "group_column": group_column}
        columns["condition_columns"] = reading.condition_columns
        dataset = windows_of(X, window, stride, test_share=0, name="arrays", source="X", **columns)
    for note in dataset.notes:
        warnings.warn(note, stacklevel=2)
    device = usable_device(device)
    given = make_config(preset, **options)
    config = resolve_config(given, dataset, device)
    for note in guesses(given, config, dataset):
        warnings.warn(note, stacklevel=2)
    out = None if out is None else Path(out)
    return train(config, dataset, out=out, device=device, graph=graph, quiet=quiet)


def resolve_config(config: Config, dataset: Dataset, device: torch.device) -> Config:
    """The configuration with everything that depends on data and device filled in: epochs in place of steps."""
    n = len(dataset.X_train)
    size = current_processes().size
    for flag, batch_size in (("--batch-size", config.batch_size), ("--stage2-batch-size", config.stage2_batch_size)):
        if batch_size < size:
            raise UserError(f"{flag} {batch_size} is of all processes together, and there are {size}: start fewer")
    if config.ssl not in WITHOUT_LOSS and n < 2:
        raise UserError("self-supervision compares series, so it needs at least 2; add data or use --ssl none")
    if dataset.length < config.n_fft:
        raise UserError(
            f"series hold at least n_fft = {config.n_fft} samples; {dataset.name} has length {dataset.length}: "
            "lower --n-fft or use longer series"
        )
    if config.ssl != "none" and dataset.length < MIN_LENGTH:
        raise UserError(
            f"views are made of series of at least {MIN_LENGTH} samples; {dataset.name} has length {dataset.length}: "
            "use longer series or --ssl none"
        )
    if max(dataset.length, dataset.n_channels) > MAX_LENGTH:
        raise UserError(
            f"series have at most {MAX_LENGTH} samples and channels; {dataset.name} has {dataset.n_channels} x "
            f"{dataset.length}: cut them into shorter ones"
        )
    if config.n_fft % 4:
        raise UserError(f"--n-fft is a multiple of 4, since the hop is a quarter of it; got {config.n_fft}")
    columns = (1 + dataset.length // (config.n_fft // 4)) >> (config.halvings or 1)
    if columns < 1:
        raise UserError(f"--halvings {config.halvings} leaves nothing of length {dataset.length}; lower it")
    if config.codebook_levels * config.codebook_size > MAX_CODES:
        raise UserError(
            f"the codebooks of all levels hold at most {MAX_CODES} codes; got --codebook-levels "
            f"{config.codebook_levels} of --codebook-size {config.codebook_size}"
        )
    Augment(config.augment)  # an unknown name is refused before anything is written
    config = dataclasses.replace(config, stretch=chosen_stretch(dataset, config))
    n = num_trained_on(n, config)
    epochs1 = config.stage1_epochs or math.ceil(config.stage1_steps / len(batch_ends(n, config.batch_size)))
    steps2 = config.stage2_steps or min(STAGE2_STEPS, max(LEAST_STAGE2_STEPS, STEPS_A_SERIES * n))
    epochs2 = config.stage2_epochs or math.ceil(steps2 / len(batch_ends(n, config.stage2_batch_size)))
    epochs3 = None if config.refiner == "none" else config.refiner_epochs or math.ceil(REFINER_SHARE * epochs1)
    precision = resolve_precision(config.precision, device)
    if config.level == "auto":
        apart = level_share(dataset.X_train) >= LEAST_SHARE
        config = dataclasses.replace(config, level="on" if apart else "off")
    if config.halvings is None and config.detail > 0:
        config = dataclasses.replace(config, halvings=chosen_halvings(dataset, config))
    if config.class_dropout is None:
        dropped = CLASS_DROPOUT_WITH_CONDITIONS if stats_of(config, dataset).conditions else CLASS_DROPOUT
        config = dataclasses.replace(config, class_dropout=dropped)
    check_memory(config, dataset, device)
    return dataclasses.replace(
        config, stage1_epochs=epochs1, stage2_epochs=epochs2, refiner_epochs=epochs3, precision=precision
    )


def num_trained_on(num_series: int, config: Config) -> int:
    """Series with their copies, of a configuration whose `stretch` is resolved."""
    return num_series * num_copies(num_series) if config.stretch else num_series


def chosen_stretch(dataset: Dataset, config: Config) -> float:
    """As the configuration says, or by the number of series in a class."""
    has_gaps = bool(np.isnan(dataset.X_train).any())
    if config.stretch is None:
        few = len(dataset.X_train) <= FEW_IN_A_CLASS * max(1, dataset.n_classes)
        return STRETCH if few and not has_gaps and dataset.length >= MIN_LENGTH else 0.0
    if config.stretch > 0 and has_gaps:
        raise UserError(
            f"--stretch {config.stretch:g} makes copies of whole series, and {dataset.name} has missing values or "
            "series of unequal lengths: leave it out, or use --stretch 0"
        )
    return config.stretch


def chosen_halvings(dataset: Dataset, config: Config) -> int:
    """By the length, or fewer where a halving less tells a share `detail` of the variance more apart."""
    by_length = num_downsampling_blocks(dataset.length, config.n_fft, config.samples_per_column)
    if config.detail == 0:
        return by_length
    hop, frames = config.n_fft // 4, 1 + dataset.length // (config.n_fft // 4)
    chosen = by_length
    X = dataset.X_train
    if config.level == "on":
        X = stats_of(config, dataset).normalise(X, torch.device("cpu")).numpy()  # what is coded
    longer = structure_within(X, hop << by_length)
    for halvings in range(by_length - 1, 0, -1):
        shorter = structure_within(X, hop << halvings)
        if longer - shorter >= config.detail:
            chosen = halvings
        longer = shorter
    while chosen < by_length and frames >> chosen > MAX_COLUMNS:
        chosen += 1
    return chosen


def columns_reason(given: Config, resolved: Config, dataset: Dataset) -> str:
    """Why a series has as many columns, behind their number."""
    if given.halvings is not None:
        return "as --halvings says"
    by_length = num_downsampling_blocks(dataset.length, given.n_fft, given.samples_per_column)
    if resolved.halvings in (None, by_length):
        return "by the length"
    frames = 1 + dataset.length // (given.n_fft // 4)
    return f"for detail that {frames >> by_length} by the length would lose (--detail {given.detail:g})"


def level_reason(given: Config, dataset: Dataset) -> str:
    """Why levels are taken apart or not, behind what was decided."""
    if given.level != "auto":
        return "as --level says"
    return f"{level_share(dataset.X_train):.1%} of the variance lies between the means of series (--level auto)"


def guesses(given: Config, resolved: Config, dataset: Dataset) -> list[str]:
    """What was decided by the data and changes what is learned, with what decides otherwise."""
    notes = []
    if given.stretch is None and resolved.stretch:
        notes.append(
            f"few series: all stages train on {num_copies(len(dataset.X_train)) - 1} copies of each too, stretched in "
            "time; stretch=0 trains on the series alone"
        )
    if given.level == "auto" and resolved.level == "on":
        reason = level_reason(given, dataset)
        notes.append(f"the level and scale of each series are drawn apart: {reason}; level='off' codes them with it")
    return notes


def check_memory(config: Config, dataset: Dataset, device: torch.device) -> None:
    """Refuses what cannot fit, by what it takes at least: each counts only its largest tensors."""
    vqvae, prior, refiner = on_meta(config, stats_of(config, dataset))
    with without_memory():
        ssl = [] if config.ssl in WITHOUT_LOSS else [SelfSupervision(config)]
    n, dim = num_trained_on(len(dataset.X_train), config), config.dim
    rows1, rows2 = min(n, config.batch_size), min(n, config.stage2_batch_size)
    # Float32: weights, gradients and the two moments of AdamW; then what the backward pass keeps.
    stage1 = 16 * size_of(vqvae, *ssl) + 8 * rows1 * dim * vqvae.stft.num_bins * (vqvae.stft.num_frames // 2)
    stage2 = 4 * size_of(vqvae) + 16 * size_of(prior) + 8 * rows2 * vqvae.num_tokens * prior.num_codes
    shared = current_processes().size
    if refiner is not None:
        length = dataset.n_channels * dataset.length
        # And all series, once decoded at least.
        stage3 = 16 * size_of(refiner) + 8 * rows1 * config.refiner_dim * dataset.length * len(refiner.blocks)
        check_fits(stage3 // shared + 4 * n * length, device, "stage 3", "lower --refiner-dim or --batch-size")
    check_fits(stage1 // shared, device, "stage 1", "lower --dim, --residual-blocks, --projector-dim or --batch-size")
    check_fits(
        stage2 // shared,
        device,
        "stage 2",
        "lower --codebook-size, --stage2-batch-size, --prior-dim, --prior-layers or --prior-ff-mult",
    )


def stats_of(config: Config, dataset: Dataset) -> DataStats:
    """config: resolved."""
    return DataStats.of(dataset, level=config.level == "on")


@exhaustion_explained(OUT_OF_MEMORY)
def train(
    config: Config,
    dataset: Dataset,
    *,
    out: Path | None,
    device: torch.device,
    resume: bool = False,
    checkpoint_every: int | None = None,
    graph: bool = True,
    quiet: bool = False,
) -> NCVQVAE:
    """Stages 1 and 2, and 3 of a refiner. With `out`, the run folder is written as it goes and can be continued after
    any kill.

    Over several processes as `fit`; the state does not depend on how many there are, so that others may continue it.

    Args:
        config: resolved (`resolve_config`).
        out: the run folder, or None.
        resume: continue the run in `out`; without it, a folder that holds a run is refused.
        checkpoint_every: epochs between two states on disk; None: checkpointing takes at most 5 % of the time.
        graph: on a GPU, make each training step one CUDA graph.
    """
    data = stats_of(config, dataset)
    processes = current_processes()
    processes.check_alike("options or data", (config, data.identity))
    train_options = {"checkpoint_every": checkpoint_every, "graph": graph, "quiet": quiet or not processes.is_first}
    with contextlib.ExitStack() as held:
        if out is not None:
            processes.on_rank0(lambda: held.enter_context(sole_writer(out)))
            processes.on_rank0(lambda: prepare_run(out, config, data, resume))
        return train_stages(config, dataset, data, out, device, processes, train_options)


def train_stages(
    config: Config,
    dataset: Dataset,
    data: DataStats,
    out: Path | None,
    device: torch.device,
    processes: Processes,
    train_options: dict[str, Any],
) -> NCVQVAE:
    """`train` in a folder that is ready. train_options: arguments of `train_stage`."""
    folder = out if processes.is_first else None  # where this process writes
    run = run_sha256(config, data)
    x, observed = data.normalise_observed(dataset.X_train, device)  # [N, C, L]
    labels = None if dataset.y_train is None else torch.from_numpy(dataset.y_train).to(device)
    rows = data.told(dataset)
    conditions = None if rows is None else torch.from_numpy(rows).to(device)
    if config.stretch:
        copies = num_copies(len(x))
        x = stretched_copies(x, copies, config.stretch, derived_seed(config.seed, 4))
        labels = None if labels is None else labels.repeat(copies)
        conditions = None if conditions is None else conditions.repeat(copies, 1)
    state = None if out is None else processes.on_every_rank(lambda: saved_state(out, device, run))
    processes.check_alike(f"states in {out}", None if state is None else (state["stage"], state["epoch"]))
    loop = {
        "seed": config.seed,
        "device": device,
        "run": run,
        "state_path": None if folder is None else folder / "state.pt",
        "processes": processes,
        **train_options,
    }

    with RunLog(folder) as log, current(device):
        vqvae = new_vqvae(config, data)
        if state is not None and state["stage"] > 1:
            processes.on_every_rank(lambda: load_weights(out / "stage1.safetensors", vqvae))
            vqvae = vqvae.to(device).eval()
        else:
            first = make_stage1(config, vqvae, x, device, processes, observed)
            with synchronised(vqvae, processes.group):
                result = train_stage(first, log=log, state=state, **loop)
            state = None
            del first  # the projector
            # In the order of a model that is loaded: what goes on from here, or draws, then rounds as one that was.
            vqvae = vqvae.to(memory_format=torch.contiguous_format).eval()
            if folder is not None:
                write_tensors(folder / "stage1.safetensors", vqvae.state_dict())
                measured = reconstruction(vqvae, data, dataset, config.precision)
                record_metrics(folder, "stage1", {**stage_metrics(result), **measured})

        prior = new_prior(config, vqvae, data)
        if state is not None and state["stage"] > 2:
            processes.on_every_rank(lambda: load_weights(out / "stage2.safetensors", prior))
        else:
            second = make_stage2(config, vqvae, prior, x, labels, device, processes, observed, conditions)
            result = train_stage(second, log=log, state=state, **loop)
            state = None
            if folder is not None:
                write_tensors(folder / "stage2.safetensors", prior.state_dict())
                record_metrics(folder, "stage2", stage_metrics(result))

        refiner = new_refiner(config, data)
        if refiner is not None:
            third = make_stage3(config, vqvae, refiner, x, device, processes, observed)
            result = train_stage(third, log=log, state=state, **loop)
            if folder is not None:
                write_tensors(folder / "stage3.safetensors", refiner.state_dict())
                record_metrics(folder, "stage3", stage_metrics(result))
            vqvae.refiner = refiner
    return NCVQVAE(config, data, vqvae, prior, device)


@torch.no_grad()
def reconstruction(vqvae: VQVAE, data: DataStats, dataset: Dataset, precision: str) -> dict[str, float]:
    """Mean squared error of the test series through the codebook, in units of the train set."""
    if dataset.X_test is None:
        return {}
    x, observed = data.normalise_observed(dataset.X_test, next(vqvae.parameters()).device)
    scale = data.units(x.device, data.levels_of(dataset.X_test))[1].expand(len(x), -1, -1)
    there = torch.from_numpy(~np.isnan(dataset.X_test)).to(x.device)
    error = 0.0
    for first in range(0, len(x), 256):
        rows = slice(first, first + 256)
        with computing(precision, x.device):
            x_hat = vqvae.reconstruct(x[rows], None if observed is None else observed[rows])
        error += float(((x_hat - x[rows]) * scale[rows]).square()[there[rows]].sum())
    return {"test_reconstruction_mse": error / int(there.sum())}
