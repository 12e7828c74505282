"""Short-time Fourier transform and its inverse as two real convolutions, for series of one fixed length."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class STFT(nn.Module):
    """Equals torch.stft / torch.istft (periodic Hann window, centred, reflect padding, one-sided), in real arithmetic.

    Real and imaginary parts are channels, so the whole model stays real, compiles, and has no host synchronisation. The
    inverse returns exactly `length` samples, odd or even. Float32 or better, under any autocast: this is the data.
    """

    def __init__(self, length: int, n_fft: int = 8) -> None:
        super().__init__()
        if n_fft < 4 or n_fft % 4:
            raise ValueError(f"STFT: n_fft is a multiple of 4 (the hop is n_fft / 4); got {n_fft}")
        if length < n_fft:
            raise ValueError(f"STFT: a series holds at least n_fft = {n_fft} samples; got length {length}")
        self.length = length
        self.n_fft = n_fft
        self.hop = n_fft // 4
        self.num_bins = n_fft // 2 + 1  # H
        self.num_frames = length // self.hop + 1  # W

        # Made on the CPU wherever the module is made: on the meta device `arange` and others run in Python, for which
        # PyTorch imports a second's worth of modules.
        device = torch.get_default_device()
        with torch.device("cpu"):
            buffers = self.make_buffers()
        for name, buffer in zip(("forward_basis", "inverse_basis", "gain"), buffers, strict=True):
            self.register_buffer(name, buffer.float().to(device), persistent=False)

    def make_buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bases [2H, 1, n_fft] of both directions, and what undoes the windows' overlap [1, 1, L]; float64."""
        n_fft = self.n_fft
        window = torch.hann_window(n_fft, dtype=torch.float64)
        n = torch.arange(n_fft, dtype=torch.float64)
        k = torch.arange(self.num_bins, dtype=torch.float64)[:, None]
        angle = 2 * torch.pi * k * n / n_fft  # [H, n_fft]
        forward = torch.stack([angle.cos(), -angle.sin()]) * window  # [2, H, n_fft]
        # The bins strictly between 0 and Nyquist stand for two each.
        fold = torch.full((self.num_bins, 1), 2.0, dtype=torch.float64)
        fold[0] = fold[-1] = 1
        inverse = torch.stack([angle.cos() * fold, -angle.sin() * fold]) * window / n_fft
        envelope = F.conv_transpose1d(
            torch.ones(1, 1, self.num_frames, dtype=torch.float64), window.square()[None, None], stride=self.hop
        )
        start = n_fft // 2
        envelope = envelope[..., start : start + self.length]
        return forward.flatten(0, 1)[:, None], inverse.flatten(0, 1)[:, None], 1 / envelope

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, L] -> u [B, 2C, H, W]: real and imaginary part of each channel."""
        B, C, L = x.shape
        with unrounded(x.device):
            x = F.pad(wide(x).reshape(B * C, 1, L), (self.n_fft // 2, self.n_fft // 2), mode="reflect")
            u = F.conv1d(x, self.forward_basis, stride=self.hop)
        return u.view(B, 2 * C, self.num_bins, self.num_frames)

    def inverse(self, u: Tensor) -> Tensor:
        """u [B, 2C, H, W] -> x [B, C, L]."""
        B, channels = u.shape[:2]
        frames = wide(u).reshape(B * channels // 2, 2 * self.num_bins, self.num_frames)
        with unrounded(u.device):
            x = F.conv_transpose1d(frames, self.inverse_basis, stride=self.hop)
        start = self.n_fft // 2
        return (x[..., start : start + self.length] * self.gain).view(B, channels // 2, self.length)


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


@contextlib.contextmanager
def unrounded(device: torch.device) -> Iterator[None]:
    """Convolutions inside the block take all bits of their operands."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or torch.compiler.is_compiling():
            yield
            return
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
