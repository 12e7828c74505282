"""Runs a function of a test on several gloo processes."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ncfast.cli.startup import leave_compiler_out


def on_processes(world, folder, function, *arguments):
    """What function(*arguments) returns on each of `world` processes of a default group, in order of rank.

    function: of the module level; results are saved in `folder`, which holds nothing of an earlier call.
    """
    mp.spawn(run_rank, (world, str(folder), function, arguments), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def run_rank(rank, world, folder, function, arguments):
    leave_compiler_out()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # Not by way of Python's end: a thread of a group that is still kept then, as torch.compile keeps it, aborts the
    # process when it comes to let go of a tensor.
    os._exit(0)


def once_per_world(tmp_path_factory, function):
    """world -> what function() returns on each of that many processes; run once, also where it fails."""
    done = {}

    def of(world):
        if world not in done:
            try:
                done[world] = on_processes(world, tmp_path_factory.mktemp(f"ranks{world}"), function)
            except Exception as error:  # every test of these ranks would wait for the same
                done[world] = error
        if isinstance(done[world], Exception):
            pytest.fail(str(done[world]), pytrace=False)
        return done[world]

    return of
