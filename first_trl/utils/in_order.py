"""Calls that wait for something else, several at a time, with their results in the order of the work."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar


T = TypeVar("T")
R = TypeVar("R")

_caller = threading.local()


class Abandoned(Exception):
    """Nobody waits any more for what this thread does."""


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[tuple[T, R], None, None]:
    """
    `function` of each item, in the order of the items, with up to `workers` calls under way. With one worker the calls
    are made in the caller's thread, one when it is asked for.

    A failed call ends the work at once, whatever was begun before it. What is still under way then, or when the caller
    leaves early, is abandoned: its next [`sleep`] raises, and it does not keep the process alive.

    Args:
        function (`Callable`): Safe to call from several threads when `workers` is above 1.
        items (`Iterable`): Read as they are needed.
        workers (`int`): Calls under way at most.

    Yields:
        `tuple`: item and result.
    """
    if workers == 1:
        for item in items:
            yield item, function(item)
        return
    abandoned = threading.Event()
    ahead: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            ahead.append((item, _start(function, item, abandoned)))
            if len(ahead) == workers:
                yield _first(ahead)
        while ahead:
            yield _first(ahead)
    finally:
        abandoned.set()


def sleep(seconds: float) -> None:
    """`time.sleep` that raises [`Abandoned`] in a thread of [`in_order`] that nobody waits for any more."""
    abandoned = getattr(_caller, "abandoned", None)
    if abandoned is None:
        time.sleep(seconds)
    elif abandoned.wait(seconds):
        raise Abandoned


def _start(function: Callable[[T], R], item: T, abandoned: threading.Event) -> "Future[R]":
    future: Future[R] = Future()

    def work() -> None:
        _caller.abandoned = abandoned
        try:
            future.set_result(function(item))
        except BaseException as error:
            future.set_exception(error)

    # A daemon, unlike the threads of an executor: a request that hangs must not hold up the end of the process
    threading.Thread(target=work, daemon=True).start()
    return future


def _first(ahead: "deque[tuple[T, Future[R]]]") -> tuple[T, R]:
    while not ahead[0][1].done():
        done, _ = wait([future for _, future in ahead if not future.done()], return_when=FIRST_COMPLETED)
        if ahead[0][1] not in done:
            for future in done:
                future.result()
    item, future = ahead.popleft()
    return item, future.result()
