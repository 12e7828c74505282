"""Stage 1: what trains the VQVAE, its reconstruction and its self-supervised loss (NC-VQVAE, arXiv 2408.16613)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.models.vqvae import VQVAE
from ncfast.training.self_supervision import SelfSupervision


def mean_squared_errors(a: Tensor, b: Tensor, views: int) -> tuple[Tensor, ...]:
    """Of each view, a and b [views·B, ...] being view after view; of an empty batch 0."""
    squares = F.mse_loss(a, b, reduction="none").reshape(views, -1)
    return (squares.sum(1) / max(1, squares.shape[1])).unbind()


class Gaps(NamedTuple):
    """Of a batch of series with gaps, and of its views behind it [views·B, C, L]."""

    observed: Tensor  # bool, what the losses of the reconstruction count
    share: float  # of the train set was observed, so that these losses are means over what was


def stage1_losses(
    model: VQVAE,
    ssl: SelfSupervision | None,
    x: Tensor,
    view: Tensor | None,
    view_weight: float,
    loss_weight: float = 1.0,
    gather: Callable[[Tensor], Tensor] | None = None,
    gaps: Gaps | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The losses of one batch, "loss" being what is minimised.

        L = MSE(x, x̂) + MSE(u, û) + commitment
          + view_weight · (MSE(x', x̂') + MSE(u', û'))      x' goes through the decoder unquantised
          + SSL(z_q, z')                                   quantised original, continuous view; gradients to both

    Args:
        x: normalised series [B, C, L].
        ssl: None leaves its term out.
        view: augmented series, as x; None, and without `ssl`, for a plain VQVAE.
        loss_weight: of these rows, where a batch is spread over several processes (`engine.processes`).
        gather, generator: see `SelfSupervision`.
        gaps: of series that have some.

    Where x was not observed, û is held against the spectrogram of a series that has x̂ there.
    Encoder and decoder have both views in one batch, but each view has batch statistics of its own.
    """
    views = 1 if view is None else 2
    x = joined((x,) if view is None else (x, view))
    u = model.stft(x)
    z, *z_view = model.encode(model.with_observed(u, None if gaps is None else gaps.observed), views).chunk(views)
    z_q, commitment = model.quantize(z)
    u_hat = model.decode(joined((z_q, *z_view)), views)
    x_hat = model.stft.inverse(u_hat)
    if gaps is not None:
        x = torch.where(gaps.observed, x, x_hat.detach())  # without an error in the gaps
        u = model.stft(x)
        x_hat = torch.where(gaps.observed, x_hat, x)
    time, *time_view = mean_squared_errors(x_hat, x, views)
    spectrum, *spectrum_view = mean_squared_errors(u_hat, u, views)
    if gaps is not None:
        time, spectrum = time / gaps.share, spectrum / gaps.share
        time_view, spectrum_view = ([each / gaps.share for each in part] for part in (time_view, spectrum_view))
    losses = {"reconstruction_time": time, "reconstruction_spectrum": spectrum, "commitment": commitment}
    if view is not None:
        losses["reconstruction_view"] = time_view[0] + spectrum_view[0]
    if loss_weight != 1:
        losses = {name: loss_weight * value for name, value in losses.items()}
    loss = losses["reconstruction_time"] + losses["reconstruction_spectrum"] + losses["commitment"]
    if view is not None:
        loss = loss + view_weight * losses["reconstruction_view"]
    if ssl is not None:
        losses["ssl"] = ssl(model.as_grid(z_q), model.as_grid(z_view[0]), gather, generator)
        loss = loss + losses["ssl"]
    return {"loss": loss, **losses, "perplexity": model.vq.perplexity}


def joined(parts: tuple[Tensor, ...]) -> Tensor:  # [B, ...] each
    return parts[0] if len(parts) == 1 else torch.cat(parts)
