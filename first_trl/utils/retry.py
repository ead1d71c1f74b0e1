"""Trying again what may pass: a server that is down, busy or cut off. The loop is tenacity's."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from .in_order import sleep


T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to insist. Waits grow twofold from `base_seconds`, with jitter, up to `max_wait_seconds` each.

    Clients may insist on their own while they transfer data (a dead Hub: 23 s over LFS, minutes over Xet). That is one
    try here, and it is not cut short.

    Args:
        max_attempts (`int`, *optional*, defaults to `8`): Tries of one step, the first included; `None` sets no bound.
        base_seconds (`float`, defaults to `1.0`): Upper bound of the first wait.
        max_wait_seconds (`float`, defaults to `60.0`): Upper bound of a wait that the server did not ask for.
        max_total_seconds (`float`, defaults to `900.0`): No further try of a step starts after this long, and no
            `Retry-After` that would end later is waited for.
    """

    max_attempts: int | None = 8
    base_seconds: float = 1.0
    max_wait_seconds: float = 60.0
    max_total_seconds: float = 900.0

    def wait_seconds(self, attempt: int) -> float:
        """Wait after try number `attempt` (from 1): between half and the whole of the current bound."""
        bound = min(self.max_wait_seconds, self.base_seconds * 2.0 ** min(attempt - 1, 64))
        return bound * random.uniform(0.5, 1.0)


class GaveUp(Exception):
    """The bounds of a [`RetryPolicy`] were reached.

    Attributes:
        failure (`Exception`): What the last try ended with.
        attempts (`int`): Tries made.
        seconds (`float`): Time since the first began.
    """

    def __init__(self, failure: Exception, attempts: int, seconds: float) -> None:
        super().__init__(f"gave up at try {attempts} after {seconds:.0f} s: {failure}")
        self.failure, self.attempts, self.seconds = failure, attempts, seconds


def retry(
    function: Callable[[], T],
    policy: RetryPolicy,
    *,
    is_transient: Callable[[Exception], bool],
    wait_seconds: Callable[[Exception, int], float],
    before_wait: Callable[[Exception, int, float], None],
) -> T:
    """Run `function` until it succeeds, fails for good, or the policy's bounds are reached.

    Args:
        function (`Callable`): The work. Must be harmless to repeat, also after its effect was achieved and only the
            answer was lost.
        policy ([`RetryPolicy`]): The bounds.
        is_transient (`Callable`): Failure -> whether another try may succeed.
        wait_seconds (`Callable`): Failure, number of the try -> seconds before the next one.
        before_wait (`Callable`): Failure, number of the try, seconds: told before each wait, to log it.

    Raises:
        [`GaveUp`]: The bounds were reached. Any other failure of `function` is raised as it is, at once.
    """

    def failure(state: tenacity.RetryCallState) -> Exception:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert isinstance(error, Exception)
        return error

    stop: tenacity.stop.stop_base = tenacity.stop_before_delay(policy.max_total_seconds)
    if policy.max_attempts is not None:
        stop = stop | tenacity.stop_after_attempt(policy.max_attempts)
    loop = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and is_transient(error)),
        wait=lambda state: max(wait_seconds(failure(state), state.attempt_number), 0.0),
        stop=stop,
        sleep=sleep,
        before_sleep=lambda state: before_wait(failure(state), state.attempt_number, state.upcoming_sleep),
        # What the last try ended with travels in `GaveUp`, for the caller to word
        retry_error_callback=_give_up,
    )
    return loop(function)


def _give_up(state: tenacity.RetryCallState) -> None:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, Exception)
    raise GaveUp(error, state.attempt_number, state.seconds_since_start or 0.0)
