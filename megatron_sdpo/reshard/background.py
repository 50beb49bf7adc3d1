"""Calls in the background that never keep the process from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

R = TypeVar("R")


def background(call: Callable[[], R]) -> "Future[R]":
    """Start ``call`` in a daemon thread.

    At exit Python waits for an executor's threads, and a call that waits for a lost engine may take very long.
    """
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
