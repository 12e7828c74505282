"""masked_attention against every backend of PyTorch's attention that runs, FlexAttention, and torch.compile.

All start from packed qkv [B, S, 3, 2, d] and end at [B, S, 2, d], with B S about 19,456 (B = 256 for the 76 tokens of
FordA).

Expected of ours, for each head: forward 4 S² d FLOPs and, of n bytes an element, 4 S d n bytes; backward 10 S² d, for
it computes the weights again, and 7 S d n. On a CPU multiply-adds bind: the products reach 90 % of their rate, and what
the softmax and the packing of keys take besides leaves 70 to 75 %. On a GPU memory binds below S = 370, of which flash
and cuDNN move half as much again in their backward passes, in three launches. Beyond S = 128 `auto` is PyTorch's.

"normalised, null key" is the attention of TimeVQVAE's block: l2-normalised q and k with learned scales, and a null
key, which PyTorch writes out as some ten tensors of B S H d elements each way.
"""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, Timing, copies, reason, rows, timings
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from ncfast.ops import masked_attention, masked_attention_reference

LENGTHS = (16, 17, 41, 64, 76, 97, 128, 192, 256, 512)
HEAD_DIMS = (32, 64)
BLOCK_SHAPES = [(17, 64), (41, 64), (76, 32), (76, 64), (128, 64), (256, 64)]  # S, d
TOKENS, HEADS = 256 * 76, 2
LARGE = 8192  # sequences: B H = 16,384 of S = 76 and d = 64 are enough for any GPU
CPU_CASES = [  # S, d, block, B
    *((S, d, False, None) for d in HEAD_DIMS for S in LENGTHS),
    *((S, d, True, None) for S, d in BLOCK_SHAPES),
]
CUDA_CASES = [
    (76, 64, False, LARGE),
    (76, 64, True, LARGE),
    (76, 64, False, None),
    (76, 64, True, None),
    *((S, d, True, None) for S, d in BLOCK_SHAPES if (S, d) != (76, 64)),
    *((S, 64, False, None) for S in (17, 41, 128, 256, 512)),
]
MODES = {"forward": 4, "backward": 10, "both": 14}  # FLOPs over B H S² d
BACKENDS = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
}


def data(
    S: int, d: int, device: str, dtype: torch.dtype, block: bool, B: int | None = None, seed: int = 0
) -> tuple[tuple[Tensor, ...], Tensor]:
    """qkv [B, S, 3, H, d] and, for the block, q_scale, k_scale [d] and null_kv [2, H, d]; a gradient [B, S, H, d]."""
    generator = torch.Generator().manual_seed(seed)
    B = B or TOKENS // S
    qkv = torch.randn(B, S, 3, HEADS, d, generator=generator).to(device, dtype)
    gradient = torch.randn(B, S, HEADS, d, generator=generator).to(device, dtype)
    inputs = (qkv,)
    if block:
        q_scale, k_scale, null_kv = (
            torch.rand(shape, generator=generator).add(0.5).to(device) for shape in ((d,), (d,), (2, HEADS, d))
        )
        inputs = (qkv, q_scale, k_scale, null_kv)
    return tuple(x.requires_grad_() for x in inputs), gradient


def ours(qkv: Tensor, *block: Tensor) -> Tensor:
    return masked_attention(qkv, **options(block))


def written_out(qkv: Tensor, *block: Tensor) -> Tensor:
    return masked_attention_reference(qkv, **options(block))


def options(block: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("q_scale", "k_scale", "null_kv"), block, strict=False))


def sdpa(qkv: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


def flex(qkv: Tensor) -> Tensor:
    return flex_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


def eager(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, S, d] each
    return (torch.softmax(q @ k.mT * qkv.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def peers(device: str, block: bool, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    compile = functools.partial(torch.compile, dynamic=False)
    if block:
        return {OURS: ours, "PyTorch": written_out, **({"PyTorch, compiled": compile(written_out)} if compiled else {})}
    backends = {f"SDPA, {name}": functools.partial(sdpa, backend=backend) for name, backend in BACKENDS[device].items()}
    more = {"FlexAttention, compiled": compile(flex), "eager form, compiled": compile(eager)} if compiled else {}
    return {OURS: ours, **backends, **more}


def calls_of(peer: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor) -> dict[str, Callable]:
    """Forward; backward; both, which returns the gradients."""

    constants = tuple(x.detach() for x in inputs)  # FlexAttention refuses anything else on a CPU

    def forward():
        with torch.no_grad():
            return peer(*constants)

    @functools.cache  # made by the first call, on the stream of whoever calls
    def out():
        return peer(*inputs)

    def backward():
        return torch.autograd.grad(out(), inputs, gradient, retain_graph=True)

    def both():
        return torch.autograd.grad(peer(*inputs), inputs, gradient)

    return {"forward": forward, "backward": backward, "both": both}


def why_not(calls: dict[str, Callable]) -> dict[str, str]:
    """Which modes do not run, and why: a peer may have no backward pass, or nothing for this device and dtype."""
    reasons = {}
    for mode, needed in (("forward", "forward"), ("both", "both"), ("backward", "both")):
        try:
            calls[needed]() if needed not in reasons else None
        except Exception as error:  # which class it is depends on the backend
            reasons[mode] = reason(error)
        if needed in reasons:
            reasons[mode] = reasons[needed]
    return reasons


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", peers("cpu", block=False, compiled=False))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(41, 64), (76, 64), (128, 32)], ids=lambda shape: "x".join(map(str, shape)))
def test_attention(benchmark, shape, mode, peer):
    benchmark.group = f"attention S={shape[0]} d={shape[1]} {mode}"
    benchmark(calls_of(peers("cpu", False, False)[peer], *data(*shape, "cpu", torch.float32, False))[mode])


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", peers("cpu", block=True, compiled=False))
@pytest.mark.parametrize("mode", MODES)
def test_attention_block(benchmark, mode, peer):
    benchmark.group = f"attention, normalised, with a null key, S=76 d=64 {mode}"
    benchmark(calls_of(peers("cpu", True, False)[peer], *data(76, 64, "cpu", torch.float32, True))[mode])


def exact_gradient(inputs: tuple[Tensor, ...], gradient: Tensor, sequences: int = 4) -> Tensor:
    """Of qkv, for the first sequences, in float64."""
    qkv, *block = (x.detach().double() for x in inputs)
    qkv = qkv[:sequences].requires_grad_()
    return torch.autograd.grad(written_out(qkv, *block), qkv, gradient[:sequences].double())[0]


def measure(
    S: int,
    d: int,
    block: bool,
    device: str,
    dtype: torch.dtype,
    seconds: float,
    compiled: bool,
    B: int | None = None,
) -> list[dict]:
    """The rows of one shape."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # backward is timed alone, again and again
    B = B or TOKENS // S
    seeds = range(copies(4 * B * S * HEADS * d * dtype.itemsize, device))
    inputs = [data(S, d, device, dtype, block, B, seed) for seed in seeds]
    calls, missing = {}, {}
    for name, peer in peers(device, block, compiled).items():
        calls[name] = [calls_of(peer, *each) for each in inputs]
        missing[name] = why_not(calls[name][0])
    exact = exact_gradient(*inputs[0])
    size = exact.abs().max()
    errors = {}
    for name, each in calls.items():
        if "both" not in missing[name]:
            errors[name] = ((each[0]["both"]()[0][: exact.shape[0]] - exact).abs().max() / size).item()
    made = []
    for mode, flops in MODES.items():
        running = {name: [of[mode] for of in each] for name, each in calls.items() if mode not in missing[name]}
        times = timings(running, seconds, device)
        times |= {name: Timing(None, reasons[mode]) for name, reasons in missing.items() if mode in reasons}
        work = flops * B * HEADS * S * S * d * 1e-9
        rates = {name: work / time.seconds for name, time in times.items() if time.seconds}
        case = f"{B} x {S} x {d}"
        made += rows(case, times, mode, error=errors, rate=rates)
    return made


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for S, d, block, B in CPU_CASES if device == "cpu" else CUDA_CASES:
        made = measure(S, d, block, device, dtype, seconds, True, B)
        kind = "normalised, null key, " if block else ""
        yield [row | {"case": f"{row['case']}, {kind}{str(dtype).removeprefix('torch.')}"} for row in made]
