"""What a type checker says of a user's script."""

import dataclasses
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from ncfast.config import Config
from ncfast.options import Options, SamplingOptions

ROOT = Path(__file__).parents[1]
SCRIPT = """
from pathlib import Path

import numpy as np
import torch

import ncfast
from ncfast import VectorQuantize
from ncfast.ops import code_stats, nearest_code, vicreg_loss

X = np.zeros((4, 1, 50), np.float32)
y = np.array(["a", "b", "a", "b"])
model: ncfast.NCVQVAE = ncfast.fit(X, y, ssl="vicreg", stage1_epochs=3, augment=("gauss", "warp"), out=Path("runs/x"))
series, labels = model.sample(10, labels={"a": 4, "b": 6}, guidance_scale=2.0)
mean: float = float(series.mean())
if labels is not None:
    print(labels.tolist())
old, _ = model.sample(3, condition={"age": 63, "sex": "f"})
known: dict[str, np.ndarray] = model.sample_conditions(3)
for batch in model.sample_batches(10, labels="balanced", batch_size=5):
    print(batch.index.shape, batch.tokens.dtype)
again: ncfast.NCVQVAE = ncfast.load("runs/x", device="cpu")
print(again.reconstruct(X).mean(), ncfast.open_generated("x.h5").class_names)
z, indices, loss = VectorQuantize(dim=64, codebook_size=32)(torch.randn(2, 3, 64))
code: torch.Tensor = nearest_code(torch.randn(5, 4), torch.randn(3, 4))
counts, sums = code_stats(torch.randn(5, 4), code, 3)
value: torch.Tensor = vicreg_loss(torch.randn(5, 4), torch.randn(5, 4), sim=25.0)
"""
MISTAKES = [  # a line, and a word of what is said of it
    ("ncfast.fit(X, stage1_epoch=3)", "stage1_epoch"),
    ('ncfast.fit(X, ssl="vicregg")', "vicregg"),
    ('model.sample("ten")', "int"),
    ("model.sample(10, guidance=2.0)", "guidance"),
    ("model.smaple(3)", "smaple"),
    ("ncfast.fitt(X)", "fitt"),
    ('VectorQuantize(dim="64", codebook_size=3)', "dim"),
]


def test_options_are_those_of_the_configuration():
    fields = {f.name: f.metadata["group"] for f in dataclasses.fields(Config)}
    assert set(Options.__annotations__) == set(fields)
    assert set(SamplingOptions.__annotations__) == {name for name, group in fields.items() if group == "Sampling"}
    hints, expected = typing.get_type_hints(Options), typing.get_type_hints(Config)
    assert {name for name in hints if hints[name] != expected[name]} == {"augment"}  # one name will do there


@pytest.mark.slow
def test_a_type_checker_takes_a_users_script_and_finds_its_mistakes(tmp_path):
    pytest.importorskip("mypy")
    lines = SCRIPT.splitlines() + [line for line, _ in MISTAKES]
    (tmp_path / "script.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # reading torch takes long
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [line.split(": error: ") for line in done.stdout.splitlines() if ": error: " in line]
    found = {int(place.split(":")[1]): text for place, text in errors}
    first = len(SCRIPT.splitlines()) + 1
    assert list(found) == list(range(first, first + len(MISTAKES))), done.stdout + done.stderr
    for number, (_, word) in enumerate(MISTAKES, first):
        assert word in found[number]
