"""One training step of each stage at the paper's FordA configuration, whole and part by part."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from common import OURS, Timing, peak_memory, rows, timings
from torch import Tensor

from ncfast.config import make_config
from ncfast.data.augment import Augment
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.engine.precision import PRECISIONS, computing
from ncfast.engine.step import TrainingStep
from ncfast.training import fit, stages

LENGTH, CLASSES, SERIES = 500, 2, 3601  # FordA


def forward_backward(outputs: Callable[[], Tensor | tuple[Tensor, ...]]) -> Callable[[], None]:
    """Calls, and sends a gradient of ones back through everything that was computed."""

    def call():
        result = outputs()
        sum(part.sum() for part in (result if isinstance(result, tuple) else (result,))).backward()

    return call


class Step:
    """A call is a step of stage 1 or 2, as `ncfast.train` takes it."""

    def __init__(
        self,
        number: int,
        ssl: str = "vicreg",
        device: str = "cpu",
        *,
        precision: str | None = None,
        graph: bool = True,
    ) -> None:
        self.device = torch.device(device)
        generator = np.random.default_rng(0)
        x, y = generator.normal(size=(SERIES, LENGTH)), np.arange(SERIES) % CLASSES
        dataset = from_arrays(x.astype(np.float32), y)
        config = make_config("paper", ssl=ssl, seed=0, precision=precision)
        config = fit.resolve_config(config, dataset, self.device)
        data = DataStats.of(dataset)
        x, labels = data.normalise(dataset.X_train, self.device), torch.from_numpy(dataset.y_train).to(self.device)
        self.vqvae = stages.new_vqvae(config, data).to(self.device).eval()
        if number == 1:
            stage = stages.make_stage1(config, self.vqvae, x, self.device)
        else:
            prior = stages.new_prior(config, self.vqvae, data)
            stage = stages.make_stage2(config, self.vqvae, prior, x, labels, self.device)
        stage.modules.train()
        self.config, self.modules, self.x = config, stage.modules, x
        self.batch_size = stage.batch_size
        self.step = TrainingStep(
            stage.losses,
            stage.modules,
            num_series=SERIES,
            weight_decay=stage.weight_decay,
            rates=[stage.learning_rate] * 10**6,
            precision=stage.precision,
            device=self.device,
            graph=graph,
        )
        self.generators = [torch.Generator(self.device)]
        self.order = torch.randperm(SERIES, device=self.device)
        self.taken = 0
        for _ in range(TrainingStep.EAGER_STEPS + 1 if device == "cuda" else 0):  # the capture is not timed
            self()

    def __call__(self) -> None:
        first = self.batch_size * (self.taken % (SERIES // self.batch_size))
        rows = self.order[first : first + self.batch_size]
        with computing(self.config.precision, self.device):
            self.step(self.taken, rows, self.generators)
        self.taken += 1

    def parts(self) -> dict[str, Callable[[], object]]:
        """Called one after the other, in float32."""
        optimizer = {"AdamW": lambda: self.step.optimizer.step()}
        if "prior" in self.modules:
            B, S, dim = self.batch_size, self.vqvae.num_tokens + 1, self.config.prior_dim
            x = torch.randn(B, S, dim, device=self.device, requires_grad=True)
            block = self.modules["prior"].transformer.blocks[0]
            return {
                "attention half, one of 4 layers": forward_backward(lambda: block.attention_half(x)),
                "feed-forward half, one of 4 layers": forward_backward(lambda: block.feed_forward_half(x)),
                **optimizer,
            }
        model, ssl = self.modules["vqvae"], self.modules["ssl"]
        augment = Augment(self.config.augment)
        x = self.x[: self.batch_size]
        u = model.stft(x)
        z = model.encode(u).detach().requires_grad_()
        grid = model.as_grid(z)
        return {
            "view (augmentation)": lambda: augment(x, self.generators[0]),
            "STFT": lambda: model.stft(x),
            "encoder, one view": forward_backward(lambda: model.encode(u)),
            "nearest code, commitment, EMA": forward_backward(lambda: (model.vq(z)[0], model.vq(z)[2])),
            "decoder, one view": forward_backward(lambda: model.decode(z)),
            "inverse STFT": lambda: model.stft.inverse(u),
            "projector and SSL loss": forward_backward(lambda: ssl(grid, grid.flip(0))),
            **optimizer,
        }


SSL = ("none", "barlow", "vicreg", "vibcreg", "ntxent", "byol", "simsiam", "sigreg", "visreg")


@pytest.mark.parametrize("ssl", SSL)
def test_stage1_step(benchmark, ssl):
    benchmark.pedantic(Step(1, ssl), rounds=5, warmup_rounds=1)


def test_stage2_step(benchmark):
    benchmark.pedantic(Step(2), rounds=5, warmup_rounds=1)


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    """The steps, on a GPU in every precision and without the graph; their parts on a CPU.

    On a GPU a step is called as the training loop does, and brings its own graph.
    """
    own = [None] if device == "cpu" else PRECISIONS
    for number, ssl in ((1, "vicreg"), (2, "none"), *((1, ssl) for ssl in SSL if ssl != "vicreg")):
        steps = {precision: Step(number, ssl, device, precision=precision) for precision in own}
        name = f"stage 1 (batch 128), ssl {ssl}" if number == 1 else "stage 2 (batch 256)"
        yield timed(name, {f"whole step{f', {each}' if each else ''}": step for each, step in steps.items()}, seconds)
    if device == "cuda":
        for number in (1, 2):
            eager = Step(number, device=device, graph=False)
            yield timed(f"stage {number}, a launch a kernel", {f"whole step, {eager.config.precision}": eager}, seconds)
        return
    for number in (1, 2):
        parts = Step(number, device=device).parts()
        yield timed(f"stage {number}, part by part", {f"  {name}": part for name, part in parts.items()}, seconds)


def timed(case: str, steps: dict[str, Callable], seconds: float) -> list[dict]:
    device = next((step.device.type for step in steps.values() if isinstance(step, Step)), "cpu")
    times = timings({name: [step] for name, step in steps.items()}, seconds, device, capture=False)
    made = []
    for name, step in steps.items():
        # A CPU's allocator keeps what the steps before have freed.
        memory = {OURS: peak_memory(step, device)} if device == "cuda" and times[name].seconds else {}
        made += rows(case, how({OURS: times[name]}, step), name, mib=memory)
    return made


def how(times: dict[str, Timing], step: Callable) -> dict[str, Timing]:
    """That ours is a graph, if it is."""
    if isinstance(step, Step) and step.step.graphs:
        times[OURS] = times[OURS]._replace(how="graph")
    return times
