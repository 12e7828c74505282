"""Stage 1: a VQVAE over spectrograms whose codes also obey a self-supervised loss (NC-VQVAE, arXiv 2408.16613)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.config import Config
from ncfast.nn.encoder_decoder import Decoder, Encoder, num_downsampling_blocks
from ncfast.nn.projector import Projector, pool
from ncfast.nn.stft import STFT
from ncfast.nn.vector_quantize import VectorQuantize
from ncfast.ops import barlow_twins_loss, nearest_code, vibcreg_loss, vicreg_loss


class VQVAE(nn.Module):
    """x [B, C, L] --STFT--> u --encoder--> z [B, D, H, W'] --nearest code--> tokens [B, n] --decoder, ISTFT--> x̂."""

    def __init__(self, config: Config, channels: int, length: int) -> None:
        super().__init__()
        self.stft = STFT(length, config.n_fft)
        spectrum_size = (self.stft.num_bins, self.stft.num_frames)
        num_down = self.num_down = config.halvings or num_downsampling_blocks(length, config.n_fft)
        width = spectrum_size[1] >> num_down
        if width < 1:
            raise ValueError(f"series of length {length} leave no latent column after {num_down} halvings")
        self.grid = (spectrum_size[0], width)  # (H, W')
        self.encoder = Encoder(2 * channels, config.dim, num_down, config.residual_blocks)
        self.vq = VectorQuantize(
            config.dim,
            config.codebook_size,
            decay=config.codebook_decay,
            rotation_trick=False,
            kmeans_init=config.codebook_init == "kmeans",
            threshold_ema_dead_code=config.dead_code_threshold,
        )
        if config.codebook_init == "random":
            # As far apart as the paper's, whose counts start at zero: a code that no latent has chosen yet is then its
            # moving average over eps, up to 1e6 long, and decodes to spikes. Here each counts as chosen once, so that
            # it stays between where it began and the latents that choose it.
            self.vq.codebook = torch.randn(config.codebook_size, config.dim)
        self.decoder = Decoder(2 * channels, config.dim, num_down, config.residual_blocks, spectrum_size)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def samples_per_column(self) -> int:
        """How many samples of a series one column of the grid stands for; the last one also has what is left over."""
        return self.stft.hop << self.num_down

    def encode(self, u: Tensor, views: int = 1) -> Tensor:
        """u [B, 2C, H, W] -> continuous latents z [B, n, D]; `views` of equal size may be in a batch, see Encoder."""
        return self.encoder(u, views).flatten(2).mT

    def decode(self, z: Tensor, views: int = 1) -> Tensor:
        """Latents z [B, n, D], quantised or not -> spectrogram û [B, 2C, H, W]."""
        return self.decoder(self.as_grid(z), views)

    def as_grid(self, z: Tensor) -> Tensor:
        """z [B, n, D] -> [B, D, H, W']."""
        return z.mT.unflatten(2, self.grid)

    @torch.no_grad()
    def tokenize(self, x: Tensor) -> Tensor:
        """x [B, C, L] -> tokens [B, n]: the nearest codes."""
        return nearest_code(self.encode(self.stft(x)), self.vq.codebook)

    @torch.no_grad()
    def detokenize(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] -> series [B, C, L]."""
        return self.stft.inverse(self.decode(F.embedding(tokens, self.vq.codebook)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """x [B, C, L] -> x̂ [B, C, L] through the codebook."""
        return self.detokenize(self.tokenize(x))


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
    share: float = 1.0,
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
        share: of the rows of a batch over several processes (`engine.processes`), whose mean the losses are then.
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
    if share != 1:
        losses = {name: share * value for name, value in losses.items()}
    loss = losses["reconstruction_time"] + losses["reconstruction_spectrum"] + losses["commitment"]
    if view is not None:
        loss = loss + view_weight * losses["reconstruction_view"]
    if ssl is not None:
        losses["ssl"] = ssl(model.as_grid(z_q), model.as_grid(z_view[0]), gather)
        loss = loss + losses["ssl"]
    return {"loss": loss, **losses, "perplexity": model.vq.perplexity}


def joined(parts: tuple[Tensor, ...]) -> Tensor:  # [B, ...] each
    return parts[0] if len(parts) == 1 else torch.cat(parts)
