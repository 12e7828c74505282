"""Stage 1: what trains the VQVAE, its reconstruction and its self-supervised loss (NC-VQVAE, arXiv 2408.16613)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.config import Config
from ncfast.models.vqvae import VQVAE
from ncfast.nn.projector import Projector, pool
from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss

SSL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "barlow": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "vibcreg": vibcreg_loss,
}
SSL_WEIGHTS = {"barlow": 1.0, "vicreg": 0.01, "vibcreg": 0.01}
WITHOUT_LOSS = ("none", "views")  # values of --ssl


class SelfSupervision(nn.Module):
    """weight · L(P(pool(z_a)), P(pool(z_b))): the projector P trains with stage 1 and is then thrown away."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.projector = Projector(2 * config.dim, config.projector_dim, whiten=config.ssl == "vibcreg")
        self.loss = SSL_LOSSES[config.ssl]
        self.weight = SSL_WEIGHTS[config.ssl] if config.ssl_weight is None else config.ssl_weight

    def forward(self, z_a: Tensor, z_b: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Latent grids of the two views, [B, D, H, W'] each -> scalar.

        gather: of a batch over several processes, own rows [n_r, ...] -> those of all [B, ...], with a gradient. What
            comes after pooling, projector and loss, each process computes from all rows: the projector is too small to
            be worth sharing out, and its gradients, 138 MB at the paper's width, too large to be worth sending.
        """
        a, b = pool(z_a), pool(z_b)
        if gather is not None:
            a, b = gather(torch.cat([a, b], 1)).chunk(2, 1)
        return self.weight * self.loss(*self.projector(a, b))


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Of an empty batch 0."""
    return F.mse_loss(a, b, reduction="mean" if len(a) else "sum")


def stage1_losses(
    model: VQVAE,
    ssl: SelfSupervision | None,
    x: Tensor,
    view: Tensor | None,
    view_weight: float,
    loss_weight: float = 1.0,
    gather: Callable[[Tensor], Tensor] | None = None,
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
        gather: see `SelfSupervision`.

    Encoder and decoder have both views in one batch, but each view has batch statistics of its own.
    """
    views = 1 if view is None else 2
    series = (x,) if view is None else (x, view)
    u = model.stft(joined(series))
    z, *z_view = model.encode(u, views).chunk(views)
    z_q, _, commitment = model.vq(z)
    u_hat = model.decode(joined((z_q, *z_view)), views)
    x_hat = model.stft.inverse(u_hat)
    (time, *time_view), (spectrum, *spectrum_view) = (
        [mean_squared_error(a, b) for a, b in zip(hat.chunk(views), true, strict=True)]
        for hat, true in ((x_hat, series), (u_hat, u.chunk(views)))
    )
    losses = {"reconstruction_time": time, "reconstruction_spectrum": spectrum, "commitment": commitment}
    if view is not None:
        losses["reconstruction_view"] = time_view[0] + spectrum_view[0]
    if loss_weight != 1:
        losses = {name: loss_weight * value for name, value in losses.items()}
    loss = losses["reconstruction_time"] + losses["reconstruction_spectrum"] + losses["commitment"]
    if view is not None:
        loss = loss + view_weight * losses["reconstruction_view"]
    if ssl is not None:
        losses["ssl"] = ssl(model.as_grid(z_q), model.as_grid(z_view[0]), gather)
        loss = loss + losses["ssl"]
    return {"loss": loss, **losses, "perplexity": model.vq.perplexity}


def joined(parts: tuple[Tensor, ...]) -> Tensor:  # [B, ...] each
    return parts[0] if len(parts) == 1 else torch.cat(parts)
