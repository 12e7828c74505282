"""Completing series: what was observed stays, the rest is drawn given the tokens that the observed part determines."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncfast.data.arrays import FLOAT32_MAX, to_numpy
from ncfast.data.gaps import interpolated, last_observed
from ncfast.data.stats import DataStats
from ncfast.errors import UserError
from ncfast.models.vqvae import VQVAE


class Context:
    """m series of which some samples were observed.

    A token counts as determined when at least half of the samples it stands for were observed and the encoder, which
    sees further, gives the same token whatever stands in the gaps: straight lines between their ends, and `NUM_FILLS`
    series drawn from the model, bent to meet those ends. The prior then draws the other tokens given these.

    Attributes:
        original: data units, float32 [m, C, L], anything where not observed.
        observed: bool [m, C, L].
    """

    NUM_FILLS = 7

    def __init__(self, context: np.ndarray, mask: np.ndarray | None, data: DataStats) -> None:
        """
        Args:
            context: series in data units, [L], [m, L] or [m, C, L]; numbers that were not observed do not matter, and
                what a masked array masks was not.
            mask: bool, True where observed: of context's shape, [L], or [m, L] for all channels; None takes what is
                finite.
            data: of the model.

        Raises:
            UserError: shapes that do not fit the model, or an observed number that is not finite.
        """
        C, L = data.channels, data.length
        self.original = self.as_series(real_numbers(context), C, L)
        finite = np.isfinite(self.original)
        if mask is None:
            self.observed = finite
        else:
            mask = np.asarray(mask)
            if mask.dtype != np.bool_:
                raise UserError(f"mask is bool, True where the context was observed; got {mask.dtype}")
            if mask.ndim == 2 and C > 1:
                m = len(self.original)
                if np.ndim(context) == 3 and m == C > 1 and mask.shape == (C, L):
                    raise UserError(
                        f"a mask {[C, L]} of {m} series of {C} channels may be [series, time] or [channels, time]: "
                        "give mask[:, None] ([m, 1, L]) or mask[None] ([1, C, L])"
                    )
                if mask.shape != (C, L):
                    mask = mask[:, None]  # one for all channels
            if mask.ndim < 3 and C == 1:
                mask = mask.reshape(-1, 1, mask.shape[-1])
            try:
                self.observed = np.broadcast_to(mask, self.original.shape)
            except ValueError:
                raise UserError(
                    f"mask has the shape of the context, {list(self.original.shape)}, or [{L}]; got {list(mask.shape)}"
                ) from None
            if not finite[self.observed].all():
                raise UserError("the context holds NaN or infinity where the mask says it was observed")
        self.data = data
        self.known: Tensor | None = None

    @staticmethod
    def as_series(x: np.ndarray, C: int, L: int) -> np.ndarray:
        """[m, C, L] of any of the shapes a user may bring."""
        shape = x.shape
        if x.ndim == 1:
            x = x[None]
        if x.ndim == 2:
            x = x[None] if C > 1 and x.shape == (C, L) else x[:, None]
        if x.ndim != 3 or x.shape[1:] != (C, L) or len(x) == 0:
            raise UserError(f"context is [m, {C}, {L}] (m from 1, channels may be left out when 1); got {list(shape)}")
        return x

    def last_observed(self) -> np.ndarray:
        """How many time points each series has up to the last that was observed, int64 [m]."""
        return last_observed(np.where(self.observed, 0.0, np.nan))

    def levels(self) -> np.ndarray | None:
        """Of what was observed, float64 [m, 2C], NaN where that does not tell: a single sample has no scale."""
        levels = self.data.levels_of(np.where(self.observed, self.original, np.nan))
        if levels is not None:
            levels[:, self.data.channels :][self.observed.sum(2) < 2] = np.nan
        return levels

    def __len__(self) -> int:
        return len(self.original)

    @torch.no_grad()
    def find_known_tokens(self, vqvae: VQVAE, fills: Tensor, chunk_size: int) -> None:
        """Finds the tokens that the observed samples determine.

        Args:
            fills: series to try in the gaps, normalised [F, C, L].
            chunk_size: rows a forward pass of the encoder.
        """
        device = fills.device
        x = self.data.normalise(np.where(self.observed, self.original, np.nan), torch.device("cpu"))  # [m, C, L]
        observed = torch.from_numpy(self.observed.copy())
        lines = interpolated(x, observed)
        versions = [lines]
        for fill in fills.cpu():
            fill = fill.expand_as(x)
            versions.append(torch.where(observed, x, lines + fill - interpolated(fill, observed)))
        blocks = []
        for first in range(0, len(x), chunk_size):
            rows = np.arange(first, first + chunk_size) % len(x)
            tokens, *others = (vqvae.tokenize(version[rows].to(device)) for version in versions)
            agree = torch.stack([other == tokens for other in others]).all(0)
            # A fine token is of the residual of the coarser ones: known only with them.
            agree = agree.unflatten(1, (-1, *vqvae.grid)).int().cumprod(1).bool().flatten(1)
            blocks.append(torch.where(agree, tokens, len(vqvae.codebook)))
        span = vqvae.samples_per_column
        seen = self.observed.mean(1)  # [m, L], share of the channels
        columns = [
            seen[:, w * span : None if w == vqvae.grid[1] - 1 else (w + 1) * span].mean(1) for w in range(vqvae.grid[1])
        ]
        enough = torch.from_numpy(np.stack(columns, 1) >= 0.5).to(device)  # [m, W']
        known = torch.cat(blocks)[: len(x)].unflatten(1, (-1, *vqvae.grid))
        self.known = torch.where(enough[:, None, None], known, len(vqvae.codebook)).flatten(1)  # [m, n]

    def known_tokens(self, sample: Tensor) -> Tensor:
        """Sample indices int64 [B] -> tokens int64 [B, n], K where none is determined."""
        return self.known[sample % len(self)]

    def keep_observed(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Decoded series in data units [B, C, L] of samples `index` [B], with what was observed in its place."""
        rows = index % len(self)
        observed = self.observed[rows]
        return np.where(observed, self.original[rows], x)


def real_numbers(context: Any) -> np.ndarray:
    """float32, as a user may bring it: NaN where nothing was observed."""
    x = to_numpy(context, "context")
    if x.dtype.kind not in "fiub":
        raise UserError(f"context: series are real numbers; got {x.dtype}; convert them to float32")
    with np.errstate(over="ignore"):
        converted = x.astype(np.float32)
    if (np.isinf(converted) & np.isfinite(x)).any():
        raise UserError(f"context: it holds a value beyond float32 ({FLOAT32_MAX:.1e}); rescale it first")
    return converted
