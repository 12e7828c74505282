"""Runs a function of a test on several gloo processes."""

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_processes(world, folder, function, *arguments):
    """What function(*arguments) returns on each of `world` processes of a default group, in order of rank.

    function: of the module level; results are saved in `folder`, which holds nothing of an earlier call.
    """
    mp.spawn(run_rank, (world, str(folder), function, arguments), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def run_rank(rank, world, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
