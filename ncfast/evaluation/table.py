"""An evaluation as text: what a figure says, and what it was computed from."""

from typing import Any

HEADINGS = ("measure", "value", "over", "series", "evaluator")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of HEADINGS for each measure of what `evaluate` returns."""
    return [row(figure) for figure in result["measures"]]


def row(figure: dict[str, Any]) -> tuple[str, ...]:
    if figure["value"] is None:
        return figure["metric"], "-", figure["reason"], "", ""
    over = figure["std_over"] or ""
    if figure["seeds"]:
        seeds = ", ".join(map(str, figure["seeds"]))
        if len(figure["seeds"]) > 1:
            over = f"sampling seeds {seeds}"
        else:  # its spread, if any, is over something else
            over = f"{over}, sampling seed {seeds}" if over else f"sampling seed {seeds}"
    accuracy = figure["evaluator_accuracy"]
    evaluator = "" if accuracy is None else f"accuracy {accuracy:.3f}"
    return figure["metric"], value(figure), over, figure["n"], evaluator


def value(figure: dict[str, Any]) -> str:
    text = f"{figure['value']:.4g}"
    return text if figure["std"] is None else f"{text} ± {figure['std']:.2g}"


def summary(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What every figure of the evaluation has in common."""
    data = result["dataset"]
    classes = f"{data['classes']} classes" if data["classes"] else "no labels"
    lines = [
        (
            "data",
            f"{data['name']}: {data['train']} train and {data['test']} test series "
            f"[{data['channels']}, {data['length']}], {classes}",
        ),
        ("model", f"ssl {result['config']['ssl']}, {result['device']}, {result['precision']}"),
    ]
    evaluator = result["evaluator"]
    if evaluator is not None:
        accuracy = evaluator["test_accuracy"]
        known = "accuracy unknown" if accuracy is None else f"test accuracy {accuracy:.4f}"
        lines.append(
            (
                "evaluator",
                f"FCN {evaluator['sha256'][:12]}, seed {evaluator['seed']}, {evaluator['epochs']} epochs: {known}",
            )
        )
    return lines


def as_text(result: dict[str, Any]) -> str:
    cells = [HEADINGS, *rows(result)]
    # A reason is as long as it likes.
    widths = [max(len(row[i]) for row in cells if i == 0 or row[1] != "-") for i in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)
