"""One training step of each stage at the paper's FordA configuration, whole and part by part.

`pytest benchmarks/ --benchmark-only` times the steps; `python benchmarks/bench_training.py` prints a Markdown table of
the parts, timed in turns in one run. With `--ensemble 4` it prints instead what a step of four models at once takes
against four steps of one.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from common import OURS, flat, interleaved, machine, peak_memory, rows, table, timings
from torch import Tensor

from ncfast import ensemble, training
from ncfast.config import Config, make_config
from ncfast.data.augment import Augment
from ncfast.data.facts import DataFacts
from ncfast.data.sources import from_arrays
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
    def __init__(self, ssl: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        config = make_config("paper", ssl=ssl)
        self.model = VQVAE(config, 1, LENGTH).to(device)
        self.ssl = None if ssl == "none" else SelfSupervision(config).to(device)
        self.augment = Augment(config.augment)
        self.generator = torch.Generator(device).manual_seed(0)
        modules = [self.model] if self.ssl is None else [self.model, self.ssl]
        parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3, fused=True)
        self.x = torch.randn(config.batch_size, 1, LENGTH).to(device)

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
    def __init__(self, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.config: Config = make_config("paper")
        codebook = torch.randn(self.config.codebook_size, self.config.dim)
        self.prior = Prior(self.config, codebook, 75, CLASSES).to(device)
        self.optimizer = torch.optim.AdamW(self.prior.parameters(), lr=1e-3, weight_decay=1e-3, fused=True)
        B = self.config.stage2_batch_size
        self.tokens = torch.randint(0, self.config.codebook_size, (B, 75)).to(device)
        self.labels = torch.randint(0, CLASSES, (B,)).to(device)
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        stage2_losses(self.prior, self.tokens, self.labels, self.config, self.generator)["loss"].backward()
        self.optimizer.step()

    def parts(self) -> dict[str, Callable[[], object]]:
        B, S = len(self.tokens), self.tokens.shape[1] + 1
        x = torch.randn(B, S, self.config.prior_dim, device=self.tokens.device, requires_grad=True)
        block = self.prior.transformer.blocks[0]
        return {
            "attention half, one of 4 layers": forward_backward(lambda: block.attention_half(x)),
            "feed-forward half, one of 4 layers": forward_backward(lambda: block.feed_forward_half(x)),
            "AdamW": lambda: self.optimizer.step(),
        }


class EnsembleStep:
    """One step of E models at once, as `--seeds` trains them, or with E None of one model alone."""

    def __init__(self, number: int, ssl: str, E: int | None, device: torch.device) -> None:
        config = dataclasses.replace(make_config("paper", ssl=ssl), seed=0)
        N = config.batch_size if number == 1 else config.stage2_batch_size
        generator = np.random.default_rng(0)
        x, y = generator.normal(size=(N, LENGTH)), np.arange(N) % CLASSES
        dataset = from_arrays(x.astype(np.float32), y)
        data = DataFacts.of(dataset)
        x, labels = data.normalise(dataset.X_train, device), torch.from_numpy(dataset.y_train).to(device)
        configs = [dataclasses.replace(config, seed=seed) for seed in range(E or 1)]
        vqvaes = [training.new_vqvae(each, data).to(device).eval() for each in configs]
        if number == 1 and E is None:
            self.stage = training.stage1(config, vqvaes[0], x, device)
        elif number == 1:
            self.stage = ensemble.stage1(configs, vqvaes, x, device)
        else:
            priors = [training.new_prior(each, vqvae, data) for each, vqvae in zip(configs, vqvaes, strict=True)]
            if E is None:
                self.stage = training.stage2(config, vqvaes[0], priors[0], x, labels, device)
            else:
                self.stage = ensemble.stage2(configs, vqvaes, priors, x, labels, device)
        self.stage.modules.train()
        self.optimizer = torch.optim.AdamW(self.stage.modules.parameters(), lr=1e-3, weight_decay=1e-3, fused=True)
        rows, generators = torch.arange(N, device=device), [torch.Generator(device) for _ in configs]
        self.arguments = (rows, generators[0]) if E is None else (rows.expand(E, -1), generators)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.stage.step(*self.arguments)["loss"].sum().backward()
        self.optimizer.step()


def ensemble_table(E: int, device: torch.device, seconds: float) -> str:
    lines = []
    for number, ssl in ((1, "none"), (1, "vicreg"), (2, "none")):
        one, together = (EnsembleStep(number, ssl, members, device) for members in (None, E))

        def in_turn(one: EnsembleStep = one) -> None:
            for _ in range(E):
                one()

        times = interleaved({"solo": in_turn, "together": together}, seconds, device=device.type)
        solo, both = times["solo"], times["together"]
        what = f"ssl {ssl}" if number == 1 else "prior"
        lines.append([str(number), what, f"{1e3 * solo:.1f}", f"{1e3 * both:.1f}", f"{solo / both:.2f}"])
    return table(["stage", "step", f"{E} steps of one, ms", f"one of {E} at once, ms", "ratio"], lines)


@pytest.mark.parametrize("ssl", ["none", "barlow", "vicreg", "vibcreg"])
def test_stage1_step(benchmark, ssl):
    benchmark.pedantic(Stage1Step(ssl), rounds=5, warmup_rounds=1)


def test_stage2_step(benchmark):
    benchmark.pedantic(Stage2Step(), rounds=5, warmup_rounds=1)


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    """Called eagerly on a GPU too, as the training loop calls them."""
    stage1 = {ssl: Stage1Step(ssl, device) for ssl in ("none", "barlow", "vicreg", "vibcreg")}
    stage2 = Stage2Step(device)
    names = "1 (batch 128)", "2 (batch 256)"
    yield timed_steps(names[0], {f"whole step, ssl {ssl}": step for ssl, step in stage1.items()}, seconds, device)
    yield timed_steps(names[1], {"whole step": stage2}, seconds, device)
    yield timed_steps(names[0], {f"  {name}": part for name, part in stage1["vicreg"].parts().items()}, seconds, device)
    yield timed_steps(names[1], {f"  {name}": part for name, part in stage2.parts().items()}, seconds, device)


def timed_steps(stage: str, steps: dict[str, Callable], seconds: float, device: str) -> list[dict]:
    times = timings({name: [step] for name, step in steps.items()}, seconds, device, capture=False)
    made = []
    for name, step in steps.items():
        # A CPU's allocator keeps what the steps before have freed.
        memory = {OURS: peak_memory(step, device)} if device == "cuda" and times[name].seconds else {}
        made += rows(f"stage {stage}", {OURS: times[name]}, name, mib=memory)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each stage is timed [30]")
    parser.add_argument("--ensemble", type=int, metavar="E", help="time E models at once against E steps of one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    print(f"{machine(options.device)}\n")
    if options.ensemble is not None:
        print(ensemble_table(options.ensemble, torch.device(options.device), options.seconds))
        return
    made = sorted(flat(cases(options.device, options.seconds)), key=lambda row: row["case"])
    lines = [[row["case"].removeprefix("stage "), row["what"], f"{1e3 * row['seconds']:.1f}"] for row in made]
    print(table(["stage", "what, forward and backward", "median ms"], lines))


if __name__ == "__main__":
    main()
