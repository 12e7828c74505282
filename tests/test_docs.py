"""The documentation: its examples run, its commands parse, its links lead to files, and it names all that is public.

A block of Python runs after those before it on its page, in a folder of its own. What the examples take for granted is
made here, tiny: `X`, `y`, `X_gaps`, the run `runs/FordA-vicreg`, its series `big.h5`, the data set FordA. Where a block
needs what may not be here, a comment before it says so, `<!-- needs: GPU -->` or `<!-- needs: MODULE, why -->`; such a
block stands alone, and is skipped where that is missing.
"""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import ncfast
import ncfast.data
import ncfast.evaluation
import ncfast.generate
import ncfast.ops
from ncfast.config import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    name: importlib.import_module(f"ncfast.{name}").make_parser()
    for name in ("train", "generate", "evaluate", "reproduce", "info")
}
EXPERIMENTS = [
    importlib.import_module(f"experiments.{name}").make_parser()
    for name in ("held_out", "paper_table", "claims", "checks", "augmentations", "dependence", "tsg", "table_time")
]
TINY = {
    "dim": 8,
    "residual_blocks": 1,
    "codebook_size": 16,
    "projector_dim": 16,
    "prior_dim": 16,
    "prior_layers": 1,
    "prior_head_dim": 8,
    "decoding_steps": 4,
    "stage1_steps": 2,
    "stage2_steps": 2,
    "stretch": 0.0,
}
LENGTH = 48


def python_blocks(page):
    """(line, what it needs or None, code) of each."""
    text = page.read_text()
    for match in re.finditer(r"(?:<!-- needs: (.+) -->\n)?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, match.start(2)) + 1, match[1], match[2]


def commands(page):
    """(program, arguments as text) wherever a line of code or a piece of code in a sentence starts a program."""
    text = re.sub(r"\\\n *", " ", page.read_text())
    lines = re.findall(r"^    .*$", text, re.MULTILINE) + [" ".join(code.split()) for code in code_in_sentences(text)]
    return [match.groups() for line in lines if (match := re.search(r"-m ncfast\.(\w+)(.*)", line))]


def code_in_sentences(text):
    prose = re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [code for paragraph in prose.split("\n\n") for code in re.findall(r"`([^`]+)`", paragraph)]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with all that the examples take for granted, and the names that they use."""
    folder = tmp_path_factory.mktemp("docs")
    generator = np.random.default_rng(0)
    y = np.array(["a", "b"] * 8)
    X = np.sin(np.linspace(0, 9, LENGTH) * (1 + (y == "b"))[:, None]) + 0.1 * generator.normal(size=(16, LENGTH))
    X_gaps = X[:3].copy()
    X_gaps[:, 20:30] = np.nan
    np.savez(folder / "FordA.npz", X_train=X, y_train=y, X_test=X + 0.01, y_test=y)
    run = folder / "runs" / "FordA-vicreg"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "default", TINY)
        ncfast.fit(X, y, out=run, quiet=True)
        ncfast.generate.main(["--run", str(run), "--num-samples", "2000", "--out", str(folder / "big.h5")])
    return folder, {"X": X, "y": y, "X_gaps": X_gaps}


@pytest.fixture
def namespace(made, tmp_path, monkeypatch):
    folder, names = made
    monkeypatch.setitem(PRESETS, "default", TINY)
    monkeypatch.setenv("NCFAST_DATA", str(folder))
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/FordA-vicreg").symlink_to(folder / "runs" / "FordA-vicreg")
    Path("big.h5").symlink_to(folder / "big.h5")
    return {name: value.copy() for name, value in names.items()}


def execute(page, line, code, namespace):
    """With the page's own line numbers, which an error then shows."""
    exec(compile("\n" * (line - 1) + code, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_examples_run(page, namespace):
    for line, needs, code in python_blocks(page):
        if needs is None:
            execute(page, line, code, namespace)


NEEDY = [
    pytest.param(page, line, needs, code, id=f"{name_of(page)}:{line}")
    for page in PAGES
    for line, needs, code in python_blocks(page)
    if needs is not None
]


@pytest.mark.parametrize("page, line, needs, code", NEEDY)
def test_examples_run_where_they_can(page, line, needs, code, namespace):
    what = re.match(r"\w+", needs)[0]
    if not (torch.cuda.is_available() if what == "GPU" else importlib.util.find_spec(what)):
        pytest.skip(f"needs {needs}")
    execute(page, line, code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_programs_take_the_commands(page):
    for program, text in commands(page):
        arguments = [re.sub(r"\$\w+", "0", word) for word in shlex.split(text, comments=True)]
        if arguments == [] and program != "info":  # the program's name
            assert program in PROGRAMS
        elif "..." in arguments:
            check_flags(text, options_of(PROGRAMS[program]), page)
        else:
            PROGRAMS[program].parse_args(arguments)  # raises UserError


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_the_text_are_of_some_program(page):
    known = {"--help"}.union(*map(options_of, [*PROGRAMS.values(), *EXPERIMENTS]))
    for code in code_in_sentences(page.read_text()):
        if code.startswith("--"):
            check_flags(code, known, page)


def options_of(parser):
    return {flag for action in parser._actions for flag in action.option_strings}


def check_flags(text, known, page):
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known
    assert not unknown, f"{name_of(page)}: no program has {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{name_of(page)}: {target} does not exist"


def test_the_reference_has_all_that_is_public():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    for package in (ncfast, ncfast.data, ncfast.evaluation, ncfast.ops):
        for name in set(package.__all__) - {"__version__"}:
            assert re.search(rf"^::: {package.__name__}\.(\w+\.)*{name}$", text, re.MULTILINE), name
