"""The published Space: complete without `first_trl`, and its page works."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from first_trl.metrics.ece import build_space_folder


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FOLDER = Path(__file__).resolve().parents[2] / "first_trl" / "metrics" / "ece"


def test_the_folder_is_complete(tmp_path: Path) -> None:
    folder = build_space_folder(tmp_path / "space", repo_id="someone/my_ece")
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "app.py", "requirements.txt", "table_reader", "tests.py", "my_ece.py"} <= names
    assert "ece.py" not in names
    imported: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "first_trl", path
                if path.name == "my_ece.py" and node.level == 1:
                    imported.add(f"{node.module}.py")
            elif isinstance(node, ast.Import):
                assert all(not alias.name.startswith("first_trl") for alias in node.names), path
    # evaluate fetches what the main script imports, and nothing else.
    assert imported == names - {"README.md", "app.py", "requirements.txt", "table_reader", "tests.py", "my_ece.py"}
    assert 'evaluate.load("someone/my_ece")' in (folder / "README.md").read_text()
    assert '"my_ece.py"' in (folder / "app.py").read_text()
    for name in imported:
        assert (folder / name).read_bytes() == (FOLDER.parents[1] / "calibration" / name).read_bytes()


@pytest.mark.parametrize(
    "repo_id", ["ece", "a/b/c", "someone/my-ece", "someone/1ece", "someone/report", "someone/app", ""]
)
def test_names_that_cannot_work(tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match="repo_id"):
        build_space_folder(tmp_path / "space", repo_id=repo_id)
    assert not (tmp_path / "space").exists()


def test_a_used_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not an empty folder"):
        build_space_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_it_loads_where_first_trl_is_not_installed(tmp_path: Path) -> None:
    pytest.importorskip("evaluate", reason="needs evaluate")
    folder = build_space_folder(tmp_path / "ece")
    table = tmp_path / "TABLE.CSV"
    table.write_bytes("confidence;correct\n0,5;1\n".encode("utf-16"))
    script = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("first_trl", "torch", "sklearn", "scipy", "transformers"):
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Absent())
        import evaluate
        module = evaluate.load({str(folder)!r}, cache_dir={str(tmp_path / "cache")!r})
        result = module.compute(
            predictions=[[0.6, 0.2, 0.2], [0, 0.95, 0.05], [0.7, 0.1, 0.2]], references=[0, 1, 2],
            mode="classwise", strategy="mass", confidence_interval=0.95, null_test=True,
        )
        result = module.compute(predictions=[0.25, 0.25, 0.55, 0.75, 0.75], references=[0, 0, 1, 1, 1], n_bins=2)
        module.plot(result).savefig({str(tmp_path / "plot.png")!r})
        module.add_batch(predictions=[0.5], references=[1])
        assert module.compute()["n"] == 1
        sys.path.insert(0, {str(folder)!r})
        from table_reader import load_table
        assert load_table({str(table)!r}).rows == [{{"confidence": "0,5", "correct": "1"}}]
        assert "first_trl" not in sys.modules and "torch" not in sys.modules
        print(result["ece"])
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "USE_TORCH": "0"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert float(run.stdout.strip().splitlines()[-1]) == pytest.approx(0.29)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def app() -> Any:
    pytest.importorskip("gradio", reason="needs gradio")
    pytest.importorskip("evaluate", reason="needs evaluate")
    import importlib.util

    spec = importlib.util.spec_from_file_location("ece_app", FOLDER / "app.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DEFAULTS = (10, "width", "l1", "right", False, "panels")


def test_app_scores_a_file(app: Any, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("confidence,correct\n.25,0\n.25,0\n.55,1\n.75,true\n.75,1\n")
    text, figure, reports = app.score(str(table), 2, *DEFAULTS[1:])
    assert "0.290000" in text and reports[""]["ece"] == pytest.approx(0.29)
    assert len(figure.axes) == 2
    text, _, reports = app.score(str(table), 2, "width", "l1", "right", True, "panels")
    assert "95 % interval" in text and reports[""]["p_value"] is not None


def test_app_reads_class_columns_and_models(app: Any, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(
        "\ufeffmodel, A, B, C, label\nx,0.6,0.2,0.2,0\nx,0,0.95,0.05,1\nx,0.7,0.1,0.2,2\ny,1,0,0,0\ny,.5,.5,0,1\n"
    )
    _, figure, reports = app.score(str(table), *DEFAULTS)
    assert reports["x"]["ece"] == pytest.approx(23 / 60) and reports["y"]["n"] == 2
    assert len(figure.axes) == 4
    _, overlay, _ = app.score(str(table), *DEFAULTS[:-1], "overlay")
    assert len(overlay.axes) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("confidence,right\n0.5,1\n", "header needs"),
        ("confidence,correct\n", "no rows"),
        ("confidence,correct\n0.5,1\n0.5\n", r"table\.csv, row 2 \(line 3\) has 1 cell under 2"),
        ("confidence,correct\n0.5,1\nx,1\n", r"row 2 \(line 3\): confidence is 'x', not a number"),
        ("confidence,correct\n0.5,maybe\n", r"row 1 \(line 2\): correct is 'maybe'"),
        ("confidence,correct\n1.5,1\n", r"row 0 \(1.5\)"),
        ("confidence,correct\nnan,1\n", r"row 1 \(line 2\): confidence is 'nan', not a number"),
        ("confidence,confidence,correct\n.5,.5,1\n", "twice"),
        ("a,b,label\n0.5,0.1,0\n", "sums to 0.6"),
        ("a,b,label\n0.5,0.5,2\n", r"references row 0 \(2\)"),
        ("a,b,label\n0.5,0.5,B\n", r"row 1 \(line 2\): label is 'B', not the number of a class"),
    ],
)
def test_app_explains_bad_files(app: Any, tmp_path: Path, content: str, message: str) -> None:
    import re

    table = tmp_path / "table.csv"
    table.write_text(content)
    text, figure, reports = app.score(str(table), *DEFAULTS)
    assert "cannot be scored" in text and re.search(message, text), text
    assert figure is None and reports is None


def test_app_takes_no_flag_for_a_class_id(app: Any, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text('{"a": 0.9, "b": 0.1, "label": 0}\n{"a": 0.2, "b": 0.8, "label": true}\n')
    text, _, reports = app.score(str(table), *DEFAULTS)
    assert "row 2 (line 2): label is True, not the number of a class" in text and reports is None


def test_app_waits_without_a_file(app: Any) -> None:
    assert app.score(None, *DEFAULTS)[1:] == (None, None)
