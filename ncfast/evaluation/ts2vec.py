"""TS2Vec, the encoder that Context-FID rests on (Yue et al. 2022, arXiv 2106.10466), trained without labels."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.engine.device import usable_device
from ncfast.engine.logging import progress_bar
from ncfast.engine.loop import derived_seed, seeded
from ncfast.engine.precision import computing
from ncfast.evaluation.measures import frechet_distance
from ncfast.evaluation.network_cache import fingerprint, trained_once

WIDTH, CODE, LAYERS = 64, 320, 10  # channels of the hidden layers, components of a code, dilated blocks before the last
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
DROPOUT = 0.1
MASKED = 0.5  # of the times of a series, in training
FEW_VALUES, STEPS = 100_000, (200, 600)  # the authors train few values for fewer steps
ROWS = 256  # series a forward pass without a gradient


class Block(nn.Module):
    """Two dilated convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv1d(outputs, outputs, 3, padding=dilation, dilation=dilation)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, inputs, L] -> [B, outputs, L]
        return self.second(F.gelu(self.first(F.gelu(x)))) + self.shortcut(x)


class TS2Vec(nn.Module):
    """A linear layer, then blocks of dilation 1, 2, 4, ... 1024."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, WIDTH)
        widths = [WIDTH] * (LAYERS + 1) + [CODE]
        self.body = nn.Sequential(*[Block(widths[i], widths[i + 1], 2**i) for i in range(LAYERS + 1)])

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x [B, L, C] -> codes of every time [B, L, 320].

        generator: in training, draws the times that are masked and the components that are dropped.
        """
        x = self.project(x)
        if generator is None:
            return self.body(x.transpose(1, 2)).transpose(1, 2)
        x = x * keep(x[:, :, :1], MASKED, generator)
        codes = self.body(x.transpose(1, 2)).transpose(1, 2)
        return codes * keep(codes, DROPOUT, generator) / (1 - DROPOUT)

    @torch.no_grad()
    def describe(self, x: np.ndarray) -> np.ndarray:
        """The code of each series, the largest value of each component over time.  [N, C, L] -> float32 [N, 320]."""
        device = self.project.weight.device
        with computing("fp32", device):
            blocks = torch.from_numpy(x.transpose(0, 2, 1).astype(np.float32)).split(ROWS)
            return torch.cat([self(rows.to(device)).amax(1) for rows in blocks]).cpu().numpy()


def keep(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """0 for the given share of the elements of x, at random, and 1 for the others."""
    return (torch.rand(x.shape, generator=generator, device=x.device) >= share).to(x.dtype)


def contrast(one: Tensor, other: Tensor) -> Tensor:
    """Loss of two views of M things in each of G groups: each is to be nearer to itself than to the rest of its group.

    The cross-entropy of a softmax over the inner products with the 2 M - 1 other codes of the group, whose target is
    the other view of the same thing (Yue et al. 2022, eqs. 1 and 2).

    Args:
        one, other: [G, M, D].
    """
    M = one.shape[1]
    if M < 2:
        return one.new_zeros(())
    both = torch.cat([one, other], 1)  # [G, 2 M, D]
    itself = torch.eye(2 * M, dtype=torch.bool, device=one.device)
    log_likelihood = (both @ both.transpose(1, 2)).masked_fill(itself, float("-inf")).log_softmax(-1)
    rows = torch.arange(2 * M, device=one.device)
    return -log_likelihood[:, rows, rows.roll(M)].mean()


def hierarchical_loss(one: Tensor, other: Tensor) -> Tensor:
    """Contrast of series and of times, mean over levels: codes are max-pooled by 2 until one time is left.

    Args:
        one, other: codes of the same times of the same series in two views [B, L, D].
    """
    total, levels = one.new_zeros(()), 0
    while True:
        of_series = contrast(one.transpose(0, 1), other.transpose(0, 1))
        # The last level has one time, of which nothing can be told apart.
        total = total + 0.5 * of_series + 0.5 * contrast(one, other)
        levels += 1
        if one.shape[1] == 1:
            return total / levels
        one, other = (F.max_pool1d(codes.transpose(1, 2), 2).transpose(1, 2) for codes in (one, other))


def steps_for(x: np.ndarray) -> int:
    """As the authors: few for few values.  x [N, C, L]."""
    return STEPS[x.size > FEW_VALUES]


def train_ts2vec(
    x: np.ndarray, steps: int, seed: int, device: torch.device | str = "cpu", *, title: str = ""
) -> TS2Vec:
    """An encoder of series, whose weights are the mean over all steps.

    Two overlapping crops of each series are its views, and their codes are compared where they overlap.

    Args:
        x: float32 [N, C, L], L at least 2.
        title: of the progress bar; without one there is none.
    """
    device = usable_device(device)
    generator = torch.Generator(device).manual_seed(derived_seed(seed, 0))
    random = np.random.default_rng(seed)
    with seeded(seed, 1):
        model = TS2Vec(x.shape[1])
    model = model.to(device)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    series = torch.from_numpy(x.transpose(0, 2, 1).astype(np.float32)).to(device)  # [N, L, C]
    N, L = series.shape[:2]
    B = min(BATCH_SIZE, N)
    order = np.empty(0, np.int64)
    average.update_parameters(model)
    with progress_bar(title, steps, unit="step", quiet=not title) as bar:
        for _ in range(steps):
            if len(order) < B:
                order = random.permutation(N)
            rows, order = order[:B], order[B:]
            # The views are [first, right) and [left, last), and the overlap [left, right).
            overlap = int(random.integers(2, L + 1))
            left = int(random.integers(0, L - overlap + 1))
            right = left + overlap
            first, last = int(random.integers(0, left + 1)), int(random.integers(right, L + 1))
            shifts = random.integers(-first, L - last + 1, B)

            def cut(begin: int, end: int, rows: np.ndarray = rows, shifts: np.ndarray = shifts) -> Tensor:
                times = shifts[:, None] + np.arange(begin, end)
                return series[torch.from_numpy(rows[:, None]).to(device), torch.from_numpy(times).to(device)]

            with computing("fp32", device):
                optimizer.zero_grad()
                one = model(cut(first, right), generator)[:, left - first :]
                other = model(cut(left, last), generator)[:, :overlap]
                hierarchical_loss(one, other).backward()
                optimizer.step()
                average.update_parameters(model)
            bar.update()
    model.load_state_dict(average.module.state_dict())
    return model.eval()


def cached_ts2vec(
    x: np.ndarray,
    seed: int,
    device: torch.device | str,
    folder: Path | None,
    *,
    name: str,
    steps: int | None = None,
    quiet: bool = False,
) -> TS2Vec:
    """The encoder of these series and this seed: from `folder`, or trained and kept there.

    Args:
        x: float32 [N, C, L].
        folder, name: as `network_cache.trained_once` takes them.
        steps: None for `steps_for(x)`.

    Raises:
        UserError: the folder cannot be written.
    """
    steps = steps_for(x) if steps is None else steps
    record = {"shape": list(x.shape), "layers": [WIDTH, CODE, LAYERS], "steps": steps, "seed": seed}
    model, _ = trained_once(
        "ts2vec",
        lambda: TS2Vec(x.shape[1]),
        lambda: train_ts2vec(x, steps, seed, device, title="" if quiet else f"TS2Vec ({name})"),
        key=fingerprint(record, x.astype("<f4")),
        folder=folder,
        name=name,
        facts={"seed": seed, "steps": steps},
    )
    return model.to(device).eval()


def context_fid(encoder: TS2Vec, real: np.ndarray, generated: np.ndarray) -> float:
    """Fréchet distance of the encoder's codes of two sets of series [N, C, L] and [M, C, L] (Jeha et al. 2022)."""
    return frechet_distance(encoder.describe(real), encoder.describe(generated))
