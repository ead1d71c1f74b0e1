"""Scripted faults: which request misbehaves, how, and how many times."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


# How a fault shows itself on the wire.
#   "500", "503", "429", any other status: answered instead of handling the request
#   "reset":    the connection is reset before the request is handled
#   "lost":     the request is handled, then the connection is reset: the work landed, the client cannot know
#   "truncate": half of the body is sent under the full Content-Length, then the connection is closed
#   "stall":    neither handled nor answered until the server's end: time to kill a client in the middle
#   "before":   no fault: a function is called before the request is handled, see `FaultPlan.before`
KINDS = ("reset", "lost", "truncate", "stall")


@dataclass
class Fault:
    pattern: re.Pattern[str]
    kind: str
    times: int
    skip: int = 0
    retry_after: str | None = None
    action: Callable[[], object] | None = None


@dataclass
class FaultPlan:
    """Faults in the order they were scripted; a request takes the first one that matches it and is not used up."""

    faults: list[Fault] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, route_regex: str, kind: str, times: int = 1, skip: int = 0, retry_after: str | None = None) -> None:
        """Script a fault for requests whose `"METHOD /path?query"` matches `route_regex` from its start.

        Args:
            route_regex (`str`): Regular expression, e.g. `r"POST /api/datasets/.*/commit/"`.
            kind (`str`): One of `KINDS` or an HTTP status such as `"503"`.
            times (`int`): How many matching requests misbehave.
            skip (`int`): How many matching requests are handled normally first.
            retry_after (`str`, *optional*): Value of the `Retry-After` header of an error status.
        """
        if kind not in KINDS and not (kind.isdigit() and 400 <= int(kind) <= 599):
            raise ValueError(f"Unknown fault {kind!r}: use one of {KINDS} or an HTTP error status such as '503'.")
        with self.lock:
            self.faults.append(Fault(re.compile(route_regex), kind, times, skip, retry_after))

    def before(self, route_regex: str, action: Callable[[], object], times: int = 1, skip: int = 0) -> None:
        """Call `action` when a matching request has arrived and before it is handled: to let something else in between."""
        with self.lock:
            self.faults.append(Fault(re.compile(route_regex), "before", times, skip, action=action))

    def take(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.match(line):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    @property
    def pending(self) -> int:
        """How many scripted faults have not happened yet: a test whose fault never fired proves nothing."""
        with self.lock:
            return sum(fault.times for fault in self.faults)

    def clear(self) -> None:
        with self.lock:
            self.faults.clear()
