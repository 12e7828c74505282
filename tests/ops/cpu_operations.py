"""Every C++ kernel by every instruction set, at odd and extreme sizes, for the sanitizers: `make sanitize`.

Results are compared with the plain PyTorch versions, so that a kernel that does nothing does not pass. Of inputs with
NaN or infinities the reference says what comes out only for the operations that choose; the others just run.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ncfast import ops
from ncfast.ops import dispatch

GENERATOR = torch.Generator().manual_seed(0)
THREADS = (1, 3)
ANY = float("inf")  # a tolerance: it is enough to get there
# What each sanitizer has to find in a call that is wrong on purpose.
FAULTS = {
    "overflow": "AddressSanitizer: heap-buffer-overflow",
    "misaligned": "runtime error: load of misaligned address",
}

Call = Callable[[str], tuple[Tensor, ...]]


def placed(x: Tensor) -> Tensor:
    """x as close to an address with no alignment as its type allows, right before the end of its memory."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return placed(torch.randn(*shape, generator=GENERATOR).to(dtype))


def randint(low: int, high: int, *shape: int) -> Tensor:
    return placed(torch.randint(low, high, shape, generator=GENERATOR))


def spoiled(x: Tensor, *, huge: bool = True) -> Tensor:
    """x with NaN, infinities and numbers at the ends of its range."""
    limits = torch.finfo(x.dtype)
    values = [torch.nan, torch.inf, -torch.inf, limits.tiny, 0, *((limits.max, limits.min) if huge else ())]
    values = torch.tensor(values, dtype=x.dtype)
    flat = x.clone().flatten()
    where = torch.randperm(flat.numel(), generator=GENERATOR)[: max(1, flat.numel() // 20)]
    flat[where] = values.repeat(len(where) // len(values) + 1)[: len(where)]
    return placed(flat.view_as(x))


def weights_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor, **options: object) -> Call:
    """A call with an implementation, which returns the result and the gradients of all floating-point tensors."""

    def call(impl: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        named = {
            name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in options.items()
        }
        out = function(*leaves, impl=impl, **named)
        leaves += [x for x in named.values() if isinstance(x, Tensor) and x.requires_grad]
        weight = weights_of(out) if out.dim() else None
        return out, *torch.autograd.grad(out, leaves, weight)

    return call


def lookup(z: Tensor, codebook: Tensor) -> Call:
    return lambda impl: (ops.nearest_code(z, codebook, impl=impl),)


def statistics(z: Tensor, indices: Tensor, K: int) -> Call:
    return lambda impl: ops.code_stats(z, indices, K, impl=impl)


def to_code(z: Tensor, codebook: Tensor, indices: Tensor, rotate: bool) -> Call:
    def call(impl: str) -> tuple[Tensor, ...]:
        leaf = z.detach().requires_grad_()
        out, commitment = ops.rotate_to_code(leaf, codebook, indices, rotate=rotate, impl=impl)
        return out, commitment, torch.autograd.grad((out * weights_of(out)).sum() + commitment.sum(), leaf)[0]

    return call


def unmask(logits: Tensor, tokens: Tensor, **options: object) -> Call:
    sample = placed(torch.arange(len(tokens)))
    return lambda impl: ops.unmask_step(logits, tokens, sample, seed=-3, step=2, impl=impl, **options)


DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def nearest_code_calls() -> Iterator[tuple[str, Call, float]]:
    shapes = [(M, K, D) for M in (0, 1, 7, 129) for K in (1, 7, 33, 300) for D in (0, 1, 17, 64)]
    shapes += [(1000, 1031, 100), (129, 4097, 16), (63, 300, 513), (3, 2, 20000), (5, 30000, 1), (3000, 16, 3)]
    for M, K, D in shapes:
        z, codebook = randn(M, D), randn(K, D)
        yield f"{M} x {K} x {D}", lookup(z, codebook), 0
    for dtype in DTYPES:
        for M, K, D in ((33, 70, 31), (500, 129, 64)):
            z, codebook = randn(2, M, D, dtype=dtype), randn(2, K, D, dtype=dtype)
            codebook[:, K // 2 :] = codebook[:, :1]  # more ties than there are candidates
            yield f"2 x {M} x {K} x {D} {dtype}", lookup(z, codebook), 0
            yield f"2 x {M} x {K} x {D} {dtype}, far away", lookup(z + 100, codebook + 100), 0
            yield f"2 x {M} x {K} x {D} {dtype}, spoiled", lookup(spoiled(z), spoiled(codebook)), ANY
            yield f"2 x {M} x {K} x {D} {dtype}, spoiled rows", lookup(spoiled(z, huge=False), codebook), 0
            yield f"2 x {M} x {K} x {D} {dtype}, strided", lookup(z.mT.contiguous().mT, codebook[:, ::2]), 0


def code_stats_calls() -> Iterator[tuple[str, Call, float]]:
    for dtype in DTYPES:
        for M, K, D in ((0, 5, 7), (9, 4, 0), (1, 1, 1), (7, 1, 0), (129, 7, 63), (2500, 3, 33), (700, 900, 130)):
            z = randn(2, M, D, dtype=dtype)
            indices = randint(-2, K + 2, 2, M)
            yield f"2 x {M} x {K} x {D} {dtype}", statistics(z, indices, K), 1e-5
            yield f"2 x {M} x {K} x {D} {dtype}, strided", statistics(z.mT.contiguous().mT, indices, K), 1e-5
            if z.numel():
                yield f"2 x {M} x {K} x {D} {dtype}, spoiled", statistics(spoiled(z), indices, K), ANY
    indices = randint(-(2**63), 2**63 - 1, 40)
    yield "any indices", statistics(randn(40, 9), indices, 5), 1e-5


def rotate_to_code_calls() -> Iterator[tuple[str, Call, float]]:
    for dtype, tolerance in DTYPES.items():
        for M, K, D in ((0, 5, 7), (1, 1, 1), (7, 1, 0), (129, 7, 63), (700, 90, 130), (9, 3, 5000)):
            z, codebook, indices = randn(2, M, D, dtype=dtype), randn(2, K, D, dtype=dtype), randint(-1, K + 1, 2, M)
            for rotate in (False, True):
                name = f"2 x {M} x {K} x {D} {dtype}, rotate={rotate}"
                yield name, to_code(z, codebook, indices, rotate), 10 * tolerance
                yield f"{name}, strided", to_code(z.mT.contiguous().mT, codebook, indices, rotate), 10 * tolerance
                yield f"{name}, zero", to_code(0 * z, codebook, indices, rotate), ANY
                if z.numel():
                    yield f"{name}, spoiled", to_code(spoiled(z), spoiled(codebook), indices, rotate), ANY


def loss_calls() -> Iterator[tuple[str, Call, float]]:
    for loss in (ops.barlow_twins_loss, ops.vicreg_loss, ops.vibcreg_loss):
        for N, D in ((2, 1), (2, 57), (7, 70), (31, 56), (33, 500), (130, 513), (300, 17), (64, 2000)):
            za, zb = randn(N, D), randn(N, D)
            name = f"{loss.__name__} {N} x {D}"
            # Of two rows the standardised columns are signs: what is left of a gradient is rounding.
            yield name, with_gradients(loss, za, zb, route="gram"), ANY if N == 2 else 1e-3
            strided = (z.T.contiguous().T for z in (za, zb))
            yield f"{name}, strided", with_gradients(loss, *strided, route="gram"), ANY if N == 2 else 1e-3
            yield f"{name}, constant", with_gradients(loss, 0 * za, 0 * zb + 1, route="gram"), ANY
            yield f"{name}, spoiled", with_gradients(loss, spoiled(za), zb, route="gram"), ANY


def iter_norm_calls() -> Iterator[tuple[str, Call, float]]:
    for N, D, groups in ((2, 1, 1), (40, 96, 3), (7, 33, 33), (300, 130, 2), (600, 64, 1), (513, 34, 2), (64, 280, 1)):
        for iterations in (0, 1, 2, 5):
            x, options = randn(N, D), {"groups": groups, "iterations": iterations}
            name = f"{N} x {D} / {groups}, {iterations} iterations"
            fits = 2e-2 if N * groups >= 2 * D else ANY  # a covariance without full rank amplifies rounding
            yield name, with_gradients(ops.iter_norm, x, **options), fits
            yield f"{name}, strided", with_gradients(ops.iter_norm, x.T.contiguous().T, **options), fits
            yield f"{name}, spoiled", with_gradients(ops.iter_norm, spoiled(x), **options), ANY
    yield "no channels", with_gradients(ops.iter_norm, randn(5, 0), groups=1), 0


def masked_attention_calls() -> Iterator[tuple[str, Call, float]]:
    shapes = (
        (0, 7, 2, 8),
        (2, 1, 1, 1),
        (3, 7, 2, 17),
        (2, 63, 2, 32),
        (4, 76, 2, 64),
        (1, 128, 3, 8),
        (1, 33, 1, 300),
    )
    for B, S, H, d in (*shapes, (2, 0, 2, 8), (2, 5, 1, 0), (2, 5, 0, 3), (1, 15, 2, 16), (1, 127, 2, 129)):
        qkv = randn(B, S, 3, H, d)
        keys = {
            "all keys": {},
            "mask": {"key_mask": placed(torch.rand(B, S, generator=GENERATOR) < 0.6)},
            "lengths": {"lengths": randint(0, S + 1, B)},
        }
        scales = {"q_scale": randn(d), "k_scale": randn(d)}
        for which, given in keys.items():
            for learned in ({}, scales, {"null_kv": randn(2, H, d)}, {**scales, "null_kv": randn(2, H, d)}):
                name = f"{B} x {S} x {H} x {d}, {which}, {', '.join(learned)}"
                # A number over its own size is a sign: no gradient is left but rounding.
                tolerance = ANY if d == 1 and "q_scale" in learned else 1e-3
                yield name, with_gradients(ops.masked_attention, qkv, **given, **learned), tolerance
                if qkv.numel():
                    strided = qkv.transpose(0, -1).contiguous().transpose(0, -1)
                    for kind, x, fits in (
                        ("strided", strided, tolerance),
                        ("spoiled", spoiled(qkv), ANY),
                        ("0", 0 * qkv, ANY),
                    ):
                        yield f"{name}, {kind}", with_gradients(ops.masked_attention, x, **given, **learned), fits
        beyond = {"lengths": randint(-(2**62), 2**62, B)}
        yield f"{B} x {S} x {H} x {d}, any lengths", with_gradients(ops.masked_attention, qkv, **beyond), ANY


def fused_linear_calls() -> Iterator[tuple[str, Call, float]]:
    shapes = ((0, 3, 5), (3, 0, 5), (3, 5, 0), (1, 1, 1), (7, 63, 17), (57, 33, 100), (130, 70, 64), (60, 35, 600))
    for M, N, K in shapes:
        x, weight = randn(M, K), randn(N, K)
        bias, norm_weight, residual = randn(N), randn(K), randn(M, N)
        everything = {"bias": bias, "norm_weight": norm_weight, "residual": residual}
        for parts in ({}, {"bias": bias}, {"norm_weight": norm_weight}, {"residual": residual}, everything):
            for gelu in (False, True):
                name = f"{M} x {N} x {K}, {', '.join(parts)}, gelu={gelu}"
                # A number over its own size is a sign: no gradient is left but rounding.
                tolerance = ANY if K == 1 and "norm_weight" in parts else 1e-4
                yield name, with_gradients(ops.fused_linear, x, weight, gelu=gelu, **parts), tolerance
                strided = x.T.contiguous().T, weight.T.contiguous().T
                yield f"{name}, strided", with_gradients(ops.fused_linear, *strided, gelu=gelu, **parts), tolerance
                if M * N * K:
                    yield (
                        f"{name}, spoiled",
                        with_gradients(ops.fused_linear, spoiled(x), weight, gelu=gelu, **parts),
                        ANY,
                    )


def unmask_step_calls() -> Iterator[tuple[str, Call, float]]:
    for B, n, K in ((0, 5, 7), (2, 0, 7), (3, 1, 1), (3, 33, 30), (4, 20, 300), (2, 7, 64), (2, 7, 65), (9, 40, 1025)):
        logits, tokens = randn(B, n, K), torch.where(randint(0, 3, B, n) > 0, K, randint(0, K, B, n))
        listed = randint(0, n + 1, B, n // 2 + 1).sort().values
        listed[:, 1:][listed[:, 1:] == listed[:, :-1]] = n  # no position twice; n is padding wherever it stands
        listed = placed(listed.sort().values)
        for convention in ("paper", "google"):
            for num_masked in (0, n // 3, n + 3, randint(-1, n + 2, B)):
                for top_k in (0, 1, 9):
                    options = {"convention": convention, "num_masked": num_masked, "top_k": top_k}
                    kind = "each" if isinstance(num_masked, Tensor) else num_masked
                    name = f"{B} x {n} x {K}, {convention}, num_masked={kind}, top_k={top_k}"
                    guided = {"unconditional": logits.flip(-1), "guidance_scale": 1.5, "choice_temperature": 4.0}
                    yield name, unmask(logits, tokens, temperature=0.7, **options), 0
                    yield f"{name}, guided", unmask(logits, tokens, **guided, **options), 0
                    part = logits[:, : n // 2 + 1] if n else randn(B, 1, K)
                    if n:
                        yield f"{name}, listed", unmask(part, tokens, positions=listed, **options), 0
                    if logits.numel():
                        yield f"{name}, spoiled", unmask(spoiled(logits), tokens, width=n + 9, **guided, **options), 0


FAMILIES = {
    "nearest_code": nearest_code_calls,
    "code_stats": code_stats_calls,
    "rotate_to_code": rotate_to_code_calls,
    "losses": loss_calls,
    "iter_norm": iter_norm_calls,
    "masked_attention": masked_attention_calls,
    "fused_linear": fused_linear_calls,
    "unmask_step": unmask_step_calls,
}


def check(name: str, call: Call, tolerance: float, isas: list[str]) -> None:
    expected = None if tolerance == ANY else [result.detach() for result in call("reference")]
    for isa in isas:
        os.environ["NCFAST_ISA"] = isa
        for threads in THREADS:
            torch.set_num_threads(threads)
            results = [result.detach() for result in call("cpp")]
            torch.set_num_threads(1)
            for ours, exact in zip(results, expected or (), strict=bool(expected)):
                if ours.shape != exact.shape or ours.dtype != exact.dtype:
                    sys.exit(f"{name}: {isa} gives {ours.dtype} {list(ours.shape)}, the reference something else")
                if exact.numel() == 0:
                    continue
                scale = exact.double().abs().max().clamp(min=1e-30)
                error = float((ours.double() - exact.double()).abs().max() / scale)
                if not error <= tolerance:
                    sys.exit(f"{name}: {isa}, {threads} threads differs from the reference by {error:.1e}")


def commit(fault: str) -> None:
    """What a sanitizer must not let pass."""
    module, _ = dispatch.load_module("_C")
    z, codebook = torch.zeros(8, 3), torch.zeros(2, 3)
    if fault == "overflow":
        indices = torch.empty(7, dtype=torch.int64)
        module.nearest_code(z.data_ptr(), 0, codebook.data_ptr(), 1, 8, 2, 3, 1, indices.data_ptr())
    else:
        indices = torch.empty(7, dtype=torch.int64)
        module.nearest_code(z.data_ptr() + 1, 0, codebook.data_ptr(), 1, 7, 2, 3, 1, indices.data_ptr())


def check_sanitizers() -> None:
    """Ends the program unless both sanitizers watch the module."""
    module, reason = dispatch.load_module("_C")
    if module is None:
        sys.exit(f"no C++ module: {reason}")
    code = Path(module.__file__).read_bytes()
    for symbol in (b"__asan_init", b"__ubsan_handle_"):
        if symbol not in code:
            sys.exit(
                f"{module.__file__} has no {symbol.decode()}: it was built without sanitizers; see `make sanitize`"
            )
    for fault, report in FAULTS.items():
        done = subprocess.run([sys.executable, __file__, "--commit", fault], capture_output=True, text=True)
        if done.returncode == 0 or report not in done.stderr:
            sys.exit(f"no report of a fault made on purpose ({fault}):\n{done.stderr}")
        print(f"a fault made on purpose is found: {report}", flush=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--commit"]:
        return commit(arguments[1])
    check_sanitizers()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN: what is not written shows
    isas = dispatch.load_module("_C")[0].isas()
    print(f"instruction sets: {', '.join(isas)}; threads: {', '.join(map(str, THREADS))}", flush=True)
    for isa in isas:
        os.environ["NCFAST_ISA"] = isa
        if not all(dispatch.load_module("_C")[0].fma_peak(threads, 0.01) > 0 for threads in THREADS):
            sys.exit(f"fma_peak: {isa} does nothing")
    for family in arguments or FAMILIES:
        count = 0
        for name, call, tolerance in FAMILIES[family]():
            check(f"{family} {name}", call, tolerance, isas)
            count += 1
        print(f"{family}: {count} calls", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
