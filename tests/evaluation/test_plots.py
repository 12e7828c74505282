import sys

import numpy as np
import pytest

from ncfast.errors import UserError
from ncfast.evaluation.plots import draw_completions, draw_samples, write_figure


@pytest.mark.parametrize("classes", [0, 1, 3, 40])
def test_writes_a_picture(tmp_path, classes):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2, 30)).astype(np.float32)
    y = np.arange(60) % classes if classes else None
    names = tuple(str(c) for c in range(classes))
    path = tmp_path / "samples.png"
    write_figure(draw_samples(x, y, x[:7], None if y is None else y[:7], names, "title"), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]


def test_writes_completions(tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    real = rng.normal(size=(2, 1, 30)).astype(np.float32)
    seen = {"forecasting": np.arange(30) < 20, "a gap": np.arange(30) % 20 < 10}
    drawn = {task: rng.normal(size=(6, 1, 30)) for task in seen}
    write_figure(draw_completions(real, seen, drawn, "title"), tmp_path / "completions.png")
    content = (tmp_path / "completions.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000


def test_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"ncfast\[eval\]"):
        draw_samples(np.zeros((1, 1, 8)), None, np.zeros((1, 1, 8)), None, (), "title")


def test_series_that_are_drawn_are_spread_over_the_set():
    pytest.importorskip("matplotlib")
    x = np.arange(100.0)[:, None, None] + np.zeros((1, 1, 8))
    figure = draw_samples(x, None, x[:3], None, (), "title", series_each=10)
    drawn = [sorted({float(line.get_ydata()[0]) for line in axis.lines}) for axis in figure.axes]
    assert drawn == [[11.0 * k for k in range(10)], [0.0, 1.0, 2.0]]
