"""New series by their index: chunks of a fixed size through prior and decoder, and what comes out, as arrays."""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncfast.config import Config, sampling_config
from ncfast.data.gaps import cut
from ncfast.engine.device import current
from ncfast.engine.precision import computing
from ncfast.errors import UserError
from ncfast.models.trained import TrainedModel
from ncfast.sampling.class_plan import NONE, TRAIN, LabelPlan
from ncfast.sampling.completion import Context
from ncfast.sampling.condition_plan import ConditionPlan
from ncfast.sampling.maskgit import ChunkDecoder, Sampler

WORTH_A_GRAPH = 5  # chunks; on an H200, 4 took as long either way and 8 took 0.7 s launched, 0.4 s captured
# Of a data set no series has this index or a higher one: contexts are filled with these.
LARGEST_INDEX = 2**62


class Batch(NamedTuple):
    """Consecutive generated series, as arrays."""

    index: np.ndarray  # int64 [B], global sample index
    x: np.ndarray | None  # float32 [B, C, L], in data units; None where only tokens were asked for
    y: np.ndarray | None  # int64 [B] class index, None for series without a class
    tokens: np.ndarray  # uint16 [B, n]
    # float64 [B, k] of the user's k conditions, as `ncfast.data.conditions` encodes them; None where none is known
    conditions: np.ndarray | None = None
    length: np.ndarray | None = None  # int64 [B], x is NaN from there on; None for series of full length
    levels: np.ndarray | None = None  # float64 [B, 2C], see `ncfast.data.level`; None where they are not drawn apart


class SeriesSampler:
    """Series of one model, seed and plan of labels. A series depends on these and its index, not on how it is drawn.

    Attributes:
        config: the run's, with the sampling options in force.
        plan: which class each index gets.
        size: rows a forward pass. Fixed, because a matrix product may round differently for another number of rows.
    """

    def __init__(
        self,
        model: TrainedModel,
        labels: Any = TRAIN,
        seed: int = 0,
        *,
        context: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        condition: Any = None,
        decode: bool = True,
        **sampling: Any,
    ) -> None:
        """The arguments are those of `NCVQVAE.sample_batches`.

        Raises:
            UserError: a label or condition the model does not know, a context that does not fit, or a bad option.
        """
        self.config: Config = sampling_config(model.config, sampling)
        self.context = None if context is None else Context(context, mask, model.data)
        if self.context is not None and isinstance(labels, str) and labels == TRAIN:
            labels = NONE
        if mask is not None and context is None:
            raise UserError("mask says what of a context was observed; give the context too")
        seed = checked_index("seed", seed, bits=63)
        self.plan = LabelPlan(labels, model.class_names, model.data.class_counts)
        self.conditions = None
        embedding = model.prior.condition_embedding
        if not model.data.conditions and condition is not None:
            raise UserError("this model was trained without conditions; fit(conditions=...) makes one that has some")
        # Of what is completed, conditions drawn at random could contradict what is observed.
        if embedding is not None and (context is None or condition is not None or model.data.levels):
            self.conditions = ConditionPlan(
                embedding,
                condition,
                len(model.class_names),
                draw=context is None,
                num_levels=len(model.data.levels),
                levels=None if self.context is None else self.context.levels(),
            )
            self.check_lengths(model)
        self.model = model
        self.seed = seed
        self.decode = decode
        self.size = model.chunk_size
        self.decoder: ChunkDecoder | None = None

    def check_lengths(self, model: TrainedModel) -> None:
        """Raises UserError for lengths given that no series can have."""
        place = len(model.data.user_conditions)
        for length in self.conditions.given.get(place, ()) if model.data.has_lengths else ():
            if not (length == round(length) and 1 <= length <= model.data.length):
                raise UserError(f"length is an integer from 1 to {model.data.length}; got {length:g}")

    def check_context_ends(self, n: int, start: int) -> None:
        """Raises UserError where a series is observed beyond the length that is given for it."""
        data = self.model.data
        given = self.conditions.given.get(len(data.user_conditions)) if self.conditions and data.has_lengths else None
        if self.context is None or given is None or n == 0:
            return
        index = start + np.arange(min(n, len(given) * len(self.context)))
        seen = self.context.last_observed()[index % len(self.context)]
        lengths = given[index % len(given)]
        if (seen > lengths).any():
            i = int(np.argmax(seen > lengths))
            raise UserError(
                f"series {index[i]} has length {lengths[i]:g}, and its context is observed up to time point {seen[i]}; "
                "give a length that holds it"
            )

    def total(self) -> int | None:
        """How many series there are, where counts of labels or a context say so."""
        if self.context is None or self.plan.total is not None:
            return self.plan.total
        return len(self.context)

    def batches(self, n: int, start: int = 0, batch_size: int | None = None) -> Iterator[Batch]:
        """Series start .. start + n - 1, `batch_size` at a time (None: as they come).

        Raises:
            UserError: an n, start or batch size that cannot be.
        """
        n, start = checked_index("n", n), checked_index("start", start)
        if start + n > LARGEST_INDEX:
            raise UserError(f"the last index is below 2**62; got n={n} from start={start}")
        if self.plan.total is not None and start + n > self.plan.total:
            raise UserError(f"the counts of labels sum to {self.plan.total}; got n={n} from start={start}")
        if batch_size is not None and checked_index("the batch size", batch_size) < 1:
            raise UserError(f"the batch size is at least 1; got {batch_size}")
        self.check_context_ends(n, start)
        chunks = self.chunks(n, start)
        return chunks if batch_size is None else rebatch(chunks, batch_size)

    @torch.no_grad()
    def chunks(self, n: int, start: int) -> Iterator[Batch]:
        # Whole chunks, aligned to the sample index: a series always sits in the same row of the same product.
        firsts = range(start // self.size * self.size, start + n, self.size)
        self.prepare(graph=len(firsts) >= WORTH_A_GRAPH)
        ahead: Chunk | None = None
        for first in firsts:
            chunk = self.launch(first, slice(max(start - first, 0), min(start + n - first, self.size)))
            if ahead is not None:
                yield self.arrived(ahead)
            ahead = chunk  # a GPU is at work on it while the caller has the one before
        if ahead is not None:
            yield self.arrived(ahead)

    @torch.no_grad()
    def again(self, index: np.ndarray) -> Batch:
        """These series, int64 [B] in ascending order: drawn each in its own chunk, which is waited for."""
        self.prepare(graph=False)
        parts = []
        for number in np.unique(index // self.size):
            whole = self.arrived(self.launch(int(number) * self.size, slice(0, self.size)))
            rows = index[index // self.size == number] % self.size
            parts.append(Batch(*(None if part is None else part[rows] for part in whole)))
        return join(parts)

    def prepare(self, *, graph: bool) -> None:
        if self.decoder is not None:
            return
        model = self.model
        token_sampler = Sampler(model.prior, self.config, precision=model.precision)
        self.decoder = ChunkDecoder(model.vqvae, token_sampler, graph=graph, decode=self.decode)
        self.mean, self.std = model.data.moments(model.device)
        if self.context is not None:
            fillers = torch.arange(self.size, device=model.device) + LARGEST_INDEX
            unlabelled = torch.full_like(fillers, model.prior.num_classes)
            nothing = torch.full((self.size, model.prior.num_tokens), model.prior.num_codes, device=model.device)
            unknown = None if self.conditions is None else self.unknown()
            fills = self.decoder(unlabelled, fillers, self.seed, nothing, unknown)[1]
            with computing("fp32", model.device):
                self.context.find_known_tokens(model.vqvae, fills[: Context.NUM_FILLS], self.size)

    def unknown(self) -> Tensor:
        """Conditions of a chunk of which none is known, float64 [B, k]."""
        shape = self.size, self.conditions.rows.shape[1]
        return torch.full(shape, torch.nan, dtype=torch.float64, device=self.model.device)

    def launch(self, first: int, rows: slice) -> "Chunk":
        with current(self.model.device):
            sample = torch.arange(first, first + self.size, device=self.model.device)
            labels = self.plan(sample, self.seed)
            known = None if self.context is None else self.context.known_tokens(sample)
            conditions = None if self.conditions is None else self.conditions(sample, labels, self.seed)
            tokens, x = self.decoder(labels, sample, self.seed, known, conditions)
            if x is not None:
                mean, std = self.mean, self.std
                if self.model.data.levels:
                    levels = conditions[:, len(self.conditions.columns) :]
                    mean, std = self.model.data.moments(self.model.device, levels)
                x = (x.double() * std + mean).float()
            return Chunk(first, rows, labels, tokens, x, conditions)

    def arrived(self, chunk: "Chunk") -> Batch:
        labels, tokens, x, conditions = chunk.arrays()
        index = np.arange(chunk.first + chunk.rows.start, chunk.first + chunk.rows.stop)
        self.check(index, "token", tokens, self.model.prior.num_codes)
        self.check(index, "class", labels, self.plan.no_class + 1)
        if self.conditions is not None:
            self.check(index, "condition", np.isnan(conditions[:, self.conditions.known]).astype(np.int64), 1)
        if x is not None and self.context is not None:
            x = self.context.keep_observed(x, index)
        length = levels = None
        if conditions is not None and self.model.data.levels:
            conditions, levels = np.split(conditions, [len(self.conditions.columns)], axis=1)
            conditions = conditions if self.conditions.draw or self.conditions.given else None
        if conditions is not None and self.model.data.has_lengths:
            conditions, length = conditions[:, :-1], conditions[:, -1]
            length = None if np.isnan(length).any() else length.astype(np.int64)
        conditions = None if conditions is None or conditions.shape[1] == 0 else conditions
        if x is not None and length is not None:
            x = cut(x, length)
        y = labels if self.plan.names_classes else None
        return Batch(index, x, y, tokens.astype(np.uint16), conditions, length, levels)

    def check(self, index: np.ndarray, what: str, values: np.ndarray, end: int) -> None:
        """That all values [B] or [B, n] are below `end`: the host's copy of what was not computed has none of these."""
        if len(index) == 0 or 0 <= values.min() <= values.max() < end:
            return
        wrong = ((values < 0) | (values >= end)).reshape(len(values), -1).any(1)
        raise UserError(
            f"series {index[np.argmax(wrong)]} has a {what} that does not exist ({values.min()} to {values.max()}, and "
            f"there are 0 to {end - 1}): {self.model.device} has not computed it; run the same again, and if that "
            "repeats, on another device"
        )


class Chunk:
    """Results on their way to the host: what follows on the device neither waits for them nor overwrites them."""

    def __init__(self, first: int, rows: slice, *results: Tensor | None) -> None:
        self.first = first
        self.rows = rows
        self.results = [None if result is None else to_host(result) for result in results]
        self.there = None
        device = results[0].device
        if device.type == "cuda":
            self.there = torch.cuda.Event()
            self.there.record(torch.cuda.current_stream(device))  # on which the copies are made

    def arrays(self) -> list[np.ndarray | None]:
        if self.there is not None:
            self.there.synchronize()
        return [None if result is None else result.numpy()[self.rows] for result in self.results]


def checked_index(name: str, value: Any, bits: int = 62) -> int:
    """The value as an int of so many bits, 0 or more, or a UserError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**bits:
        raise UserError(f"{name} is an integer, at least 0 and below 2**{bits}; got {value!r}")
    return number


def to_host(x: Tensor) -> Tensor:
    """A copy that the device makes when it comes to it; on a CPU one that is made now."""
    if x.device.type != "cuda":
        return x.clone()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    # What no series has: a read that came before the copy would show.
    host.fill_(torch.nan if x.is_floating_point() else -1)
    return host.copy_(x, non_blocking=True)


def rebatch(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The same series in batches of `size`; the last one may be smaller."""
    kept: list[Batch] = []
    held = 0
    for batch in batches:
        kept.append(batch)
        held += len(batch.index)
        while held >= size:
            joined = join(kept)
            yield Batch(*(None if part is None else part[:size] for part in joined))
            kept = [Batch(*(None if part is None else part[size:] for part in joined))]
            held -= size
    if held:
        yield join(kept)


def join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(*(None if parts[0] is None else np.concatenate(parts) for parts in zip(*batches, strict=True)))
