"""VectorQuantize against vector-quantize-pytorch's: the whole module, time and memory.

Both have the same state, and moving averages go on while they are timed.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, Timing, copies, peak_memory, rows, timings
from torch import Tensor, nn

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
CUDA_SHAPES = {"65536 x 1024": (65536, 1024, 64, {}), "65536 x 16384": (65536, 16384, 256, {}), **SHAPES}
MODES = ("eval", "forward", "forward + backward")


def modules(K: int, D: int, options: dict, device: str = "cpu") -> dict[str, nn.Module]:
    """Ours and, where installed, the original, in the same state."""
    torch.manual_seed(0)
    ours = VectorQuantize(D, K, **options)
    ours.codebook = (
        nn.functional.normalize(torch.randn(K, D), dim=-1) if options.get("use_cosine_sim") else (torch.randn(K, D))
    )
    ours._codebook.embed_avg.copy_(ours._codebook.embed)
    both = {OURS: ours.to(device)}
    try:
        import vector_quantize_pytorch
    except ImportError:
        return both
    both["original"] = vector_quantize_pytorch.VectorQuantize(D, K, **options)
    both["original"].load_state_dict(copy.deepcopy(ours.state_dict()))
    both["original"].to(device)
    return both


def calls(
    module: nn.Module, mode: str, M: int, D: int, device: str = "cpu", compiled: bool = False
) -> list[Callable[[], object]]:
    """The module on vectors of each call's own."""
    module = copy.deepcopy(module).train(mode != "eval")
    if compiled:
        module = torch.compile(module)
    B = 16 if M % 16 == 0 else 1
    return [one_call(module, mode, torch.randn(B, M // B, D, device=device)) for _ in range(copies(4 * M * D, device))]


def one_call(module: nn.Module, mode: str, x: Tensor) -> Callable[[], object]:
    if mode == "eval":

        def run():
            with torch.no_grad():
                return module(x)

        return run
    x.requires_grad_()
    if mode == "forward":
        return lambda: module(x)
    gradient = torch.randn_like(x)

    def step():
        quantized, _, loss = module(x)
        return torch.autograd.grad([quantized, loss], x, [gradient, torch.ones_like(loss)])

    return step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name, (M, K, *_) in SHAPES.items() if M * K < 2**26])
@pytest.mark.parametrize("whose", [OURS, "original"])
def test_vector_quantize(benchmark, name, mode, whose):
    M, K, D, options = SHAPES[name]
    both = modules(K, D, options)
    if whose not in both:
        pytest.skip("vector-quantize-pytorch is not installed: pip install 'ncfast[test]'")
    benchmark.group = f"VectorQuantize {name}, {mode}"
    benchmark.pedantic(calls(both[whose], mode, M, D)[0], rounds=5, warmup_rounds=1)


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for name, (M, K, D, options) in (CUDA_SHAPES if device == "cuda" else SHAPES).items():
        both = modules(K, D, options, device)
        made = []
        for mode in MODES:
            running = {whose: calls(module, mode, M, D, device) for whose, module in both.items()}
            times = timings(running, seconds, device)
            memory = {whose: peak_memory(running[whose][0], device) for whose in both if times[whose].seconds}
            if "original" not in both:
                times["original"] = Timing(None, "vector-quantize-pytorch is not installed")
            made += rows(f"{name}: {M} x {K} x {D}", times, mode, mib=memory)
        yield made
