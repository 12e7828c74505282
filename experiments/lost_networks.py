"""Networks of stage 1 that were tried and are not in the package, because they lost: docs/experiments.md."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.config import Config
from ncfast.models.vqvae import VQVAE
from ncfast.nn.encoder_decoder import (
    SLOPE,
    Decoder,
    Encoder,
    LinearResize,
    in_turns,
    normalised,
    residual_stack,
    run_residual_stack,
    up_block,
)


class TwoBands(VQVAE):
    """The lowest bin of the spectrogram has an encoder and a decoder, the others have theirs (as in TimeVQVAE)."""

    def __init__(self, config: Config, channels: int, length: int) -> None:
        super().__init__(config, channels, length)

        def networks(bins: int) -> tuple[Encoder, Decoder]:
            depth = self.num_down, config.residual_blocks
            size = bins, self.stft.num_frames
            return Encoder(2 * channels, config.dim, *depth), Decoder(2 * channels, config.dim, *depth, size)

        self.encoder, self.decoder = networks(1)
        self.high_encoder, self.high_decoder = networks(self.stft.num_bins - 1)

    def encode(self, u: Tensor, views: int = 1) -> Tensor:
        low = self.encoder(u[:, :, :1].contiguous(), views)
        high = self.high_encoder(u[:, :, 1:].contiguous(), views)
        return torch.cat([low, high], dim=2).flatten(2).mT

    def decode(self, z: Tensor, views: int = 1) -> Tensor:
        grid = self.as_grid(z)
        low = self.decoder(grid[:, :, :1].contiguous(), views)
        high = self.high_decoder(grid[:, :, 1:].contiguous(), views)
        return torch.cat([low, high], dim=2)


class WideDecoder(nn.Module):
    """`Decoder` without its bottleneck: all layers but the last are `dim` wide, at the spectrogram's width too."""

    def __init__(self, out_channels: int, dim: int, num_up: int, num_residual: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.num_residual = num_residual
        self.blocks = nn.Sequential(
            *residual_stack(dim, num_residual, inner_norm=False),
            *[up_block(dim, dim) for _ in range(num_up)],
            nn.ConvTranspose2d(dim, out_channels, (3, 4), stride=(1, 2), padding=(1, 1)),
        )
        self.resize = LinearResize((size[1] >> num_up) << (num_up + 1), size[1])

    def forward(self, z: Tensor, views: int = 1) -> Tensor:
        if in_turns(z, views):
            return torch.cat([self(view) for view in z.chunk(views)])
        blocks = list(self.blocks)
        stack, ups, last = blocks[: 2 * self.num_residual], blocks[2 * self.num_residual : -1], blocks[-1]
        x = run_residual_stack(stack, z, F.leaky_relu(z, SLOPE), views)
        for conv, norm, _ in ups:
            x = normalised(norm, conv(x), slope=SLOPE, views=views)
        return self.resize(last(x))


class WithWideDecoder(VQVAE):
    def __init__(self, config: Config, channels: int, length: int) -> None:
        super().__init__(config, channels, length)
        size = (self.stft.num_bins, self.stft.num_frames)
        self.decoder = WideDecoder(2 * channels, config.dim, self.num_down, config.residual_blocks, size)
