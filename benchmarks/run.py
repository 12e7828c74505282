"""Runs benchmarks, all or those that are named, and prints one Markdown table; `make gpu` runs all on a GPU.

    python benchmarks/run.py nearest_code vector_quantize --seconds 4

Each benchmark runs in its own process, so that a crash loses no other. With `--minutes` it has a share of that time and
stops before the case that would not fit in. Peers that are installed take part; of the others the reason is in their
rows. Exit codes: 0; 1 when a test or a benchmark failed, the rest having run; 2 for a wrong argument or without a GPU.
"""

import argparse
import contextlib
import importlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import torch
from common import OURS, fma_peak, machine, show, table

from ncfast.cli.parser import Parser, run
from ncfast.engine.checkpoint import atomic_path, read_json, write_json
from ncfast.errors import UserError
from ncfast.info import version
from ncfast.ops import dispatch
from ncfast.version import __version__

ROOT = Path(__file__).resolve().parents[1]
# Shares of the time: those that compile peers with torch.compile, or have large ones, need more.
BENCHMARKS = {
    "nearest_code": 4,
    "ssl": 7,
    "training": 24,
    "sampling": 5,
    "attention": 8,
    "vector_quantize": 4,
    "compiled": 6,
    "unmask_step": 1,
    "code_stats": 1,
    "rotate_to_code": 2,
    "iter_norm": 2,
    "batch_norm": 2,
    "thin_conv_transpose": 1,
    "fused_linear": 2,
    "layer_norm": 1,
}
PACKAGES = ("triton", "vector-quantize-pytorch", "flash-kmeans", "lightly", "numpy")
TEST_PROCESSES = 14
LEAST_SHARE = 8.0  # seconds kept for each benchmark, however long those before it took: compiling, a first case
NO_LIMIT = 1e6  # minutes
GRACE = 30.0  # seconds that a process may take beyond its share


def make_parser() -> Parser:
    parser = Parser(prog="benchmarks/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)} [all]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long the peers of a case take turns [2]")
    parser.add_argument("--threads", type=int, help="of every peer [torch's]")
    parser.add_argument("--minutes", type=float, help="for everything that is asked for [no limit]")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows; the table goes beside it [only printed]")
    parser.add_argument(
        "--tests", action="store_true", help="first run the tests marked gpu, for half of --minutes at most"
    )
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if (options.device == "cuda" or options.check or options.tests) and not torch.cuda.is_available():
        cuda = f"CUDA {torch.version.cuda}, but sees no device" if torch.version.cuda else "no CUDA"
        raise UserError(f"--device cuda needs an NVIDIA GPU and torch with CUDA; torch {torch.__version__} has {cuda}")
    for name in options.names:
        if name not in BENCHMARKS:
            raise UserError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    if options.check:
        return
    if options.worker:
        work(options.worker, options)
        return
    begin = time.monotonic()
    minutes = options.minutes or NO_LIMIT
    report = provenance(options)
    if options.tests:
        report["tests"] = run_tests(begin + 30 * minutes)
        write_report(options.out, report)
    names = options.names or list(BENCHMARKS)
    with contextlib.ExitStack() as ends:
        workers = (ends.enter_context(Worker(name, options)) for name in names)
        following = next(workers)
        for i, name in enumerate(names):
            worker = following
            # The imports of the next one take no time of a GPU, but they would disturb a timing on a CPU.
            following = next(workers, None) if options.device == "cuda" else None
            seconds = share(names[i:], begin + 60 * minutes - time.monotonic())
            limit = f"{seconds:.0f} s" if options.minutes else "all cases"
            print(f"{name}: {limit}", file=sys.stderr, flush=True)
            report["rows"] += worker.measure(seconds, seconds + GRACE)
            report["seconds"] = round(time.monotonic() - begin, 1)
            write_report(options.out, report)  # after each: what is measured stays, whatever happens next
            following = following or next(workers, None)
    print(markdown(report))
    if failures(report):
        sys.exit(1)


def provenance(options: argparse.Namespace) -> dict:
    """What the figures depend on."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return {
        "machine": machine(options.device),
        "fma_peak": fma_peak() if options.device == "cpu" else None,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {"ncfast": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {"cuda": torch.version.cuda}
        | {package: version(package) for package in PACKAGES},
        "build": dispatch.build_record(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "seconds": 0.0,
        "tests": None,
        "rows": [],
    }


def commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def share(names: list[str], left: float) -> float:
    """Seconds for the first of `names`, of what is left for all of them. What it leaves goes to those after it."""
    free = max(0.0, left - LEAST_SHARE * len(names))
    return LEAST_SHARE + free * BENCHMARKS[names[0]] / sum(BENCHMARKS[name] for name in names)


def work(name: str, options: argparse.Namespace) -> None:
    """In a process of its own: measures at least one case, and more while one like the last fits into its time.

    It imports what it needs, then waits for its turn: a line with its share in seconds.
    """
    benchmark = importlib.import_module(f"bench_{name}")
    if options.threads:
        torch.set_num_threads(options.threads)
    line = sys.stdin.readline()
    if not line:
        return
    begin = time.monotonic()
    end = begin + float(line)
    measured = {"rows": [], "complete": False}
    for made in benchmark.cases(options.device, options.seconds):
        measured["rows"] += made
        write_json(options.out, measured)
        now = time.monotonic()
        if now + (now - begin) > end:
            return
        begin = now
    write_json(options.out, measured | {"complete": True})


class Worker:
    """The process of one benchmark: started early, so that its imports take no time of the GPU."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options

    def __enter__(self) -> "Worker":
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name) / "rows.json"
        self.log = Path(self.folder.name) / "log"
        command = [sys.executable, __file__, "--worker", self.name, "--device", self.options.device]
        command += ["--seconds", str(self.options.seconds), "--out", str(self.out)]
        command += ["--threads", str(self.options.threads)] if self.options.threads else []
        self.process = start(command, self.log, stdin=subprocess.PIPE)
        return self

    def __exit__(self, *error: object) -> None:
        finish([self.process], 0.0)
        self.process.stdin.close()
        self.folder.cleanup()

    def measure(self, seconds: float, limit: float) -> list[dict]:
        """The rows; the last says what went wrong, if anything did."""
        with contextlib.suppress(BrokenPipeError):  # it ended before its turn: its exit code says why
            self.process.stdin.write(f"{seconds:.1f}\n".encode())
            self.process.stdin.flush()
        code = finish([self.process], time.monotonic() + limit)[0]
        measured = read_json(self.out) if self.out.exists() else {"rows": [], "complete": False}
        text = self.log.read_text(errors="replace").strip()
        made = [{"benchmark": self.name, **row} for row in measured["rows"]]
        failed = [row for row in made if row["peer"] == OURS and row["seconds"] is None]
        if code is None:
            why = f"killed after {limit:.0f} s; its share was {seconds:.0f} s"
        elif code:
            why = f"exit code {code}: {text.splitlines()[-1] if text else 'no output'}"
        elif failed:
            why = f"{OURS} did not run: {failed[0]['how']}"
        elif not made:
            why = "it has no cases"
        else:
            why = None
        if why is not None:
            print(text, file=sys.stderr)
            return [*made, {"benchmark": self.name, "failed": why}]
        note = {"benchmark": self.name, "note": "its time was over: not all cases"}
        return made if measured["complete"] else [*made, note]


def run_tests(deadline: float) -> dict:
    """The tests marked gpu in several processes. What takes long is compiling, which is the host's."""
    processes = max(1, min(TEST_PROCESSES, (os.cpu_count() or 1) - 2))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = {"passed": 0, "skipped": 0, "failed": [], "seconds": 0.0}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.log" for i in range(processes)]
        commands = [
            [sys.executable, "-m", "pytest", "tests", "-m", "gpu", f"--shard={i}/{processes}", f"--junitxml={log}.xml"]
            for i, log in enumerate(logs)
        ]
        codes = finish([start(*each, environment) for each in zip(commands, logs, strict=True)], deadline)
        for i, (code, log) in enumerate(zip(codes, logs, strict=True)):
            with contextlib.suppress(FileNotFoundError, ElementTree.ParseError):
                count_tests(ElementTree.parse(f"{log}.xml"), result)
            if code not in (0, 5):  # 5: none of them is in this share
                print(log.read_text(errors="replace"), file=sys.stderr)
            if code not in (0, 1, 5):  # of 1 the failed tests are known by name
                ended = "was stopped when the time was over" if code is None else f"ended with exit code {code}"
                result["failed"].append(f"process {i + 1} of {processes} {ended}")
    if not (result["passed"] or result["failed"]):
        result["failed"].append("no test ran")
    return result | {"seconds": round(time.monotonic() - begin, 1)}


def count_tests(tree: ElementTree.ElementTree, result: dict) -> None:
    for case in tree.iter("testcase"):
        if case.find("skipped") is not None:
            result["skipped"] += 1
            continue
        wrong = [part for part in case if part.tag in ("failure", "error")]
        if wrong:
            message = (wrong[0].get("message") or "").strip().splitlines() or [""]
            result["failed"].append(f"{case.get('classname')}::{case.get('name')}: {message[0][:150]}")
        else:
            result["passed"] += 1


def start(
    command: list[str], log: Path, environment: dict[str, str] | None = None, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen:
    with open(log, "wb") as file:
        # A group of its own: compilers that it starts end with it.
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            stdin=stdin,
            start_new_session=True,
        )


def finish(processes: list[subprocess.Popen], deadline: float) -> list[int | None]:
    """Exit codes; None for those that had to be killed at the deadline."""
    codes = []
    try:
        for process in processes:
            try:
                codes.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
    finally:
        for process in processes:
            if process.poll() is None:
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
                process.wait()
    return codes


def failures(report: dict) -> list[str]:
    failed = [f"test {name}" for name in (report["tests"] or {"failed": []})["failed"]]
    return failed + [f"{row['benchmark']}: {row['failed']}" for row in report["rows"] if "failed" in row]


def write_report(out: Path | None, report: dict) -> None:
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    with atomic_path(out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(report) + "\n")


def markdown(report: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"{report['machine']}, {report['cores']} cores; {versions}"]
    lines += [f"commit {report['commit'] or 'unknown'}, {report['date']}, {report['seconds']:.0f} s in all"]
    if report["tests"] is not None:
        tests = report["tests"]
        counts = f"{tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped"
        lines.append(f"GPU tests: {counts} in {tests['seconds']:.0f} s")
    lines += [f"- failed: {what}" for what in failures(report)]
    if report["fma_peak"]:
        lines.append(f"multiply-adds at most {report['fma_peak']:.0f} GFLOP/s")
    columns = ["benchmark", "case", "what", "peer", "median ms", "time / ours", "rate", "peak MiB", "error", "timed"]
    made = table(columns, [[cell.replace("|", "\\|") for cell in cells(row)] for row in report["rows"]]).splitlines()
    made[1] = "|" + " --- |" * 4 + " ---: |" * 5 + " --- |"
    legend = (
        "timed: on a GPU in CUDA graphs with inputs that take turns, unless it says eager, and why. "
        "error: against float64, relative to the largest value or norm; of nearest_code the rows that differ."
    )
    return "\n\n".join(["\n".join(lines), "\n".join(made), legend])


def cells(row: dict) -> list[str]:
    if "failed" in row or "note" in row:
        said = f"FAILED: {row['failed']}" if "failed" in row else row["note"]
        return [row["benchmark"], said, *[""] * 8]
    error = row.get("error")
    return [
        row["benchmark"],
        row["case"],
        row["what"].strip(),
        row["peer"],
        show(row["seconds"] and row["seconds"] * 1e3, ".4g"),
        show(row["ratio"], ".2f"),
        f"{row['rate']:.3g} {row['unit']}" if "rate" in row else "-",
        show(row.get("mib"), ".0f"),
        str(error) if isinstance(error, int) else show(error, ".0e"),
        row["how"],
    ]


if __name__ == "__main__":
    run(main)
