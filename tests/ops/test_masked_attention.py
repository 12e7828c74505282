"""masked_attention against float64 written out with numpy, by every implementation."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from implementations import GPU, each, implementations, isa, poisoned_memory
from offline import compile_offline, needs_triton

from ncfast.engine.cuda_graph import CudaGraph
from ncfast.ops import dispatch, masked_attention
from ncfast.ops.masked_attention import MAX_LENGTH, shared_memory, why_not

IMPLEMENTATIONS = implementations(masked_attention, why_not, cuda=True)
every_implementation = each(IMPLEMENTATIONS)
every_cpp = each(IMPLEMENTATIONS, "cpp")
every_kernel = each(IMPLEMENTATIONS, "cpp", "triton", "cuda")
every_cuda = each(IMPLEMENTATIONS, "cuda")
# What divides by zero in the interpreter is NumPy's to report and the kernel's to expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# B, S, H, d
SHAPES = [(2, 1, 1, 1), (3, 7, 2, 17), (2, 63, 2, 32), (2, 76, 2, 64), (1, 128, 3, 8), (1, 33, 1, 100)]
KEYS = ("all", "mask", "lengths")  # which keys there are
LEARNED = ("plain", "normalised", "null", "normalised-null")


class Case(NamedTuple):
    qkv: torch.Tensor  # [B, S, 3, H, d]
    keys: dict  # key_mask [B, S], or lengths [B], or nothing
    learned: dict  # q_scale and k_scale [d], null_kv [2, H, d]
    grad_out: torch.Tensor  # [B, S, H, d]
    scale: float | None = None

    def sequences(self, chosen):
        keys = {name: x[chosen] for name, x in self.keys.items()}
        return self._replace(qkv=self.qkv[chosen], keys=keys, grad_out=self.grad_out[chosen])


def case(B, S, H, d, *, keys="all", learned="plain", size=1.0, scale=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(S * 100 + d)
    qkv = size * torch.randn(B, S, 3, H, d, generator=generator)
    grad_out = torch.randn(B, S, H, d, generator=generator)
    given, parameters = {}, {}
    if keys == "mask":
        given["key_mask"] = torch.rand(B, S, generator=generator) < 0.7
        given["key_mask"][0] = False  # a sequence without any key
    if keys == "lengths":
        given["lengths"] = torch.randint(1, S + 1, (B,), generator=generator)
        given["lengths"][0] = 0
    if "normalised" in learned:
        parameters["q_scale"], parameters["k_scale"] = (1 + torch.randn(d, generator=generator) for _ in range(2))
    if "null" in learned:
        parameters["null_kv"] = torch.randn(2, H, d, generator=generator)
    return Case(qkv.to(dtype), given, parameters, grad_out.to(dtype), scale)


class Result(NamedTuple):
    out: torch.Tensor
    grads: dict  # of qkv and what is learned


def forward_and_backward(run, case):
    """Everything that comes out, on the CPU, or a skip with the reason why `run` does not take this shape."""
    _, S, _, _, d = case.qkv.shape
    reason = why_not(torch.device(run.device), case.qkv.dtype, S, d, plain=not case.learned)[run.name]
    if reason is not None:
        pytest.skip(f"{run.name}: {reason}")
    leaves = {name: x.clone().requires_grad_() for name, x in {"qkv": case.qkv, **case.learned}.items()}
    qkv, learned = leaves["qkv"], {name: leaves[name] for name in case.learned}
    out = run(qkv, scale=case.scale, **case.keys, **learned)
    with isa(run.isa):
        grads = torch.autograd.grad(out, list(leaves.values()), case.grad_out)
    return Result(out.detach(), dict(zip(leaves, grads, strict=True)))


def normalised(x, scale):
    """The rows of x over their lengths, times scale; and the gradients of x and of scale from that of this."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = x / norm

    def backward(grad):
        of_unit = grad * scale
        return (of_unit - unit * (unit * of_unit).sum(-1, keepdims=True)) / norm, (grad * unit).sum(0)

    return unit * scale, backward


def oracle(case):
    """Output and gradients, float64, head by head."""
    qkv, g = case.qkv.double().numpy(), case.grad_out.double().numpy()
    learned = {name: x.double().numpy() for name, x in case.learned.items()}
    B, S, _, H, d = qkv.shape
    scale = 1 / math.sqrt(d) if case.scale is None else case.scale
    out = np.zeros((B, S, H, d))
    grads = {"qkv": np.zeros_like(qkv), **{name: np.zeros_like(x) for name, x in learned.items()}}
    for b in range(B):
        kept = np.ones(S, bool)
        if "key_mask" in case.keys:
            kept = case.keys["key_mask"][b].numpy()
        if "lengths" in case.keys:
            kept = np.arange(S) < case.keys["lengths"][b].item()
        for h in range(H):
            q, k, v = (qkv[b, :, part, h] for part in range(3))
            k, v = k[kept], v[kept]
            if "null_kv" in learned:
                k, v = np.vstack((learned["null_kv"][0, h], k)), np.vstack((learned["null_kv"][1, h], v))
            if len(k) == 0:
                continue
            if "q_scale" in learned:
                q, backward_q = normalised(q, learned["q_scale"])
                k, backward_k = normalised(k, learned["k_scale"])
            scores = scale * q @ k.T
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, h] = weights @ v
            of_weights = g[b, :, h] @ v.T
            of_scores = scale * weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
            of_q, of_k, of_v = of_scores @ k, of_scores.T @ q, weights.T @ g[b, :, h]
            if "q_scale" in learned:
                of_q, of_q_scale = backward_q(of_q)
                of_k, of_k_scale = backward_k(of_k)
                grads["q_scale"] += of_q_scale
                grads["k_scale"] += of_k_scale
            if "null_kv" in learned:
                grads["null_kv"][0, h] += of_k[0]
                grads["null_kv"][1, h] += of_v[0]
                of_k, of_v = of_k[1:], of_v[1:]
            grads["qkv"][b, :, 0, h], grads["qkv"][b, kept, 1, h], grads["qkv"][b, kept, 2, h] = of_q, of_k, of_v
    return Result(out, grads)


def relative_error(actual, expected):
    return np.linalg.norm(actual.double().numpy() - expected) / max(np.linalg.norm(expected), 1e-30)


def check_against_oracle(run, case, of_out=1e-6, of_grads=2e-6):
    expected, result = oracle(case), forward_and_backward(run, case)
    if run.name == "triton" and run.device == "cuda":
        of_out, of_grads = 4 * of_out, 4 * of_grads  # three products of TF32 for one of float32
    assert relative_error(result.out, expected.out) < of_out
    for name, grad in expected.grads.items():
        largest = max(np.linalg.norm(case.grad_out.double().numpy()), np.linalg.norm(expected.grads["qkv"]))
        if np.linalg.norm(grad) > 1e-3 * largest:  # scores of one key have no gradient; what is left is rounding
            assert relative_error(result.grads[name], grad) < of_grads, name
        else:
            assert np.linalg.norm(result.grads[name].double().numpy() - grad) < of_grads * largest, name


@every_implementation
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(run, shape, keys):
    check_against_oracle(run, case(*shape, keys=keys))


@every_implementation
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("learned", LEARNED[1:])
@pytest.mark.parametrize("shape", [(3, 7, 2, 17), (2, 76, 2, 64), (1, 128, 1, 32)], ids=str)
def test_normalised_and_with_a_null_key(run, shape, learned, keys):
    if run.slow and shape[1] > 7 and keys == "lengths":
        pytest.skip("the interpreter is slow; the small shape covers it")
    check_against_oracle(run, case(*shape, keys=keys, learned=learned), 2e-6, 1e-5)


@every_implementation
@pytest.mark.parametrize("shape", [(0, 0, 0, 0), (2, 3, 2, 0), (2, 0, 2, 4), (2, 3, 0, 4)], ids=str)
def test_nothing_to_attend(run, shape):
    """Without sequences, positions, heads or elements: the default scale divides by the root of the latter."""
    result = forward_and_backward(run, case(*shape))
    B, S, H, d = shape
    assert result.out.shape == shape and result.grads["qkv"].shape == (B, S, 3, H, d)


@every_implementation
def test_scale(run):
    check_against_oracle(run, case(2, 9, 2, 8, learned="normalised-null", scale=5.0), 2e-6, 1e-5)


@every_implementation
def test_a_row_of_zeros_is_normalised_to_zeros(run):
    zeros = case(1, 6, 1, 8, learned="normalised")
    zeros.qkv[0, 2, :2] = 0
    result = forward_and_backward(run, zeros)
    _, _, v = zeros.qkv[0, :, :, 0].unbind(1)
    torch.testing.assert_close(result.out[0, 2, 0], v.mean(0))  # every score is 0
    assert result.grads["qkv"].isfinite().all()


@every_kernel
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_flat_and_sharp_weights(run, size):
    """Scores up to thousands apart: weights of 0 and 1, and no overflow."""
    check_against_oracle(run, case(2, 40, 2, 16, keys="mask", size=size), 1e-4, 1e-3)


@every_kernel
def test_a_nan_stays_in_its_sequence(run):
    clean = case(3, 9, 2, 8, learned="normalised-null")
    before = forward_and_backward(run, clean)
    clean.qkv[1, 4, 1] = torch.nan  # a key
    after = forward_and_backward(run, clean)
    assert after.out[1].isnan().all() and after.grads["qkv"][1].isnan().all()
    assert torch.equal(after.out[[0, 2]], before.out[[0, 2]])
    assert torch.equal(after.grads["qkv"][[0, 2]], before.grads["qkv"][[0, 2]])


@every_kernel
@pytest.mark.parametrize("keys", ["mask", "lengths"])
@pytest.mark.parametrize("held", [7.0, math.nan, math.inf])
def test_masked_keys_do_not_matter(run, keys, held):
    masked = case(3, 20, 2, 8, keys=keys, learned="normalised-null")
    before = forward_and_backward(run, masked)
    kept = masked.keys.get("key_mask")
    if kept is None:
        kept = torch.arange(20) < masked.keys["lengths"][:, None]
    masked.qkv[:, :, 1:] = torch.where(kept[:, :, None, None, None], masked.qkv[:, :, 1:], held)
    after = forward_and_backward(run, masked)
    assert torch.equal(after.out, before.out)
    for name, grad in before.grads.items():
        assert torch.equal(after.grads[name], grad), name


@every_kernel
def test_lengths_beyond_the_sequence(run):
    lengths = torch.tensor([-3, 4, 9, 2**40])
    beyond = case(4, 9, 1, 8)
    mask = torch.arange(9) < lengths[:, None]
    by_lengths = forward_and_backward(run, beyond._replace(keys={"lengths": lengths}))
    by_mask = forward_and_backward(run, beyond._replace(keys={"key_mask": mask}))
    # On a GPU the two are compiled apart, and may round apart.
    torch.testing.assert_close(by_lengths.out, by_mask.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_lengths.grads["qkv"], by_mask.grads["qkv"], rtol=1e-5, atol=1e-6)


@every_cpp
def test_same_bits_for_any_batch_and_thread_count(run, threads):
    whole = case(5, 76, 2, 64, keys="mask", learned="normalised-null")
    answers = []
    for count in (1, 2, 3):
        threads(count)
        answers.append(forward_and_backward(run, whole))
    for answer in answers[1:]:
        assert torch.equal(answer.out, answers[0].out)
        for name, grad in answers[0].grads.items():
            assert torch.equal(answer.grads[name], grad), name
    for b in range(5):
        alone = forward_and_backward(run, whole.sequences(slice(b, b + 1)))
        assert torch.equal(alone.out, answers[0].out[b : b + 1])
        assert torch.equal(alone.grads["qkv"], answers[0].grads["qkv"][b : b + 1])


@every_kernel
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("learned", LEARNED)
def test_every_element_is_written(run, keys, learned):
    some = case(2, 17, 2, 9, keys=keys, learned=learned)
    with poisoned_memory():
        result = forward_and_backward(run, some)
    assert result.out.isfinite().all()
    assert all(grad.isfinite().all() for grad in result.grads.values())


@every_implementation
@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)], ids=str)
def test_empty(run, shape, learned):
    result = forward_and_backward(run, case(*shape, learned=learned))
    assert result.out.shape == (shape[0], shape[1], shape[2], shape[3])
    assert not any(grad.any() for grad in result.grads.values())


@each(IMPLEMENTATIONS, "reference", "triton")
@pytest.mark.parametrize("learned", ["plain", "normalised-null"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(run, dtype, tolerance, learned):
    halves = case(2, 41, 2, 32, keys="mask", learned=learned, dtype=dtype)
    result = forward_and_backward(run, halves)
    assert result.out.dtype == result.grads["qkv"].dtype == dtype
    check_against_oracle(run, halves, tolerance, 2 * tolerance)


@every_cuda
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("S", [1, 15, 16, 33, 64, 76, 97, 128])
def test_half_precision_in_cuda(run, S, dtype, keys):
    halves = case(3, S, 2, 64, keys=keys, dtype=dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    check_against_oracle(run, halves, tolerance, 2 * tolerance)
    with poisoned_memory():
        first, second = (forward_and_backward(run, halves) for _ in range(2))
    assert torch.equal(first.out, second.out) and torch.equal(first.grads["qkv"], second.grads["qkv"])
    assert first.out.isfinite().all() and first.grads["qkv"].isfinite().all()
    # What starts between multiples of 16 bytes is copied first.
    shifted = torch.cat([halves.qkv.new_zeros(1), halves.qkv.flatten()])[1:].view_as(halves.qkv)
    assert torch.equal(forward_and_backward(run, halves._replace(qkv=shifted)).out, first.out)


@every_implementation
def test_float64_and_parameters_of_other_types(run):
    """The reference computes float64 as such; parameters follow the type of qkv and get gradients of their own."""
    mixed = case(2, 11, 2, 8, learned="normalised-null")
    mixed = mixed._replace(learned={name: x.double() for name, x in mixed.learned.items()})
    check_against_oracle(run, mixed, 2e-6, 1e-5)
    result = forward_and_backward(run, mixed)
    assert all(result.grads[name].dtype == torch.float64 for name in mixed.learned)
    if run.name == "reference":
        double = mixed._replace(qkv=mixed.qkv.double(), grad_out=mixed.grad_out.double())
        check_against_oracle(run, double, 1e-13, 1e-13)


@every_kernel
def test_non_contiguous(run):
    straight = case(2, 11, 2, 8, keys="mask", learned="normalised-null")
    strided = straight._replace(
        qkv=straight.qkv.transpose(0, 1).contiguous().transpose(0, 1),
        keys={"key_mask": straight.keys["key_mask"].T.contiguous().T},
        learned={name: torch.stack((x, x), -1)[..., 0] for name, x in straight.learned.items()},
        grad_out=straight.grad_out.transpose(1, 2).contiguous().transpose(1, 2),
    )
    expected, result = forward_and_backward(run, straight), forward_and_backward(run, strided)
    assert torch.equal(result.out, expected.out)
    for name, grad in expected.grads.items():
        assert torch.equal(result.grads[name], grad), name


def test_auto_leaves_what_the_kernel_does_not_take_to_pytorch():
    cpu = torch.device("cpu")
    assert why_not(cpu, torch.float32, MAX_LENGTH)["cpp"] == dispatch.why_not_cpp(cpu)
    assert "up to 128" in why_not(cpu, torch.float32, MAX_LENGTH + 1)["cpp"]
    assert "is float32" in why_not(cpu, torch.bfloat16)["cpp"]
    long = case(1, MAX_LENGTH + 1, 1, 8).qkv
    assert masked_attention(long).shape == (1, MAX_LENGTH + 1, 1, 8)
    with pytest.raises(RuntimeError, match="sequences of 129: the kernel takes up to 128"):
        masked_attention(long, impl="cpp")


def test_unknown_instruction_set_is_named():
    if dispatch.why_not_cpp(torch.device("cpu")):
        pytest.skip(dispatch.why_not_cpp(torch.device("cpu")))
    with isa("avx7"), pytest.raises(ValueError, match="NCFAST_ISA=avx7"):
        masked_attention(case(1, 4, 1, 4).qkv, impl="cpp")


@pytest.mark.gpu
def test_captured_by_a_cuda_graph():
    some = case(4, 76, 2, 64, keys="mask", learned="normalised-null", dtype=torch.bfloat16)
    qkv = some.qkv.cuda().requires_grad_()
    grad_out = some.grad_out.to(qkv)
    options = {name: x.cuda() for name, x in {**some.keys, **some.learned}.items()}

    def step():
        out = masked_attention(qkv, impl="triton", **options)
        return out, *torch.autograd.grad(out, qkv, grad_out)

    expected = step()
    qkv = qkv.detach().requires_grad_()  # the gradients of the other one are for the stream of its first
    graph = CudaGraph(step, device=GPU)
    for _ in range(2):
        captured = graph()
        for ours, theirs in zip(captured, expected, strict=True):
            assert torch.equal(ours, theirs)


@needs_triton
def test_triton_kernels_compile_offline():
    from ncfast.ops.triton.masked_attention import blocks

    types = {"key_mask": "*i1", "lengths": "*i64", "scale": "fp32", "q_scale": "*fp32", "k_scale": "*fp32"}
    types |= {"null_kv": "*fp32", "shared": "*fp32"}
    everything = {"HAS_MASK": 1, "HAS_LENGTHS": 0, "NORMALISED": 1, "HAS_NULL": 1}
    jobs, configurations = [], []
    S, d = 76, 64
    for dtype, learned in ((torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float32, 0)):
        typed = types | dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), TRITON_TYPES[dtype])
        flags = everything if learned else dict.fromkeys(everything, 0)
        for kernel, backward in (("masked_attention_kernel", False), ("masked_attention_backward_kernel", True)):
            jobs.append(
                (kernel, typed, {"H": 2, "d": d, **flags, **blocks(S, d, dtype, backward=backward, plain=not learned)})
            )
        configurations += [(dtype, learned)] * 2
    used = compile_offline("ncfast.ops.triton.masked_attention", jobs)
    for (dtype, learned), of in zip(configurations, used, strict=True):
        assert of["shared"] <= shared_memory(dtype, S, d)
        if dtype == torch.bfloat16:
            assert of["stack"] <= (32 if learned else 8), "registers spill"


TRITON_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qkv": torch.zeros(2, 3, 4)}, r"qkv is \[B, S, 3, H, d\]; got \[2, 3, 4\]"),
        ({"qkv": torch.zeros(2, 3, 2, 1, 4)}, r"qkv is \[B, S, 3, H, d\]"),
        ({"qkv": torch.zeros(2, 3, 3, 1, 4, dtype=torch.int64)}, "floating point; got torch.int64"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, r"key_mask is bool \[2, 3\]; got torch.bool \[2, 4\]"),
        ({"key_mask": torch.ones(2, 3)}, "got torch.float32"),
        ({"lengths": torch.ones(2)}, r"lengths is int64 \[2\]; got torch.float32 \[2\]"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths is int64 \[2\]; got torch.int64 \[3\]"),
        (
            {"key_mask": torch.ones(2, 3, dtype=torch.bool), "lengths": torch.ones(2, dtype=torch.int64)},
            "key_mask or lengths, not both",
        ),
        ({"q_scale": torch.ones(4)}, "go together; got q_scale without k_scale"),
        ({"k_scale": torch.ones(4)}, "go together; got k_scale without q_scale"),
        (
            {"q_scale": torch.ones(4), "k_scale": torch.ones(1, 4)},
            r"k_scale is floating point \[4\]; got torch.float32",
        ),
        ({"null_kv": torch.zeros(2, 4)}, r"null_kv is floating point \[2, 1, 4\]; got torch.float32 \[2, 4\]"),
        ({"null_kv": torch.zeros(2, 1, 4, device="meta")}, "qkv is on cpu and null_kv on meta; move one"),
    ],
)
def test_refuses(options, message):
    options = {"qkv": torch.zeros(2, 3, 3, 1, 4), **options}
    with pytest.raises(ValueError, match=message):
        masked_attention(options.pop("qkv"), **options)
