"""What the package imports, it declares; what only some need is an extra, and says so when it is missing."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import first_trl


PACKAGE = Path(first_trl.__file__).parent
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
# wandb: asked for only where transformers finds it. gradio: the Space's own requirement. triton: comes with torch for GPUs.
ELSEWHERE = {
    "training/card.py": {"wandb"},
    "metrics/ece/app.py": {"gradio"},
    "losses/kernels.py": {"triton"},
    "losses/tiles.py": {"triton"},
}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", entry)[0].lower().replace("-", "_") for entry in requirements}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    found -= {*sys.stdlib_module_names, "first_trl", "__future__"}
    return {DISTRIBUTIONS.get(name, name).lower().replace("-", "_") for name in found}


def test_every_import_is_declared():
    core, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    optional = {
        "evaluation/sklearn_calibrators.py": names(extras["tasks"]),
        "metrics/ece/app.py": names(extras["evaluate"]),
        "metrics/ece/ece.py": names(extras["evaluate"]),
        "utils/tables/load.py": names(extras["excel"]),
    }
    missing = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        undeclared = imported(path) - core - optional.get(place, set()) - ELSEWHERE.get(place, set())
        if undeclared:
            missing[place] = undeclared
    assert missing == {}


def test_the_constraints_pin_every_dependency():
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = names([line for line in lines if not line.startswith("#")])
    extras = PROJECT["optional-dependencies"]
    parts = ("plots", "tasks", "evaluate", "excel", "test")
    wanted = names([*PROJECT["dependencies"], *(line for part in parts for line in extras[part])])
    assert wanted - {"first_trl"} <= pinned


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("get_task('digits').load('test', limit=1)", "The task `digits` needs scikit-learn: `pip install 'first_trl[tasks]'`."),
        ("get_task('diabetes').load('test', limit=1)", "The task `diabetes` needs scikit-learn: `pip install 'first_trl[tasks]'`."),
        ("import first_trl.evaluation.sklearn_calibrators", "A scikit-learn calibrator needs scikit-learn: `pip install 'first_trl[tasks]'`."),
        ("first_trl.reliability_diagram(first_trl.calibration_report([0.5] * 9, [1] * 9))", "A reliability diagram needs matplotlib: `pip install 'first_trl[plots]'`."),
    ],
)  # fmt: skip
def test_a_missing_extra_says_how_to_install_it(call, line):
    # transformers looks for scikit-learn itself, and imports it where it finds it
    hide = """
import sys
from importlib.abc import MetaPathFinder
class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sklearn", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import first_trl
from first_trl.tasks import get_task
"""
    done = subprocess.run([sys.executable, "-c", hide + call], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] in (
        f"ImportError: {line}",
        f"first_trl.utils.extras.MissingExtra: {line}",
    )
