"""`.ci/run` on a copy of the repository's front, with a `python3.11` that only notes what it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parents[2]
# Makes an environment whose programs write their names and arguments into a log
PYTHON = """#!/usr/bin/env bash
echo "python3.11 $*" >> "$LOG"
mkdir -p "$3/bin"
for program in pip python ruff mypy first-trl; do
    printf '#!/usr/bin/env bash\\necho "%s $*" >> "$LOG"\\n' "$program" > "$3/bin/$program"
    chmod +x "$3/bin/$program"
done
"""


def test_runs_the_readmes_command_in_an_environment_of_its_own(tmp_path):
    copy, tools, scratch = tmp_path / "copy", tmp_path / "tools", tmp_path / "scratch"
    for folder in (copy / ".venv", tools, scratch):
        folder.mkdir(parents=True)
    (copy / ".venv" / "mine").write_text("kept")
    for name in ("README.md", ".ci/run", "tests/constraints.txt"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (tools / "python3.11").write_text(PYTHON)
    (tools / "python3.11").chmod(0o755)
    log = tmp_path / "log"
    env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(scratch), "LOG": str(log)}
    subprocess.run([copy / ".ci" / "run"], check=True, env=env, timeout=60, capture_output=True)
    calls = log.read_text().splitlines()
    assert calls[0].startswith(f"python3.11 -m venv {scratch}")
    assert calls[1] == "pip install --quiet torch==2.13.0"
    assert "pip install -c tests/constraints.txt -e .[test]" in calls
    assert any(call.startswith("python -m pytest") for call in calls)
    assert calls[-4:] == ["ruff check .", "ruff format --check .", "mypy ", "first-trl recipes check"]
    assert [path.name for path in (copy / ".venv").iterdir()] == ["mine"]
    assert list(scratch.iterdir()) == [], "the environment stayed behind"


def test_the_workflow_runs_the_same_command():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["tests"]["steps"]]
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert yaml.safe_load(path.read_text())["jobs"]
