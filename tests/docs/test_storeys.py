"""Imports run down: from a storey to lower ones, never up, and never in a circle."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import first_trl


PACKAGE = Path(first_trl.__file__).parent
# From the ground up. What stands on one line may import what stands on earlier lines, and its own inside.
STOREYS = (
    ("utils", "vocabulary"),
    ("_trl_compat", "plugins"),
    ("calibration", "losses", "hub"),
    ("tasks", "metrics"),
    ("cache",),
    ("recalibration", "evaluation"),
    ("cards", "inference"),
    ("teacher", "training"),
    ("experiments",),
    ("cli",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that one module imports, anywhere in it, functions included."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "first_trl"):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = (node.module or "").split(".") if node.module else []
            target = [*base, *(names if node.level else names[1:])]
            for alias in node.names:
                inner = ".".join([*target, alias.name])
                found.add(inner if inner in known else ".".join(target))
        elif isinstance(node, ast.Import):
            found |= {
                name.name.removeprefix("first_trl.") for name in node.names if name.name.startswith("first_trl.")
            }
    return found - {module}


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {module: imports(module, path, known) for module, path in known.items() if module}


def test_every_room_has_a_storey(arrows):
    assert {module.split(".")[0] for module in arrows} == {room for storey in STOREYS for room in storey}


def test_no_import_runs_up(arrows):
    height = {room: level for level, storey in enumerate(STOREYS) for room in storey}
    up = [
        f"{module} imports {target}"
        for module, targets in arrows.items()
        for target in sorted(targets)
        if (one := module.split(".")[0]) != (other := target.split(".")[0]) and height[other] >= height[one]
    ]
    assert not up


def test_no_circle(arrows):
    # Of modules, and of rooms
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, targets in arrows.items():
        rooms[module.split(".")[0]] |= {target.split(".")[0] for target in targets} - {module.split(".")[0]}
    for graph in (arrows, rooms):
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_few_rooms_and_few_loose_files():
    entries = [
        path for path in PACKAGE.iterdir() if not path.name.startswith("__init__") and path.name != "__pycache__"
    ]
    assert len([path for path in entries if path.is_dir() and path.name not in ("recipes", "model_cards")]) <= 14
    assert len([path for path in entries if path.suffix == ".py"]) <= 6


def test_an_option_of_the_trainer_touches_few_files():
    # The option, what it does, and the two trainers that have it
    sources = [path for suffix in ("*.py", "*.pyi") for path in PACKAGE.rglob(suffix)]
    found = {path.name for path in sources if "token_dropout" in path.read_text(encoding="utf-8")}
    assert found <= {"options.py", "token_dropout.py", "sft.py", "trainer.py"}
