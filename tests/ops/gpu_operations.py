"""Every kernel on a GPU a few times, small and at odd sizes, for compute-sanitizer: `make sanitize-gpu`.

Results are compared with the plain PyTorch versions, so that a kernel that does nothing does not pass.
"""

import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ncfast import ops

GENERATOR = torch.Generator()
DEVICE = torch.device("cuda")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(DEVICE, dtype)


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=GENERATOR).to(DEVICE)


Call = Callable[[str], tuple[Tensor, ...]]


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor, **options: object) -> Call:
    """A call with an implementation, which returns the result and the gradients of the inputs."""

    def call(impl: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves, impl=impl, **options)
        weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
        return out, *torch.autograd.grad(out, leaves, weight)

    return call


def calls(device: str = "cuda") -> Iterator[tuple[str, str, Call, float]]:
    """Name, implementation, call and relative tolerance; the same inputs on every device."""
    global DEVICE
    DEVICE = torch.device(device)
    GENERATOR.manual_seed(0)
    for M, K, D in ((333, 70, 64), (1000, 1031, 100), (129, 4097, 16), (257, 300, 513)):
        z, codebook = randn(M, D), randn(K, D)
        codebook[K // 2] = codebook[1]

        def lookup(impl: str, z: Tensor = z, codebook: Tensor = codebook) -> tuple[Tensor, ...]:
            return (ops.nearest_code(z, codebook, impl=impl),)

        for isa in ("", "mma"):
            yield f"nearest_code {M} x {K} x {D} {isa}", f"cuda {isa}", lookup, 0
        yield f"nearest_code {M} x {K} x {D}", "triton", lookup, 0
    for M, K, D in ((1000, 7, 33), (500, 600, 16), (60_000, 200, 5)):
        z, indices = randn(M, D), randint(K + 1, M) - 1
        yield f"code_stats {M} x {K} x {D}", "triton", lambda impl: ops.code_stats(z, indices, K, impl=impl), 1e-5  # noqa: B023
    for rotate in (False, True):
        z, codebook, indices = randn(333, 40), randn(9, 40), randint(9, 333)

        def to_code(impl: str, rotate: bool = rotate, z=z, codebook=codebook, indices=indices) -> tuple[Tensor, ...]:
            leaf = z.detach().requires_grad_()
            out, commitment = ops.rotate_to_code(leaf, codebook, indices, rotate=rotate, impl=impl)
            return out, commitment, torch.autograd.grad((out * z.flip(0)).sum() + commitment.sum(), leaf)[0]

        yield f"rotate_to_code, rotate={rotate}", "triton", to_code, 1e-4
    for N, D in ((7, 70), (130, 513)):
        for loss in (ops.barlow_twins_loss, ops.vicreg_loss, ops.vibcreg_loss):
            yield (
                f"{loss.__name__} {N} x {D}",
                "triton",
                with_gradients(loss, randn(N, D), randn(N, D), route="gram"),
                1e-3,
            )
    yield "iter_norm 40 x 96", "triton", with_gradients(ops.iter_norm, randn(40, 96), groups=3), 1e-2
    for M, D in ((333, 64), (41, 100), (7, 1000)):
        parts = randn(M, D), randn(D), randn(D)
        yield f"layer_norm {M} x {D}", "triton", with_gradients(ops.layer_norm, *parts, gelu=D != 100), 1e-4
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        for S, d in ((17, 24), (76, 64)):
            qkv = randn(3, S, 3, 2, d, dtype=dtype)
            mask = randint(2, 3, S) > 0
            yield f"masked_attention {S} x {d}", "triton", with_gradients(ops.masked_attention, qkv), tolerance
            block = {"q_scale": randn(d).abs(), "k_scale": randn(d).abs(), "null_kv": randn(2, 2, d)}
            made = with_gradients(ops.masked_attention, qkv, key_mask=mask, **block)
            yield f"masked_attention {S} x {d}, all options", "triton", made, tolerance
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        vectors = randn(20), randn(20)
        for shape, options in (((6, 20, 5, 7), {"slope": 0.1, "pad": True}), ((4, 20, 1, 3), {"slope": 0.0})):
            made = with_gradients(ops.batch_norm, randn(*shape, dtype=dtype), *vectors, views=2, **options)
            yield f"batch_norm {shape}", "triton", made, tolerance
    for M, N, K in ((130, 70, 64), (33, 20, 100)):
        parts = [randn(*shape, dtype=torch.bfloat16) for shape in ((M, K), (N, K), (N,), (K,), (M, N))]
        yield f"fused_linear {M} x {N} x {K}", "triton", with_gradients(ops.fused_linear, *parts, gelu=True), 5e-2
    thin = randn(3, 6, 5, 9), randn(6, 2, 3, 4), randn(6)
    yield "thin_conv_transpose", "triton", with_gradients(ops.thin_conv_transpose, *thin, groups=3), 1e-4
    for n, K in ((33, 30), (20, 300)):
        logits, sample = randn(5, n, K), torch.arange(5, device=DEVICE)
        tokens = torch.where(randint(3, 5, n) > 0, K, randint(K, 5, n))

        def unmask(impl: str, logits: Tensor = logits, tokens: Tensor = tokens, n: int = n) -> tuple[Tensor, ...]:
            options = {"seed": 3, "step": 2, "num_masked": n // 3, "choice_temperature": 1.0, "top_k": 9}
            return ops.unmask_step(logits, tokens, sample, unconditional=logits.flip(1), impl=impl, **options)  # noqa: B023

        yield f"unmask_step {n} x {K}", "triton", unmask, 0


def main() -> None:
    # What it is compared with: float32 in convolutions too, and attention without the kernels of others, some of which
    # racecheck has something to say about.
    torch.backends.cudnn.allow_tf32 = False
    for others in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        others(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    for name, implementation, call, tolerance in calls():
        implementation, *isa = implementation.split()
        os.environ.pop("NCFAST_CUDA_ISA", None)
        if isa:
            os.environ["NCFAST_CUDA_ISA"] = isa[0]
        for ours, exact in zip(call(implementation), call("reference"), strict=True):
            scale = exact.double().abs().max().clamp(min=1e-30)
            error = float((ours.double() - exact.double()).abs().max() / scale)
            if not error <= tolerance:
                sys.exit(f"{name}: {implementation} differs from the reference by {error:.1e}")
        print(f"{name}: {implementation}", flush=True)


if __name__ == "__main__":
    main()
