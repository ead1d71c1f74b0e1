"""The retry loop by itself: what is tried again, how long, and what its errors say."""

import time
from email.utils import formatdate

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from first_trl.hub.session import HubSession, is_transient, retry_after_seconds
from first_trl.utils.retry import RetryPolicy


def answer(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("POST", "http://127.0.0.1:1/api/datasets/alice/d/commit/main")
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return HfHubHTTPError(f"{status} for the test", response=httpx2.Response(status, request=request, headers=headers))


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_server_trouble_is_transient(status: int) -> None:
    assert is_transient(answer(status))
    assert is_transient(wrapped(RuntimeError("Error while uploading 'x' to the Hub."), answer(status)))
    assert is_transient(wrapped(LocalEntryNotFoundError("no snapshot"), answer(status)))


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 410, 413, 422])
def test_our_mistakes_are_not(status: int) -> None:
    assert not is_transient(answer(status), conflicts=True)


@pytest.mark.parametrize("status", [409, 412])
def test_conflicts_only_where_asked_for(status: int) -> None:
    assert not is_transient(answer(status))
    assert is_transient(answer(status), conflicts=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (httpx2.ReadError("reset"), True),
        (httpx2.ConnectTimeout("slow"), True),
        (httpx2.RemoteProtocolError("peer closed connection"), True),
        (ConnectionError("Network error: HTTP status server error (503 Service Unavailable)"), True),
        (ConnectionError("Network error: HTTP status client error (404 Not Found), domain: x"), False),
        (ConnectionResetError("reset"), True),
        (OSError("Consistency check failed: file should be of size 5 but has size 3"), True),
        (OSError(28, "No space left on device"), False),
        (OfflineModeIsEnabled("offline"), False),
        (ValueError("bad"), False),
        (KeyError("bug"), False),
    ],
)
def test_errors_without_an_answer(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


def test_waits_that_the_hub_asks_for() -> None:
    assert retry_after_seconds(answer(429, Retry_After="7")) == 7.0
    assert retry_after_seconds(answer(429, Retry_After=formatdate(time.time() + 30, usegmt=True))) == pytest.approx(
        30, abs=2
    )
    assert retry_after_seconds(answer(503, Retry_After=formatdate(time.time() - 30, usegmt=True))) == 0.0
    assert retry_after_seconds(answer(429, RateLimit='"api";r=0;t=55')) == 55.0
    assert retry_after_seconds(answer(429, RateLimit='"api";r=3;t=55', Retry_After="7")) == 7.0
    assert retry_after_seconds(answer(429)) is None
    assert retry_after_seconds(answer(429, Retry_After="soon")) is None
    assert retry_after_seconds(ValueError("no answer at all")) is None


def test_waits_grow_are_jittered_and_bounded() -> None:
    policy = RetryPolicy(base_seconds=1.0, max_wait_seconds=10.0)
    for attempt, bound in enumerate([1, 2, 4, 8, 10, 10], start=1):
        waits = [policy.wait_seconds(attempt) for _ in range(200)]
        assert bound / 2 <= min(waits) < max(waits) <= bound
        assert max(waits) - min(waits) > bound / 4


class Flaky:
    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def session(**policy: float) -> HubSession:
    return HubSession("alice/d", "dataset", "hf_secret", RetryPolicy(**{"base_seconds": 0.001, **policy}))


def test_succeeds_after_trouble_and_stops_at_the_bound() -> None:
    work = Flaky(answer(503), httpx2.ReadError("reset"), answer(429))
    assert session().call("Working", work) == "done" and work.calls == 4
    work = Flaky(*(answer(503) for _ in range(10)))
    with pytest.raises(RuntimeError, match=r"Working failed for dataset repository alice/d: gave up at try 3 of 3"):
        session(max_attempts=3).call("Working", work)
    assert work.calls == 3


def test_total_time_is_bounded() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="gave up"):
        session(base_seconds=0.2, max_total_seconds=0.5).call("Working", Flaky(*(answer(503) for _ in range(99))))
    # 99 tries would take minutes; the margin is for a busy machine
    assert time.monotonic() - started < 10


def test_other_errors_keep_their_type_and_are_raised_at_once() -> None:
    work = Flaky(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        session().call("Working", work)
    assert work.calls == 1


def test_refusals_of_the_data_store_name_the_repository() -> None:
    refusal = ConnectionError("Network error: HTTP status client error (400 Bad Request), domain: http://x/v1/shards")
    with pytest.raises(RuntimeError, match=r"Working failed for dataset repository alice/d: .*400 Bad Request"):
        session().call("Working", Flaky(refusal))


def test_no_error_tells_the_token(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError) as caught:
        session().call("Working", Flaky(httpx2.ReadError("hf_secret"), ValueError("Bearer hf_secret")))
    assert "hf_secret" not in str(caught.value) + caplog.text and "<token>" in str(caught.value)
    assert caught.value.__suppress_context__, "the traceback would show the client's error"
    assert "<token>" in caplog.text
