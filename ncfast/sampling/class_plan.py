"""Which class each generated series gets, by its index alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncfast.errors import UserError
from ncfast.ops import philox

TRAIN, BALANCED, NONE = "train", "balanced", "none"


class LabelPlan:
    """Class indices of a range of samples.

    Attributes:
        total: how many samples it is for; None for any number.
        names_classes: whether its indices are classes, not "no class".
    """

    def __init__(self, labels: Any, class_names: Sequence[str], class_counts: Sequence[int]) -> None:
        """
        Args:
            labels: "train" draws classes in the train set's proportions, "balanced" takes all in turn, "none" gives
                every series the id of "no class", also where a class is called so; a sequence of class names is taken
                in turn; a mapping from names to counts makes that many of each, one class after the other.
            class_names: of the model, empty for one without classes.
            class_counts: of the train set, one a class.

        Raises:
            UserError: a class the model does not know, a count that is not one, or nothing to choose from.
        """
        self.class_names = list(class_names)
        self.no_class = len(self.class_names)
        self.total: int | None = None
        self.in_turn: np.ndarray | None = None  # class indices [m], taken in turn
        self.ends: np.ndarray | None = None  # last index + 1 of each class that is counted out [m]
        self.cdf: np.ndarray | None = None  # cumulative train counts [C]
        self.copies: dict[tuple[str, torch.device], Tensor] = {}  # of these, on the devices where they are used
        if not self.class_names:
            if not isinstance(labels, str) or labels not in (TRAIN, NONE):
                raise UserError("this model was trained without labels, so it has no classes to choose from")
            self.in_turn = np.array([self.no_class])
        elif isinstance(labels, str) and labels == TRAIN:
            self.cdf = np.cumsum(np.asarray(class_counts, dtype=np.float64))
        elif isinstance(labels, str) and labels == BALANCED:
            self.in_turn = np.arange(self.no_class)
        elif isinstance(labels, str) and labels == NONE:
            self.in_turn = np.array([self.no_class])
        elif isinstance(labels, Mapping):
            self.in_turn = np.array([self.index(name) for name in labels], dtype=np.int64)
            counts = list(labels.values())
            wrong = [c for c in counts if isinstance(c, bool) or not isinstance(c, int | np.integer) or c < 0]
            if wrong:
                raise UserError(f"the number of series of a class is an integer, 0 or more; got {wrong[0]!r}")
            self.total = sum(map(int, counts))
            if self.total > 2**62:
                raise UserError(f"labels may count to 2**62; got {self.total}")
            self.ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        else:
            single = isinstance(labels, str) or not isinstance(labels, Sequence | np.ndarray)
            self.in_turn = np.array([self.index(name) for name in ([labels] if single else labels)], dtype=np.int64)
        self.names_classes = self.in_turn is None or self.no_class not in self.in_turn
        if self.in_turn is not None and len(self.in_turn) == 0:
            raise UserError(f"labels names no class; this model knows {', '.join(self.class_names)}")

    def index(self, name: Any) -> int:
        if str(name) not in self.class_names:
            odd = any(mark in known for known in self.class_names for mark in ",:")
            hint = """; names with commas or colons: --labels '["a,b"]' or '{"a,b": 1000}'""" if odd else ""
            raise UserError(f"no class {str(name)!r}; this model knows {', '.join(self.class_names)}{hint}")
        return self.class_names.index(str(name))

    def __call__(self, sample: Tensor, seed: int) -> Tensor:
        """Global sample indices int64 [B] -> class indices int64 [B]; C is "no class"."""
        if self.cdf is not None:
            cdf = self.on_device("cdf", sample.device)
            u = philox.uniform(seed, sample, torch.zeros_like(sample), step=0, stream=philox.LABELS)
            return (cdf <= u[:, None] * cdf[-1]).sum(-1)
        choices = self.on_device("in_turn", sample.device)
        if self.ends is None:
            return choices[sample % len(choices)]
        ends = self.on_device("ends", sample.device)
        # An index past the end only fills up a chunk.
        return choices[torch.searchsorted(ends, sample, right=True).clamp(max=len(choices) - 1)]

    def on_device(self, name: str, device: torch.device) -> Tensor:
        """Copied once: each copy would wait for what the device has to do."""
        if (name, device) not in self.copies:
            self.copies[name, device] = torch.from_numpy(getattr(self, name)).to(device)
        return self.copies[name, device]


def parse_labels(text: str, class_names: Sequence[str] = ()) -> str | list[str] | dict[str, int]:
    """A command line's --labels: train, balanced, none, "a:1000,b:500", "a,b", or a list or an object of JSON.

    A class of that very name comes before a list of several; one that is called train, balanced or none is drawn by
    '["none"]' or "none:1000".

    Raises:
        UserError: some parts have counts and some do not, a count is no number, or the text means several things.
    """
    if text in (TRAIN, BALANCED, NONE):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if text in class_names:
        others = parts if len(parts) > 1 else [text] if ":" in text else []
        if others and all({part, part.rpartition(":")[0].strip()} & {*class_names} - {text} for part in others):
            raise UserError(f"--labels {text} is one class, and names others; write --labels '{json.dumps([text])}'")
        return [text]
    if text[:1] in "[{":
        try:
            labels = json.loads(text)
        except ValueError as error:
            raise UserError(f"--labels {text} is no JSON ({error}); such as " + '["a", "b"] or {"a": 1000}') from error
        return labels if isinstance(labels, dict) else [str(label) for label in labels]
    if not any(":" in part for part in parts) or all(part in class_names for part in parts):
        return parts
    counts: dict[str, int] = {}
    for part in parts:
        name, colon, count = part.rpartition(":")
        if not colon or not name.strip() or not count.strip().isdecimal():
            raise UserError(
                f'--labels with counts is "name:count,name:count"; got {part!r} in {text!r} (names with commas or '
                'colons: ["a,b"] or {"a,b": 1000})'
            )
        counts[name.strip()] = counts.get(name.strip(), 0) + int(count)
    return counts
