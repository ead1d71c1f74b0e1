"""A run's folder is spelled in one file, and its stages stand in one table."""

import ast
import json
from pathlib import Path

import pytest

import first_trl
from first_trl.experiments.plan.progress import plan_units
from first_trl.experiments.recipe import load_recipe
from first_trl.experiments.run_folder import RunFolder, cache_unit, recalibration_unit, student_unit, teacher_unit
from first_trl.experiments.stages.context import RunContext
from first_trl.experiments.stages.table import STAGE_TABLE
from first_trl.utils.files import write_json
from first_trl.vocabulary import STAGES


PACKAGE = Path(first_trl.__file__).parent
# `recipe` says where runs lie, `smoke` makes rows that a run reads: neither looks into a run
READERS = [
    *(path for room in ("stages", "plan", "report", "share") for path in (PACKAGE / "experiments" / room).glob("*.py")),
    *(PACKAGE / "cli" / f"{name}.py" for name in ("run", "report", "push")),
]  # fmt: skip
FILES = {
    "recipe.yaml", "unit.json", "counts.json", "report.json", "report.md", "report.tex", "report.html", "share.json",
    "repositories.json", "temperature.json", "selection.json", "training_log.json", "versions.json",
    "adapter_config.json", "checkpoints", "manifest",
}  # fmt: skip
# Of a model on this machine
ELSEWHERE = {"config.json"}
FOLDERS = ("students/", "evaluate/", "base/", "data/", "teacher-", "cache-", "recalibration-", "fold-", "/fold-")


def spelled(source: str) -> list[str]:
    """What in a file spells a part of a path: a string joined with `/`, or the name of a file or folder of a run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.BinOp(op=ast.Div(), right=ast.Constant(value=str(name))) if name not in ELSEWHERE:
                found.append(ast.unparse(node))
            case ast.BinOp(op=ast.Div(), right=ast.JoinedStr()):
                found.append(ast.unparse(node))
            case ast.Constant(value=str(text)) if text in FILES or text.startswith(FOLDERS):
                found.append(text)
            case ast.JoinedStr(values=[ast.Constant(value="teacher" | "cache" | "recalibration"), *_]):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", READERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_other_file_spells_a_path_of_a_run(path):
    assert spelled(path.read_text()) == []


def test_the_search_finds_what_it_looks_for():
    lines = ['folder / "model"', 'folder / f"{role}.json"', 'f"students/{arm}"', 'open("unit.json")',
             'f"cache{teacher.suffix}{part}"']  # fmt: skip
    assert all(spelled(line) for line in lines)
    assert spelled((PACKAGE / "experiments" / "run_folder.py").read_text())


def test_stages_are_named_as_the_table_names_them():
    assert tuple(stage.name for stage in STAGE_TABLE) == STAGES


def test_units_of_teachers_and_folds():
    run = RunFolder(Path("run"))
    assert run.cache() == Path("run/cache") and run.cache("cross", 0) == Path("run/cache-cross/fold-0")
    assert run.teacher("cross", 3).model == Path("run/teacher-cross/fold-3/model")
    assert run.predictions("first@top_k=1", "ood.v2") == Path("run/evaluate/first@top_k=1/ood.v2.parquet")
    assert (teacher_unit(), cache_unit("short")) == ("teacher", "cache-short")
    assert run.fit("logit_temperature", "short") == Path("run/recalibration-short/logit_temperature.json")


@pytest.fixture
def finished(tmp_path):
    """A run whose markers say that all is done, without its models: enough for a plan."""
    recipe = load_recipe("quickstart", output_dir=str(tmp_path))
    run = RunContext(recipe)
    for stage in STAGE_TABLE:
        if stage.name == "students":
            for method in ("probability_temperature", "logit_temperature"):
                write_json(run.folder.fit(method), {"recalibration": {"method": method, "value": 0.5}})
        if stage.name == "evaluate":
            break
        for unit in stage.units(run):
            write_json(run.folder.marker(unit.name), {"key": unit.key, "status": "done", "seconds": 1.0})
            run.add(unit, done=True)
    return recipe, run


def statuses(recipe) -> dict[str, str]:
    return {unit.unit: unit.status for unit in plan_units(recipe)}


def test_only_what_needs_an_unfinished_unit_is_unchecked(finished):
    recipe, run = finished
    done = statuses(recipe)
    trained = ("direct", "first", "first_t", "sft")
    assert {done[student_unit(arm)] for arm in trained} == {"done"}
    assert done["report"] == done["evaluate/first"] == "to do"
    marker = run.folder.marker(recalibration_unit())
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "status": "running"}))
    # The key of `first` holds the fitted value, which may change; those of the others are known
    found = statuses(recipe)
    assert [found[student_unit(arm)] for arm in trained] == ["done", "unchecked", "unchecked", "done"]


def test_a_plan_reports_a_bug_and_a_broken_marker_instead_of_to_do(finished, monkeypatch):
    recipe, run = finished
    monkeypatch.setattr("first_trl.experiments.stages.students.fitted_value", lambda *_: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        plan_units(recipe)
    monkeypatch.undo()
    run.folder.marker("data").write_text("{")
    with pytest.raises(ValueError, match=r"data/unit.json is no JSON .* Delete it"):
        plan_units(recipe)


def test_a_run_says_what_is_missing_where_a_marker_promises_it(finished):
    recipe, run = finished
    run.folder.fit("probability_temperature").unlink()
    assert statuses(recipe)[student_unit("first")] == "unchecked"
    again = RunContext(recipe)
    with pytest.raises(ValueError, match=r"'students/first' needs what 'recalibration' has made.*Delete .*unit.json"):
        for stage in STAGE_TABLE:
            stage.run(again)
