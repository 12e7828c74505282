"""Which level and scale each generated series gets: near those of its training series, and seldom the very same."""

import torch
from torch import Tensor

from ncfast.ops import philox

NEIGHBOURS = 5
BLOCK = 2**24  # distances that are held at once
ROW, NEIGHBOUR, PLACE = range(3)  # positions of the random numbers of a sample's conditions


class LevelPlan:
    """Levels (`ncfast.data.level`) on the line between those of a training series and of one near to it.

    The other one is of the same class, drawn among the `NEIGHBOURS` nearest by levels in standard deviations.
    """

    def __init__(self, levels: Tensor, classes: Tensor) -> None:
        """levels: of the training series, float64 [N, 2C]; classes: int64 [N]."""
        self.levels, self.classes = levels, classes
        std = levels.std(0, correction=0)
        self.points = levels / torch.where(std > 0, std, 1)
        self.others = torch.bincount(classes)[classes] - 1  # of the same class

    def __call__(self, row: Tensor, sample: Tensor, seed: int) -> Tensor:
        """Training series and global sample indices, int64 [B] -> levels [B, 2C]."""
        u, weight = (
            philox.uniform(seed, sample, torch.full_like(sample, position), step=0, stream=philox.CONDITIONS)
            for position in (NEIGHBOUR, PLACE)
        )
        own, other = self.levels[row], self.levels[self.neighbour(row, u)]
        return own + weight[:, None] * (other - own)

    def neighbour(self, row: Tensor, u: Tensor) -> Tensor:
        """A training series near to each, itself where its class has no other: int64 [B]; u uniform [B]."""
        most = min(NEIGHBOURS, len(self.levels) - 1)
        if most == 0:
            return row
        nearest = []
        for part in row.split(max(1, BLOCK // len(self.levels))):
            # Each distance by itself: as bits of a row in a product of matrices may depend on the others.
            distance = torch.cdist(self.points[part], self.points, compute_mode="donot_use_mm_for_euclid_dist")
            distance.masked_fill_(self.classes != self.classes[part, None], torch.inf)
            distance.scatter_(1, part[:, None], torch.inf)
            nearest.append(distance.topk(most, largest=False).indices)
        count = self.others[row].clamp(max=most)
        chosen = torch.cat(nearest).gather(1, (u * count).long()[:, None])[:, 0]
        return torch.where(count > 0, chosen, row)
