"""The examples run as they stand, the notebooks with small networks and one epoch."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest
from runs import SMALL

import ncfast

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "train_and_look": ("aeon", "matplotlib"),
    "complete_series": ("aeon", "matplotlib"),
    "swap_vector_quantize": ("vector_quantize_pytorch",),
}


def test_every_notebook_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_notebook(name, tmp_path, monkeypatch):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(ncfast, "fit", functools.partial(ncfast.fit, **SMALL))
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")  # none is kept
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = re.sub(r"^EPOCHS = \d+$", "EPOCHS = 1", "".join(cell["source"]), flags=re.MULTILINE)
            exec(compile(code, f"{name}.ipynb", "exec"), names)


@pytest.mark.slow
def test_codec_learns():
    spec = importlib.util.spec_from_file_location("codec", EXAMPLES / "codec.py")
    codec = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(codec)
    _, before = codec.train(0)
    _, after = codec.train(300)
    assert before > 0.9 and after < 0.5 * before
