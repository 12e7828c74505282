"""VectorQuantize as other packages treat a module: copied, averaged, called with another state, given wrong shapes."""

import copy
import io
import pickle
import warnings
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from processes import on_processes
from torch import distributed

from ncfast import VectorQuantize


def batch(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(**options):
    torch.manual_seed(1)
    vq = VectorQuantize(8, 16, kmeans_init=True, **options)
    for seed in range(3):
        vq(batch(2, 40, 8, seed=seed))
    return vq


def fresh(**options):
    torch.manual_seed(2)
    return VectorQuantize(8, 16, kmeans_init=True, **options)


def copied_in_place(source):
    target = fresh()
    for own, other in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        own.copy_(other)
    return target


def averaged(source):
    model = torch.optim.swa_utils.AveragedModel(fresh(), use_buffers=True)
    model.update_parameters(source)
    return model.module


def assigned(source):
    target = fresh()
    target.load_state_dict(source.state_dict(), assign=True)
    return target


def given_codes(source):
    target = fresh()
    target._codebook.embed.copy_(source._codebook.embed)
    target._codebook.initted.fill_(True)
    return target


def set_codes(source):
    target = fresh()
    target.codebook = source.codebook
    return target


def loaded(source):
    target = fresh()
    target.load_state_dict(source.state_dict())
    return target


WAYS = (copied_in_place, averaged, assigned, given_codes, set_codes, loaded, copy.deepcopy)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", [*WAYS, lambda vq: pickle.loads(pickle.dumps(vq))])
def test_codes_that_came_from_elsewhere_stay(way, training):
    source = trained()
    target = way(source).train(training)
    codes = source.codebook.clone()
    x = batch(2, 40, 8, seed=9)
    quantised, indices, _ = target(x)
    assert torch.equal(indices, torch.cdist(x.double(), codes.double()).argmin(-1))
    assert torch.equal(quantised.detach(), codes[indices])
    if not training:
        assert torch.equal(target.codebook, codes)


def test_functional_call_uses_the_state_it_is_given_and_leaves_the_module_alone():
    source, target = trained().eval(), fresh().eval()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    x = batch(2, 40, 8, seed=9)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    _, indices, _ = torch.func.functional_call(target, state, (x,))
    assert torch.equal(indices, source(x)[1])
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    target(x)
    assert bool(target._codebook.initted) and not torch.equal(target.codebook, source.codebook)


def test_k_means_runs_again_when_the_buffer_says_so():
    vq = trained()
    codes = vq.codebook.clone()
    vq._codebook.initted.fill_(False)
    vq(batch(2, 40, 8, seed=9) + 5)
    assert bool(vq._codebook.initted) and (vq.codebook.mean(0) - codes.mean(0)).mean() > 3


def test_a_compiled_module_keeps_codes_that_were_copied_into_it():
    source = trained()
    target = copied_in_place(source).eval()
    compiled = torch.compile(target, backend="aot_eager", fullgraph=True)
    x = batch(2, 40, 8, seed=9)
    for _ in range(2):
        assert torch.equal(compiled(x)[1], source.eval()(x)[1])
        assert torch.equal(target.codebook, source.codebook)


def test_a_step_on_the_codes_themselves_leaves_them_where_they_are():
    vq = VectorQuantize(8, 16, decay=0.5)
    codes = batch(16, 8, seed=3)
    vq.codebook = codes
    vq(codes[None])
    torch.testing.assert_close(vq.codebook, codes, rtol=0, atol=1e-5)


def test_validation_in_inference_mode_and_then_training():
    vq = VectorQuantize(8, 16, affine_param=True)
    with torch.inference_mode():
        vq.eval()(batch(2, 40, 8))
    quantised, _, loss = vq.train()(batch(2, 40, 8, seed=1).requires_grad_())
    (quantised.sum() + loss).backward()
    assert torch.isfinite(vq.codebook).all()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("separate", [False, True])
def test_padding_decodes_to_zeros(heads, separate):
    vq = VectorQuantize(8, 16, heads=heads, codebook_dim=4, separate_codebook_per_head=separate).eval()
    x, mask = batch(2, 5, 8), torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    _, indices, _ = vq(x, mask=mask)
    codes = vq.get_codes_from_indices(indices)
    assert (codes[~mask] == 0).all() and (codes[mask] != 0).any(-1).all()
    full = vq.get_codes_from_indices(vq(x)[1])
    assert torch.equal(codes[mask], full[mask])


@pytest.mark.parametrize(
    ("options", "shape", "forward", "message"),
    [
        (
            {},
            (4, 100, 8),
            {"mask": torch.ones(4, 50, dtype=torch.bool)},
            r"mask is bool .* \[4, 100\].*got torch.bool \[4, 50\]",
        ),
        ({}, (4, 100, 8), {"mask": torch.ones(4, 100)}, r"mask is bool .*got torch.float32"),
        ({}, (4, 100, 8), {"lens": torch.ones(3, dtype=torch.int64)}, r"lens is \[B\] = \[4\].*got \[3\]"),
        ({}, (4, 8), {"lens": torch.ones(4, dtype=torch.int64)}, r"lens needs sequences.*got x \[4, 8\]"),
        ({"accept_image_fmap": True}, (2, 8, 5, 10), {"lens": torch.tensor([5, 2])}, "lens needs sequences"),
        ({}, (2, 8, 50), {}, r"x is \[B, n, dim\] .*dim = 8; got \[2, 8, 50\]; .*channel_last=False"),
        ({}, (2, 8, 5, 6), {}, r"got \[2, 8, 5, 6\]; .*accept_image_fmap=True"),
        ({}, (2, 8, 5, 6, 7), {}, "accept_3d_fmap=True"),
        ({"channel_last": False}, (2, 50, 8), {}, r"x is \[B, dim, n\].*channel_last=True"),
        ({}, (2, 50, 9), {}, r"dim = 8; got \[2, 50, 9\]$"),
        ({}, (8,), {}, r"got \[8\]"),
    ],
)
def test_shapes_that_do_not_fit_are_told_with_the_option_that_helps(options, shape, forward, message):
    vq = VectorQuantize(8, 16, **options)
    with pytest.raises(ValueError, match=f"VectorQuantize: .*{message}"):
        vq(torch.randn(shape), **forward)


def test_an_image_that_could_be_vectors_is_not_taken_without_a_word():
    with pytest.warns(UserWarning, match="dim = 8 first and last; the last is taken.*accept_image_fmap=True"):
        VectorQuantize(8, 16)(batch(2, 8, 5, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VectorQuantize(8, 16)(batch(2, 6, 5, 8))
        VectorQuantize(8, 16, accept_image_fmap=True)(batch(2, 8, 5, 8))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "options", [{}, {"kmeans_init": True}, {"threshold_ema_dead_code": 3}, {"use_cosine_sim": True}]
)
def test_a_vector_that_is_not_finite_counts_nowhere(wrong, options):
    x = batch(2, 40, 8)
    x[1, 7, 3] = wrong
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[1, 7] = False
    vq, masked = (VectorQuantize(8, 16, **options) for _ in range(2))
    masked.load_state_dict(vq.state_dict())
    for seed, module in ((3, vq), (3, masked)):
        torch.manual_seed(seed)
        for _ in range(3):
            module(x, mask=keep if module is masked else None)
    assert torch.isfinite(vq.codebook).all()
    if not options or "use_cosine_sim" in options:  # the others draw vectors, and a mask draws others
        torch.testing.assert_close(vq.state_dict(), masked.state_dict(), rtol=1e-6, atol=1e-6)


def test_a_compiled_module_leaves_them_out_too():
    x = batch(2, 40, 8)
    x[0, 0] = float("nan")
    vq = VectorQuantize(8, 16)
    eager = copy.deepcopy(vq)
    torch.compile(vq, backend="aot_eager", fullgraph=True)(x)
    eager(x)
    torch.testing.assert_close(vq.codebook, eager.codebook, rtol=1e-6, atol=1e-6)


def test_a_vector_of_zeros_has_a_bounded_gradient_by_angle():
    vq = VectorQuantize(8, 16, use_cosine_sim=True)
    x = batch(2, 10, 8)
    x[0, 3] = 0
    x.requires_grad_()
    quantised, _, loss = vq(x)
    (gradient,) = torch.autograd.grad(quantised.square().sum() + loss, x)
    assert gradient.abs().max() < 100 and (gradient[0, 3] == 0).all() and (gradient[0, 4] != 0).any()


def steps_of_a_module_made_early():
    """Codes after five steps, of a module that was made before there was a process group; kmeans_init with a forward of
    one process alone before them."""
    rank = distributed.get_rank()
    codes = []
    for options in ({}, {"kmeans_init": True}, {"affine_param": True, "sync_affine_param": True}):
        torch.manual_seed(0)
        with mock.patch("torch.distributed.is_initialized", return_value=False):
            vq = VectorQuantize(8, 16, **options)
        if rank == 0:
            vq.eval()(batch(2, 40, 8))
        vq.train()
        for seed in range(5):
            vq(batch(2, 40, 8, seed=10 * seed + rank))
        codes.append(vq.codebook.detach().clone())
    return codes


@pytest.mark.slow
def test_processes_share_a_codebook_that_was_made_before_they_met(tmp_path):
    first, second = on_processes(2, tmp_path, steps_of_a_module_made_early)
    for i, (a, b) in enumerate(zip(first[:2], second[:2], strict=True)):
        assert torch.equal(a, b), i
    assert torch.isfinite(first[2]).all()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"heads": 2, "codebook_dim": 4}, {"use_cosine_sim": True}])
def test_an_exported_module_is_saved_and_needs_nothing_of_this_package(options, strict):
    vq = VectorQuantize(8, 16, **options).eval()
    x = batch(2, 10, 8)
    program = torch.export.export(vq, (x,), strict=strict)
    assert not any("ncfast" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    quantised, indices, _ = torch.export.load(file).module()(x)
    expected, expected_indices, _ = vq(x)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(quantised, expected, rtol=1e-6, atol=1e-6)


class Checkpointed(torch.nn.Module):
    """A codebook used twice in a step, with random numbers drawn after it, in a part that is computed again."""

    def __init__(self, options, reentrant):
        super().__init__()
        self.encoder = torch.nn.Linear(8, 8)
        self.vq = VectorQuantize(8, 16, **options)
        self.reentrant = reentrant

    def part(self, x):
        z = self.encoder(x)
        quantised, _, loss = self.vq(z)
        return torch.nn.functional.dropout(quantised, 0.3), loss

    def forward(self, x):
        if self.reentrant is None:
            return self.part(x)
        return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kmeans_init": True},
        {"use_cosine_sim": True, "threshold_ema_dead_code": 2},
        {"affine_param": True},
        {"orthogonal_reg_weight": 0.5},
        {"learnable_codebook": True, "ema_update": False},
        {"stochastic_sample_codes": True},
    ],
    ids=str,
)
def test_a_pass_that_is_computed_again_neither_moves_nor_sees_another_codebook(options, reentrant):
    results = []
    for way in (None, reentrant):
        torch.manual_seed(0)
        model = Checkpointed(options, way)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outputs = []
        for _ in range(3):
            x = torch.randn(2, 4, 50, 8, requires_grad=True)
            (a, first), (b, second) = model(x[0]), model(x[1])
            optimizer.zero_grad()
            ((a - b).square().mean() + first + second).backward()
            optimizer.step()
            outputs += [a.detach(), b.detach(), first.detach(), x.grad, model.encoder.weight.grad.clone()]
        results.append(outputs + list(model.state_dict().values()))
    for found, expected in zip(*results, strict=True):
        # Gradients of the two passes are added in another order.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if "orthogonal_reg_weight" in options else 0)


def test_what_cannot_be_computed_again_says_so():
    x = torch.randn(2, 50, 8, requires_grad=True)
    vq = VectorQuantize(8, 16, learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=torch.optim.AdamW)
    with pytest.raises(RuntimeError, match="in_place_codebook_optimizer"):
        torch.utils.checkpoint.checkpoint(vq, x, use_reentrant=False)[2].backward()
    torch.manual_seed(0)
    vq = VectorQuantize(8, 16)
    x.register_hook(lambda _: vq(x))
    with pytest.raises(RuntimeError, match="keep this module out"):
        x.sum().backward()


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True, "heads": 2}, {"accept_image_fmap": True}], ids=str)
def test_onnx_runs_what_the_module_does(options, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    vq = VectorQuantize(8, 16, **options).eval()
    x = batch(2, 8, 4, 4) if "accept_image_fmap" in options else batch(2, 10, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(vq, (x,), tmp_path / "vq.onnx", dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(tmp_path / "vq.onnx")
    quantised, indices, _ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected, expected_indices, _ = vq(x)
    assert (indices == expected_indices.numpy()).all()
    assert abs(quantised - expected.detach().numpy()).max() < 1e-6
