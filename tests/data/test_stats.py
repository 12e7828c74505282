"""What a run remembers of its data: what JSON may hold, and the units."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats

CPU = torch.device("cpu")
FACTS = DataStats("a", "b", 4, 2, 9, ("x", "y"), (3, 1), (1.0, -2.0), (0.25, 4.0), ("said",))


def read(**changes):
    return DataStats.from_json({**json.loads(json.dumps(dataclasses.asdict(FACTS))), **changes})


def test_facts_survive_json():
    assert read() == FACTS


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("length", 2**24, True),  # what a series may have at most
        ("length", 2**24 + 1, False),
        ("num_series", 2**48 - 1, True),
        ("num_series", 2**48, False),
        ("num_series", 1, True),
        ("num_series", 0, False),
        ("std", [1e-30, 1e30], True),
        ("std", [0.0, 1.0], False),
        ("other", 1, False),
    ],
)
def test_limits_of_facts(name, value, good):
    if good:
        assert getattr(read(**{name: value}), name) == (tuple(value) if isinstance(value, list) else value)
        return
    with pytest.raises(ValueError, match=name if name != "other" else "facts of the data are"):
        read(**{name: value})


def test_facts_of_a_version_that_had_fewer_take_the_default():
    values = dataclasses.asdict(FACTS)
    del values["notes"]
    assert DataStats.from_json(values) == dataclasses.replace(FACTS, notes=())


@pytest.mark.parametrize("name", ["length", "std", "name"])
def test_facts_that_lack_one_are_refused(name):
    values = dataclasses.asdict(FACTS)
    del values[name]
    with pytest.raises(ValueError, match="facts of the data are name, source, num_series"):
        DataStats.from_json(values)


def test_a_channel_that_never_changes_is_only_shifted():
    x = np.stack([np.tile([1.0, 5.0], (3, 4)), np.full((3, 8), 7.0)], 1)  # mean 3 and 7, deviation 2 and 0
    facts = DataStats.of(from_arrays(x))
    assert (facts.num_series, facts.channels, facts.length) == (3, 2, 8)
    assert facts.mean == (3.0, 7.0) and facts.std == (2.0, 1.0)
    normalised = facts.normalise(x.astype(np.float32), CPU)
    expected = torch.tensor([[-1.0, 1.0] * 4, [0.0] * 8]).expand(3, 2, 8)
    assert torch.equal(normalised, expected)
    np.testing.assert_array_equal(facts.denormalise(normalised), x)
    np.testing.assert_array_equal(facts.denormalise(torch.full((1, 2, 1), 0.25))[0, :, 0], [3.5, 7.25])
