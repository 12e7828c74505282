"""One page about a trained model that needs nothing beside it: pictures, table, configuration."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ncfast.engine.checkpoint import atomic_path
from ncfast.evaluation import table
from ncfast.evaluation.figures import figures
from ncfast.evaluation.material import Material

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.3rem; border-bottom: 1px solid #ddd; }
p { margin: 0.3rem 0 0.8rem; color: #555; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 0.6rem 0; }
th, td { text-align: left; padding: 0.15rem 1.2rem 0.15rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
td:nth-child(2) { font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; }
.facts td:first-child { color: #777; }
.facts td:nth-child(2) { white-space: normal; overflow-wrap: anywhere; }
"""

NOTES = """
FID: Fréchet distance of the evaluator's features; FID_reconstructed is of test series through the codebook. IS:
inception score, 1 to the number of classes. CAS: test accuracy of a classifier trained on generated series only; beside
it that of the evaluator, trained on real ones. ACD and MDD: differences of autocorrelation and of the values at each
time. NND: median distance to the nearest train series; NNDR divides it by NND_test, and below 0.7 the generator
memorises. MIA: how well distances to generated series tell train from test series; 0.5 where nothing leaks. Precision
and recall: share of generated series among the real ones and of real among the generated ones, by the evaluator's
features or, without labels, by the series. FID_train, ACD_train, MDD_train, precision_train, recall_train, NND_test and
IS_test are of real series only: what generated ones can be expected to reach. Discriminative and predictive score,
context_FID: as TimeGAN and Diffusion-TS take them, against the train series. Reconstruction and NND are in normalised
units.
""".strip()


def write_report(path: Path, material: Material, result: dict[str, Any]) -> None:
    """Writes the page; the pictures are of the first seed of `result`.

    Raises:
        UserError: matplotlib or scikit-learn is not installed, or `path` cannot be written.
    """
    drawn = []
    for title, text, draw in figures(material, result["seeds"][0]):
        image = io.BytesIO()
        draw().savefig(image, dpi=100, format="png")
        drawn.append((title, text, image.getvalue()))
    page = render(result, drawn)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(result: dict[str, Any], drawn: Iterable[tuple[str, str, bytes]]) -> str:
    """The page. drawn: title, explanation and PNG of each picture."""
    title = f"{result['dataset']['name']}, ssl {result['config']['ssl']}"
    facts = [*table.summary(result), *((f"note on {result['dataset']['name']}", n) for n in result["dataset"]["notes"])]
    seconds = sum(result["seconds"].values())
    facts.append(("made", f"by ncfast {result['ncfast']} in {seconds:.0f} s, pictures not counted"))
    run = result.get("run")
    if run:
        facts.append(("run", f"{run['folder']}, weights {run['weights_sha256'][:12]}"))
    pictures = "\n".join(
        f"<h2>{html.escape(name)}</h2>\n<p>{html.escape(text)}</p>\n"
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, text, png in drawn
    )
    config = [(name, show(value)) for name, value in result["config"].items()]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{as_table(facts)}
<h2>Measures</h2>
<p>{html.escape(NOTES)}</p>
{as_table(table.rows(result), table.HEADINGS)}
{pictures}
<h2>Configuration</h2>
{as_table(config)}
</body>
</html>
"""


def as_table(rows: Iterable[tuple[str, ...]], headings: tuple[str, ...] | None = None) -> str:
    head = "" if headings is None else f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in headings)}</tr>\n"
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="facts"' if headings is None else ""
    return f"<table{kind}>\n{head}{body}\n</table>"


def show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
