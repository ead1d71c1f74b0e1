"""A Hub on this machine for trials by hand: `python -m tests.support.hub_server --port 8765 --root /tmp/hub`."""

import argparse
import signal
import tempfile
import threading
from pathlib import Path

from .server import HubServer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port of the Hub (default: a free one)")
    parser.add_argument("--root", type=Path, help="folder of the store (default: a temporary one)")
    parser.add_argument("--fail", nargs=3, action="append", default=[], metavar=("ROUTE_REGEX", "KIND", "TIMES"))
    arguments = parser.parse_args()
    root = arguments.root or Path(tempfile.mkdtemp(prefix="hub-"))
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())
    with HubServer(root, arguments.port) as hub:
        for route_regex, kind, times in arguments.fail:
            hub.fail(route_regex, kind, int(times))
        print(f"store: {root}\n\nIn another shell, with a fresh HF_HOME for a fresh store:\n")
        print(f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={hub.token} HF_HOME=$(mktemp -d)", flush=True)
        seen = 0
        while not stop.wait(0.5):
            for request in hub.requests[seen:]:
                fault = f" [{request.fault}]" if request.fault else ""
                print(f"{request.port:5} {request.status} {request.line}{fault}", flush=True)
                seen += 1


if __name__ == "__main__":
    main()
