"""The VQVAE of stage 1: series to tokens and back (NC-VQVAE, arXiv 2408.16613)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.config import Config
from ncfast.models.refiner import Refiner, noise_of
from ncfast.nn.encoder_decoder import Decoder, Encoder, num_downsampling_blocks
from ncfast.nn.stft import STFT
from ncfast.nn.vector_quantize import VectorQuantize
from ncfast.ops import nearest_code


class VQVAE(nn.Module):
    """x [B, C, L] --STFT--> u --encoder--> z [B, D, H, W'] --nearest code--> tokens [B, n] --decoder, ISTFT--> x̂.

    For series with gaps the encoder also sees, for each channel and frame, (share of samples that are missing)^4 over a
    column: long gaps and ends. Straight lines over single samples are as good, and a mask of them only adds noise to
    the tokens (docs/experiments.md).
    """

    def __init__(self, config: Config, channels: int, length: int, has_gaps: bool = False) -> None:
        super().__init__()
        self.has_gaps = has_gaps
        self.refiner: Refiner | None = None  # of stage 3, where there is one
        self.stft = STFT(length, config.n_fft)
        spectrum_size = (self.stft.num_bins, self.stft.num_frames)
        num_down = self.num_down = config.halvings or num_downsampling_blocks(
            length, config.n_fft, config.samples_per_column
        )
        width = spectrum_size[1] >> num_down
        if width < 1:
            raise ValueError(f"series of length {length} leave no latent column after {num_down} halvings")
        self.grid = (spectrum_size[0], width)  # (H, W')
        self.encoder = Encoder((3 if has_gaps else 2) * channels, config.dim, num_down, config.residual_blocks)
        self.vq = new_codebook(config)
        # What finer levels are for: the residuals of those before.
        self.finer = nn.ModuleList(new_codebook(config) for _ in range(config.codebook_levels - 1))
        self.decoder = Decoder(2 * channels, config.dim, num_down, config.residual_blocks, spectrum_size)

    def state_dict_of_stage1(self) -> dict[str, Tensor]:
        """Without the refiner's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("refiner.")}

    @property
    def levels(self) -> list[VectorQuantize]:
        """Coarse to fine."""
        return [self.vq, *self.finer]

    @property
    def codebook(self) -> Tensor:
        """Codes of all levels, one level after the other [levels * K, D]; tokens are their rows."""
        return torch.cat([vq.codebook for vq in self.levels]) if self.finer else self.vq.codebook

    @property
    def num_tokens(self) -> int:
        """Of a series: the grid of each level, one level after the other."""
        return len(self.levels) * self.grid[0] * self.grid[1]

    @property
    def samples_per_column(self) -> int:
        """How many samples of a series one column of the grid stands for; the last one also has what is left over."""
        return self.stft.hop << self.num_down

    def spectrum(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """What the encoder takes: x [B, C, L], observed bool [B, C, L] (None: all of x) -> u [B, 2C or 3C, H, W]."""
        return self.with_observed(self.stft(x), observed)

    def with_observed(self, u: Tensor, observed: Tensor | None = None) -> Tensor:
        """u = STFT(x) [B, 2C, H, W] -> what the encoder takes; see `spectrum`."""
        if not self.has_gaps:
            return u
        B, channels, H, W = u.shape
        if observed is None:
            return torch.cat([u, u.new_zeros(B, channels // 2, H, W)], 1)
        half = self.samples_per_column // 2
        share = F.avg_pool1d(F.pad((~observed).to(u), (half, half), "replicate"), 2 * half, self.stft.hop)
        return torch.cat([u, share[:, :, None, :W].square().square().expand(-1, -1, H, -1)], 1)

    def encode(self, u: Tensor, views: int = 1) -> Tensor:
        """What the encoder takes, u [B, 2C or 3C, H, W] -> continuous latents z [B, n, D].

        `views` of equal size may be in a batch, see Encoder.
        """
        return self.encoder(u, views).flatten(2).mT

    def decode(self, z: Tensor, views: int = 1) -> Tensor:
        """Latents z [B, n, D], quantised or not -> spectrogram û [B, 2C, H, W]."""
        return self.decoder(self.as_grid(z), views)

    def as_grid(self, z: Tensor) -> Tensor:
        """z [B, n, D] -> [B, D, H, W']."""
        return z.mT.unflatten(2, self.grid)

    @torch.no_grad()
    def tokenize(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """x [B, C, L], observed bool [B, C, L] (None: all of x) -> tokens [B, n]: the nearest codes."""
        residual = self.encode(self.spectrum(x, observed))
        tokens = []
        for level, vq in enumerate(self.levels):
            codes = nearest_code(residual, vq.codebook)
            tokens.append(codes + level * vq.codebook_size if level else codes)
            if level + 1 < len(self.levels):
                residual = residual - F.embedding(codes, vq.codebook)
        return torch.cat(tokens, 1) if self.finer else tokens[0]

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents z [B, n, D] -> their codes, straight through, and the commitment loss, which trains the encoder.

        In training the codebooks move towards what chose them.
        """
        z_q, _, commitment = self.vq(z)
        code = z_q.detach()
        for vq in self.finer:
            z = z - code
            code, _, loss = vq(z)
            code = code.detach()
            z_q, commitment = z_q + code, commitment + loss
        return z_q, commitment

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, levels * n] -> the sum of their codes [B, n, D]."""
        codes = F.embedding(tokens, self.codebook)
        return codes.unflatten(1, (len(self.levels), -1)).sum(1) if self.finer else codes

    @torch.no_grad()
    def detokenize(self, tokens: Tensor, refinements: int = 0) -> Tensor:
        """tokens [B, n] -> series [B, C, L]; refinements: steps of the refiner, where there is one."""
        x = self.stft.inverse(self.decode(self.embed(tokens)))
        if self.refiner is None or refinements == 0:
            return x
        return self.refiner.refine(x, noise_of(tokens, *x.shape[1:]), refinements)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """x [B, C, L], observed as in `tokenize` -> x̂ [B, C, L] through the codebook."""
        return self.detokenize(self.tokenize(x, observed))


def new_codebook(config: Config) -> VectorQuantize:
    vq = VectorQuantize(
        config.dim,
        config.codebook_size,
        decay=config.codebook_decay,
        rotation_trick=False,
        kmeans_init=config.codebook_init == "kmeans",
        threshold_ema_dead_code=config.dead_code_threshold,
    )
    if config.codebook_init == "random":
        # As far apart as the paper's, whose counts start at zero: a code that no latent has chosen yet is then its
        # moving average over eps, up to 1e6 long, and decodes to spikes. Here each counts as chosen once, so that it
        # stays between where it began and the latents that choose it.
        vq.codebook = torch.randn(config.codebook_size, config.dim)
    return vq
