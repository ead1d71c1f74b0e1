"""The server itself: two ports on the loopback interface over one folder, with accounts, faults and a request log."""

import hashlib
import re
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from . import file_routes, repo_routes, store_routes
from .accounts import Accounts
from .faults import FaultPlan
from .storage import Entry, ObjectStore, Repo, RepoStore, git_blob_oid
from .wire import HttpError, LoggedRequest, make_handler
from .xet import XetStore


XET_TOKEN_LIFETIME_S = 3600


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), BaseHTTPRequestHandler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no event here; errors of the routes are collected by the handler."""


class HubServer:
    """A Hub on this machine: `with HubServer(folder) as hub: ...`.

    Args:
        root (`Path`): Folder of the store; a later server on the same folder serves the same content.
        port, store_port (`int`): Port of the Hub, and of the blob store and CAS behind it; 0 picks a free one.
        lfs_part_size (`int`): LFS objects above this many bytes are sent in parts of this size.
        page_size (`int`): Most rows of one page of a file listing.

    Attributes:
        endpoint (`str`): Value for the clients' `HF_ENDPOINT`.
        token (`str`): Write token of the user `alice`, member of the organisation `team`.
        read_token (`str`): Read-only token of `alice`.
        other_token (`str`): Write token of the user `bob`.
        requests (`list[LoggedRequest]`): Every request that was handled, in order of completion, on both ports.
        faults (`FaultPlan`): Scripted faults, see [`HubServer.fail`].
        internal_errors (`list[str]`): Bugs of this server met while handling requests; tests assert that it is empty.
    """

    def __init__(
        self,
        root: Path,
        port: int = 0,
        store_port: int = 0,
        lfs_part_size: int = 20_000_000,
        page_size: int = 1000,
    ) -> None:
        Path(root).mkdir(parents=True, exist_ok=True)
        self.objects = ObjectStore(Path(root) / "store")
        self.repos = RepoStore(Path(root) / "repos")
        self.xet = XetStore(self.objects)
        self.accounts = Accounts()
        self.token = self.accounts.add("alice", orgs=("team",))
        self.read_token = self.accounts.add("alice", role="read", orgs=("team",))
        self.other_token = self.accounts.add("bob")
        self.faults = FaultPlan()
        self.fail = self.faults.add
        self.before = self.faults.before
        self.internal_errors: list[str] = []
        self.lfs_part_size = lfs_part_size
        self.page_size = page_size
        self._log: list[LoggedRequest] = []
        self._log_grew = threading.Condition()
        self._xet_tokens: dict[str, tuple[str, int]] = {}
        hub, store = _Server(port), _Server(store_port)
        hub.RequestHandlerClass = make_handler(self, "hub", repo_routes.ROUTES + file_routes.ROUTES)
        store.RequestHandlerClass = make_handler(self, "store", store_routes.ROUTES)
        self._servers = (hub, store)
        self.endpoint, self.store_endpoint = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in self._servers
        ]

    def start(self) -> "HubServer":
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        self.faults.released.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Request log

    @property
    def requests(self) -> list[LoggedRequest]:
        with self._log_grew:
            return list(self._log)

    def log(self, request: LoggedRequest) -> None:
        with self._log_grew:
            self._log.append(request)
            self._log_grew.notify_all()

    def matching(self, route_regex: str) -> list[LoggedRequest]:
        """Logged requests whose `"METHOD /path?query"` matches from its start."""
        return [request for request in self.requests if re.match(route_regex, request.line)]

    def count(self, route_regex: str, status: int | None = None) -> int:
        return sum(status in (None, request.status) for request in self.matching(route_regex))

    def wait_for(self, route_regex: str, count: int = 1, timeout_s: float = 60) -> None:
        """Block until that many matching requests have been handled."""
        with self._log_grew:
            pattern = re.compile(route_regex)
            if not self._log_grew.wait_for(
                lambda: sum(bool(pattern.match(request.line)) for request in self._log) >= count, timeout_s
            ):
                raise TimeoutError(f"fewer than {count} requests matched {route_regex!r} within {timeout_s} s")

    @property
    def foreign_requests(self) -> list[str]:
        """Requests for other hosts, which reach this server because the clients take it for their proxy.

        `datasets` derives the host of the dataset viewer from the endpoint's: on the real Hub that is the Hub itself.
        """
        viewer = "GET http://datasets-server.127.0.0.1:"
        lines = [request.line for request in self.requests if not request.path.startswith("/")]
        return [line for line in lines if not line.startswith(viewer)]

    # Authentication

    def identify(self, authorization: str | None) -> tuple[str | None, str]:
        """For the log: whose request this is, and what kind of credential it carries."""
        if not authorization:
            return None, "none"
        token = authorization.removeprefix("Bearer ").strip()
        if token in self._xet_tokens:
            return None, "xet"
        account = self.accounts.tokens.get(token)
        return (account.user if account else None), "hub"

    def issue_xet_token(self, scope: str) -> tuple[str, int]:
        token, expires = "xet_" + secrets.token_hex(16), int(time.time()) + XET_TOKEN_LIFETIME_S
        self._xet_tokens[token] = (scope, expires)
        return token, expires

    def xet_scope_allows(self, authorization: str | None, scope: str) -> bool:
        granted, expires = self._xet_tokens.get((authorization or "").removeprefix("Bearer ").strip(), ("", 0))
        return expires > time.time() and scope in ("read", granted)

    # Content

    def store_regular(self, content: bytes) -> Entry:
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects.put("objects", sha256, content)
        return Entry(len(content), git_blob_oid(content), sha256, lfs=False)

    def holds(self, sha256: str) -> bool:
        return self.objects.has("objects", sha256) or self.objects.has("xet-by-sha256", sha256)

    def size_of(self, sha256: str) -> int | None:
        if self.objects.has("objects", sha256):
            return self.objects.path("objects", sha256).stat().st_size
        file = self.xet.by_sha256(sha256)
        return file.size if file else None

    def content(self, sha256: str) -> bytes:
        """The bytes of an object, however it was uploaded."""
        content = self.objects.get("objects", sha256)
        if content is None:
            file = self.xet.by_sha256(sha256)
            if file is None:
                raise HttpError(404, "no such object")
            content = self.xet.rebuild(file)
        return content

    # What tests look at

    def repo(self, id: str, type: str = "dataset") -> Repo:
        return self.repos.repos[type, id]

    def files(self, id: str, type: str = "dataset", revision: str = "main") -> dict[str, bytes]:
        """Content of every file of a repository at a revision."""
        repo = self.repo(id, type)
        return {path: self.content(entry.sha256) for path, entry in repo.commit(repo.resolve(revision)).files.items()}
