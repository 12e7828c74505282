"""Puts the machine, as the tables name it, into pytest-benchmark's results."""

from common import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["ncfast"] = machine()


def pytest_report_header(config):
    return f"benchmarks on {machine()}"
