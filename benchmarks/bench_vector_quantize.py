"""VectorQuantize against vector-quantize-pytorch's: the whole module, time and memory.

`pytest benchmarks/ --benchmark-only` times each alone; `python benchmarks/bench_vector_quantize.py` lets the two take
turns and prints one Markdown table. Both have the same state, and moving averages go on while they are timed.
"""

import argparse
import copy
from collections.abc import Callable

import pytest
import torch
from common import interleaved, machine, peak_memory, table
from torch import nn

from ncfast import VectorQuantize

# M vectors in sequences, K codes, D: what published models use, as far as the original fits into a CPU's memory.
SHAPES = {
    "TimeVQVAE": (16384, 32, 64, {}),
    "TimeVQVAE, K = 128": (4096, 128, 64, {}),
    "K = 1024": (16384, 1024, 64, {}),
    "VQ-VAE-2": (32768, 512, 64, {}),
    "original's README": (16384, 512, 256, {}),
    "EnCodec, one level": (4800, 1024, 128, {}),
    "DAC, one level": (5504, 1024, 8, {"use_cosine_sim": True}),
    "Mimi, one level": (800, 2048, 256, {}),
    "WavTokenizer": (4800, 4096, 512, {}),
    "RQ-VAE (TIGER)": (8192, 256, 32, {}),
    "VQGAN": (8192, 16384, 256, {}),
    "K = 16384": (16384, 16384, 64, {}),
    "LlamaGen": (4096, 16384, 8, {"use_cosine_sim": True}),
    "dead codes replaced": (16384, 1024, 64, {"threshold_ema_dead_code": 2}),
}
MODES = ("eval", "forward", "forward + backward")


def modules(K: int, D: int, options: dict) -> dict[str, nn.Module]:
    """Ours and, where installed, the original, in the same state."""
    torch.manual_seed(0)
    ours = VectorQuantize(D, K, **options)
    ours.codebook = (
        nn.functional.normalize(torch.randn(K, D), dim=-1) if options.get("use_cosine_sim") else (torch.randn(K, D))
    )
    ours._codebook.embed_avg.copy_(ours._codebook.embed)
    both = {"ncfast": ours}
    try:
        import vector_quantize_pytorch
    except ImportError:
        return both
    both["original"] = vector_quantize_pytorch.VectorQuantize(D, K, **options)
    both["original"].load_state_dict(copy.deepcopy(ours.state_dict()))
    return both


def call(module: nn.Module, mode: str, M: int, D: int) -> Callable[[], object]:
    x = torch.randn(16 if M % 16 == 0 else 1, M // (16 if M % 16 == 0 else 1), D)
    if mode == "eval":
        module = copy.deepcopy(module).eval()

        def run():
            with torch.no_grad():
                return module(x)

        return run
    module = copy.deepcopy(module).train()
    x.requires_grad_()
    if mode == "forward":
        return lambda: module(x)
    gradient = torch.randn_like(x)

    def step():
        x.grad = None
        quantized, _, loss = module(x)
        torch.autograd.backward([quantized, loss], [gradient, None])

    return step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name, (M, K, *_) in SHAPES.items() if M * K < 2**26])
@pytest.mark.parametrize("whose", ["ncfast", "original"])
def test_vector_quantize(benchmark, name, mode, whose):
    M, K, D, options = SHAPES[name]
    both = modules(K, D, options)
    if whose not in both:
        pytest.skip("vector-quantize-pytorch is not installed: pip install 'ncfast[test]'")
    benchmark.group = f"VectorQuantize {name}, {mode}"
    benchmark.pedantic(call(both[whose], mode, M, D), rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row [2]")
    arguments = parser.parse_args()
    print(f"VectorQuantize, float32, rotation trick, on {machine()}\n")
    rows = []
    for name, (M, K, D, options) in SHAPES.items():
        both = modules(K, D, options)
        for mode in MODES:
            calls = {whose: call(module, mode, M, D) for whose, module in both.items()}
            times = interleaved(calls, arguments.seconds)
            memory = {whose: peak_memory(run) for whose, run in calls.items()}
            row = [f"{name}: {M} x {K} x {D}", mode, f"{1e3 * times['ncfast']:.2f}", f"{memory['ncfast']:.0f}"]
            if "original" in both:
                ratio = times["original"] / times["ncfast"]
                row += [f"{1e3 * times['original']:.1f}", f"{memory['original']:.0f}", f"{ratio:.1f}"]
            rows.append(row)
            print(" | ".join(row), flush=True)
    columns = ["M x K x D", "what", "ncfast ms", "MiB", "original ms", "MiB", "original / ncfast"]
    print("\n" + table(columns[: len(rows[0])], rows))


if __name__ == "__main__":
    main()
