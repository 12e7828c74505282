"""A captured training step on a GPU with each hand-written operation left to PyTorch, and the whole step compiled.

    python -m experiments.compare_operations --stage 1 --precision bf16

All steps take turns. The rule: an operation of training stays while the whole step is at least 5 % faster with it than
with the best of PyTorch's.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ncfast.engine.precision import PRECISIONS
from ncfast.engine.step import TrainingStep
from ncfast.nn import encoder_decoder
from ncfast.ops import dispatch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_training
from common import table

LOSSES = ("barlow_twins_loss", "vicreg_loss", "vibcreg_loss")
LEFT_OUT = {  # of each stage, what is left to PyTorch
    1: {
        "batch_norm": ("batch_norm",),
        "thin_conv_transpose": ("thin_conv_transpose",),
        "SSL losses": LOSSES,
        "rotate_to_code": ("rotate_to_code",),
        "all of these": ("batch_norm", "thin_conv_transpose", "rotate_to_code", *LOSSES),
    },
    2: {
        "layer_norm": ("layer_norm",),
        "fused_linear": ("fused_linear",),
        "masked_attention": ("masked_attention",),
        "all of these": ("layer_norm", "fused_linear", "masked_attention"),
    },
}


@contextmanager
def without(operations: tuple[str, ...]) -> Iterator[None]:
    """Steps that are made inside take PyTorch's operations in the place of these."""
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
    """Its networks go through torch.compile; the step is captured as any other."""

    def __init__(self, losses: Callable, modules: torch.nn.Module, **options: object) -> None:
        parts = [modules["vqvae"].encoder, modules["vqvae"].decoder] if "vqvae" in modules else [modules["prior"]]
        for part in [*parts, *([modules["ssl"]] if "ssl" in modules else [])]:
            part.compile()
        super().__init__(losses, modules, **options)

    def compile_kernels(self, *_: object) -> None:
        """torch.compile does that."""


def make_step(stage: int, precision: str, left_out: tuple[str, ...], step: type[TrainingStep]) -> bench_training.Step:
    bench_training.TrainingStep = step
    with without(left_out):
        return bench_training.Step(stage, "vicreg", "cuda", precision=precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    made = {"ours": make_step(options.stage, options.precision, (), TrainingStep)}
    for name, left_out in LEFT_OUT[options.stage].items():
        made[f"without {name}"] = make_step(options.stage, options.precision, left_out, TrainingStep)
    begin = time.perf_counter()
    left_out = LEFT_OUT[options.stage]["all of these"]
    made["without all of these, compiled"] = make_step(options.stage, options.precision, left_out, CompiledStep)
    print(f"torch.compile took {time.perf_counter() - begin:.0f} s")
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, step in made.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                step()
            torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - begin) / 20)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, stage {options.stage}, {options.precision}")
    rows = [[name, "", f"{1e3 * value:.3f}", f"{value / medians['ours']:.3f}"] for name, value in medians.items()]
    print(table(["step", "", "median ms", "of ours"], rows))


if __name__ == "__main__":
    main()
