"""Convolutional encoder and decoder between a spectrogram and a grid of latent vectors (NC-VQVAE, section 3)."""

import math

from torch import Tensor, nn
from torch.nn import functional as F


def num_downsampling_blocks(length: int, n_fft: int = 8) -> int:
    """How often the encoder halves the time axis: log2(length / (8 (log2 n_fft - 1))) times, at least once.

    Truncated as in the authors' runs, so that 8 to 15 columns of latents remain of 70 samples and more.
    """
    rate = max(1, round(length / (math.log2(n_fft) - 1) / 8))
    return 1 + max(0, int(math.log2(rate)) - 1)


def down_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Halves the width: [B, in, H, W] -> [B, out, H, W // 2]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, (3, 4), stride=(1, 2), padding=(1, 1), padding_mode="replicate"),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(),
    )


def up_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Doubles the width: [B, in, H, W] -> [B, out, H, 2W]."""
    return nn.Sequential(
        nn.ConvTranspose2d(in_channels, out_channels, (3, 4), stride=(1, 2), padding=(1, 1)),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(),
    )


class ResidualBlock(nn.Module):
    """x + Conv1x1(LeakyReLU([BatchNorm] Conv3x3(LeakyReLU(x)))), shape kept."""

    def __init__(self, channels: int, *, inner_norm: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.LeakyReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels) if inner_norm else nn.Identity(),
            nn.LeakyReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, H, W]
        return x + self.block(x)


def residual_stack(channels: int, num_blocks: int, *, inner_norm: bool) -> list[nn.Module]:
    blocks = [(ResidualBlock(channels, inner_norm=inner_norm), nn.BatchNorm2d(channels)) for _ in range(num_blocks)]
    return [module for pair in blocks for module in pair]


class Encoder(nn.Sequential):
    """u [B, in_channels, H, W] -> z [B, dim, H, W'], with W halved `num_down` times."""

    def __init__(self, in_channels: int, dim: int, num_down: int, num_residual: int) -> None:
        super().__init__(
            down_block(in_channels, dim),
            *[down_block(dim, dim) for _ in range(num_down - 1)],
            *residual_stack(dim, num_residual, inner_norm=True),
        )


class Decoder(nn.Module):
    """z [B, dim, H, W'] -> u [B, out_channels, *size]: up once more than the encoder goes down, then resized."""

    def __init__(self, out_channels: int, dim: int, num_up: int, num_residual: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.blocks = nn.Sequential(
            *residual_stack(dim, num_residual, inner_norm=False),
            *[up_block(dim, dim) for _ in range(num_up - 1)],
            nn.ConvTranspose2d(dim, out_channels, (3, 4), stride=(1, 2), padding=(1, 1)),
            nn.ConvTranspose2d(out_channels, out_channels, (3, 4), stride=(1, 2), padding=(1, 1)),
        )

    def forward(self, z: Tensor) -> Tensor:
        return F.interpolate(self.blocks(z), size=self.size, mode="bilinear", align_corners=True)
