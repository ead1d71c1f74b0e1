"""What travels in the wheel: recipes, card templates, the metric folder, the typing marker."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
        timeout=300,
    )
    return next(folder.glob("*.whl"))


def test_recipes_templates_and_metric_are_inside(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("model_cards/**/*.j2")):
        assert f"first_trl/{path.relative_to(ROOT).as_posix()}" in names
    assert {"first_trl/metrics/ece/ece.py", "first_trl/metrics/ece/README.md", "first_trl/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "recipes/"))]


def test_a_recipe_is_found_by_name_with_no_checkout_around(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import first_trl, first_trl.utils.resources as r; "
        f"assert first_trl.__file__.startswith({str(site)!r}), first_trl.__file__; "
        "from first_trl.cli import main; raise SystemExit(main(['recipes', 'check']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart: valid" in done.stdout
