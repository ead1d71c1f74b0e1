"""What travels in the wheel: recipes and their schema, card templates, the metric folder, types. The index takes it."""

import subprocess
import sys
import tarfile
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
    for path in ROOT.glob("recipes/*.json"):  # the schema that editors check recipes with
        assert f"first_trl/recipes/{path.name}" in names
    assert {"first_trl/metrics/ece/ece.py", "first_trl/metrics/ece/README.md", "first_trl/py.typed"} <= names
    assert {"first_trl/__init__.pyi", "first_trl/recipes/README.md"} <= names
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


@pytest.mark.slow
def test_the_index_would_take_wheel_and_sdist(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("twine")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True, timeout=600)
    files = sorted(tmp_path.iterdir())
    assert {path.suffix for path in files} == {".whl", ".gz"}
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True, timeout=100)
    sdist = next(path for path in files if path.suffix == ".gz")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"CHANGELOG.md", "recipes/README.md", "tests/constraints.txt", "first_trl/__init__.pyi"} <= inside
