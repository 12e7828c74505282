"""One training step of each stage at the paper's FordA configuration, whole and part by part.

`pytest benchmarks/ --benchmark-only` times the steps; `python benchmarks/bench_training.py` prints a Markdown table of
the parts, timed in turns in one run.
"""

import argparse
from collections.abc import Callable

import pytest
import torch
from common import interleaved, machine, table
from torch import Tensor

from ncfast.config import Config, make_config
from ncfast.data.augment import Augment
from ncfast.stage1 import VQVAE, SelfSupervision, stage1_losses
from ncfast.stage2 import Prior, stage2_losses

LENGTH, CLASSES = 500, 2


def forward_backward(outputs: Callable[[], Tensor | tuple[Tensor, ...]]) -> Callable[[], None]:
    """Calls, and sends a gradient of ones back through everything that was computed."""

    def call():
        result = outputs()
        sum(part.sum() for part in (result if isinstance(result, tuple) else (result,))).backward()

    return call


class Stage1Step:
    def __init__(self, ssl: str) -> None:
        torch.manual_seed(0)
        config = make_config("paper", ssl=ssl)
        self.model = VQVAE(config, 1, LENGTH)
        self.ssl = None if ssl == "none" else SelfSupervision(config)
        self.augment = Augment(config.augment)
        self.generator = torch.Generator().manual_seed(0)
        modules = [self.model] if self.ssl is None else [self.model, self.ssl]
        parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3, fused=True)
        self.x = torch.randn(config.batch_size, 1, LENGTH)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        view = None if self.ssl is None else self.augment(self.x, self.generator)
        stage1_losses(self.model, self.ssl, self.x, view, 0.1)["loss"].backward()
        self.optimizer.step()

    def parts(self) -> dict[str, Callable[[], object]]:
        model = self.model
        u = model.stft(self.x)
        z = model.encode(u).detach().requires_grad_()
        grid = model.as_grid(z)
        return {
            "view (augmentation)": lambda: self.augment(self.x, self.generator),
            "STFT": lambda: model.stft(self.x),
            "encoder, one view": forward_backward(lambda: model.encode(u)),
            "nearest code, commitment, EMA": forward_backward(lambda: (model.vq(z)[0], model.vq(z)[2])),
            "decoder, one view": forward_backward(lambda: model.decode(z)),
            "inverse STFT": lambda: model.stft.inverse(u),
            "projector and SSL loss": forward_backward(lambda: self.ssl(grid, grid.flip(0))),
            "AdamW": lambda: self.optimizer.step(),
        }


class Stage2Step:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.config: Config = make_config("paper")
        self.prior = Prior(self.config, torch.randn(self.config.codebook_size, self.config.dim), 75, CLASSES)
        self.optimizer = torch.optim.AdamW(self.prior.parameters(), lr=1e-3, weight_decay=1e-3, fused=True)
        B = self.config.stage2_batch_size
        self.tokens = torch.randint(0, self.config.codebook_size, (B, 75))
        self.labels = torch.randint(0, CLASSES, (B,))
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        stage2_losses(self.prior, self.tokens, self.labels, self.config, self.generator)["loss"].backward()
        self.optimizer.step()

    def parts(self) -> dict[str, Callable[[], object]]:
        B, S = len(self.tokens), self.tokens.shape[1] + 1
        x = torch.randn(B, S, self.config.prior_dim, requires_grad=True)
        block = self.prior.transformer.blocks[0]
        return {
            "attention half, one of 4 layers": forward_backward(lambda: block.attention_half(x)),
            "feed-forward half, one of 4 layers": forward_backward(lambda: block.feed_forward_half(x)),
            "AdamW": lambda: self.optimizer.step(),
        }


@pytest.mark.parametrize("ssl", ["none", "barlow", "vicreg", "vibcreg"])
def test_stage1_step(benchmark, ssl):
    benchmark.pedantic(Stage1Step(ssl), rounds=5, warmup_rounds=1)


def test_stage2_step(benchmark):
    benchmark.pedantic(Stage2Step(), rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each stage is timed [30]")
    seconds = parser.parse_args().seconds
    print(f"{machine()}\n")
    rows = []
    stage1 = {ssl: Stage1Step(ssl) for ssl in ("none", "barlow", "vicreg", "vibcreg")}
    times = interleaved({f"whole step, ssl {ssl}": step for ssl, step in stage1.items()}, seconds)
    times |= interleaved({f"  {name}": part for name, part in stage1["vicreg"].parts().items()}, seconds)
    rows += [["1 (batch 128)", name, f"{1e3 * t:.1f}"] for name, t in times.items()]
    step = Stage2Step()
    times = interleaved({"whole step": step} | {f"  {name}": part for name, part in step.parts().items()}, seconds)
    rows += [["2 (batch 256)", name, f"{1e3 * t:.1f}"] for name, t in times.items()]
    print(table(["stage", "what, forward and backward", "median ms"], rows))


if __name__ == "__main__":
    main()
