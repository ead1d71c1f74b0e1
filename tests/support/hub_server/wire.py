"""HTTP plumbing shared by the two ports: requests in, replies out, faults and the request log in between."""

import json
import re
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit


if TYPE_CHECKING:
    from .server import HubServer


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def bytes_reply(body: bytes, range_header: str | None, headers: dict[str, str] | None = None) -> Reply:
    """The whole body, or the part a `Range: bytes=a-b` header asks for (206, or 416 when it lies outside)."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **(headers or {})}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", range_header or "")
    if match is None or match.groups() == ("", ""):
        return Reply(200, body, headers)
    first, last = match.groups()
    start = int(first) if first else max(0, len(body) - int(last))
    stop = min(len(body), int(last) + 1) if first and last else len(body)
    if start >= stop:
        return Reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
    return Reply(206, body[start:stop], headers)


class HttpError(Exception):
    """An error status with the headers by which the clients recognise its cause."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            extra["X-Error-Code"] = code
        self.reply = json_reply({"error": message}, status, {"X-Error-Message": message, **extra})


@dataclass
class Call:
    """One request on its way through the server. `params` are the unquoted named groups of the route's pattern."""

    hub: "HubServer"
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    params: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def form(self) -> dict[str, Any]:
        """A body in JSON or as an HTML form, whichever the client chose."""
        if self.body.lstrip().startswith(b"{"):
            return dict(self.json())
        return dict(parse_qs(self.body.decode()))


@dataclass(frozen=True)
class LoggedRequest:
    """What the request log keeps. Tokens are never kept, only whose they were.

    `status` is what the server decided; a client under a `fault` may have seen something else.
    """

    port: str
    method: str
    path: str
    status: int
    user: str | None
    authorization: str
    received: int
    sent: int
    fault: str | None
    time: float

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


Route = tuple[str, re.Pattern[str], Callable[[Call], Reply]]


def route(method: str, pattern: str, function: Callable[[Call], Reply]) -> Route:
    """A route; in `pattern`, `{name}` stands for one quoted path segment and `{name*}` for the rest of the path."""
    pattern = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", pattern)
    return method, re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)), function


def dispatch(routes: list[Route], call: Call) -> Reply:
    method = "GET" if call.method == "HEAD" else call.method
    for route_method, pattern, function in routes:
        match = pattern.fullmatch(call.path) if route_method == method else None
        if match:
            call.params = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            return function(call)
    raise HttpError(404, f"No such route: {call.method} {call.path}", "EntryNotFound")


class _Reset(Exception):
    """Raised to drop the connection without an orderly end."""


def make_handler(hub: "HubServer", port: str, routes: list[Route]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except (_Reset, ConnectionError):
                self.close_connection = True

        def _read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionError("the client went away in the middle of its request")
            return body

        def _reset(self) -> None:
            # RST instead of FIN: linger 0, and both buffered files closed first because they hold the socket open.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
            raise _Reset

        def _send(self, reply: Reply, truncate: bool = False) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[: len(reply.body) // 2] if truncate else reply.body)

        def _serve(self) -> None:
            url = urlsplit(self.path)
            body = self._read_body()
            line = f"{self.command} {self.path}"
            fault = hub.faults.take(line)
            kind = fault.kind if fault else None
            user, authorization = hub.identify(self.headers.get("Authorization"))
            if kind == "stall":
                hub.faults.stalled.set()
                hub.faults.released.wait()
            if fault and fault.action:
                fault.action()
            if kind in (None, "before", "lost", "truncate"):
                query = {name: values[-1] for name, values in parse_qs(url.query).items()}
                call = Call(hub, self.command, url.path, query, self.headers, body)
                try:
                    reply = dispatch(routes, call)
                except HttpError as error:
                    reply = error.reply
                except Exception as error:  # a bug of this server must be seen by the test, not only by the client
                    hub.internal_errors.append(f"{line}: {error!r}")
                    reply = json_reply({"error": f"internal error: {error!r}"}, 500)
            elif kind in ("reset", "stall"):
                reply = Reply(0)
            else:
                headers = {"Retry-After": fault.retry_after} if fault and fault.retry_after else None
                reply = json_reply({"error": "scripted fault"}, int(kind), headers)
            hub.log(
                LoggedRequest(
                    port=port,
                    method=self.command,
                    path=self.path,
                    status=reply.status,
                    user=user,
                    authorization=authorization,
                    received=len(body),
                    sent=0 if kind in ("reset", "lost", "stall") else len(reply.body),
                    fault=kind,
                    time=time.time(),
                )
            )
            if kind in ("reset", "lost", "stall"):
                self._reset()
            self._send(reply, truncate=kind == "truncate")
            # Nothing is missing of an empty body, so the connection stays: closing it would be another, later fault.
            if kind == "truncate" and reply.body and self.command != "HEAD":
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = _serve

    return Handler
