"""Work in several threads, and what they share of torch."""

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

from ncfast.engine import precision as precision_module
from ncfast.engine.checkpoint import without_checksums
from ncfast.engine.drawing import DrawingFrom
from ncfast.engine.precision import computing
from ncfast.engine.threads import in_threads
from ncfast.errors import UserError

CPU = torch.device("cpu")


def test_threads_run_at_the_same_time_and_one_is_the_caller():
    met, names = threading.Barrier(3), []

    def work():
        met.wait(60)
        names.append(threading.get_ident())

    in_threads(3, work, CPU)
    assert len(set(names)) == 3 and threading.get_ident() not in names
    in_threads(1, lambda: names.append(threading.get_ident()), CPU)
    assert names[3] == threading.get_ident()


def test_no_two_threads_share_a_stream_of_a_gpu():
    with pytest.raises(UserError, match="--streams is at most 16 on a GPU; got 17"):
        in_threads(17, lambda: None, torch.device("cuda", 0))


def test_an_error_leaves_the_others_and_is_raised_at_the_end():
    numbers, done = iter(range(3)), []

    def work():
        number = next(numbers)
        if number == 1:
            raise ValueError("broken")
        time.sleep(0.2)
        done.append(number)

    with pytest.raises(ValueError, match="broken"):
        in_threads(3, work, CPU)
    assert sorted(done) == [0, 2]


@pytest.mark.skipif(os.name == "nt", reason="there a signal does not end a wait")
def test_what_interrupts_the_caller_interrupts_the_threads():
    """They leave their blocks, so that what is open is closed."""
    ended = []

    def work():
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.append(True)

    alarm = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    alarm.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            in_threads(2, work, CPU)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ended) == 2


def weights_and_draws():
    modules = [nn.Linear(5, 7), nn.Conv2d(3, 4, 3), nn.ConvTranspose1d(3, 4, 3), nn.Embedding(6, 5), nn.LayerNorm(4)]
    drawn = [parameter.detach() for module in modules for parameter in module.parameters()]
    drawn += [torch.randn(9, 5), torch.rand(33), torch.randint(9, (40,)), torch.randperm(50)]
    return [*drawn, torch.empty(20).uniform_(), torch.zeros(20).normal_()]


def test_what_draws_without_a_generator_draws_the_same_from_ones_own():
    torch.manual_seed(5)
    expected = weights_and_draws()
    before = torch.get_rng_state()
    other = torch.Generator().manual_seed(1)
    with DrawingFrom(torch.Generator().manual_seed(5)):
        found = weights_and_draws()
        assert torch.equal(torch.rand(3, generator=other), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_states_without_checksums_are_written_one_at_a_time():
    """The second to begin would take the first one's setting for the one to put back."""
    before, inside, most = torch.serialization.get_crc32_options(), [], []

    def work():
        for _ in range(20):
            with without_checksums():
                inside.append(torch.serialization.get_crc32_options())
                time.sleep(0.001)
                most.append(len(inside))
                assert inside.pop() is False

    in_threads(3, work, CPU)
    assert set(most) == {1} and torch.serialization.get_crc32_options() == before


def test_threads_of_different_precision_take_turns(monkeypatch):
    """Flags are the process's: without turns one thread leaves them to another as they were before."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: precision_module.contextlib.nullcontext())  # there is none

    def flags():
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark

    before, names, wrong = flags(), iter(["fp32", "tf32", "bf16"] * 2), []

    def work():
        precision = next(names)
        rounded = precision != "fp32"
        for _ in range(50):
            with computing(precision, torch.device("cuda", 0)):
                seen = flags()
                time.sleep(0.0005)
                with computing("fp32", torch.device("cuda", 0)):  # as a stage has inside
                    inside = flags()
                if {seen, flags()} != {(rounded, rounded, True, False)} or inside != (False, False, True, False):
                    wrong.append(seen)

    in_threads(6, work, CPU)
    assert not wrong and flags() == before
