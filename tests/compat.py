"""The trainer's tests on other releases of TRL: `python -m tests.compat oldest newest`.

Each release is put, alone, into a folder in front of what is installed; nothing that is installed changes.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# What leans on TRL's own methods: the trainer, tokenisation as SFTTrainer does it, the capture
TESTS = ("tests/training", "tests/cache/test_capture.py")


def oldest() -> str:
    """The lower bound of `trl` in pyproject.toml, as a version that can be installed."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    bound = next(match[1] for entry in requirements if (match := re.match(r"trl>=([\d.]+)", entry)))
    return bound if bound.count(".") == 2 else f"{bound}.0"


def run(release: str) -> int:
    """Exit code of the tests on one release: a version, `"oldest"` or `"newest"`."""
    wanted = {"oldest": f"trl=={oldest()}", "newest": "trl"}.get(release, f"trl=={release}")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wanted]
        subprocess.run(pip, check=True)
        path = os.pathsep.join([folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path}
        found = [sys.executable, "-c", "import trl; print('TRL', trl.__version__, flush=True)"]
        subprocess.run(found, check=True, cwd=ROOT, env=env)
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *TESTS]
        return subprocess.run(tests, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    codes = {release: run(release) for release in sys.argv[1:] or ("oldest", "newest")}
    print(", ".join(f"{release}: {'passed' if code == 0 else 'failed'}" for release, code in codes.items()))
    sys.exit(max(codes.values()))
