"""Work beside the caller's: functions run in order in a thread of their own, a few of them waiting at most."""

import queue
import threading
from collections.abc import Callable
from typing import Any


class Background:
    """Runs what it is given, one after the other. An error is raised in the caller, at its next call or at the end.

    Use it as a context: leaving it waits for everything, or, after an error, drops what has not begun.
    """

    def __init__(self, depth: int = 4) -> None:
        """depth: how many calls may wait; one more, and `call` waits. It bounds the memory that they hold."""
        self.waiting: queue.Queue = queue.Queue(depth)
        self.error: BaseException | None = None
        self.dropping = False
        self.thread = threading.Thread(target=self.run, daemon=True)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.raise_error()
        self.waiting.put((function, arguments))

    def run(self) -> None:
        while (item := self.waiting.get()) is not None:
            if self.dropping:
                continue  # the caller may be waiting for a place
            function, arguments = item
            try:
                function(*arguments)
            except BaseException as error:  # the caller's to deal with
                self.error = error
                self.dropping = True

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def __enter__(self) -> "Background":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.dropping |= kind is not None
        self.waiting.put(None)
        self.thread.join()
        if kind is None:
            self.raise_error()
