"""A vLLM server of the environment that install.sh made, for the length of a test."""

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path


def vllm_python() -> str | None:
    """Interpreter with vLLM, named by `FIRST_TRL_VLLM_PYTHON`; `None` when there is none."""
    python = os.environ.get("FIRST_TRL_VLLM_PYTHON")
    return python if python and Path(python).is_file() else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class VLLMServer:
    """
    A server on the loopback interface.

    Args:
        model (`Path`): Folder of the model.
        name (`str`): Name it is served under.
        port (`int`): Port.
        log (`Path`): File for its output.
    """

    def __init__(self, model: Path, name: str, port: int, log: Path, max_model_len: int = 256) -> None:
        python = vllm_python()
        assert python is not None
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.output = open(log, "ab")  # noqa: SIM115 (lives as long as the server)
        self.process = subprocess.Popen(
            [
                python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
                "--port", str(port), "--dtype", "float32", "--max-model-len", str(max_model_len), "--enforce-eager",
                "--max-logprobs", "20", "--served-model-name", name, "--skip-tokenizer-init",
            ],
            env={
                **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
                "HF_HUB_OFFLINE": "1",
            },
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def wait(self, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError(f"vLLM did not answer within {seconds} s:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the server and its engine processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        self.output.close()
