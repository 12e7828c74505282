"""What every operation owes PyTorch, by each implementation.

Its operators obey their schemas and fake versions, it compiles into one graph, once, and second derivatives are those
of the definition or are refused; never zeros in silence.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from implementations import GPU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ncfast import ops
from ncfast.ops.nearest_code import why_not


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


SIZES = 11, 17  # of batches; no other dimension is as large, or a compiler would take the two for one


class Case(NamedTuple):
    function: Callable  # (*inputs, impl=) -> a tensor or several
    inputs: Callable  # (size of the batch, seed) -> tensors
    trained: int  # how many of them, from the first on, have gradients
    compiles: bool = True
    refuses: bool = False  # second derivatives


def nearest(z, codebook, impl):
    return ops.nearest_code(z, codebook, impl=impl)


def statistics(z, indices, impl):
    return ops.code_stats(z, indices, 4, impl=impl)


def to_code(rotate):
    def function(z, codebook, indices, impl):
        q, loss = ops.rotate_to_code(z, codebook, indices, impl=impl, rotate=rotate)
        return q * q.detach().cos(), loss

    return function


def loss(function, **options):
    return lambda a, b, impl: function(a, b, route="gram", impl=impl, **options)


def whitened(x, impl):
    return ops.iter_norm(x, groups=2, iterations=3, impl=impl)


def layer(gelu, dtype=None):
    def function(x, weight, bias, add=None, *, impl):
        return ops.layer_norm(x, weight, bias, add=add, gelu=gelu, dtype=dtype, impl=impl)

    return function


def normalised(x, weight, bias, residual, mean, variance, impl):
    return ops.batch_norm(x, weight, bias, mean, variance, residual, views=2, slope=0.1, then_slope=0.2, impl=impl)


def padded(x, weight, bias, impl):
    return ops.batch_norm(x, weight, bias, slope=0.1, pad=True, impl=impl)


def linear(x, weight, *parts, impl):
    return ops.fused_linear(x, weight, *parts, gelu=len(parts) > 0, return_x=len(parts) > 0, impl=impl)


def attention(qkv, q_scale=None, k_scale=None, null_kv=None, lengths=None, *, impl):
    return ops.masked_attention(
        qkv, lengths=lengths, q_scale=q_scale, k_scale=k_scale, null_kv=null_kv, scale=0.5, impl=impl
    )


def masked(qkv, key_mask, impl):
    return ops.masked_attention(qkv, key_mask, impl=impl)


def transposed(x, weight, bias, impl):
    return ops.thin_conv_transpose(x, weight, bias, groups=2, impl=impl)


def unmasked(logits, tokens, sample, counts, impl):
    options = {"step": 3, "num_masked": counts, "width": 6, "choice_temperature": 1.0}
    return ops.unmask_step(logits, tokens, sample, seed=torch.tensor(1, device=logits.device), impl=impl, **options)


def guided(logits, tokens, sample, unconditional, seed, impl):
    options = {"step": 3, "num_masked": 2, "unconditional": unconditional, "guidance_scale": 2.0, "top_k": 2}
    return ops.unmask_step(logits, tokens, sample, seed=seed, convention="google", impl=impl, **options)


def logits_and_tokens(n, seed):
    return randn(n, 6, 5, seed=seed), integers(6, n, 6, seed=seed), torch.arange(n)


def views(n, seed):
    return randn(n, 20, seed=seed), randn(n, 20, seed=seed + 1)


def images(n, seed, channels=3):
    # Strided as the models' are.
    return randn(2 * n, channels, 5, 7, seed=seed).to(memory_format=torch.channels_last)


def vectors(channels, *seeds):
    return [1 + 0.1 * randn(channels, seed=seed) for seed in seeds]


CASES = {
    "nearest_code": Case(nearest, lambda n, s: (randn(2, n, 5, seed=s), randn(2, 9, 5)), 0),
    "nearest_code, one code": Case(nearest, lambda n, s: (randn(n, 1, seed=s).half(), randn(1, 1)), 0),
    "nearest_code, no row": Case(nearest, lambda n, s: (randn(0, 5), randn(3, 5)), 0, compiles=False),
    "code_stats": Case(statistics, lambda n, s: (randn(2, n, 5, seed=s), integers(5, 2, n, seed=s) - 1), 0),
    "code_stats, no row": Case(statistics, lambda n, s: (randn(1, 0, 5), integers(1, 1, 0)), 0, compiles=False),
    "code_stats, half": Case(statistics, lambda n, s: (randn(140, 1).half(), integers(4, 140)), 0, compiles=False),
    **{
        f"rotate_to_code, {'rotated' if rotate else 'straight through'}": Case(
            to_code(rotate),
            lambda n, s: (randn(n, 5, seed=s), randn(4, 5, seed=1), integers(5, n, seed=s) - 1),
            2,
        )
        for rotate in (True, False)
    },
    "barlow_twins_loss": Case(loss(ops.barlow_twins_loss), views, 2),
    "vicreg_loss": Case(loss(ops.vicreg_loss), views, 2),
    "vicreg_loss, facebook": Case(loss(ops.vicreg_loss, convention="facebook"), views, 2),
    "vibcreg_loss": Case(loss(ops.vibcreg_loss), views, 2),
    "iter_norm": Case(whitened, lambda n, s: (randn(n, 6, seed=s),), 1),
    "layer_norm": Case(layer(False), lambda n, s: (randn(n, 3, 8, seed=s), *vectors(8, 1, 2)), 3, refuses=True),
    "layer_norm, gelu": Case(
        layer(True, torch.float16),
        lambda n, s: (randn(n, 3, 8, seed=s), *vectors(8, 1, 2), randn(3, 8)),
        4,
        refuses=True,
    ),
    "batch_norm": Case(
        normalised,
        lambda n, s: (images(n, s), *vectors(3, 1, 2), images(n, s + 1), torch.zeros(3), torch.ones(3)),
        4,
        refuses=True,
    ),
    "batch_norm, padded": Case(padded, lambda n, s: (images(n, s), *vectors(3, 1, 2)), 3, refuses=True),
    "fused_linear": Case(linear, lambda n, s: (randn(n, 8, seed=s), randn(6, 8)), 2, refuses=True),
    "fused_linear, float16": Case(
        linear, lambda n, s: (randn(n, 8, seed=s).half(), randn(6, 8).half()), 2, refuses=True
    ),
    "fused_linear, all parts": Case(
        linear,
        lambda n, s: (randn(n, 8, seed=s), randn(6, 8), *vectors(6, 1), *vectors(8, 2), randn(n, 6, seed=s)),
        5,
        refuses=True,
    ),
    "masked_attention": Case(attention, lambda n, s: (randn(n, 5, 3, 1, 4, seed=s),), 1, refuses=True),
    "masked_attention, key mask": Case(
        masked, lambda n, s: (randn(n, 5, 3, 1, 4, seed=s), integers(4, n, 5, seed=s) > 0), 1, refuses=True
    ),
    "masked_attention, all parts": Case(
        attention,
        lambda n, s: (
            *(randn(n, 5, 3, 2, 4, seed=s), *vectors(4, 1, 2), randn(2, 2, 4)),
            1 + integers(5, n, seed=s),
        ),
        4,
        refuses=True,
    ),
    "thin_conv_transpose": Case(
        transposed, lambda n, s: (randn(n, 4, 5, 7, seed=s), randn(4, 1, 3, 4), randn(2)), 3, refuses=True
    ),
    "unmask_step": Case(unmasked, lambda n, s: (*logits_and_tokens(n, s), integers(4, n, seed=s)), 0),
    "unmask_step, guided": Case(
        guided, lambda n, s: (*logits_and_tokens(n, s), randn(n, 6, 5, seed=s + 1), torch.tensor(s)), 0
    ),
}
IMPLEMENTATIONS = {"cpp": "cpu", "triton": GPU, "cuda": "cuda"}
every_case = pytest.mark.parametrize("name", CASES)
every_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def inputs_of(case, impl, size=0, seed=0):
    if IMPLEMENTATIONS[impl] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    made = [x.to(IMPLEMENTATIONS[impl]) for x in case.inputs(SIZES[size], seed)]
    return [x.requires_grad_() if i < case.trained else x for i, x in enumerate(made)]


def outputs(case, inputs, impl):
    """As a list; a skip where the implementation is not here or does not exist; any other error is one."""
    try:
        out = case.function(*inputs, impl=impl)
    except (RuntimeError, ValueError) as error:
        if "cannot run this call" not in str(error) and "has the implementations" not in str(error):
            raise
        pytest.skip(str(error))
    return [out] if isinstance(out, Tensor) else list(out)


def total(out):
    """One number of all results, with another weight for each element."""
    parts = [x for x in out if x.is_floating_point() and x.requires_grad]
    return sum((x.double().flatten() * torch.linspace(-1, 2, x.numel(), device=x.device)).sum() for x in parts)


class Calls(TorchDispatchMode):
    """The calls of the package's operators, with what they are given."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "ncfast":
            copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments]
            self.made.append((function, copies, options or {}))
        return function(*arguments, **(options or {}))


def calls_of(case, impl):
    inputs = inputs_of(case, impl)
    with Calls() as calls:
        out = outputs(case, inputs, impl)
        if case.trained:
            torch.autograd.grad(total(out), inputs[: case.trained])
    return calls.made


@every_implementation
@every_case
def test_operators_are_what_they_say(name, impl):
    made = calls_of(CASES[name], impl)
    assert any(impl in operator.name() for operator, _, _ in made)
    for operator, arguments, options in made:
        torch.library.opcheck(operator, tuple(arguments), options)


def test_no_operator_is_left_out():
    made = set()
    for case in CASES.values():
        for impl in IMPLEMENTATIONS:
            try:
                made |= {operator.name() for operator, _, _ in calls_of(case, impl)}
            except pytest.skip.Exception:
                continue
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ncfast::")}
    absent = {name for name in known for impl in ("cpp", "triton", "cuda") if name.endswith(impl) and not runs(impl)}
    assert known - {"ncfast::snapshot"} - absent == made


def runs(impl):
    return any(why_not(torch.device(device), torch.float32).get(impl, "") is None for device in ("cpu", GPU))


@every_implementation
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].compiles])
def test_compiles_into_one_graph_once(name, dynamic, impl):
    if impl == "triton" and GPU == "cpu" and not dynamic:
        pytest.skip("triton: the interpreter takes the dynamic one")
    case = CASES[name]
    outputs(case, inputs_of(case, impl), impl)  # or a skip
    torch._dynamo.reset()

    def function(first, *others):
        out = case.function(first * 1, *others, impl=impl)
        return [x + 0 for x in ([out] if isinstance(out, Tensor) else out)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for turn in range(2):
        found = []
        for each in (compiled, function):
            inputs = inputs_of(case, impl, size=turn if dynamic else 0, seed=turn)
            with torch._dynamo.config.patch(error_on_recompile=turn > 0):
                out = each(*inputs)
            gradients = torch.autograd.grad(total(out), inputs[: case.trained]) if case.trained else ()
            found.append([*out, *gradients, *inputs[case.trained :]])
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].compiles])
def test_runs_the_same_operators_when_compiled(name):
    """The implementation that "auto" takes is that of a call that is not compiled, on every torch."""
    case = CASES[name]
    inputs = [x.to(GPU) for x in case.inputs(SIZES[0], 0)]
    torch._dynamo.reset()

    def function(first, *others):
        return case.function(first * 1, *others, impl="auto")

    with Calls() as calls:
        function(*inputs)
    graphs = []
    torch.compile(function, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(*inputs)
    targets = [node.target for module in graphs[0].modules() if hasattr(module, "graph") for node in module.graph.nodes]
    compiled = {target.name() for target in targets if getattr(target, "namespace", None) == "ncfast"}
    assert compiled == {operator.name() for operator, _, _ in calls.made}


def product(case, inputs, impl):
    """Product of the Hessian with a vector."""
    leaves = inputs[: case.trained]
    gradients = torch.autograd.grad(total(outputs(case, inputs, impl)), leaves, create_graph=True)
    along = sum((g * randn(*g.shape, seed=7, dtype=torch.float64).to(g)).sum() for g in gradients)
    return torch.autograd.grad(along, leaves, allow_unused=True)


@every_implementation
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.trained and not case.refuses])
def test_second_derivatives_are_those_of_the_definition(name, impl):
    case = CASES[name]
    found = product(case, inputs_of(case, impl), impl)
    exact = [x.detach().double() if x.is_floating_point() else x for x in inputs_of(case, impl)]
    exact = [x.requires_grad_() if i < case.trained else x for i, x in enumerate(exact)]
    expected = product(case, exact, "reference")
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert b.norm() > 0 or "through" in name
            assert (a.double() - b).norm() <= 1e-4 * b.norm() + 1e-6


@every_implementation
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refuses])
def test_second_derivatives_are_refused_where_there_are_none(name, impl):
    case = CASES[name]
    inputs = inputs_of(case, impl)
    out = outputs(case, inputs, impl)
    torch.autograd.grad(total(out), inputs[: case.trained], retain_graph=True)
    # The incoming gradient requires none: nothing but create_graph tells that a second derivative is wanted.
    operation = name.partition(",")[0]
    with pytest.raises(RuntimeError, match=f"{operation}: its kernels have no second derivative.*impl='reference'"):
        torch.autograd.grad(out[0].sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize("loss", [ops.barlow_twins_loss, ops.vicreg_loss, ops.vibcreg_loss])
def test_hvp_is_a_difference_of_gradients(loss):
    a, b, v = randn(6, 20), randn(6, 20, seed=1), randn(6, 20, seed=2)
    _, found = torch.autograd.functional.hvp(lambda u: loss(u, b), a, v)

    def gradient(u):
        u = u.requires_grad_()
        return torch.autograd.grad(loss(u, b.double(), impl="reference"), u)[0]

    step = 1e-4 * v.double()
    expected = (gradient(a.double() + step) - gradient(a.double() - step)) / 2e-4
    assert (found.double() - expected).norm() <= 1e-4 * expected.norm()


def test_a_penalty_on_a_gradient_trains_rightly():
    z, codes, weight = randn(7, 5), randn(4, 5, seed=1), randn(5, 5, seed=2)
    results = []
    for impl, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        x, w = z.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = sum(part.sum() for part in to_code(True)(x @ w, codes.to(dtype), integers(5, 7) - 1, impl=impl))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), w)[0].double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
