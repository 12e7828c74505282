"""One step of an optimiser, from the rows of a batch to new weights; on a GPU one CUDA graph for each batch size."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncfast.engine.adamw import AdamW, RoundedWeights
from ncfast.engine.compile_ahead import compile_ahead
from ncfast.engine.cuda_graph import CudaGraph, capture_stream, on_stream
from ncfast.engine.drawing import DrawingFrom
from ncfast.engine.precision import autocast, computing
from ncfast.engine.processes import ALONE, Processes
from ncfast.ops import dispatch

Losses = Callable[[Tensor, torch.Generator | list[torch.Generator]], dict[str, Tensor]]


class TrainingStep:
    """Losses, gradients and AdamW, and the sums of an epoch's losses.

    On a GPU everything that changes between steps is in its memory: rows, learning rate, generators, moments, sums. A
    step is then the same launches every time, and after `EAGER_STEPS` of a batch size they become a CUDA graph. What
    cannot be captured goes on as before, with a warning that says why.

    Attributes:
        totals: of each loss the sum over the steps since `begin_epoch`, weighted by their share of the series.
        losses: of the last step.
    """

    EAGER_STEPS = 3  # they compile and allocate what the capture needs to find
    LEAST_REPLAYS = 20  # a capture takes as long as several steps

    def __init__(
        self,
        losses: Losses,
        modules: nn.Module,
        *,
        num_series: int,
        weight_decay: float,
        rates: Sequence[float],
        precision: str,
        device: torch.device,
        graph: bool = True,
        fused: bool = True,
        processes: Processes = ALONE,
        whole: nn.Module | None = None,
    ) -> None:
        """
        Args:
            losses: rows [B], generator -> losses; "loss" is minimised.
            modules: what trains.
            num_series: of an epoch.
            rates: learning rate of every step.
            graph: capture; without a GPU it has no effect.
            fused: AdamW in one kernel, which rounds otherwise than one operation after the other.
            processes: those that take the step together; `losses` then are this one's, whose mean is the batch's.
            whole: of `modules` those that every process computes from all rows: their gradients are the same everywhere
                and not sent.
        """
        self.compute_losses = losses
        self.modules = modules
        self.num_series = num_series
        self.rates = list(rates)
        self.precision = precision
        self.device = device
        self.processes = processes
        self.wants_graph = graph and device.type == "cuda" and processes.can_be_captured(device)
        # The rate of a captured step is read from memory; anywhere else a number is as good.
        self.rate: Tensor | float = self.rates[0]
        if device.type == "cuda":
            self.device_rates = torch.tensor(self.rates, device=device)
            self.rate = self.device_rates[0].clone()
        self.hyperparameters = {
            "lr": self.rate,
            "weight_decay": weight_decay,
            "fused": fused and device.type in ("cpu", "cuda"),
            "capturable": device.type == "cuda",
        }
        whole = set() if whole is None else set(whole.parameters())
        self.averaged = [parameter for parameter in modules.parameters() if parameter not in whole]
        self.weights = contextlib.nullcontext()  # where the weights of a forward pass come from
        if dispatch.choose("adamw", None, dispatch.table(device, triton=None)) == "triton":
            self.optimizer = AdamW(modules.parameters(), **self.hyperparameters)
            self.optimize = AdamW.update
            if precision == "bf16" and processes.is_alone:  # gradients are averaged in float32
                self.weights = RoundedWeights(self.optimizer)
        else:
            self.optimizer = torch.optim.AdamW(modules.parameters(), **self.hyperparameters)
            # Without what PyTorch wraps around it: hooks, of which there are none, and words to its compiler, which
            # would be imported to hear them.
            self.optimize = inspect.unwrap(torch.optim.AdamW.step)
        self.totals: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self.taken: dict[int, int] = {}  # steps of each batch size
        self.graphs: dict[int, CudaGraph] = {}

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        # Of the rest of a group nothing is restored: it may have been another device's.
        state["param_groups"] = [{"params": group["params"]} for group in state["param_groups"]]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.optimizer.state_dict()["param_groups"]
        groups = [{**ours, "params": theirs["params"]} for ours, theirs in zip(own, state["param_groups"], strict=True)]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        for group in self.optimizer.param_groups:
            group.update(self.hyperparameters)
        # PyTorch's fused AdamW takes moments to lie as their weights do, unchecked; version 0.1.0's do not on a CPU.
        for parameter, own in self.optimizer.state.items():
            for name, value in own.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def begin_epoch(self) -> None:
        if isinstance(self.optimizer, AdamW):  # weights may have been loaded
            self.optimizer.refresh()
        for total in self.totals.values():
            total.zero_()

    def mean_losses(self) -> dict[str, float]:
        """Of the epoch. Waits for the device."""
        names = list(self.totals)
        return dict(zip(names, torch.stack([self.totals[name] for name in names]).tolist(), strict=True))

    def __call__(self, step: int, rows: Tensor, generators: list[torch.Generator]) -> None:
        """Takes step number `step`, counted from 0.

        Args:
            rows: int64 [B], on the device.
            generators: the first is what `losses` gets; what names none draws from the last. Those that a failed
                capture has spoilt are replaced, in the list.
        """
        if isinstance(self.rate, Tensor):
            self.rate.copy_(self.device_rates[step])
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rates[step]
        B = len(rows)
        if B not in self.graphs:
            with computing(self.precision, self.device):
                if B not in self.taken:
                    self.compile_kernels(rows, generators)
                if self.wants_graph and self.worth_a_graph(step, B):
                    self.capture(rows, generators)
                if B not in self.graphs:
                    stream = on_stream(capture_stream(self.device)) if self.wants_graph else contextlib.nullcontext()
                    with stream:
                        self.losses = self.step(rows, generators)
        self.taken[B] = self.taken.get(B, 0) + 1
        if B in self.graphs:
            self.losses = self.graphs[B](rows)

    def compile_kernels(self, rows: Tensor, generators: list[torch.Generator]) -> None:
        """`compile_ahead` for a step, after which everything is as before it."""
        if self.device.type != "cuda":
            return
        before = [generator.get_state() for generator in generators]
        with as_before(self.modules), on_stream(capture_stream(self.device)):
            compile_ahead(lambda: self.gradients(rows, generators), self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)

    def worth_a_graph(self, step: int, B: int) -> bool:
        """Whether the eager steps of this batch size are done and enough others follow, going by those up to now."""
        taken = self.taken.get(B, 0)
        if taken < self.EAGER_STEPS:
            return False
        return (len(self.rates) - step) * taken / sum(self.taken.values()) >= self.LEAST_REPLAYS

    def capture(self, rows: Tensor, generators: list[torch.Generator]) -> None:
        before = [generator.get_state() for generator in generators]
        self.optimizer.zero_grad(set_to_none=True)  # the graph's own gradients lie in its own memory
        if isinstance(self.optimizer, AdamW):
            self.optimizer.make_room()
        reason = None
        try:
            self.graphs[len(rows)] = CudaGraph(
                lambda rows: self.step(rows, generators), rows, warm_ups=0, generators=generators
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
        if not self.processes.is_alone:
            # One that could not capture would wait for the others, whose messages are in their graphs, for ever.
            reason = next((each for each in self.processes.gathered(reason) if each is not None), None)
        if reason is None:
            if isinstance(self.optimizer, AdamW):
                self.optimizer.fill_tables()
            return
        self.wants_graph = False
        self.graphs.clear()  # their generators are replaced too
        self.optimizer.zero_grad(set_to_none=True)
        for i, state in enumerate(before):
            generators[i] = torch.Generator(self.device)
            generators[i].set_state(state)
        warnings.warn(
            f"training without a CUDA graph, since the step could not be captured: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )

    def gradients(self, rows: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device), self.weights, DrawingFrom(generators[-1]):
            losses = self.compute_losses(rows, generators[0])
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def step(self, rows: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        losses = self.gradients(rows, generators)
        if not self.processes.is_alone:
            gradients = [parameter.grad for parameter in self.averaged if parameter.grad is not None]
            self.processes.average_([*gradients, *losses.values()])
        with torch.no_grad():
            self.optimize(self.optimizer)
        if not self.totals:
            self.totals = {name: torch.zeros_like(value) for name, value in losses.items()}
        totals = [self.totals[name] for name in losses]
        torch._foreach_add_(totals, list(losses.values()), alpha=len(rows) / self.num_series)
        return losses


@contextlib.contextmanager
def as_before(modules: nn.Module) -> Iterator[None]:
    """What a forward pass changes of modules, their buffers and attributes, is put back after the block."""
    kept = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules.modules()]
    values = [(buffer, buffer.clone()) for buffer in modules.buffers()]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            module.__dict__.update(attributes)
            module._buffers.update(buffers)
        for buffer, value in values:
            buffer.copy_(value)
