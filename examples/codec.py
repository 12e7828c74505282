"""A small neural codec around `ncfast.VectorQuantize`, in plain PyTorch: python examples/codec.py

An encoder turns 8 samples of sound into a latent vector, a codebook turns each vector into a number, and a decoder
turns the numbers into sound. With 256 codes that is one byte for 8 samples of 16 bits: a sixteenth.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast import VectorQuantize


class Codec(nn.Module):
    """x [B, 1, T], T a multiple of 8."""

    def __init__(self, dim: int = 32, codes: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, dim, 8, stride=8), nn.GELU(), nn.Conv1d(dim, dim, 3, padding=1))
        self.quantize = VectorQuantize(dim=dim, codebook_size=codes, decay=0.9, threshold_ema_dead_code=2)
        self.decoder = nn.Sequential(
            nn.Conv1d(dim, dim, 3, padding=1), nn.GELU(), nn.ConvTranspose1d(dim, 1, 8, stride=8)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> x̂ [B, 1, T], commitment loss."""
        quantized, _, commitment = self.quantize(self.encoder(x).mT)
        return self.decoder(quantized.mT), commitment.sum()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """-> codes [B, T / 8]."""
        return self.quantize(self.encoder(x).mT)[1]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, n] -> x̂ [B, 1, 8 n]."""
        return self.decoder(self.quantize.get_codes_from_indices(codes).mT)


def tones(count: int, generator: torch.Generator, length: int = 256) -> Tensor:
    """Sums of two sines [count, 1, length]."""
    frequency = torch.rand(count, 2, 1, generator=generator) * 0.3 + 0.02
    phase = torch.rand(count, 2, 1, generator=generator) * 6.28
    return torch.sin(torch.arange(length) * frequency + phase).mean(1, keepdim=True)


def train(steps: int, seed: int = 0) -> tuple[Codec, float]:
    """The codec and its error on new tones, relative to their power."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    codec = Codec()
    optimizer = torch.optim.AdamW(codec.parameters(), 2e-3)
    for _ in range(steps):
        x = tones(32, generator)
        rebuilt, commitment = codec(x)
        loss = F.mse_loss(rebuilt, x) + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codec.eval()
    x = tones(64, generator)
    rebuilt = codec.decode(codec.encode(x))
    return codec, float(F.mse_loss(rebuilt, x) / x.square().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    codec, error = train(parser.parse_args().steps)
    print(f"relative error {error:.3f} at one byte for 8 samples")
