"""Several calls at a time, results in order, nothing left behind."""

import threading
import time

import pytest

from first_trl.utils.in_order import in_order, sleep
from first_trl.utils.retry import RetryPolicy, retry


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_results_in_order(workers):
    under_way, most, lock = 0, 0, threading.Lock()

    def call(item):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.2 if workers == 50 else 0.01 if item % 3 else 0.03)
        with lock:
            under_way -= 1
        return item * 2

    assert list(in_order(call, iter(range(20)), workers)) == [(i, 2 * i) for i in range(20)]
    assert most == min(workers, 20)


def test_items_are_read_as_they_are_needed():
    read = []
    results = in_order(str, (read.append(i) or i for i in range(100)), 4)
    assert next(results) == (0, "0")
    assert len(read) == 4
    results.close()


def test_a_failure_ends_the_work_at_once_and_stops_the_retries_beside_it():
    tries = []

    def call(item):
        if item == 2:
            time.sleep(0.05)
            raise ValueError("item 2")

        def fail():
            tries.append(item)
            raise OSError("busy")

        retry(
            fail,
            RetryPolicy(None, base_seconds=0.02, max_wait_seconds=0.02),
            is_transient=lambda failure: isinstance(failure, OSError),
            wait_seconds=lambda failure, number: 0.02,
            before_wait=lambda failure, number, wait: None,
        )

    start = time.perf_counter()
    with pytest.raises(ValueError, match="item 2"):
        list(in_order(call, range(8), 4))
    assert time.perf_counter() - start < 2
    assert set(tries) == {0, 1, 3}
    time.sleep(0.1)
    seen = len(tries)
    time.sleep(0.1)
    assert len(tries) == seen


def test_sleep_elsewhere_is_only_that():
    start = time.perf_counter()
    sleep(0.02)
    assert time.perf_counter() - start >= 0.02
