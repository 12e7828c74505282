import subprocess
import sys

from ncfast.info import OPERATIONS


def info(*arguments):
    command = [sys.executable, "-m", "ncfast.info", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_lists_every_operation_and_says_why_not():
    result = info("--device", "cpu")
    assert result.returncode == 0, result.stderr
    rows = [line.split(maxsplit=2) for line in result.stdout.split("first that can run is used:\n")[1].splitlines()]
    assert {row[0] for row in rows} == set(OPERATIONS)
    for operation in OPERATIONS:
        assert [operation, "reference", "yes"] in rows
    for _, implementation, verdict in rows:
        assert verdict == "yes" or (verdict.startswith("no: ") and len(verdict) > 10), implementation
    assert next(row for row in rows if row[:2] == ["nearest_code", "cuda"])[2] != "yes"


def test_a_device_that_is_not_there_is_one_line():
    result = info("--device", "nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --device nonsense cannot be used") and result.stderr.count("\n") == 1
