"""One training step of each stage at the paper's FordA configuration, whole and part by part.

Also with each hand-written operation left to PyTorch, and with PyTorch's operations under torch.compile: by these
the rule of CONTRIBUTING says which operations stay.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from common import OURS, Timing, peak_memory, reason, rows, timings
from torch import Tensor

from ncfast.config import make_config
from ncfast.data.augment import Augment
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.engine.precision import PRECISIONS, computing
from ncfast.engine.step import TrainingStep
from ncfast.nn import encoder_decoder
from ncfast.ops import dispatch
from ncfast.training import fit, stages

LENGTH, CLASSES, SERIES = 500, 2, 3601  # FordA

LOSSES = ("barlow_twins_loss", "vicreg_loss", "vibcreg_loss")
HAND_WRITTEN = {  # of each stage: what is left to PyTorch, one after the other and all together
    1: {
        "batch_norm": ("batch_norm",),
        "thin_conv_transpose": ("thin_conv_transpose",),
        "SSL losses": LOSSES,
        "rotate_to_code": ("rotate_to_code",),
        "adamw": ("adamw",),
    },
    2: {
        "layer_norm": ("layer_norm",),
        "fused_linear": ("fused_linear",),
        "masked_attention": ("masked_attention",),
        "adamw": ("adamw",),
    },
}


def forward_backward(outputs: Callable[[], Tensor | tuple[Tensor, ...]]) -> Callable[[], None]:
    """Calls, and sends a gradient of ones back through everything that was computed."""

    def call():
        result = outputs()
        sum(part.sum() for part in (result if isinstance(result, tuple) else (result,))).backward()

    return call


@contextmanager
def left_to_pytorch(operations: tuple[str, ...]) -> Iterator[None]:
    """What is called or captured inside takes PyTorch's operations in the place of these."""
    choose, takes_triton = dispatch.choose, encoder_decoder.takes_triton

    def chosen(operation: str, impl: str | None, why_not: dict[str, str | None]) -> str:
        return "reference" if operation in operations else choose(operation, impl, why_not)

    dispatch.choose = chosen
    if "thin_conv_transpose" in operations:
        encoder_decoder.takes_triton = lambda *_: False
    try:
        yield
    finally:
        dispatch.choose, encoder_decoder.takes_triton = choose, takes_triton


class CompiledStep(TrainingStep):
    def compile_kernels(self, *_: object) -> None:
        """torch.compile does that."""


def compile_networks(modules: torch.nn.Module, mode: str) -> None:
    """Those that train, each as a whole. Weights are in channels_last and AdamW is fused, as in every step of ours."""
    torch.compiler.reset()  # after a few compilations of the same code the next would run as it is
    networks = [modules["vqvae"].encoder, modules["vqvae"].decoder] if "vqvae" in modules else [modules["prior"]]
    for network in [*networks, *([modules["ssl"]] if "ssl" in modules else [])]:
        network.compile(mode=mode)


class Step:
    """A call is a step of stage 1 or 2, as `ncfast.train` takes it.

    compile: of torch.compile, the mode in which it compiles the networks.
    without: operations of ours that are left to PyTorch.
    """

    def __init__(
        self,
        number: int,
        ssl: str = "vicreg",
        device: str = "cpu",
        *,
        precision: str | None = None,
        graph: bool = True,
        compile: str | None = None,
        without: tuple[str, ...] = (),
    ) -> None:
        self.without = without
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
        if compile is not None:
            compile_networks(stage.modules, compile)
        with left_to_pytorch(without):  # where the optimiser is chosen
            self.step = (TrainingStep if compile is None else CompiledStep)(
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
        with left_to_pytorch(self.without), computing(self.config.precision, self.device):
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
    """The steps, on a GPU in every precision, without the graph, and against PyTorch; their parts on a CPU.

    On a GPU a step is called as the training loop does, and brings its own graph.
    """
    own = [None] if device == "cpu" else PRECISIONS
    for number, ssl in ((1, "vicreg"), (2, "none"), *((1, ssl) for ssl in SSL if ssl != "vicreg")):
        steps = {precision: Step(number, ssl, device, precision=precision) for precision in own}
        name = f"stage 1 (batch 128), ssl {ssl}" if number == 1 else "stage 2 (batch 256)"
        yield timed(name, {f"whole step{f', {each}' if each else ''}": step for each, step in steps.items()}, seconds)
    if device == "cpu":
        for number in (1, 2):
            parts = Step(number, device=device).parts()
            yield timed(f"stage {number}, part by part", {f"  {name}": part for name, part in parts.items()}, seconds)
        # Not stage 1, whose compiled backward pass fails in torch 2.13 on a CPU (replication_pad2d in channels_last).
        yield against_pytorch(2, "fp32", "default", seconds, device)
        return
    for number in (1, 2):
        eager = Step(number, device=device, graph=False)
        yield timed(f"stage {number}, a launch a kernel", {f"whole step, {eager.config.precision}": eager}, seconds)
    # Last what may compile for many minutes: its time can end here.
    for mode in ("default", "max-autotune-no-cudagraphs"):
        for number in (1, 2):
            for precision in ("bf16", "tf32"):
                yield against_pytorch(number, precision, mode, seconds)


def against_pytorch(number: int, precision: str, mode: str, seconds: float, device: str = "cuda") -> list[dict]:
    """Ours and PyTorch's under torch.compile in turns; in its mode "default" what lies between them too.

    `compile_seconds` of a row: from making the step to its capture, less what that takes without torch.compile.
    """
    hand_written = HAND_WRITTEN[number]
    everything = tuple(operation for each in hand_written.values() for operation in each)
    peers: dict[str, tuple[tuple[str, ...], str | None]] = {OURS: ((), None)}
    if mode == "default":
        peers |= {f"without {name}": (operations, None) for name, operations in hand_written.items()}
    peers |= {"PyTorch": (everything, None), f"PyTorch, torch.compile, {mode}": (everything, mode)}
    steps, times, started = {}, {}, {}
    for name, (operations, compile) in peers.items():
        begin = time.perf_counter()
        try:
            steps[name] = Step(number, "vicreg", device, precision=precision, compile=compile, without=operations)
        except Exception as error:  # which class it is depends on the compiler
            times[name] = Timing(None, reason(error))
        started[name] = time.perf_counter() - begin
    times |= timings({name: [step] for name, step in steps.items()}, seconds, device, capture=False)
    for name, step in steps.items():
        times[name] = how({name: times[name]}, step, name)[name]
    compiled = {name: max(0.0, started[name] - started["PyTorch"]) for name in steps if peers[name][1]}
    for name, taken in compiled.items():
        times[name] = times[name]._replace(how=f"{times[name].how}, compiled in {taken:.0f} s")
    memory = {name: peak_memory(step, device) for name, step in steps.items()} if device == "cuda" else {}
    return rows(f"stage {number}, whole step against PyTorch", times, precision, mib=memory, compile_seconds=compiled)


def timed(case: str, steps: dict[str, Callable], seconds: float) -> list[dict]:
    device = next((step.device.type for step in steps.values() if isinstance(step, Step)), "cpu")
    times = timings({name: [step] for name, step in steps.items()}, seconds, device, capture=False)
    made = []
    for name, step in steps.items():
        # A CPU's allocator keeps what the steps before have freed.
        memory = {OURS: peak_memory(step, device)} if device == "cuda" and times[name].seconds else {}
        made += rows(case, how({OURS: times[name]}, step), name, mib=memory)
    return made


def how(times: dict[str, Timing], step: Callable, name: str = OURS) -> dict[str, Timing]:
    """That a step is a graph, if it is."""
    if isinstance(step, Step) and step.step.graphs:
        times[name] = times[name]._replace(how="graph")
    return times
