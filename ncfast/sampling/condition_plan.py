"""Which conditions each generated series gets, by its index and class alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncfast.data.conditions import ConditionColumn, did_you_mean, named_columns
from ncfast.data.level import filled
from ncfast.errors import UserError
from ncfast.models.prior import ConditionEmbedding
from ncfast.ops import philox
from ncfast.sampling.level_plan import ROW, LevelPlan


class ConditionPlan:
    """Conditions of a range of samples: those given, taken in turn, and for the others those of a training series.

    Each sample draws one training series of its class, any where it has none. Together the conditions drawn, and with
    the class, are distributed as in the training set; they do not depend on those given. Levels, which no user gives,
    are near those of the same training series, or those of what is completed.

    Attributes:
        columns: without those of levels.
        given: values float64 [m] of the conditions that were given, by the place of their column.
        known: places of the columns of which every series gets a value.
    """

    def __init__(
        self,
        embedding: ConditionEmbedding,
        given: Any,
        num_classes: int,
        *,
        draw: bool = True,
        num_levels: int = 0,
        levels: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            embedding: that of the prior.
            given: by name one value, or several, of which sample i gets number i mod m.
            num_classes: C; a class index of C is none.
            draw: False leaves conditions that are not given unknown.
            num_levels: the last so many columns are levels (`ncfast.data.level`).
            levels: of m series, of which sample i completes number i mod m: float64 [m, num_levels], NaN where not
                known; None draws them.

        Raises:
            UserError: a name or a value that the model does not know.
        """
        self.columns = embedding.columns[: len(embedding.columns) - num_levels]
        self.given = encode_given(self.columns, given)
        self.draw = draw
        self.known = [i for i in range(len(embedding.columns)) if draw or i in self.given or i >= len(self.columns)]
        device = embedding.rows.device
        classes = embedding.classes
        order = torch.argsort(classes, stable=True)
        self.rows = embedding.rows[order]  # [N, k], class by class
        counts = torch.bincount(classes, minlength=num_classes) if num_classes else classes.new_zeros(0)
        everything = torch.tensor([0, len(order)], device=device)
        self.first = torch.cat([counts.cumsum(0) - counts, everything[:1]])  # [C + 1]
        self.count = torch.cat([counts, everything[1:]])
        self.in_turn = {i: torch.from_numpy(values).to(device) for i, values in self.given.items()}
        self.levels, self.own_levels = None, None
        if num_levels:
            self.levels = LevelPlan(self.rows[:, -num_levels:], classes[order])
            if levels is not None:
                self.own_levels = torch.from_numpy(filled(levels, self.levels.levels.cpu().numpy())).to(device)

    def __call__(self, sample: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Global sample indices and class indices, both int64 [B] -> conditions float64 [B, k], NaN where unknown."""
        if self.draw or self.levels is not None:
            u = philox.uniform(seed, sample, torch.full_like(sample, ROW), step=0, stream=philox.CONDITIONS)
            row = self.first[labels] + (u * self.count[labels]).long()
            rows = self.rows[row]
        else:
            rows = self.rows.new_full((len(sample), self.rows.shape[1]), torch.nan)
        if self.levels is not None:
            levels = self.levels(row, sample, seed)
            if self.own_levels is not None:
                own = self.own_levels[sample % len(self.own_levels)]
                levels = torch.where(own.isnan(), levels, own)
            rows[:, len(self.columns) :] = levels
            if not self.draw:
                rows[:, : len(self.columns)] = torch.nan
        for i, values in self.in_turn.items():
            rows[:, i] = values[sample % len(values)]
        return rows


def encode_given(columns: tuple[ConditionColumn, ...], given: Any) -> dict[int, np.ndarray]:
    """Values float64 [m] of each column that they are given for, by its place."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) and not hasattr(given, "columns") and not hasattr(given, "column_names"):
        raise UserError(f"condition is a dict of values by name, or a table; got {type(given).__name__}")
    names = [column.name for column in columns]
    encoded = {}
    for name, values in named_columns(given, "condition").items():
        if name not in names:
            raise UserError(f"no condition {name!r}; this model knows {', '.join(names)}{did_you_mean(name, names)}")
        place = names.index(name)
        encoded[place] = columns[place].encode(values)
        if len(encoded[place]) == 0:
            raise UserError(f"condition {name} has no value; give one, or one for each series")
    return encoded
