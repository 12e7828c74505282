"""The SSL losses against the D x D forms that their authors write: time, memory, and error of the gradient.

Operations of forward + backward: 6 N D² (Barlow Twins) or 12 N D² of the D x D forms against 8 N² D; memory traffic:
120 to 200 D² bytes against 24 N D + 24 N². So at 128 x 4096 operations promise a factor of 24 to 48, and traffic, which
is what eager D x D waits for, more.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from common import OURS, Timing, copies, peak_memory, reason, rows, timings
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss
from ncfast.ops.gram import choose, why_not_kernels

Loss = Callable[[Tensor, Tensor], Tensor]

# (N, D): the paper's 128 x 4096, what others train with, and one with N > D, where no Gram matrix helps.
SHAPES = [(128, 4096), (256, 2048), (256, 8192), (1024, 4096), (1024, 512)]
CUDA_SHAPES = [*SHAPES, (2048, 8192)]
SMALL = [(128, 4096), (256, 2048), (1024, 512)]


def barlow_twins_eager(za: Tensor, zb: Tensor) -> Tensor:
    """As NC-VQVAE computes it."""
    N, D = za.shape
    za, zb = ((z - z.mean(0)) / (z.std(0) + 1e-8) for z in (za, zb))
    c = za.T @ zb / N  # [D, D]
    eye = torch.eye(D, device=c.device, dtype=c.dtype)
    on_diagonal = ((1 - c) * eye).square().sum()
    off_diagonal = (c * (1 - eye)).square().sum()
    return (on_diagonal + 0.005 * off_diagonal) / D


def hinge(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def vicreg_eager(za: Tensor, zb: Tensor) -> Tensor:
    """As facebookresearch/vicreg computes it."""
    N, D = za.shape
    loss = 25 * F.mse_loss(za, zb) + 25 * (hinge(za) + hinge(zb)) / 2
    for z in (za, zb):
        z = z - z.mean(0)
        c = z.T @ z / (N - 1)  # [D, D]
        # Rows of D + 1 elements, less the first of each, are what is off the diagonal.
        loss = loss + c.flatten()[:-1].view(D - 1, D + 1)[:, 1:].flatten().square().sum() / D
    return loss


def vibcreg_eager(za: Tensor, zb: Tensor) -> Tensor:
    """As NC-VQVAE computes it."""
    D = za.shape[1]
    loss = 25 * F.mse_loss(za, zb) + 25 * (hinge(za) + hinge(zb))
    for z in (za, zb):
        z = F.normalize(z - z.mean(0), dim=0)
        c = z.T @ z  # [D, D]
        eye = torch.eye(D, device=c.device, dtype=c.dtype)
        loss = loss + 100 * (c * (1 - eye)).square().mean()
    return loss


# loss: our function, the D x D form, its convention, and where lightly has it.
LOSSES = {
    "Barlow Twins": (barlow_twins_loss, barlow_twins_eager, "ncvqvae", ("barlow_twins_loss", "BarlowTwinsLoss")),
    "VICReg": (vicreg_loss, vicreg_eager, "facebook", ("vicreg_loss", "VICRegLoss")),
    "VIbCReg": (vibcreg_loss, vibcreg_eager, "ncvqvae", None),
}


class Unavailable(Exception):
    """Why a peer cannot take part."""


@functools.cache
def why_no_compiler(device: str) -> str | None:
    try:
        torch.compile(lambda x: x.sin().sum())(torch.zeros(8, device=device))
    except Exception as error:  # whatever the tool chain lacks
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
    return None


def eager(name: str, device: str) -> Loss:
    return LOSSES[name][1]


def compiled(name: str, device: str) -> Loss:
    if reason := why_no_compiler(device):
        raise Unavailable(reason)
    torch._dynamo.reset()  # shapes are constants, as in a training run of one shape
    return torch.compile(LOSSES[name][1], dynamic=False)


def lightly(name: str, device: str) -> Loss:
    """From its own file: the package of the losses imports torchvision, which these do not need."""
    if LOSSES[name][3] is None:
        raise Unavailable("lightly has no such loss")
    package = importlib.util.find_spec("lightly")
    if package is None:
        raise Unavailable("lightly is not installed: pip install --no-deps lightly")
    module, attribute = LOSSES[name][3]
    path = Path(package.submodule_search_locations[0]) / "loss" / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"lightly_{module}", path)
    loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except ImportError as error:
        raise Unavailable(f"lightly does not import: {error}") from error
    return getattr(loaded, attribute)()


def plain(name: str, device: str) -> Loss:
    return functools.partial(LOSSES[name][0], convention=LOSSES[name][2], impl="reference")


def ours(name: str, device: str) -> Loss:
    return functools.partial(LOSSES[name][0], convention=LOSSES[name][2])


PEERS = {
    "eager D x D": eager,
    "torch.compile of that": compiled,
    "lightly": lightly,
    "ncfast, plain PyTorch": plain,
    OURS: ours,
}


@functools.cache
def data(N: int, D: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views that agree in part, [N, D] each."""
    generator = torch.Generator().manual_seed(N + D + seed)
    za = torch.randn(N, D, generator=generator)
    zb = za + 0.5 * torch.randn(N, D, generator=generator)
    return za.to(device).requires_grad_(), zb.to(device).requires_grad_()


def step(loss: Loss, za: Tensor, zb: Tensor) -> Callable[[], object]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(loss(za, zb), (za, zb))


def gradient_error(peer: str, name: str, loss: Loss, za: Tensor, zb: Tensor) -> float:
    """Relative to the gradient of the same convention in float64."""
    convention = "lightly" if peer == "lightly" else LOSSES[name][2]
    exact = [z.detach().double().requires_grad_() for z in (za, zb)]
    expected = torch.autograd.grad(LOSSES[name][0](*exact, convention=convention, impl="reference"), exact)
    actual = torch.autograd.grad(loss(za, zb), (za, zb))
    squares = [[(a - e).square().sum(), e.square().sum()] for a, e in zip(actual, expected, strict=True)]
    error, norm = torch.tensor(squares).sum(0).sqrt()
    return float(error / norm)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", LOSSES)
def test_ssl(benchmark, name, shape, peer):
    try:
        loss = PEERS[peer](name, "cpu")
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{name} N={shape[0]} D={shape[1]}, forward + backward"
    benchmark.pedantic(step(loss, *data(*shape, "cpu")), rounds=5, warmup_rounds=1)


def measure(name: str, shape: tuple[int, int], seconds: float, device: str) -> list[dict]:
    """The rows of one loss and shape."""
    inputs = [data(*shape, device, seed) for seed in range(copies(8 * shape[0] * shape[1], device))]
    za, zb = inputs[0]
    losses, missing, errors = {}, {}, {}
    for peer, build in PEERS.items():
        try:
            losses[peer] = build(name, device)
            errors[peer] = gradient_error(peer, name, losses[peer], za, zb)
        except Unavailable as error:
            missing[peer] = Timing(None, str(error))
        except Exception as error:  # a peer's own
            if peer == OURS:
                raise
            losses.pop(peer, None)
            missing[peer] = Timing(None, reason(error))
    modes = {
        "forward": {peer: [functools.partial(loss, *views) for views in inputs] for peer, loss in losses.items()},
        "forward + backward": {peer: [step(loss, *views) for views in inputs] for peer, loss in losses.items()},
    }
    chosen = {OURS: choose(name, "auto", why_not_kernels(za.device), "auto", za)}
    made = []
    for mode, calls in modes.items():
        times = timings(calls, seconds, device) | missing
        memory = {peer: peak_memory(each[0], device) for peer, each in calls.items() if times[peer].seconds}
        made += rows(
            ", ".join([name, " x ".join(map(str, shape))]), times, mode, mib=memory, error=errors, chosen=chosen
        )
    return made


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for shape in CUDA_SHAPES if device == "cuda" else SHAPES:
        for name in LOSSES:
            yield measure(name, shape, seconds, device)
