"""Whether the Hub can be reached, found out once and quickly."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session


# Seconds; a Hub that is there answers in a fraction of one
_PATIENCE = 3.0


@lru_cache(maxsize=4)
def reachable(endpoint: str) -> bool:
    """Whether an endpoint answers at all, whatever it answers."""
    try:
        get_session().head(endpoint, timeout=_PATIENCE)
    except Exception:  # the libraries behind the session have no common error: whatever it is, nothing can be fetched
        return False
    return True


@contextmanager
def quick_offline() -> Iterator[None]:
    """
    Without network, look into the local cache alone, instead of asking for every file until the retries are used up.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
