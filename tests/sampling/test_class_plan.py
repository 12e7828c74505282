import numpy as np
import pytest
import torch

from ncfast.errors import UserError
from ncfast.ops import philox
from ncfast.sampling.class_plan import LabelPlan, parse_labels

NAMES, COUNTS = ("a", "b", "c"), (10, 70, 20)


def labels(spec, count=12, start=0, seed=0, names=NAMES):
    return LabelPlan(spec, names, COUNTS[: len(names)])(torch.arange(start, start + count), seed).tolist()


def test_train_proportions():
    drawn = np.bincount(labels("train", 20_000), minlength=3) / 20_000
    p = np.array(COUNTS) / 100
    assert (np.abs(drawn - p) < 4 * np.sqrt(p * (1 - p) / 20_000)).all()
    assert labels("train", 5, start=7) == labels("train", 12)[7:]
    assert labels("train", 50, seed=1) != labels("train", 50)


def test_a_draw_on_the_edge_of_two_classes_is_of_the_second(monkeypatch):
    """So that a class of no series is never drawn, not even by 0: of counts 0, 1, 3 the edges are 0 and 1/4."""
    monkeypatch.setattr(philox, "uniform", lambda *_, **__: torch.tensor([0, 0.2, 0.25, 0.99], dtype=torch.float64))
    assert LabelPlan("train", NAMES, (0, 1, 3))(torch.arange(4), 0).tolist() == [1, 1, 2, 2]


def test_in_turn_and_without_class():
    assert labels("balanced", 7, start=1) == [1, 2, 0, 1, 2, 0, 1]
    assert labels(["c", "a"], 4) == [2, 0, 2, 0] and labels("b", 3) == [1] * 3
    assert labels("none", 3) == [3] * 3
    assert labels("none", 2, names=()) == labels("train", 2, names=()) == [0, 0]
    named = [LabelPlan(spec, NAMES, COUNTS).names_classes for spec in ("train", "balanced", ["a"], {"a": 1}, "none")]
    assert named == [True, True, True, True, False]
    assert not LabelPlan("train", (), ()).names_classes


def test_counts():
    plan = LabelPlan({"c": 2, "a": 0, "b": 3}, NAMES, COUNTS)
    assert plan.total == 5
    assert plan(torch.arange(8), 0)[:5].tolist() == [2, 2, 1, 1, 1]
    assert plan(torch.arange(3, 5), 9).tolist() == [1, 1]


def test_counts_end_at_two_to_the_62():
    plan = LabelPlan({"a": 1, "b": 2**62 - 1}, NAMES, COUNTS)
    assert plan.total == 2**62 and plan(torch.tensor([0, 1, 2**62 - 1]), 0).tolist() == [0, 1, 1]
    with pytest.raises(UserError, match=f"got {2**62 + 1}"):
        LabelPlan({"a": 2, "b": 2**62 - 1}, NAMES, COUNTS)


@pytest.mark.parametrize(
    ("spec", "names", "message"),
    [
        ("d", NAMES, "no class 'd'; this model knows a, b, c"),
        ({"a": -1}, NAMES, "got -1"),
        ({"a": 1.5}, NAMES, "got 1.5"),
        ({"a": True}, NAMES, "got True"),
        ([], NAMES, "names no class"),
        ({}, NAMES, "names no class"),
        ("balanced", (), "without labels"),
        (["a"], (), "without labels"),
    ],
)
def test_refuses(spec, names, message):
    with pytest.raises(UserError, match=message):
        LabelPlan(spec, names, COUNTS[: len(names)])


def test_parse():
    assert parse_labels("train") == "train" and parse_labels("none") == "none"
    assert parse_labels("a, b") == ["a", "b"]
    assert parse_labels("0:1000,1:500,0:1") == {"0": 1001, "1": 500}
    assert parse_labels("a:b:3") == {"a:b": 3}
    for text in ("a:1,b", "a:x", ":3", "a:-1"):
        with pytest.raises(UserError, match="name:count"):
            parse_labels(text)
