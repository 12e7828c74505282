"""Discriminative and predictive score: small recurrent networks trained after the fact (TimeGAN, Yoon et al. 2019).

Both follow the published protocol, so that figures compare with those of papers: TimeGAN's metrics, which Diffusion-TS
(ICLR 2024) uses unchanged. One GRU layer of half as many units as there are channels, TensorFlow 1's cell, Adam with
learning rate 1e-3, 128 series a step. The repeats of a score are independent networks, trained at once as one
batched model: R stands for them in every shape. Series are [N, C, L], each channel scaled to 0..1
(`published.to_unit_range`).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.engine.cuda_graph import CudaGraph, capture_stream, on_stream
from ncfast.engine.device import usable_device
from ncfast.engine.loop import derived_seed
from ncfast.engine.precision import computing

BATCH_SIZE = 128  # series of each kind a step
LEARNING_RATE = 1e-3
TRAIN_SHARE = 0.8  # of the series that a discriminator is trained on
ROWS = 1024  # series a forward pass without a gradient
EAGER_STEPS = 3  # before a step is captured: kernels compile and the optimiser makes its state


def discriminative_scores(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    repeats: int = 5,
    steps: int = 2000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[float]:
    """|accuracy - 0.5| of classifiers that tell real from generated series: 0 where they cannot, 0.5 where they always
    do. Each trains on four fifths of the series and is tested on the rest.

    Args:
        real, generated: [N, C, L] and [M, C, L], N and M at least 2.

    Returns:
        One score a repeat.
    """
    device = usable_device(device)
    generator = torch.Generator(device).manual_seed(derived_seed(seed, 0))
    series = [time_major(x, device) for x in (real, generated)]
    # Every repeat divides the series in its own way.
    orders = [random_rows(repeats, len(x), len(x), generator) for x in series]  # [R, N]
    cuts = [min(len(x) - 1, max(1, int(TRAIN_SHARE * len(x)))) for x in series]
    model = BatchedGRU(repeats, real.shape[1], seed).to(device)

    def loss() -> Tensor:
        drawn, targets = [], []
        for x, order, cut, is_real in zip(series, orders, cuts, (1.0, 0.0), strict=True):
            rows = order.gather(1, random_rows(repeats, cut, min(BATCH_SIZE, cut), generator))  # [R, B]
            drawn.append(x[rows])
            targets.append(x.new_full((rows.shape[1],), is_real))
        target = torch.cat(targets)
        weight = torch.cat([torch.full_like(one, 1 / len(one)) for one in targets])  # both kinds count alike
        logits = model(torch.cat(drawn, 1))[:, :, 0]  # [R, B of real + B of generated]
        return (F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none") * weight).sum()

    train(model, loss, steps, generator, device)
    right, total = torch.zeros(repeats, device=device), 0
    with torch.no_grad(), computing("fp32", device):
        for x, order, cut, is_real in zip(series, orders, cuts, (True, False), strict=True):
            for rows in order[:, cut:].split(ROWS, 1):
                right += ((model(x[rows])[:, :, 0] > 0) == is_real).sum(1)
                total += rows.shape[1]
    return (right / total - 0.5).abs().tolist()


def predictive_scores(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    repeats: int = 5,
    steps: int = 5000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Mean absolute error, on real series, of networks trained on generated ones to predict the next value of the last
    channel from the other channels so far. With one channel it is predicted from itself.

    Args:
        real, generated: [N, C, L] and [M, C, L], in 0..1, L at least 2.

    Returns:
        One score a repeat.
    """
    device = usable_device(device)
    generator = torch.Generator(device).manual_seed(derived_seed(seed, 0))
    seen, made = time_major(real, device), time_major(generated, device)
    channels = real.shape[1]
    inputs = max(1, channels - 1)
    model = BatchedGRU(repeats, inputs, seed, units=max(1, channels // 2)).to(device)

    def errors(x: Tensor) -> Tensor:  # [R, B, L, C] -> [R, B, L - 1]
        predicted = model(x[:, :, :-1, :inputs], every_step=True).sigmoid()
        return (predicted - x[:, :, 1:, -1]).abs()

    def loss() -> Tensor:
        rows = random_rows(repeats, len(made), min(BATCH_SIZE, len(made)), generator)
        return errors(made[rows]).mean((1, 2)).sum()

    train(model, loss, steps, generator, device)
    with torch.no_grad(), computing("fp32", device):
        blocks = seen.split(ROWS)
        total = torch.stack([errors(x.expand(repeats, *x.shape)).double().sum((1, 2)) for x in blocks]).sum(0)
    return (total / (len(seen) * (seen.shape[1] - 1))).tolist()


class BatchedGRU(nn.Module):
    """R independent networks: a GRU layer, as TensorFlow 1's GRUCell has it, and a linear layer of one output.

        r, u = sigmoid([x, h] W + b);  c = tanh([x, r h] C + c0);  h' = u h + (1 - u) c

    PyTorch's own GRU multiplies by r after the product, not before, so it is another network.
    """

    def __init__(self, repeats: int, inputs: int, seed: int, units: int | None = None) -> None:
        """
        Args:
            inputs: channels that it sees.
            units: None for half as many as there are inputs, one at least.
        """
        super().__init__()
        self.units = units = max(1, inputs // 2) if units is None else units
        generator = torch.Generator().manual_seed(derived_seed(seed, 1))

        def glorot(rows: int, columns: int) -> nn.Parameter:
            uniform = torch.rand(repeats, rows, columns, generator=generator)
            return nn.Parameter((2 * uniform - 1) * (6 / (rows + columns)) ** 0.5)

        self.gates = glorot(inputs + units, 2 * units)
        self.gates_bias = nn.Parameter(torch.ones(repeats, 1, 2 * units))
        self.candidate = glorot(inputs + units, units)
        self.candidate_bias = nn.Parameter(torch.zeros(repeats, 1, units))
        self.head = glorot(units, 1)
        self.head_bias = nn.Parameter(torch.zeros(repeats, 1, 1))

    def forward(self, x: Tensor, every_step: bool = False) -> Tensor:
        """x [R, B, L, inputs] -> the output of the last step [R, B, 1], or of every step [R, B, L]."""
        R, B, L, inputs = x.shape
        flat = x.reshape(R, B * L, inputs)
        # What does not depend on the state is one product for all steps.
        of_gates = torch.baddbmm(self.gates_bias, flat, self.gates[:, :inputs]).view(R, B, L, -1)
        of_candidate = torch.baddbmm(self.candidate_bias, flat, self.candidate[:, :inputs]).view(R, B, L, -1)
        state = x.new_zeros(R, B, self.units)
        states = []
        for now in range(L):
            gates = torch.baddbmm(of_gates[:, :, now], state, self.gates[:, inputs:]).sigmoid()
            reset, update = gates.split(self.units, -1)
            candidate = torch.baddbmm(of_candidate[:, :, now], reset * state, self.candidate[:, inputs:]).tanh()
            state = torch.lerp(candidate, state, update)
            states.append(state)
        told = torch.stack(states if every_step else states[-1:], 2)  # [R, B, L or 1, units]
        return torch.baddbmm(self.head_bias, told.flatten(1, 2), self.head).view(R, B, -1)


def train(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, generator: torch.Generator, device: torch.device
) -> None:
    """Minimises what `loss` returns, which draws from `generator`. On a GPU a step is one CUDA graph."""
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, capturable=on_gpu)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    if not on_gpu:
        for _ in range(steps):
            step()
        return
    with computing("fp32", device):
        with on_stream(capture_stream(device)):
            for _ in range(min(EAGER_STEPS, steps)):
                step()
        if steps > EAGER_STEPS:
            graph = CudaGraph(step, warm_ups=0, generators=(generator,), device=device)
    for _ in range(steps - EAGER_STEPS):
        graph()


def random_rows(repeats: int, n: int, count: int, generator: torch.Generator) -> Tensor:
    """Different rows out of n in random order, for each repeat.  int64 [R, count]."""
    return torch.rand(repeats, n, generator=generator, device=generator.device).topk(count, 1).indices


def time_major(x: np.ndarray, device: torch.device) -> Tensor:
    """[N, C, L] -> float32 [N, L, C] on the device."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 2, 1), dtype=np.float32)).to(device)
