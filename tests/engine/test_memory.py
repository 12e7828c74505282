"""What memory there is, by the limits of control groups."""

import pytest
import torch

import ncfast
from ncfast.engine import memory

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(own, {path: limit}): a machine with 8 GiB free, the process being in the groups `own`."""

    def make(own, limits):
        (tmp_path / "meminfo").write_text("MemAvailable: 8388608 kB\nSwapFree: 0 kB\n")
        (tmp_path / "own").write_text(own)
        for path, limit in limits.items():
            file = tmp_path / "cgroup" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{limit}\n")
        for name, path in (("MEMINFO", "meminfo"), ("OWN_CGROUPS", "own"), ("CGROUPS", "cgroup")):
            monkeypatch.setattr(memory, name, tmp_path / path)
        return memory.available_bytes(CPU)

    return make


V1 = "5:cpu,cpuacct:/job\n4:memory:/slurm/job\n1:name=systemd:/x\n"
CASES = {
    "no groups": ("", {}, 2**33),
    "version 2, a container": ("0::/\n", {"memory.max": 2**30}, 2**30),
    "version 2, no limit": ("0::/\n", {"memory.max": "max"}, 2**33),
    "version 2, a group above": ("0::/user/job\n", {"user/memory.max": 2**31, "user/job/memory.max": "max"}, 2**31),
    "version 2, the smallest": ("0::/user/job\n", {"user/memory.max": 2**31, "user/job/memory.max": 2**29}, 2**29),
    "version 1, its own": (V1, {"memory/slurm/job/memory.limit_in_bytes": 2**28, "memory.max": 5}, 2**28),
    "version 1, in a container": (V1, {"memory/memory.limit_in_bytes": 2**27}, 2**27),
    "version 1, no limit": (V1, {"memory/memory.limit_in_bytes": 2**63 - 4096}, 2**33),
}


@pytest.mark.parametrize("case", CASES)
def test_the_smallest_limit_counts(machine, case):
    own, limits, expected = CASES[case]
    assert machine(own, limits) == expected
    memory.check_fits(expected, CPU, "it", "less")
    with pytest.raises(ncfast.UserError, match="it takes at least .* of memory, and cpu has .*; less"):
        memory.check_fits(expected + 1, CPU, "it", "less")
