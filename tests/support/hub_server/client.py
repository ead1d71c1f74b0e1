"""Clients of the server run in their own process: they read `HF_ENDPOINT` and `HF_HOME` when they are imported."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .server import HubServer


REPOSITORY = Path(__file__).resolve().parents[3]

# Runs before anything else in the client (Python imports it at start-up): records each host that is looked up or
# connected to, and refuses all but the loopback interface, so that no test can reach a real host by mistake.
_GUARD = """
import ipaddress, os, socket, sys

def _check(host):
    text = host.decode() if isinstance(host, bytes) else str(host)
    with open(os.environ["CONTACTED_HOSTS"], "a") as file:
        file.write(text + "\\n")
    try:
        loopback = ipaddress.ip_address(text).is_loopback
    except ValueError:
        loopback = text == "localhost"
    if not loopback:
        raise socket.gaierror(socket.EAI_NONAME, f"host {text} is off limits in tests")

def _audit(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        _check(args[0] or "127.0.0.1")
    elif event == "socket.connect" and args[0].family in (socket.AF_INET, socket.AF_INET6):
        _check(args[1][0])

sys.addaudithook(_audit)
"""


@dataclass
class ClientResult:
    returncode: int
    stdout: str
    stderr: str
    home: Path
    contacted_hosts: set[str]

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Client:
    """A client process and the folder that is its `HF_HOME`, home and working directory."""

    def __init__(self, process: subprocess.Popen[str], home: Path) -> None:
        self.process = process
        self.home = home

    def ask(self, code: str) -> dict[str, Any]:
        """Run code in a client of [`start_session`]: `{"result": ...}`, or `{"error": traceback}` if it raised."""
        self.send(code)
        return self.receive()

    def send(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise AssertionError(f"the client went away:\n{self.wait(check=False).output}")
        return dict(json.loads(answer))

    def result(self, expression: str) -> Any:
        """Value of an expression in a client of [`start_session`]; an error fails the test."""
        answer = self.ask(f"result = {expression}")
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def wait(self, timeout_s: float = 300, check: bool = True) -> ClientResult:
        try:
            stdout, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        stderr = (self.home / "stderr.txt").read_text(errors="replace")
        hosts = set((self.home / "contacted_hosts.txt").read_text().split())
        result = ClientResult(self.process.returncode, stdout, stderr, self.home, hosts)
        if check and result.returncode != 0:
            raise AssertionError(f"the client failed ({result.returncode}):\n{result.output}")
        return result

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def client_environment(server: HubServer, home: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    """Environment of a client: the server as its Hub, nothing of this process's Hugging Face settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    (home / "site").mkdir(parents=True, exist_ok=True)
    (home / "site" / "sitecustomize.py").write_text(_GUARD)
    (home / "contacted_hosts.txt").touch()
    return {
        **kept,
        "HOME": str(home),
        "TMPDIR": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": server.token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "OMP_NUM_THREADS": "1",
        # Whatever is not for the loopback interface goes to the server as to a proxy, which refuses and logs it: this
        # also catches requests from compiled code, which the audit hook does not see.
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), server.endpoint),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        "CONTACTED_HOSTS": str(home / "contacted_hosts.txt"),
        "PYTHONPATH": os.pathsep.join([str(home / "site"), str(REPOSITORY)]),
        **(env or {}),
    }


def start_client(
    code_or_script: str | Path,
    server: HubServer,
    env: dict[str, str] | None = None,
    home: Path | None = None,
    args: tuple[str, ...] = (),
) -> Client:
    """Start Python code (a string) or a script (a path) as a client of the server.

    Args:
        home (`Path`, *optional*): Folder of an earlier client whose caches are used again; by default a fresh one.
        env (`dict[str, str]`, *optional*): Overrides; `{"HF_HUB_DISABLE_XET": "1"}` is the LFS mode. An empty
            `HF_TOKEN` is no token.
    """
    home = home or Path(tempfile.mkdtemp(prefix="client-", dir=server.objects.root.parent))
    command = [sys.executable] + (["-c", code_or_script] if isinstance(code_or_script, str) else [str(code_or_script)])
    environment = client_environment(server, home, env)
    # A file, not a pipe: nobody reads it while the client runs, and a full pipe would stop the client.
    with open(home / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(
            [*command, *args],
            env=environment,
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    return Client(process, home)


def run_client(
    code_or_script: str | Path,
    server: HubServer,
    env: dict[str, str] | None = None,
    home: Path | None = None,
    args: tuple[str, ...] = (),
    timeout_s: float = 300,
    check: bool = True,
) -> ClientResult:
    """Run a client to its end, see [`start_client`]; with `check`, a failing client fails the test with its output."""
    return start_client(code_or_script, server, env, home, args).wait(timeout_s, check)


# Runs each line of standard input, code in JSON, and answers with its variable `result`.
_SESSION = """
import json, sys, traceback
namespace = {{"__name__": "session"}}
exec({prelude!r}, namespace)
for line in sys.stdin:
    try:
        exec(json.loads(line), namespace)
        answer = {{"result": namespace.pop("result", None)}}
    except Exception:
        answer = {{"error": traceback.format_exc()}}
    print(json.dumps(answer), flush=True)
"""


def start_session(
    prelude: str, server: HubServer, env: dict[str, str] | None = None, home: Path | None = None
) -> Client:
    """Start a client that runs `prelude` and then what [`Client.ask`] sends it: saves a process per question."""
    return start_client(_SESSION.format(prelude=prelude), server, env, home)
