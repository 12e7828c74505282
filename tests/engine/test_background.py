"""Work in a thread beside the caller's."""

import threading
import time

import pytest

from ncfast.engine.background import Background


def test_calls_run_in_order_in_one_other_thread():
    done, threads = [], set()

    def note(i):
        done.append(i)
        threads.add(threading.current_thread())

    with Background() as background:
        for i in range(100):
            background.call(note, i)
    assert done == list(range(100))
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_only_a_few_calls_wait():
    gate = threading.Event()
    with Background(depth=2) as background:
        background.call(gate.wait)
        time.sleep(0.05)
        background.call(int)
        background.call(int)
        late = threading.Thread(target=background.call, args=(int,))
        late.start()
        late.join(0.1)
        assert late.is_alive()
        gate.set()
        late.join(5)
        assert not late.is_alive()


def test_an_error_reaches_the_caller_and_ends_what_follows():
    done = []

    def fail():
        raise OSError("no place")

    with pytest.raises(OSError, match="no place"), Background(depth=1) as background:
        background.call(fail)
        for i in range(1000):  # never blocks, though nobody works any more
            background.call(done.append, i)
            time.sleep(0.001)
    assert done == []
    with pytest.raises(OSError, match="no place"), Background() as background:
        background.call(fail)  # at the end, when there is no next call


def test_an_error_of_the_caller_drops_what_has_not_begun():
    gate, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.call(gate.wait)
        background.call(done.append, 1)
        threading.Timer(0.1, gate.set).start()
        raise KeyboardInterrupt
    assert done == [] and not background.thread.is_alive()
