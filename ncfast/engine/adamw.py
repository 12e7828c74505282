"""AdamW of our own on a GPU: one launch, which also rounds the weights that autocast would round in the next step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ROUNDED = {F.linear, F.conv1d, F.conv2d, F.conv_transpose1d, F.conv_transpose2d}  # what autocast rounds weights for


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with its formula and its state; float32 parameters of one group, on one device.

    Attributes:
        copies: of a parameter the bfloat16 leaf that `RoundedWeights` takes in its place, and that then gets the
            gradient, as the bits that autocast would widen.
    """

    def __init__(self, parameters: Any, **hyperparameters: Any) -> None:
        super().__init__(parameters, **hyperparameters)
        self.own = set(self.param_groups[0]["params"])
        self.copies: dict[Tensor, Tensor] = {}
        self.room: Tensor | None = None  # for the table of the next captured update
        self.tables: list[tuple[Tensor, Tensor]] = []  # of captured updates, and what goes into them

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            copy.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """After weights were changed other than by `update`."""
        for parameter, copy in self.copies.items():
            copy.copy_(parameter)

    def make_room(self) -> None:
        """Before a capture with an update. The table of that must not lie in the memory of the graph, where it would
        share its place with what earlier launches of the graph write."""
        from ncfast.ops.triton.adamw import table_of

        parameters = self.param_groups[0]["params"]
        largest, _ = table_of([(parameter,) * 6 for parameter in parameters])
        self.room = torch.zeros_like(largest, device=parameters[0].device)

    def update(self) -> None:
        """What `step` does. A captured one comes after `make_room`; `fill_tables` follows before the first replay."""
        from ncfast.ops.triton.adamw import adamw_triton, table_of

        group = self.param_groups[0]
        rows = [self.row_of(parameter) for parameter in group["params"]]
        rows = [row for row in rows if row is not None]
        table, programs = table_of(rows)
        device = group["params"][0].device
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            if self.room is None:
                raise RuntimeError("AdamW: an update is captured without make_room() before the capture")
            self.tables.append((self.room[: len(table)], table))
            table, self.room = self.tables[-1][0], None
        else:
            table = table.to(device, non_blocking=True)
        if rows:
            torch._foreach_add_([step for _, _, _, step, *_ in rows], 1)
        rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        adamw_triton(table, programs, rate, group["betas"], group["eps"], group["weight_decay"])

    def fill_tables(self) -> None:
        for table, numbers in self.tables:
            table.copy_(numbers)

    def row_of(self, parameter: Tensor) -> tuple[Tensor | None, ...] | None:
        """As `table_of` takes it; None without a gradient."""
        copy = self.copies.get(parameter)
        gradient = parameter.grad
        if copy is not None and copy.grad is not None:
            gradient = copy.grad if gradient is None else gradient + copy.grad
        if gradient is None:
            return None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for name in ("exp_avg", "exp_avg_sq"):  # a state may come from a device with another order
            state[name] = as_laid_out(state[name], parameter)
        gradient = as_laid_out(gradient, parameter)
        return parameter, state["exp_avg"], state["exp_avg_sq"], state["step"], gradient, copy


def as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x in the order in memory of `like`, from a multiple of 16 bytes on."""
    pairs = zip(x.stride(), like.stride(), x.shape, strict=True)
    if x.data_ptr() % 16 == 0 and all(own == other for own, other, size in pairs if size > 1):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


class RoundedWeights(TorchFunctionMode):
    """Inside, what autocast would round of an optimiser's parameters is taken from its copies instead."""

    def __init__(self, optimizer: AdamW) -> None:
        super().__init__()
        self.optimizer = optimizer

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in ROUNDED and torch.is_autocast_enabled(arguments[0].device.type):
            arguments = [self.rounded(each) for each in arguments]
        return function(*arguments, **(options or {}))

    def rounded(self, x: Any) -> Any:
        if not isinstance(x, nn.Parameter) or x not in self.optimizer.own or x.dtype != torch.float32:
            return x
        if x not in self.optimizer.copies:
            self.optimizer.copies[x] = x.detach().to(torch.bfloat16).requires_grad_(x.requires_grad)
        return self.optimizer.copies[x]
