"""Calls to the Hugging Face Hub: retried within bounds, and explained when they fail for good.

The clients retry their data transfers but not the calls around them: creating a repository, reading its state, the
commit itself (measured with huggingface_hub 2.4). A [`HubSession`] retries those. Whoever passes it a function promises
that running the function again is harmless.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Literal, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from ..utils.retry import GaveUp, RetryPolicy, retry
from ..utils.versions import __version__


logger = logging.getLogger(__name__)

T = TypeVar("T")
RepoType = Literal["model", "dataset", "space"]

_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}
# Another writer was faster: 409 while its commit is in progress, 412 when our parent commit is no longer the head.
_CONFLICT_STATUSES = {409, 412}


DEFAULT_RETRY_POLICY = RetryPolicy()


class HubSession:
    """One repository, one token, one retry policy.

    Args:
        repo_id (`str`): `"namespace/name"`.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        token (`str`, *optional*): Defaults to the one of `hf auth login` or `HF_TOKEN`.
        retry_policy ([`RetryPolicy`]): Bounds of the retries of each step.
        write (`bool`): Whether the session will write; then a token must exist.
    """

    def __init__(
        self,
        repo_id: str,
        repo_type: RepoType,
        token: str | None = None,
        retry_policy: RetryPolicy = DEFAULT_RETRY_POLICY,
        write: bool = False,
    ) -> None:
        if repo_type not in ("model", "dataset", "space"):
            raise ValueError(f"repo_type is {repo_type!r}; use 'model', 'dataset' or 'space'.")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
            raise ValueError(f"repo_id is {repo_id!r}; write it as 'namespace/name', e.g. 'alice/my-cache'.")
        token = token or get_token()
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            # Sent as it is, the HTTP library would refuse the header and quote it in the error.
            raise ValueError(
                "The Hub token has spaces, line breaks or non-ASCII characters in it (not shown here). Copy it again "
                "from the settings page of the Hub, or log in with `hf auth login`."
            )
        if write and token is None:
            raise ValueError(
                f"Writing to {repo_id} needs a Hub token and there is none. Log in with `hf auth login`, set HF_TOKEN, "
                "or pass token=..., with a token of the role 'write'."
            )
        self.repo_id = repo_id
        self.repo_type = repo_type
        self.retry_policy = retry_policy
        # `False` keeps the client from looking for a token again: none was found.
        self.api = HfApi(token=token or False, library_name="first_trl", library_version=__version__)
        self._token = token

    @property
    def name(self) -> str:
        return f"{self.repo_type} repository {self.repo_id}"

    def call(self, doing: str, function: Callable[[], T], retry_conflicts: bool = False) -> T:
        """Run `function` until it succeeds, fails for good, or the policy's bounds are reached.

        Args:
            doing (`str`): What is being done, for log and error texts.
            function (`Callable`): The work. Must be harmless to repeat, also after its effect was achieved and only
                the answer was lost.
            retry_conflicts (`bool`): Whether 409 and 412 (a concurrent writer) are tried again too.

        Raises:
            `ValueError`: The caller can mend it: token, permissions, names.
            `RuntimeError`: The Hub did not manage within the bounds, or refused for another reason.
        """
        policy = self.retry_policy

        def wait_seconds(failure: Exception, attempt: int) -> float:
            # A conflict is over as soon as the other commit is: no reason to wait as long as for a server in trouble.
            wait = policy.wait_seconds(1 if _status(failure) in _CONFLICT_STATUSES else attempt)
            return max(wait, retry_after_seconds(failure) or 0.0)

        def before_wait(failure: Exception, attempt: int, wait: float) -> None:
            text = "%s (%s): %s. Try %d of %d failed, next in %.1f s."
            summary = self.scrub(_summary(failure))
            logger.warning(text, doing, self.repo_id, summary, attempt, policy.max_attempts, wait)

        try:
            return retry(
                function,
                policy,
                is_transient=lambda failure: is_transient(failure, retry_conflicts),
                wait_seconds=wait_seconds,
                before_wait=before_wait,
            )
        except GaveUp as error:
            gave_up = error
        except Exception as error:
            explained = self._explained(doing, error)
            if explained is error:
                raise
            # The client's own error would be printed above ours, with the request in it and without the mend.
            raise explained from None
        raise RuntimeError(
            f"{doing} failed for {self.name}: gave up at try {gave_up.attempts} of {policy.max_attempts} after "
            f"{gave_up.seconds:.0f} s. "
            f"Last error: {self.scrub(_summary(gave_up.failure))}. Run the same command again later: what was already "
            "sent is not sent again, and nothing was committed halfway."
        ) from None

    def scrub(self, text: str) -> str:
        """`text` without the token."""
        return text.replace(self._token, "<token>") if self._token else text

    def _explained(self, doing: str, error: Exception) -> Exception:
        """The error to raise in place of a client's error that another try cannot mend."""
        cause = _hub_error(error)
        if cause is None:
            # Errors that are not about the Hub (a full disk, a bad argument) stay as they are, unless they tell a secret.
            secret = any(self._token and self._token in str(cause) for cause in _causes(error))
            if not secret and _status(error) is None:
                return error
            return RuntimeError(f"{doing} failed for {self.name}: {self.scrub(_summary(error))}")
        status = cause.response.status_code
        where = f"{self.name} at {self.api.endpoint}"
        if isinstance(cause, GatedRepoError):
            return ValueError(f"{doing} failed: {where} is gated. Ask for access on its page, then use that account.")
        if isinstance(cause, RevisionNotFoundError):
            return ValueError(f"{doing} failed: {where} has no such revision. {self._known_revisions()}")
        if self._token is None and status in (401, 403, 404):
            return ValueError(
                f"{doing} failed: {where} does not exist, or is private and there is no token. Check the name and "
                f"repo_type ({self.repo_type!r}); for a private one log in with `hf auth login` or set HF_TOKEN."
            )
        if status == 401:
            return ValueError(
                f"{doing} failed: the Hub at {self.api.endpoint} does not know the token. It was mistyped, revoked, or "
                "belongs to another Hub. Make a new one in the Hub's settings and log in with `hf auth login` or set "
                "HF_TOKEN."
            )
        if isinstance(cause, RepositoryNotFoundError):
            user = self._whoami().get("name", "unknown")
            return ValueError(
                f"{doing} failed: {where} does not exist, or is private and the account {user!r} may not see it. "
                f"Check the name and repo_type ({self.repo_type!r}), or log in as an account with access."
            )
        if status == 403:
            return ValueError(f"{doing} failed: {self._why_forbidden(where)}")
        return RuntimeError(f"{doing} failed for {where}: {self.scrub(_summary(cause))}")

    def _why_forbidden(self, where: str) -> str:
        me = self._whoami()
        role = me.get("auth", {}).get("accessToken", {}).get("role")
        namespaces = [me.get("name"), *(org["name"] for org in me.get("orgs", []))]
        namespace = self.repo_id.split("/")[0]
        if namespace not in namespaces:
            mine = ", ".join(str(name) for name in namespaces)
            return (
                f"the account {me.get('name')!r} may not write to the namespace {namespace!r} ({where}). Push to one of "
                f"its own ({mine}), e.g. '{me.get('name')}/{self.repo_id.split('/')[1]}', or ask to join {namespace!r}."
            )
        if role == "read":
            return f"the token is read-only, {where} needs one of the role 'write'. Make one in the Hub's settings."
        return f"the token has no permission to write to {where}. Give it write access in the Hub's settings."

    def _whoami(self) -> dict:
        try:
            return dict(self.api.whoami())
        except Exception as error:  # only to word an error better: its own failure must not hide that one
            logger.debug("whoami failed: %s", self.scrub(_summary(error)))
            return {}

    def _known_revisions(self) -> str:
        try:
            refs = self.api.list_repo_refs(self.repo_id, repo_type=self.repo_type)
        except Exception:
            return "Name an existing branch, tag or commit."
        names = ", ".join(sorted(ref.name for ref in [*refs.branches, *refs.tags]))
        return f"Its branches and tags: {names}."


def is_transient(error: Exception, conflicts: bool = False) -> bool:
    """Whether another try may succeed: 5xx, 429, timeouts, dropped connections; with `conflicts`, also 409 and 412."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUSES or (conflicts and status in _CONFLICT_STATUSES)
    return any(
        isinstance(cause, (httpx2.TransportError, ConnectionError, TimeoutError))
        or "Consistency check failed" in str(cause)  # the client's word for a download of the wrong length
        for cause in _causes(error)
    )


def retry_after_seconds(error: Exception) -> float | None:
    """The wait that the Hub asked for: by `Retry-After`, in seconds or as a date, or by its rate-limit headers."""
    cause = _hub_error(error)
    if cause is None:
        return None
    limit = parse_ratelimit_headers(cause.response.headers)
    if cause.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = cause.response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _hub_error(error: Exception) -> HfHubHTTPError | None:
    """The Hub's answer behind an error: some clients wrap it (upload threads, snapshot downloads)."""
    return next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def _status(error: Exception) -> int | None:
    cause = _hub_error(error)
    if cause is not None:
        return cause.response.status_code
    # hf_xet, compiled code, only says it in words.
    match = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(error))
    return int(match[1]) if match else None


def _summary(error: Exception) -> str:
    cause = _hub_error(error) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {' '.join(lines)[:500]}"


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids network calls."""
    return bool(constants.is_offline_mode())
