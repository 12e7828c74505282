"""The loop around the training steps: what it counts, when it saves, what it says of a state that does not fit."""

import pytest
import torch
from torch import nn

from ncfast.engine import loop
from ncfast.engine.logging import RunLog
from ncfast.engine.loop import Stage, batch_ends, train_stage
from ncfast.errors import UserError

CPU = torch.device("cpu")


def linear():
    """Two epochs of three steps, of 4, 4 and 2 rows."""
    model = nn.ModuleDict({"line": nn.Linear(3, 1)})
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))

    def losses(rows, generator):
        return {"loss": (model["line"](x[rows]) - 1).square().mean()}

    return Stage(1, "stage 1", model, losses, 10, batch_size=4, epochs=2, learning_rate=0.1, weight_decay=0.0)


def trained(stage, **options):
    options = {"seed": 0, "device": CPU, "log": RunLog(None), "state_path": None, "state": None, **options}
    return train_stage(stage, **options)


def test_the_bar_counts_every_step(monkeypatch):
    bars = []
    make = loop.progress_bar

    def recorded(*args, **options):
        bars.append(make(*args, **options))
        return bars[-1]

    monkeypatch.setattr(loop, "progress_bar", recorded)
    trained(linear())
    assert [(bar.n, bar.total) for bar in bars] == [(6, 6)]


def test_a_state_that_does_not_fit_is_told_by_its_last_line(tmp_path):
    """PyTorch's first line names the module only; what is wrong with it comes after."""
    state = {"modules": {"line.weight": torch.zeros(1, 3)}}
    with pytest.raises(UserError, match=r"does not fit stage 1 \(Missing key\(s\) in state_dict: \"line.bias\"\. *\)"):
        trained(linear(), state=state, state_path=tmp_path / "state.pt")


def test_a_row_left_over_joins_the_batch_before_it():
    assert batch_ends(9, 4) == [4, 9]
    assert batch_ends(13, 4) == [4, 8, 13]
    assert batch_ends(5, 4) == [5]
    assert batch_ends(1, 4) == [1]
    assert batch_ends(3, 1) == [1, 3]
