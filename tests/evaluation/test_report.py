"""The page: whole, alone, and the pictures on it."""

import base64
import html.parser
import re
import sys

import numpy as np
import pytest

import ncfast
from ncfast.data.dataset import from_arrays
from ncfast.errors import UserError
from ncfast.evaluation import figures
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.material import Material
from ncfast.evaluation.protocol import measure
from ncfast.evaluation.report import render, write_report

pytestmark = pytest.mark.usefixtures("narrow_fcn")

SMALL = {"dim": 8, "residual_blocks": 1, "codebook_size": 8, "prior_dim": 32, "prior_layers": 1, "prior_head_dim": 16}


def material(labels, channels=2):
    rng = np.random.default_rng(0)
    x, x_test = (rng.normal(3, 2, size=(n, channels, 30)).cumsum(-1).astype(np.float32) for n in (20, 15))
    y, y_test = ((np.array(["<b>", "&amp"])[np.arange(n) % 2]) if labels else None for n in (20, 15))
    dataset = from_arrays(x, y, x_test, y_test, name="a < b & c")
    model = ncfast.fit(x, y, ssl="none", quiet=True, stage1_epochs=1, stage2_epochs=1, **SMALL)
    return Material(model, dataset, recipe=Recipe(epochs=1), quiet=True)


class Page(html.parser.HTMLParser):
    """Text, images and everything that would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.fetched = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name in ("src", "href", "srcset", "data", "action"):
            address = attributes.get(name, "")
            if address.startswith("data:image/png;base64,"):
                self.images[attributes["alt"]] = base64.b64decode(address.split(",")[1], validate=True)
            elif address:
                self.fetched.append(address)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


@pytest.mark.parametrize("labels", [True, False])
def test_page_holds_table_pictures_and_configuration(tmp_path, labels):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    own = material(labels)
    result = measure(own, ["reconstruction", "fid", "acd"], [1, 2])
    write_report(tmp_path / "report.html", own, result)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert not page.open and not page.fetched
    assert not re.search(r"https?://|@import|<script", source)
    titles = ("Real and generated series", "Distribution", "Reconstruction", "Embeddings", "Codebook", "Token maps")
    assert list(page.images) == [*titles, "Decoding"]
    for content in page.images.values():
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    text = "\n".join(page.text)
    assert "a < b & c" in text and "codebook_size\n8" in text
    for figure in result["measures"]:
        shown = figure["reason"] or f"{figure['value']:.4g}"
        assert figure["metric"] in text and shown in text
    assert ("the data has no labels" in text) != labels


def test_table_says_value_spread_seeds_and_evaluator():
    figure = {"metric": "FID", "stage": "stage2", "value": 1.23456, "std": 0.0456, "std_over": "sampling seeds"}
    figure |= {"n": "15 generated, 15 test", "seeds": [1, 2], "evaluator_accuracy": 0.75, "reason": None}
    data = {"name": "x", "train": 1, "test": 2, "channels": 1, "length": 8, "classes": 2, "notes": ["partial"]}
    result = {"dataset": data, "measures": [figure], "seconds": {"fid": 1.0}, "ncfast": "1", "device": "cpu"}
    evaluator = {"sha256": "ab" * 32, "seed": 4, "epochs": 5, "test_accuracy": 0.75}
    result |= {"precision": "fp32", "config": {"ssl": "none", "augment": ("a", "b")}, "evaluator": evaluator}
    text = "\n".join(Page(render(result, [])).text)
    for expected in ("1.235 ± 0.046", "sampling seeds 1, 2", "15 generated, 15 test", "accuracy 0.750"):
        assert expected in text
    for expected in ("partial", "abababababab, seed 4, 5 epochs: test accuracy 0.7500", "a b"):
        assert expected in text


def test_pictures_show_what_they_say():
    """Data of the axes, read back from matplotlib."""
    pytest.importorskip("matplotlib")
    own = material(labels=True)
    bars = figures.codebook(own, 0).axes[0].containers
    tokens = own.test_coded.tokens
    counts = np.sort(np.bincount(tokens.ravel(), minlength=8))[::-1]
    np.testing.assert_allclose([bar.get_height() for bar in bars[1]], counts / tokens.size)  # the test set's

    drawn = figures.reconstruction(own, 0).axes[0].lines
    first = int(own.dataset.y_test.argmin())  # of the first class
    rebuilt = own.stats.normalise(own.model.reconstruct(own.dataset.X_test), "cpu")
    np.testing.assert_allclose(drawn[0].get_ydata(), own.test[first, 0])
    np.testing.assert_allclose(drawn[1].get_ydata(), rebuilt[first, 0], atol=1e-4)

    images = [axes.images[0].get_array() for axes in figures.decoding(own, 0).axes if axes.images]
    assert (images[0] == 8).all() and (images[-1] < 8).all()  # 8 is masked
    np.testing.assert_array_equal(images[-1].ravel(), own.generated(0).tokens[0])


def test_rows_are_taken_from_all_classes_in_turn():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    assert figures.spread_over_classes(labels, 7, 5).tolist() == [0, 4, 6, 1, 5]
    assert figures.spread_over_classes(None, 9, 3).tolist() == [0, 4, 8]
    assert figures.pick(4, 10).tolist() == [0, 1, 2, 3]


def test_without_sklearn_says_what_to_install(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"ncfast\[eval\]"):
        figures.embeddings(material(labels=False), 0)
