import copy
import gc
import math
import pickle
import weakref
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import once_per_world
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ncfast
from ncfast.nn.vector_quantize import VectorQuantize
from ncfast.ops import dispatch
from ncfast.ops.nearest_code import why_not

LEARNED = {"learnable_codebook": True, "ema_update": False}
SEPARATE = {"heads": 2, "separate_codebook_per_head": True}
# Sums of float32 against the same in float64: relative errors of 1e-6, and more where terms cancel.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
close = partial(torch.testing.assert_close, **FLOAT32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def spread(vq, seed=100):
    """Codes as far apart as the data: the initial ones are so close together that most distances are near ties."""
    codebook = vq._codebook
    codes = randn(*codebook.embed.shape, seed=seed)
    codes = F.normalize(codes, dim=-1) if vq.use_cosine_sim else codes
    with torch.no_grad():
        codebook.embed.copy_(codes)
        codebook.embed_avg.copy_(codes)
    return vq


def build(dim=8, codebook_size=16, **options):
    torch.manual_seed(0)
    return spread(VectorQuantize(dim, codebook_size, **options))


def state(vq):
    return {name: tensor.clone() for name, tensor in vq.state_dict().items()}


def check_states(ours, expected, **tolerance):
    assert list(ours) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            ours[name], tensor, **(tolerance or FLOAT32), msg=lambda message, name=name: f"{name}: {message}"
        )


class Definition:
    """One codebook in float64: nearest code, moving averages, Laplace smoothing."""

    def __init__(self, codes, decay, eps, cosine):
        self.codes, self.decay, self.eps, self.cosine = codes.double().numpy(), decay, eps, cosine
        self.average, self.size = self.codes.copy(), np.ones(len(codes))

    def unit(self, rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True) if self.cosine else rows

    def choose(self, rows):
        """rows [M, D] -> indices [M]"""
        rows = self.unit(rows)
        return np.square(rows[:, None] - self.codes).sum(-1).argmin(-1)

    def update(self, rows, indices):
        one_hot = np.eye(len(self.codes))[indices]  # [M, K]
        self.counts = one_hot.sum(0)
        self.size += (1 - self.decay) * (self.counts - self.size)
        self.average += (1 - self.decay) * (one_hot.T @ self.unit(rows) - self.average)
        total = self.size.sum()
        smoothed = (self.size + self.eps) / (total + len(self.codes) * self.eps) * total
        self.codes = self.unit(self.average / smoothed[:, None])

    def perplexity(self):
        share = self.counts / self.counts.sum()
        return math.exp(-sum(p * math.log(p) for p in share if p > 0))


def split(x, heads, separate):
    """x [B, n, heads·d] -> the rows [M, d] that each codebook sees, in float64."""
    parts = x.double().numpy().reshape(*x.shape[:-1], heads, -1)  # [B, n, heads, d]
    if separate:
        return [parts[:, :, head].reshape(-1, parts.shape[-1]) for head in range(heads)]
    return [parts.reshape(-1, parts.shape[-1])]


@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("heads", "separate"), [(1, False), (3, False), (3, True)], ids=["one", "shared_heads", "separate_heads"]
)
def test_training_follows_its_definition(heads, separate, cosine):
    d = 5
    vq = build(
        heads * d,
        7,
        codebook_dim=d,
        heads=heads,
        separate_codebook_per_head=separate,
        use_cosine_sim=cosine,
        decay=0.7,
        eps=1e-3,
        commitment_weight=0.3,
    )
    books = [Definition(codes, 0.7, 1e-3, cosine) for codes in vq._codebook.embed]
    for step in range(5):
        x = 2 * randn(2, 11, heads * d, seed=step)
        quantize, indices, loss = vq(x)
        assert indices.dtype == torch.int64 and loss.dtype == torch.float32 and loss.shape == ()
        squares = []
        for head, (book, rows) in enumerate(zip(books, split(x, heads, separate), strict=True)):
            chosen = book.choose(rows)
            mine = indices[..., head] if separate else indices
            np.testing.assert_array_equal(mine.flatten(), chosen)
            expected = book.codes[chosen]
            out = split(quantize, heads, separate)[head]
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
            squares.append(np.square(expected - book.unit(rows)).mean())
            book.update(rows, chosen)
        np.testing.assert_allclose(loss.detach(), 0.3 * np.mean(squares), rtol=1e-5)
        for name, expected in (("embed", "codes"), ("embed_avg", "average"), ("cluster_size", "size")):
            expected = np.stack([getattr(book, expected) for book in books])
            np.testing.assert_allclose(getattr(vq._codebook, name), expected, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(vq.code_counts, [book.counts for book in books])
        perplexity, usage = [book.perplexity() for book in books], [(book.counts > 0).mean() for book in books]
        assert vq.perplexity.shape == vq.code_usage.shape == ((heads,) if separate else ())
        np.testing.assert_allclose(vq.perplexity, perplexity if separate else perplexity[0], rtol=1e-5)
        np.testing.assert_allclose(vq.code_usage, usage if separate else usage[0], rtol=1e-6)


@pytest.mark.parametrize("frozen", [False, True], ids=["moving", "frozen"])
@pytest.mark.parametrize("options", [{}, {"ema_update": False}, LEARNED, {"codebook_dim": 5}], ids=str)
def test_usage_counts_the_last_training_batch_and_no_masked_row(options, frozen):
    vq = build(4, 6, **options)
    vq(randn(2, 9, 4, seed=5))  # an earlier batch must not count
    x, mask = randn(2, 9, 4), some(2, 9)
    _, indices, _ = vq(x, mask=mask, freeze_codebook=frozen)
    for _ in range(2):
        counts = np.bincount(indices[mask], minlength=6)
        assert vq.code_counts.shape == (1, 6)
        np.testing.assert_array_equal(vq.code_counts[0], counts)
        share = counts[counts > 0] / counts.sum()
        np.testing.assert_allclose(vq.perplexity, np.exp(-(share * np.log(share)).sum()), rtol=1e-5)
        np.testing.assert_allclose(vq.code_usage, (counts > 0).mean(), rtol=1e-6)
        assert not any(t.requires_grad for t in (vq.perplexity, vq.code_usage, vq.code_counts))
        vq.eval()(randn(2, 9, 4, seed=6))  # does not count either


def test_is_part_of_the_package():
    assert ncfast.VectorQuantize is VectorQuantize and "VectorQuantize" in ncfast.__all__


def test_usage_of_one_code_and_of_all():
    vq = build(3, 4, freeze_codebook=True)
    vq(vq.codebook[2].repeat(5, 1)[None])
    assert vq.perplexity == 1 and vq.code_usage == 0.25
    vq(vq.codebook[None])
    assert math.isclose(vq.perplexity, 4, rel_tol=1e-6) and vq.code_usage == 1
    assert "code_counts" not in str(list(vq.state_dict()))


def gradients(vq, x, weight):
    x = x.clone().requires_grad_()
    quantize, indices, loss = vq(x)
    through, of_loss = torch.autograd.grad((quantize * weight).sum(), x, retain_graph=True)[0], None
    if loss.grad_fn is not None:
        of_loss = torch.autograd.grad(loss, x)[0]
    return quantize, indices, through, of_loss


def test_straight_through_and_commitment_gradients():
    vq = build(rotation_trick=False, commitment_weight=0.3)
    codes, x, weight = vq.codebook.clone(), randn(2, 9, 8, seed=1), randn(2, 9, 8, seed=2)
    quantize, indices, through, of_loss = gradients(vq, x, weight)
    close(quantize, codes[indices])
    torch.testing.assert_close(through, weight)
    close(of_loss, 0.3 * 2 * (x - codes[indices]) / x.numel())


def rotation_gradient(x, q, weight):
    """λRᵀ weight, where λR takes x to q: R = I - 2 r rᵀ + 2 q̂ x̂ᵀ with r the unit vector along x̂ + q̂ (2410.06424)."""
    x, q, weight = (t.double().flatten(0, -2).numpy() for t in (x, q, weight))
    out = np.empty_like(x)
    for i in range(len(x)):
        u, v = x[i] / np.linalg.norm(x[i]), q[i] / np.linalg.norm(q[i])
        r = (u + v) / np.linalg.norm(u + v)
        R = np.eye(len(u)) - 2 * np.outer(r, r) + 2 * np.outer(v, u)
        np.testing.assert_allclose(R @ u, v, atol=1e-12)
        out[i] = np.linalg.norm(q[i]) / np.linalg.norm(x[i]) * R.T @ weight[i]
    return torch.from_numpy(out)


@pytest.mark.parametrize("dim", [2, 3, 8, 65])
def test_rotation_gradient(dim):
    vq = build(dim, 16)
    codes, x, weight = vq.codebook.clone(), randn(2, 9, dim, seed=1), randn(2, 9, dim, seed=2)
    quantize, indices, through, _ = gradients(vq, x, weight)
    torch.testing.assert_close(quantize, codes[indices], rtol=1e-5, atol=1e-6)
    close(through.flatten(0, 1).double(), rotation_gradient(x, codes[indices], weight))


@pytest.mark.parametrize("options", [{}, {"heads": 2, "codebook_dim": 4}, LEARNED], ids=str)
def test_rows_without_a_direction_pass_the_gradient_on(options):
    """There is no rotation from a zero vector, and the original's factor |q|/|x| makes gradients of 1e5 there."""
    vq = build(**options)
    x, weight = randn(1, 12, 8, seed=1), randn(1, 12, 8, seed=2)
    x[0, 1], x[0, 5] = 0, 1e-9
    x[0, 7] *= 1e-8 / x[0, 7].norm()
    codes = vq.codebook.clone()
    quantize, indices, through, of_loss = gradients(vq, x, weight)
    assert quantize.isfinite().all() and of_loss.isfinite().all()
    torch.testing.assert_close(through[0, [1, 5, 7]], weight[0, [1, 5, 7]])
    assert through.abs().max() < 100
    if not options:
        others = [i for i in range(12) if i not in (1, 5, 7)]
        expected = rotation_gradient(x[:, others], codes[indices[:, others]], weight[:, others])
        close(through[0, others].double(), expected)


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}, {"use_cosine_sim": True}], ids=str)
def test_no_gradient_is_computed_for_an_input_that_wants_none(options):
    vq = build(**options)
    codes = vq.codebook.clone()
    quantize, indices, _ = vq(randn(2, 9, 8))
    assert not quantize.requires_grad
    assert torch.equal(quantize, codes[indices])  # no rounding by the rotation either


LAYOUTS = {
    "plain": ({}, (2, 9, 12)),
    "projected": ({"codebook_dim": 5}, (2, 9, 12)),
    "layernorm": ({"codebook_dim": 5, "layernorm_after_project_in": True}, (2, 9, 12)),
    "cosine": ({"use_cosine_sim": True}, (2, 9, 12)),
    "channel_first": ({"channel_last": False}, (2, 12, 9)),
    "channel_first_projected": ({"channel_last": False, "codebook_dim": 5}, (2, 12, 9)),
    "image": ({"accept_image_fmap": True}, (2, 12, 3, 5)),
    "image_projected": ({"accept_image_fmap": True, "codebook_dim": 5}, (2, 12, 3, 5)),
    "volume": ({"accept_3d_fmap": True}, (2, 12, 2, 3, 5)),
    "volume_projected": ({"accept_3d_fmap": True, "codebook_dim": 5}, (2, 12, 2, 3, 5)),
    "heads": ({"heads": 3, "codebook_dim": 4}, (2, 9, 12)),
    "heads_projected": ({"heads": 2}, (2, 9, 12)),
    "heads_image": ({"heads": 3, "codebook_dim": 4, "accept_image_fmap": True}, (2, 12, 3, 5)),
    "separate": ({"codebook_dim": 6, **SEPARATE}, (2, 9, 12)),
    "separate_projected": (SEPARATE, (2, 9, 12)),
    "separate_channel_first": ({"channel_last": False, **SEPARATE}, (2, 12, 9)),
    "separate_image": ({"accept_image_fmap": True, **SEPARATE}, (2, 12, 3, 5)),
    "separate_one_head": ({"separate_codebook_per_head": True}, (2, 9, 12)),
    "single": ({}, (9, 12)),
    "single_heads": ({"heads": 2}, (9, 12)),
    "single_separate": (SEPARATE, (9, 12)),
}


@pytest.mark.parametrize(("options", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_the_plain_one_rearranged(options, shape):
    """Indices, output and loss of each layout from the codes and projections themselves."""
    torch.manual_seed(0)
    vq = spread(VectorQuantize(12, 16, **options)).eval()
    heads, separate = options.get("heads", 1), "separate_codebook_per_head" in options
    x = randn(*shape)
    channel_first = not options.get("channel_last", True) or len(shape) > 3
    rows = (x.movedim(1, -1) if channel_first else x).reshape(-1, 12)  # [M, 12]
    parts = F.normalize(vq.project_in(rows).unflatten(-1, (heads, -1)), dim=-1) if vq.use_cosine_sim else None
    parts = vq.project_in(rows).unflatten(-1, (heads, -1)) if parts is None else parts  # [M, heads, d]
    codes = vq._codebook.embed if separate else vq._codebook.embed.expand(heads, -1, -1)  # [heads, K, d]
    expected = torch.cdist(parts.double().movedim(1, 0), codes.double()).argmin(-1).T  # [M, heads]
    chosen = torch.stack([codes[head][expected[:, head]] for head in range(heads)], 1)  # [M, heads, d]
    out = vq.project_out(chosen.flatten(1))

    quantize, indices, loss = vq(x)
    positions = (shape[0], *shape[2:]) if channel_first else shape[:-1]
    assert quantize.shape == shape
    assert indices.shape == (positions if heads == 1 else (*positions, heads))
    assert torch.equal(indices.reshape(-1, heads), expected)
    out = out.view(*positions, 12)
    out = out.movedim(-1, 1) if channel_first else out
    close(quantize, out)
    assert loss == 0  # of eval


@pytest.mark.parametrize(("options", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_indices_give_the_output_back(options, shape):
    vq = build(12, **options).eval()
    quantize, indices, _ = vq(randn(*shape))
    close(vq.get_output_from_indices(indices), quantize)


def test_training_output_comes_from_the_codebook_before_the_update():
    vq = build(decay=0.5)
    before = vq.codebook.clone()
    x = randn(4, 32, 8)
    quantize, indices, _ = vq(x)
    torch.testing.assert_close(quantize, before[indices])
    assert (vq.codebook - before).abs().max() > 0.1


def test_eval_leaves_everything_as_it_was():
    vq = build(threshold_ema_dead_code=2, codebook_dim=5, affine_param=True)
    vq(randn(2, 9, 8))
    vq.eval()
    before = state(vq)
    vq(randn(2, 9, 8, seed=1))
    names = [name for name in before if "batch_" not in name]  # the running statistics of the input
    check_states({n: vq.state_dict()[n] for n in names}, {n: before[n] for n in names}, rtol=0, atol=0)


MASKABLE = {
    "plain": {},
    "projected": {"codebook_dim": 5},
    "layernorm": {"codebook_dim": 5, "layernorm_after_project_in": True},
    "heads": {"heads": 2, "codebook_dim": 4},
    "heads_projected": {"heads": 3, "codebook_dim": 5},
    "separate": {"codebook_dim": 4, **SEPARATE},
    "separate_projected": SEPARATE,
    "cosine": {"use_cosine_sim": True},
    "cosine_projected": {"use_cosine_sim": True, "codebook_dim": 5},
    "cosine_heads": {"use_cosine_sim": True, "heads": 2, "codebook_dim": 4},
    "cosine_separate": {"use_cosine_sim": True, "codebook_dim": 4, **SEPARATE},
    "no_rotation": {"rotation_trick": False, "codebook_dim": 5},
    "learned_projected": {"codebook_dim": 5, **LEARNED},
    "learned_heads": {"heads": 2, "codebook_dim": 4, **LEARNED},
    "in_place_heads": {
        "heads": 2,
        "codebook_dim": 4,
        "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=1.0),
        **LEARNED,
    },
    "affine_projected": {"affine_param": True, "codebook_dim": 5},
    "orthogonal_active": {"orthogonal_reg_weight": 10.0, "orthogonal_reg_active_codes_only": True},
    "cross_entropy": {"commitment_use_cross_entropy_loss": True},
    "cross_entropy_separate": {"commitment_use_cross_entropy_loss": True, "codebook_dim": 4, **SEPARATE},
}


@pytest.mark.parametrize("padding", [0.0, 1e4])
@pytest.mark.parametrize("options", MASKABLE.values(), ids=MASKABLE)
def test_masked_training_is_training_without_the_padding(options, padding):
    vq = build(**options, return_zeros_for_masked_padding=True)
    alone = copy.deepcopy(vq)
    if "in_place_codebook_optimizer" in options:
        alone.in_place_codebook_optimizer = options["in_place_codebook_optimizer"](alone._codebook.parameters())
    mask = some(3, 11)
    for step in range(3):
        x = randn(3, 11, 8, seed=step)
        x[~mask] += padding
        x, valid = x.clone().requires_grad_(), x[mask][None].clone().requires_grad_()
        (quantize, indices, loss), (alone_quantize, alone_indices, alone_loss) = vq(x, mask=mask), alone(valid)
        close(quantize[mask], alone_quantize[0])
        assert (quantize[~mask] == 0).all()
        assert torch.equal(indices[mask], alone_indices[0]) and (indices[~mask] == -1).all()
        close(loss, alone_loss)
        weight = randn(3, 11, 8, seed=7)
        ((quantize * weight).sum() + loss).backward()
        ((alone_quantize * weight[mask]).sum() + alone_loss).backward()
        close(x.grad[mask], valid.grad[0])
        assert (x.grad[~mask] == 0).all()
        for (name, parameter), reference in zip(vq.named_parameters(), alone.parameters(), strict=True):
            assert (parameter.grad is None) == (reference.grad is None), name
            if parameter.grad is not None:
                close(parameter.grad, reference.grad)
        check_states(state(vq), state(alone))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 5}, {"topk": 2}], ids=str)
def test_lengths_mask_the_channel_first_layout(options, zeros):
    options = dict(options)
    forward = {"topk": options.pop("topk")} if "topk" in options else {}
    lens = torch.tensor([11, 4, 7])
    vq = build(**options, return_zeros_for_masked_padding=zeros)
    channel_first = build(**options, return_zeros_for_masked_padding=zeros, channel_last=False)
    channel_first.load_state_dict(vq.state_dict())
    x = randn(3, 11, 8)
    quantize, indices, loss = vq(x, lens=lens, **forward)
    by_mask = copy.deepcopy(channel_first)
    mine = channel_first(x.mT, lens=lens, **forward)
    torch.testing.assert_close(mine, (quantize.movedim(2 if not forward else -1, 1), indices, loss))
    torch.testing.assert_close(by_mask(x.mT, mask=torch.arange(11) < lens[:, None], **forward), mine)
    assert (indices[1, 4:] == -1).all() and (indices[1, :4] >= 0).all()
    padding = quantize[1, 4:] if not forward else quantize[1, 4:, 0]
    torch.testing.assert_close(padding, x[1, 4:] * (not zeros))


def test_lengths_are_a_shorter_input():
    vq = build(32, 64, decay=1.0)
    x = randn(1, 64, 32)
    quantize, indices, loss = vq(x, lens=torch.tensor([40]))
    short_quantize, short_indices, short_loss = vq(x[:, :40])
    assert torch.equal(indices[:, :40], short_indices) and (indices[:, 40:] == -1).all()
    torch.testing.assert_close(quantize[:, :40], short_quantize)
    torch.testing.assert_close(loss, short_loss)


def test_kmeans_and_replacement_take_no_masked_row():
    mask = some(3, 11)
    for options in ({"kmeans_init": True}, {"threshold_ema_dead_code": 3}, {"kmeans_init": True, **SEPARATE}):
        torch.manual_seed(0)
        vq = VectorQuantize(8, 6, **options)
        x = randn(3, 11, 8)
        x[~mask] += 1000
        for _ in range(3):
            vq(x, mask=mask)
            assert vq._codebook.embed.abs().max() < 10


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"heads": 2, "codebook_dim": 5}, LEARNED], ids=str)
def test_nothing_but_padding(options):
    vq = build(**options)
    before = vq.codebook.clone()
    x = randn(3, 11, 8).requires_grad_()
    quantize, indices, loss = vq(x, mask=torch.zeros(3, 11, dtype=torch.bool))
    assert loss == 0 and not quantize.any() and (indices == -1).all()
    (quantize.sum() + loss).backward()
    assert not x.grad.any()
    close(vq.codebook, before)


def test_codebook_of_a_learned_codebook_can_be_set():
    vq = build(**LEARNED)
    parameter, codes = vq._codebook.embed, randn(16, 8, seed=3)
    vq.codebook = codes
    assert vq._codebook.embed is parameter and parameter.requires_grad and parameter.is_leaf
    assert torch.equal(vq.codebook, codes)


def test_loss_of_eval_is_a_tensor_of_its_own():
    vq = build()
    vq(randn(1, 5, 8).requires_grad_())[2].backward()
    vq.eval()
    loss = vq(randn(1, 5, 8))[2]
    assert loss == 0 and not loss.requires_grad
    loss += 1
    assert vq(randn(1, 5, 8))[2] == 0
    vq.train()
    assert vq(randn(1, 5, 8))[2].detach() < 10  # did not grow by what was added


def test_given_indices_are_not_written_to():
    vq = build(commitment_use_cross_entropy_loss=True)
    mask, targets = some(3, 11), torch.randint(0, 16, (3, 11))
    before = targets.clone()
    vq(randn(3, 11, 8), mask=mask)
    vq(randn(3, 11, 8), mask=mask, indices=targets)
    assert torch.equal(targets, before)


def test_cross_entropy_against_given_indices():
    vq = build().eval()
    x = randn(3, 11, 8).requires_grad_()
    targets = torch.randint(0, 16, (3, 11), generator=torch.Generator().manual_seed(0))
    targets[0, :4] = -1
    quantize, loss = vq(x, indices=targets)
    logits = -torch.cdist(x.double(), vq.codebook.double())  # [3, 11, K]
    expected = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets >= 0].mean()
    close(loss.double(), expected)
    close(torch.autograd.grad(loss, x)[0].double(), torch.autograd.grad(expected, x)[0].double())
    torch.testing.assert_close(quantize, vq(x)[0])


SIMILARITIES = {
    "targets": ({}, {"indices": torch.arange(33).view(3, 11) % 16}),
    "cross_entropy": ({"commitment_use_cross_entropy_loss": True}, {}),
    "diversity": (
        {"commitment_weight": 0, "codebook_diversity_loss_weight": 1.0, "codebook_diversity_temperature": 3.0},
        {},
    ),
}


@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
@pytest.mark.parametrize(("options", "forward"), SIMILARITIES.values(), ids=SIMILARITIES)
def test_losses_of_similarities_while_the_codebook_moves(options, forward, cosine):
    """The original differentiates them at the codes that the moving average has just written."""
    vq = build(**options, use_cosine_sim=cosine, decay=0.3)
    codes, x = vq.codebook.double(), randn(3, 11, 8).requires_grad_()
    *_, loss = vq(x, **forward)
    exact = x.detach().double().requires_grad_()
    rows = F.normalize(exact, dim=-1) if cosine else exact
    similarities = rows @ codes.T if cosine else -torch.linalg.norm(rows[:, :, None] - codes, dim=-1)  # [3, 11, K]
    if "codebook_diversity_loss_weight" in options:
        share = (3 * similarities).softmax(-1).mean(0)  # [11, K]: of each place in the sequence
        expected = (share * share.log()).sum(-1).mean()
    else:
        targets = forward.get("indices", similarities.argmax(-1))
        expected = F.cross_entropy(similarities.mT, targets)
    close(loss.double(), expected)
    mine, reference = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-6)
    assert (vq.codebook - codes).abs().max() > 0.1


def test_dead_codes_become_rows_of_the_batch():
    vq = build(8, 32, threshold_ema_dead_code=1.5, decay=0.8)
    plain = build(8, 32, decay=0.8)
    x = randn(4, 20, 8)
    vq(x), plain(x)
    dead = plain._codebook.cluster_size[0] < 1.5
    assert 0 < dead.sum() < 32
    close(vq.codebook[~dead], plain.codebook[~dead])
    distance, row = (vq.codebook[dead][:, None] - x.flatten(0, 1)).abs().amax(-1).min(-1)
    assert (distance < 1e-5).all() and len(set(row.tolist())) == dead.sum()
    assert (vq._codebook.cluster_size >= 1.5).all()
    close(vq._codebook.embed_avg[0, dead], 1.5 * vq.codebook[dead])


def test_expire_codes_draws_from_every_sequence():
    vq = build(8, 30, threshold_ema_dead_code=2)
    x = randn(3, 10, 8)
    vq.expire_codes_(x)  # a fresh codebook has counts of 1
    order = (rows[:, 0].argsort() for rows in (vq.codebook, x.flatten(0, 1)))
    assert torch.equal(vq.codebook[next(order)], x.flatten(0, 1)[next(order)])
    assert (vq._codebook.cluster_size == 2).all()


def lloyd(rows, means, iterations, cosine):
    """rows [M, D], means [K, D] in float64 -> means and counts of the last assignment; an empty cluster stays."""
    for _ in range(iterations):
        nearest = (-rows @ means.T if cosine else np.square(rows[:, None] - means).sum(-1)).argmin(-1)
        counts = np.bincount(nearest, minlength=len(means))
        for k in np.flatnonzero(counts):
            means[k] = rows[nearest == k].mean(0)
            means[k] /= np.linalg.norm(means[k]) if cosine else 1
    return means, counts


@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
@pytest.mark.parametrize("iterations", [1, 4, 10])
def test_kmeans_is_lloyds_from_a_sample_of_the_batch(cosine, iterations):
    torch.manual_seed(0)
    vq = VectorQuantize(
        6, 9, kmeans_init=True, kmeans_iters=iterations, use_cosine_sim=cosine, freeze_codebook=True, eps=1e-12
    )
    assert not vq._codebook.initted and not vq.codebook.any()
    x = randn(4, 25, 6)
    rows = x.flatten(0, 1).double().numpy()
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True) if cosine else rows
    torch.manual_seed(1)
    sample = torch.randperm(100)[:9].numpy()
    torch.manual_seed(1)
    vq(x)
    means, counts = lloyd(rows, rows[sample].copy(), iterations, cosine)
    assert vq._codebook.initted
    np.testing.assert_array_equal(vq._codebook.cluster_size[0], counts)
    close(vq.codebook.double(), torch.from_numpy(means))
    close(vq._codebook.embed_avg[0].double(), torch.from_numpy(means * counts[:, None]))
    after = vq.codebook.clone()
    vq(randn(4, 25, 6, seed=9))
    assert torch.equal(vq.codebook, after)  # once only


def test_kmeans_warns_of_more_codes_than_vectors():
    torch.manual_seed(0)
    vq = VectorQuantize(6, 20, kmeans_init=True, freeze_codebook=True)
    x = randn(1, 12, 6)
    with pytest.warns(UserWarning, match="20 codes from 12 vectors"):
        vq(x)
    assert len(vq.codebook.unique(dim=0)) <= 12


def test_state_decides_whether_kmeans_runs():
    torch.manual_seed(0)
    trained, fresh = (VectorQuantize(6, 9, kmeans_init=True, freeze_codebook=True) for _ in range(2))
    untouched = state(fresh)
    trained(randn(4, 25, 6))
    codes = trained.codebook.clone()
    fresh.load_state_dict(trained.state_dict())
    fresh(randn(4, 25, 6, seed=1))
    assert torch.equal(fresh.codebook, codes)
    fresh.load_state_dict(untouched)
    fresh(randn(4, 25, 6, seed=1))
    assert fresh._codebook.initted and not torch.equal(fresh.codebook, codes)


@pytest.mark.parametrize("options", [{"affine_param": True}, {"affine_param": True, **SEPARATE}], ids=str)
def test_affine_statistics_load_into_a_fresh_module(options):
    trained, fresh = build(**options), build(**options)
    for step in range(2):
        trained(3 * randn(2, 20, 8, seed=step) + 1)
    fresh.load_state_dict(trained.state_dict())
    for step in range(2):
        results = [vq(3 * randn(2, 20, 8, seed=5 + step) + 1) for vq in (trained, fresh)]
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    check_states(state(fresh), state(trained), rtol=0, atol=0)


def test_affine_codes_take_mean_and_variance_of_the_vectors():
    vq = build(affine_param=True, freeze_codebook=True)
    codes, x = vq.codebook.clone(), 3 * randn(2, 200, 8) + 1
    quantize, indices, _ = vq(x)
    rows = x.flatten(0, 1)
    moved = (codes - codes.mean(0)) / codes.std(0, unbiased=False) * rows.std(0, unbiased=False) + rows.mean(0)
    assert torch.equal(indices, torch.cdist(x.double(), moved.double()).argmin(-1))
    close(quantize, moved[indices])


def test_update_weight_scales_the_step_of_each_code():
    weight = torch.linspace(0, 1, 16)
    given = []
    vq, whole, by_function = build(eps=1e-12), build(eps=1e-12), build(eps=1e-12)
    before, x = state(vq), randn(4, 50, 8)

    def rule(embed_sum, cluster_size):
        given.append((embed_sum.clone(), cluster_size.clone()))
        return weight[None]

    vq(x, ema_update_weight=weight), whole(x), by_function(x, ema_update_weight=rule)
    after, full = state(vq), state(whole)
    for name, factor in (("_codebook.cluster_size", weight), ("_codebook.embed_avg", weight[:, None])):
        close(after[name], before[name] + factor * (full[name] - before[name]))
    assert torch.equal(after["_codebook.embed_avg"][0, 0], before["_codebook.embed_avg"][0, 0])
    close(vq.codebook, after["_codebook.embed_avg"][0] / after["_codebook.cluster_size"][0, :, None])
    check_states(state(by_function), after)
    [(embed_sum, cluster_size)] = given
    assert embed_sum.shape == (1, 16, 8) and cluster_size.shape == (1, 16)
    close(embed_sum, (full["_codebook.embed_avg"] - 0.8 * before["_codebook.embed_avg"]) / 0.2)


def test_accumulated_batches_update_as_one():
    parts, vq, at_once = randn(3, 2, 20, 8), build(), build()
    before = state(vq)
    for part in parts[:2]:
        vq(part, accum_ema_update=True)
        check_states(state(vq), before, rtol=0, atol=0)
    vq(parts[2])
    at_once(parts.flatten(0, 1))
    check_states(state(vq), state(at_once))
    assert not torch.equal(vq.codebook, before["_codebook.embed"][0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_top_codes_are_the_nearest_ones_with_a_loss_each(training):
    vq = build(commitment_weight=0.3).train(training)
    before = state(vq)
    x = randn(2, 9, 8)
    quantize, indices, loss = vq(x, topk=4)
    distances = torch.cdist(x.double(), vq.codebook.double())
    assert torch.equal(indices, distances.topk(4, largest=False).indices)
    torch.testing.assert_close(quantize, vq.codebook[indices])
    close(loss, 0.3 * (distances.gather(-1, indices).square() / 8).float())
    check_states(state(vq), before, rtol=0, atol=0)
    plain_quantize, plain_indices, _ = vq(x, ema_update=False)
    assert torch.equal(indices[..., 0], plain_indices)
    close(quantize[..., 0, :], plain_quantize)


def test_update_from_returned_indices_is_the_update_that_was_left_out():
    vq, later = build(codebook_dim=5), build(codebook_dim=5)
    later.load_state_dict(vq.state_dict())
    x, mask = randn(2, 9, 8), some(2, 9)
    vq(x, mask=mask)
    before = state(later)
    _, indices, _ = later(x, mask=mask, ema_update=False)
    check_states(state(later), before, rtol=0, atol=0)
    later.update_ema_indices(x, indices, mask=mask)
    check_states(state(later), state(vq))


def test_directional_reparameterisation_moves_by_the_distance_to_the_code():
    vq = build(directional_reparam=True, directional_reparam_variance=0.01, threshold_ema_dead_code=1e-3)
    x = randn(4, 50, 8).requires_grad_()
    torch.manual_seed(3)
    quantize, indices, loss = vq(x)
    codes = vq.codebook[indices]
    step, error = quantize - x, codes - x
    close(step.norm(dim=-1), error.norm(dim=-1))
    torch.manual_seed(3)
    noisy = error + 0.1 * torch.randn(4, 50, 8)
    close(step, noisy / noisy.norm(dim=-1, keepdim=True) * error.norm(dim=-1, keepdim=True))
    assert loss == 0
    weight = randn(4, 50, 8, seed=1)
    (quantize * weight).sum().backward()
    unit = (noisy / noisy.norm(dim=-1, keepdim=True)).detach()
    along = (weight * unit).sum(-1, keepdim=True) * error / error.norm(dim=-1, keepdim=True)  # d|q-x| = ê·(dq-dx)
    close(x.grad, weight - along)
    expected = torch.zeros(16, 8).index_add(0, indices.flatten(), along.detach().flatten(0, 1))
    close(vq._codebook.embed.grad[0], expected)


def test_bridge_maps_the_codebook_and_learns():
    vq = build(vq_bridge=nn.Linear(8, 8))
    x = randn(4, 50, 8).requires_grad_()
    quantize, indices, loss = vq(x)
    codes = vq._codebook.vq_bridge(vq.codebook)
    assert torch.equal(indices, torch.cdist(x.double(), codes.double()).argmin(-1))
    torch.testing.assert_close(quantize, codes[indices], rtol=1e-4, atol=1e-5)
    close(loss, (codes[indices] - x).square().mean())
    loss.backward()
    mine = vq._codebook.embed.grad, vq._codebook.vq_bridge.weight.grad
    expected = torch.autograd.grad(
        (vq._codebook.vq_bridge(vq._codebook.embed)[0][indices] - x).square().mean(),
        (vq._codebook.embed, vq._codebook.vq_bridge.weight),
    )
    torch.testing.assert_close(mine, expected, **FLOAT32)


def test_sampling_follows_its_distribution():
    vq = build(3, 4, stochastic_sample_codes=True, sample_codebook_temp=0.7, freeze_codebook=True)
    x = randn(1, 1, 3)
    torch.manual_seed(0)
    _, indices, _ = vq(x.expand(1, 20000, 3))
    expected = (-torch.cdist(x[0], vq.codebook) / 0.7).softmax(-1)[0]
    share = torch.bincount(indices.flatten(), minlength=4) / 20000
    assert (share - expected).abs().max() < 4 * math.sqrt(0.25 / 20000)  # four standard deviations
    assert torch.equal(vq.eval()(x.expand(1, 50, 3))[1], torch.cdist(x, vq.codebook).argmin(-1).expand(1, 50))


DTYPES = {torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cosine_sim": True},
        {"rotation_trick": False},
        {"codebook_dim": 4, **SEPARATE},
        {"straight_through": True, "route_gradients_to_input": False},
        {"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1), **LEARNED},
        {"threshold_ema_dead_code": 1},
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_of_another_dtype_is_quantised_in_float32(dtype, options):
    vq, reference = build(**options), build(**options)
    x = randn(4, 20, 8).to(dtype)
    mine, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    results = []
    for module, rows in ((vq, mine), (reference, theirs)):
        torch.manual_seed(0)
        results.append(module(rows))
    (quantize, indices, loss), expected = results
    assert torch.equal(indices, expected[1])
    assert quantize.dtype == dtype and vq.codebook.dtype == torch.float32
    tolerance = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    torch.testing.assert_close(quantize.float(), expected[0], **tolerance)
    torch.testing.assert_close(loss.float(), expected[2], **tolerance)
    # Cosine similarity normalises in the input's type, as the original does.
    check_states(state(vq), state(reference), **(tolerance if vq.use_cosine_sim else FLOAT32))
    weight = randn(4, 20, 8, seed=1)
    (quantize * weight.to(dtype)).sum().backward()
    (expected[0] * weight).sum().backward()
    torch.testing.assert_close(mine.grad.float(), theirs.grad, **tolerance)


def test_indices_of_float64_input_are_those_of_its_float64_or_float32_distances():
    vq = build().eval()
    x = randn(4, 200, 8).double() + 1e-9
    _, indices, _ = vq(x)
    distances = np.square(x.reshape(-1, 1, 8).numpy() - vq.codebook.double().numpy()).sum(-1)
    chosen = np.take_along_axis(distances, indices.reshape(-1, 1).numpy(), 1)[:, 0]
    assert (chosen <= distances.min(-1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"use_cosine_sim": True}, LEARNED], ids=str)
def test_module_of_another_dtype(dtype, options):
    vq, reference = build(**options).to(dtype), build(**options)
    reference.load_state_dict(vq.state_dict())  # what the conversion left of the codes
    x = randn(4, 20, 8).to(dtype).requires_grad_()
    before = vq.codebook.detach().clone()
    (quantize, indices, loss), expected = vq(x), reference(x.detach().float())
    assert (indices == expected[1]).float().mean() > 0.95  # projections round
    assert quantize.dtype == dtype and vq.codebook.dtype == dtype
    (quantize.sum() + loss).backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    if not options:
        tolerance = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
        torch.testing.assert_close(quantize, before[indices], **tolerance)
        torch.testing.assert_close(vq.codebook.float(), reference.codebook, **tolerance)


def test_statistics_of_a_half_precision_module_count_in_float32():
    vq = build(4, 2, decay=0.0).half()
    vq(torch.cat([vq.codebook[0].repeat(70001, 1), vq.codebook[1].repeat(4097, 1)])[None])
    assert vq.code_counts.tolist() == [[70001, 4097]]
    share = np.array([70001, 4097]) / 74098
    np.testing.assert_allclose(vq.perplexity, np.exp(-(share * np.log(share)).sum()), rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"heads": 2, "codebook_dim": 4}], ids=str)
def test_autocast_does_not_reach_the_codebook(options):
    vq, reference = build(**options), build(**options)
    for step in range(3):
        x = randn(4, 20, 8, seed=step)
        with torch.autocast("cpu", torch.bfloat16):
            quantize, indices, loss = vq(x)
        expected = reference(x)
        assert torch.equal(indices, expected[1])
        torch.testing.assert_close(quantize, expected[0])
        torch.testing.assert_close(loss, expected[2])
    check_states(state(vq), state(reference), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cosine_sim": True},
        {"threshold_ema_dead_code": 2},
        {"heads": 2, "codebook_dim": 4},
        {**SEPARATE, "codebook_dim": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(0, 9, 8), (3, 0, 8)], ids=str)
def test_no_rows(shape, options, training):
    vq = build(**options).train(training)
    before = vq.codebook.clone()
    x = torch.zeros(shape, requires_grad=True)
    quantize, indices, _ = vq(x)
    assert quantize.shape == shape and indices.shape[:2] == shape[:2] and indices.dtype == torch.int64
    if training:
        quantize.sum().backward()
        assert x.grad.shape == shape
    close(vq.codebook, before)  # both averages decay alike
    after = build(**options)
    after.load_state_dict(vq.state_dict())
    assert after(randn(2, 9, 8))[2].isfinite()


def test_rows_that_are_not_finite_choose_code_0():
    vq = build().eval()
    x = randn(1, 4, 8)
    x[0, 1, 3], x[0, 2, 0] = math.nan, math.inf
    _, indices, _ = vq(x)
    assert indices[0, 1] == indices[0, 2] == 0
    assert torch.equal(indices[0, [0, 3]], torch.cdist(x[0, [0, 3]], vq.codebook).argmin(-1))


COPIES = {
    "default": {},
    "dead_codes": {"threshold_ema_dead_code": 1},
    "kmeans": {"kmeans_init": True},
    "cosine_heads": {"use_cosine_sim": True, "heads": 2, "codebook_dim": 4},
    "learned_projected": {"codebook_dim": 5, **LEARNED},
    "affine": {"affine_param": True},
    "sampled": {"stochastic_sample_codes": True},
    "in_place": {"in_place_codebook_optimizer": partial(torch.optim.Adam, lr=0.1), **LEARNED},
}


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda vq: pickle.loads(pickle.dumps(vq))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("options", COPIES.values(), ids=COPIES)
def test_copies_go_on_alike_and_apart(options, duplicate):
    """Also right after a forward pass whose graph is alive: no attribute may hold on to it."""
    vq = build(**options)
    alive = vq(randn(2, 20, 8).requires_grad_())
    twin = duplicate(vq)
    assert torch.equal(twin.perplexity, vq.perplexity)
    for step in range(1, 3):
        results = []
        for module in (vq, twin):
            torch.manual_seed(step)
            results.append(module(randn(2, 20, 8, seed=step).requires_grad_()))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        check_states(state(twin), state(vq), rtol=0, atol=0)
    frozen = state(twin)
    vq(randn(2, 20, 8, seed=5))
    check_states(state(twin), frozen, rtol=0, atol=0)
    assert alive[2].requires_grad


@pytest.mark.parametrize("options", [{"threshold_ema_dead_code": 1}, {"orthogonal_reg_weight": 1.0}, LEARNED], ids=str)
def test_nothing_of_a_graph_outlives_its_step(options):
    """Neither moving averages nor statistics may hold on to what a step saved for its backward pass."""
    vq = build(**options)
    saved = []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            saved.append(weakref.ref(self))

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda kept: kept.tensor):
        out = vq(randn(2, 9, 8).requires_grad_())
    assert any(reference() is not None for reference in saved)
    del out
    gc.collect()
    assert not any(reference() is not None for reference in saved)


class Largest(TorchDispatchMode):
    """The largest storage that any operator returned."""

    def __init__(self):
        super().__init__()
        self.bytes, self.by = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > self.bytes:
                self.bytes, self.by = tensor.untyped_storage().nbytes(), func
        return out


MEMORY = {
    "default": {},
    "cosine": {"use_cosine_sim": True},
    "dead_codes": {"threshold_ema_dead_code": 2},
    "learned": LEARNED,
    "kmeans": {"kmeans_init": True, "kmeans_iters": 2},
    "no_rotation": {"rotation_trick": False},
    "masked": {},
    "orthogonal_active": {"orthogonal_reg_weight": 1.0, "orthogonal_reg_max_codes": 64},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MEMORY)
def test_no_matrix_of_rows_by_codes(name, training):
    if dispatch.choose("nearest_code", "auto", why_not(torch.device("cpu"), torch.float32)) == "reference":
        pytest.skip("the reference of nearest_code scores a block of rows against all codes")
    M, K, D = 4096, 4096, 8
    vq = build(D, K, **MEMORY[name]).train(training)
    x = randn(2, M // 2, D).requires_grad_()
    forward = {"mask": some(2, M // 2)} if name == "masked" else {}
    with Largest() as largest:
        quantize, _, loss = vq(x, **forward)
        if quantize.requires_grad:
            (quantize.sum() + loss).backward()
    # 64 numbers a row and a code: a few tensors' worth of [M, D], far from [M, K].
    assert largest.bytes <= 64 * 8 * max(M, K) < M * K * 4 / 16, largest.by


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation_trick": True, "straight_through": True}, "straight_through"),
        ({"directional_reparam": True}, "threshold_ema_dead_code"),
        ({"use_cosine_sim": True, **LEARNED}, "use_cosine_sim"),
        ({"learnable_codebook": True}, "ema_update"),
        ({"straight_through": True, **LEARNED}, "straight_through"),
        ({"vq_bridge": nn.Identity(), "learnable_codebook": False}, "vq_bridge"),
        ({"vq_bridge": nn.Identity(), "ema_update": True}, "vq_bridge|ema_update"),
        ({"sync_update_v": 0.5}, "sync_update_v"),
        ({"sync_update_v": 1.5, **LEARNED}, "sync_update_v"),
        ({"affine_param": True, "use_cosine_sim": True}, "affine_param"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_options_that_do_not_go_together(options, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        VectorQuantize(8, 16, **options)


@pytest.mark.parametrize(
    ("options", "shape", "forward", "message"),
    [
        ({}, (2, 9, 8), {"mask": torch.ones(2, 9) > 0, "lens": torch.tensor([9, 9])}, "mask|lens"),
        ({}, (9, 8), {"mask": torch.ones(9) > 0}, "mask"),
        ({"accept_image_fmap": True}, (2, 8, 3, 3), {"mask": torch.ones(2, 9) > 0}, "mask"),
        ({"accept_3d_fmap": True}, (2, 8, 3, 3, 3), {"mask": torch.ones(2, 27) > 0}, "mask"),
        ({"heads": 2}, (2, 9, 8), {"topk": 2}, "topk"),
        ({}, (2, 9, 8), {"topk": 0}, "topk"),
        ({"commitment_use_cross_entropy_loss": True}, (2, 9, 8), {"topk": 2}, "topk"),
        ({"in_place_codebook_optimizer": torch.optim.Adam, **LEARNED}, (2, 9, 8), {"topk": 2}, "topk"),
    ],
)
def test_refuses_arguments_that_do_not_fit(options, shape, forward, message):
    vq = build(**options)
    with pytest.raises((AssertionError, ValueError), match=message):
        vq(randn(*shape), **forward)


COMPILED = {
    "default": ({}, {}),
    "no_rotation": ({"rotation_trick": False}, {}),
    "dead_codes": ({"threshold_ema_dead_code": 1}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "heads": ({"heads": 2, "codebook_dim": 4}, {}),
    "separate_projected": (SEPARATE, {}),
    "kmeans": ({"kmeans_init": True}, {}),
    "masked_projected": ({"codebook_dim": 5}, {"mask": some(3, 20)}),
    "learned": (LEARNED, {}),
    "image": ({"accept_image_fmap": True}, {}),
}


def check_compiled(options, forward, training, backend):
    vq = build(**options)
    shape = (3, 8, 4, 5) if options.get("accept_image_fmap") else (3, 20, 8)
    vq(randn(*shape, seed=50), **forward)  # k-means runs eagerly
    vq.zero_grad()
    vq.train(training)
    eager = copy.deepcopy(vq)
    torch._dynamo.reset()
    compiled = torch.compile(vq, fullgraph=True, backend=backend)
    for step in range(4):
        results = []
        for module in (compiled, eager):
            x = randn(*shape, seed=step).requires_grad_(training)
            torch.manual_seed(step)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                quantize, indices, loss = module(x, **forward)
            if training:
                ((quantize * randn(*shape, seed=9)).sum() + loss).backward()
            results.append((quantize, indices, loss, x.grad))
        assert torch.equal(results[0][1], results[1][1])
        for mine, reference in zip(*results, strict=True):
            if reference is not None:
                close(mine, reference)
        for name, parameter in eager.named_parameters():
            if parameter.grad is not None:
                close(vq.get_parameter(name).grad, parameter.grad)
        check_states(state(vq), state(eager))
        close(vq.perplexity, eager.perplexity)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("options", "forward"), COMPILED.values(), ids=COMPILED)
def test_compiles_to_one_graph_and_only_once(options, forward, training):
    check_compiled(options, forward, training, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_by_inductor(training):
    check_compiled({}, {}, training, "inductor")


# One process a rank, over gloo. The scenarios of a number of ranks share its processes: starting those takes seconds.
ROWS = {2: (13, 7), 3: (20, 0, 9)}  # of the ranks; unequal, and one of them with nothing


def rank_rows(world, step, dim=8):
    return [randn(1, rows, dim, seed=100 * step + rank) for rank, rows in enumerate(ROWS[world])]


def even(x):
    """Every other row is valid."""
    return (torch.arange(x.shape[1]) % 2 == 0)[None]


SCENARIOS = {
    "default": ({}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "heads": ({"heads": 2, "codebook_dim": 4}, {}),
    "separate": (SEPARATE, {}),
    "masked": ({"codebook_dim": 5}, {"mask": even}),
    "affine": ({"affine_param": True, "sync_affine_param": True}, {}),
    "dead_codes": ({"threshold_ema_dead_code": 1.5}, {}),
    "dead_codes_all": ({"threshold_ema_dead_code": 100, "codebook_size": 40}, {}),
    "dead_codes_cosine_separate": ({"threshold_ema_dead_code": 1.5, "use_cosine_sim": True, **SEPARATE}, {}),
    "dead_codes_masked": ({"threshold_ema_dead_code": 1.5}, {"mask": even}),
    "kmeans": ({"kmeans_init": True, "kmeans_iters": 30, "codebook_size": 5}, {}),
    "kmeans_cosine": ({"kmeans_init": True, "use_cosine_sim": True, "codebook_size": 5}, {}),
    "kmeans_separate": ({"kmeans_init": True, "codebook_size": 5, **SEPARATE}, {}),
    "kmeans_masked_dead_codes": ({"kmeans_init": True, "threshold_ema_dead_code": 1.5}, {"mask": even}),
    "in_place": ({"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=1.0), **LEARNED}, {}),
}
SAME_AS_ONE_PROCESS = ["default", "cosine", "heads", "separate", "masked", "affine"]


def rank_results():
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, (options, forward) in SCENARIOS.items():
        vq = build(**options)
        torch.manual_seed(rank)  # ranks draw different numbers
        results[name] = []
        for step in range(3):
            x = rank_rows(world, step)[rank]
            vq(x.clone().requires_grad_(), **{argument: of(x) for argument, of in forward.items()})
            results[name].append((state(vq), vq.code_counts.clone()))
        if rank == 0 and "affine_param" not in options:  # those statistics follow the vectors in evaluation too
            vq.eval()(randn(1, 3, 8))  # validation on one rank must not wait for the others
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """number of ranks -> the states that each scenario left on each rank, step by step."""
    return once_per_world(tmp_path_factory, rank_results)


@pytest.mark.slow
@pytest.mark.parametrize("world", ROWS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_hold_the_same_codebook(ranks, world, name):
    first, *others = ([state for state, _ in results[name]] for results in ranks(world))
    for other in others:
        for mine, reference in zip(other, first, strict=True):
            check_states(mine, reference, rtol=0, atol=0)
    for before, after in pairwise(first):
        assert not torch.equal(before["_codebook.embed"], after["_codebook.embed"])
    assert all(tensor.isfinite().all() for tensor in first[-1].values())


@pytest.mark.slow
@pytest.mark.parametrize("world", ROWS)
@pytest.mark.parametrize("name", SAME_AS_ONE_PROCESS)
def test_ranks_together_are_one_process_with_all_rows(ranks, world, name):
    options, forward = SCENARIOS[name]
    options = {**options, "sync_affine_param": False} if "affine_param" in options else options
    vq = build(**options)
    for step, (result, counts) in enumerate(ranks(world)[0][name]):
        arguments = {"mask": torch.cat([even(x) for x in rank_rows(world, step)], 1)} if forward else {}
        vq(torch.cat(rank_rows(world, step), 1).requires_grad_(), **arguments)
        check_states(result, state(vq))
        assert torch.equal(counts, vq.code_counts)


@pytest.mark.slow
@pytest.mark.parametrize("world", ROWS)
@pytest.mark.parametrize("name", ["dead_codes", "dead_codes_all", "dead_codes_cosine_separate", "dead_codes_masked"])
def test_ranks_replace_dead_codes_by_rows_of_some_rank(ranks, world, name):
    options, forward = SCENARIOS[name]
    threshold = options["threshold_ema_dead_code"]
    plain = build(**{**options, "threshold_ema_dead_code": 0})
    for step, (result, _) in enumerate(ranks(world)[0][name]):
        batches = rank_rows(world, step)
        x = torch.cat(batches, 1)
        arguments = {"mask": torch.cat([even(batch) for batch in batches], 1)} if forward else {}
        plain(x, **arguments)
        rows = x[arguments["mask"]] if forward else x[0]
        for head in range(len(result["_codebook.embed"])):
            expected = {
                key: value[head] for key, value in state(plain).items() if value.ndim > 1 and "codebook." in key
            }
            mine = {key: result[key][head] for key in expected}
            seen = plain.project_in(rows).unflatten(-1, (len(result["_codebook.embed"]), -1))[:, head].detach()
            seen = F.normalize(seen, dim=-1) if options.get("use_cosine_sim") else seen
            dead = expected["_codebook.cluster_size"] < threshold
            replaced = (mine["_codebook.embed"] - expected["_codebook.embed"]).abs().amax(-1) > 1e-3
            assert dead.any() and not (replaced & ~dead).any()
            assert replaced.sum() == min(dead.sum(), len(rows))
            distance = (mine["_codebook.embed"][replaced][:, None] - seen).abs().amax(-1).amin(-1)
            assert (distance < 1e-5).all()
            assert (mine["_codebook.cluster_size"][replaced] == threshold).all()
            close(mine["_codebook.embed"][~replaced], expected["_codebook.embed"][~replaced])
        plain.load_state_dict(result)  # the next step starts from here


@pytest.mark.slow
@pytest.mark.parametrize("world", ROWS)
def test_ranks_run_one_kmeans(ranks, world):
    """After enough iterations each code is the mean of its rows, whichever rank they are on."""
    rows = torch.cat(rank_rows(world, 0), 1)[0].double().numpy()
    result, _ = ranks(world)[0]["kmeans"][0]
    # What the first step's moving average made of the k-means result has the same means: the assignment is the same.
    codes = result["_codebook.embed"][0].double().numpy()
    nearest = np.square(rows[:, None] - codes).sum(-1).argmin(-1)
    np.testing.assert_allclose(result["_codebook.cluster_size"][0], np.bincount(nearest, minlength=5), rtol=1e-5)
    for k in set(nearest):
        np.testing.assert_allclose(codes[k], rows[nearest == k].mean(0), rtol=1e-3, atol=1e-4)
