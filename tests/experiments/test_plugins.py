"""A recipe that names a user's task, estimator, recalibration, teacher backend and report metric, up to its report."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard

from first_trl.cli import main
from first_trl.experiments.share.cards import write_student_cards
from first_trl.utils.registry import Registry
from first_trl.utils.resources import recipe_path
from tests.support.registrations import registered_only_here


ROOT = Path(__file__).parents[2]
LLAMA = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
RECIPE = {
    "name": "plugged",
    "plugins": ["tests.support.plugins"],
    "task": {"name": "parity", "splits": {"train": "train", "validation": "validation", "test": "test"}},
    "teacher": {
        "architecture": "llama",
        "config": {**LLAMA, "hidden_size": 16, "intermediate_size": 32},
        "sft": {"num_train_epochs": 1, "learning_rate": 1e-2, "global_batch_size": 20},
    },
    "student": {"architecture": "llama", "config": {**LLAMA, "hidden_size": 8, "intermediate_size": 16}},
    "capture": {"k": 4, "backend": "noted", "backend_options": {"note": "from a recipe"}},
    "training": {"num_train_epochs": 1, "global_batch_size": 20, "save_strategy": "no"},
    "recalibration": {"methods": ["uniform_mix"]},
    "arms": {
        "teacher": {"kind": "teacher"},
        "mixed": {"kind": "distill", "estimator": "squared_error", "recalibration": "uniform_mix"},
    },
    "evaluation": {"splits": ["test"]},
}


@pytest.fixture(scope="module", autouse=True)
def only_here():
    with registered_only_here():
        yield


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "plugged.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def test_a_recipe_runs_with_all_five(recipe, tmp_path):
    folder = tmp_path / "run"
    assert main(["run", recipe, "--output-dir", str(folder)]) == 0
    manifest = json.loads((folder / "cache" / "manifest" / "train.json").read_text())
    assert "from a recipe" in json.dumps(manifest)
    report = json.loads((folder / "report" / "report.json").read_text())
    for arm in RECIPE["arms"]:
        rows = load_dataset("parquet", data_files=str(folder / "evaluate" / arm / "test.parquet"), split="train")
        sure = np.array(rows["top_prob"]) > 0.5
        expected = float((sure & ~np.array(rows["top_is_gold"])).mean())
        assert report["results"][arm]["test"]["full_vocab"]["sure_and_wrong"] == pytest.approx(expected)
    text = (folder / "report" / "report.md").read_text()
    assert "Sure and wrong %" in text and "uniform_mix" in text
    card = ModelCard.load(write_student_cards(folder)["mixed"])
    value = report["results"]["mixed"]["test"]["full_vocab"]["sure_and_wrong"]
    assert "Sure and wrong %" in card.text and f"{100 * value:.1f}" in card.text
    (stated,) = (result for result in card.data.eval_results if result.metric_type == "sure_and_wrong")
    assert stated.metric_value == pytest.approx(value) and stated.metric_name == "Sure and wrong"
    # A process that has not read the recipe learns of the plugin from the run
    done = python("-m", "first_trl", "report", str(folder), "--output-dir", str(tmp_path / "merged"))
    assert done.returncode == 0, done.stderr
    assert "Sure and wrong %" in (tmp_path / "merged" / "report.md").read_text()


PLUGIN = """
from first_trl import register_metric

@register_metric("zeros", title="Zeros")
def zeros(**predictions):
    return 0.0
"""


def python(*words, cwd=None, path=()):
    places = os.pathsep.join([str(place) for place in (*path, ROOT)])
    env = {**os.environ, "PYTHONPATH": places}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, cwd=cwd or ROOT, env=env
    )


def test_an_installed_distribution_names_its_plugin(tmp_path):
    (tmp_path / "zeros_plugin.py").write_text(PLUGIN)
    info = tmp_path / "zeros_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zeros-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[first_trl.plugins]\nzeros = zeros_plugin\n")
    code = "from first_trl.plugins import report_metrics; print([metric.key for metric in report_metrics()][-1])"
    done = python("-c", code, path=[tmp_path])
    assert done.stdout.strip() == "zeros", done.stderr
    (tmp_path / "zeros_plugin.py").write_text("import no_such_thing")
    done = python("-c", code, path=[tmp_path])
    assert "'zeros_plugin' of the installed distribution 'zeros-plugin' cannot be loaded" in done.stderr


def test_a_plugin_beside_its_recipe_is_found_from_elsewhere(recipe, tmp_path):
    (tmp_path / "zeros_plugin.py").write_text(PLUGIN)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import sys; from first_trl import load_recipe; load_recipe(sys.argv[1], sys.argv[2:]); "
        "from first_trl.plugins import METRICS; print(list(METRICS))"
    )
    both = "plugins=[tests.support.plugins,zeros_plugin]"
    done = python("-c", code, recipe, both, cwd=elsewhere)
    assert done.stdout.strip() == "['sure_and_wrong', 'zeros']", done.stderr
    (tmp_path / "zeros_plugin.py").unlink()
    # A recipe that needs no other plugin, which would import torch first
    plain = shutil.copy(recipe_path("quickstart"), tmp_path)
    done = python("-c", code, plain, "plugins=[zeros_plugin]", cwd=elsewhere)
    assert f"There is no plugin module 'zeros_plugin' in {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.name=parrity", "Did you mean 'parity'"),
        ("arms.mixed.estimator=squared_eror", "Did you mean 'squared_error'"),
        ("arms.mixed.recalibration=uniform_mixx", "Did you mean 'uniform_mix'"),
        ("arms.mixed.recalibration_value=1.5", "0 <= u < 1"),
        ("capture.backend=notted", "Did you mean 'noted'"),
        ("plugins=[no_such_plugin]", "no plugin module 'no_such_plugin'"),
    ],
)
def test_names_are_checked_with_the_recipe(recipe, capsys, change, message):
    assert main(["run", recipe, change]) != 0
    assert message in capsys.readouterr().err


CHANGING = """
from dataclasses import dataclass

from first_trl import register_task
from first_trl.tasks import Example, Task
from first_trl.tasks.word_tokenizer import word_tokenizer


@register_task("same")
@dataclass(frozen=True)
class Same(Task):
    name = "same"
    splits = {name: name for name in ("train", "validation", "test")}

    def rows(self, split, path, revision, seed):
        first = ("train", "validation", "test").index(split) * 20
        for number in range(first, first + 20):
            yield str(number), Example(f"{number} is", " odd", (" even", " odd"), 1)

    def tokenizer(self, path=None, revision=None, seed=0):
        return word_tokenizer((*map(str, range(60)), "is", "even", "odd"))
"""
ONE_ARM = {
    **{key: value for key, value in RECIPE.items() if key not in ("capture", "recalibration")},
    "plugins": ["changing"],
    "task": {"name": "same", "splits": {name: name for name in ("train", "validation", "test")}},
    "capture": {"k": 4},
    "recalibration": {"methods": []},
}


@pytest.fixture
def changing(tmp_path):
    (tmp_path / "changing.py").write_text(CHANGING)

    def run(*words):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**ONE_ARM, "arms": {"teacher": {"kind": "teacher"}}}))
        done = python("-m", "first_trl", "run", str(path), "--output-dir", str(tmp_path / "run"), *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


# Quick is the same of the other plugins, below
@pytest.mark.slow
def test_rows_of_a_task_whose_code_was_changed_are_made_again(changing, tmp_path):
    changing("--stage", "data")
    assert "data: done before, kept" in changing("--stage", "data")
    (tmp_path / "changing.py").write_text(
        CHANGING.replace('" odd", (" even", " odd"), 1', '" even", (" even", " odd"), 0')
    )
    assert "made again" in changing("--stage", "data")
    assert set(Dataset.load_from_disk(str(tmp_path / "run" / "data" / "rows" / "test"))["gold"]) == {0}


def test_files_that_a_plugin_imports_from_beside_it_are_part_of_its_code(changing, tmp_path):
    """Also those that they import in turn; other files are not, nor what is installed."""
    (tmp_path / "changing.py").write_text(
        CHANGING.replace('" odd", (" even", " odd"), 1', "*ANSWER").replace(
            "@register_task", "import numpy\n\nfrom shared.answers import ANSWER\n\n\n@register_task"
        )
    )
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "answers.py").write_text("from .gold import GOLD\n\nANSWER = GOLD\n")
    (tmp_path / "shared" / "gold.py").write_text('GOLD = " odd", (" even", " odd"), 1\n')
    changing("--stage", "data")
    (tmp_path / "other.py").write_text("something = 'else'\n")
    assert "data: done before, kept" in changing("--stage", "data")
    (tmp_path / "shared" / "gold.py").write_text('GOLD = " even", (" even", " odd"), 0\n')
    assert "made again" in changing("--stage", "data")
    assert set(Dataset.load_from_disk(str(tmp_path / "run" / "data" / "rows" / "test"))["gold"]) == {0}


def test_code_is_parsed_once_for_all_that_asks_for_it(tmp_path, monkeypatch):
    """Every unit of a run asks, and a package may have hundreds of files."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "parsed_once.py").write_text("import beside_it\n\n\nclass Mine:\n    pass\n")
    (tmp_path / "beside_it.py").write_text("VALUE = 1\n")
    registry, parsed = Registry("thing", {}), []
    registry.register("mine")(importlib.import_module("parsed_once").Mine)
    monkeypatch.setattr("ast.parse", lambda *args, parse=ast.parse: parsed.append(args) or parse(*args))
    before = registry.code("mine")
    assert registry.code("mine") == before and len(parsed) == 2
    (tmp_path / "beside_it.py").write_text("VALUE = 2\n")
    assert registry.code("mine") != before and len(parsed) == 3


def under_other_names(text):
    for name in ("parity", "noted", "squared_error", "uniform_mix", "sure_and_wrong"):
        text = re.sub(rf"\b{name}\b", f"{name}_alone", text)
    return text


def test_what_was_made_with_changed_code_is_made_again_and_nothing_else(tmp_path, monkeypatch, capsys):
    """Of an estimator the student, of a recalibration its fit and the student, of a metric the scores."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["backend", "estimator", "metric", "recalibration", "task"]
    for name in names:  # each alone, so that one can be changed
        text = (ROOT / "tests" / "support" / "plugins" / f"{name}.py").read_text()
        (tmp_path / f"alone_{name}.py").write_text(under_other_names(text))
    path = tmp_path / "alone.yaml"
    recipe = {**RECIPE, "plugins": [f"alone_{name}" for name in names]}
    path.write_text(under_other_names(yaml.safe_dump(recipe)))

    def made():
        assert main(["run", str(path), "--output-dir", str(tmp_path / "run")]) == 0
        said = capsys.readouterr().out
        return {line.split(":")[0].strip() for line in said.splitlines() if line.endswith(": running")}

    with registered_only_here():
        assert {"data", "teacher", "cache", "recalibration", "students/mixed", "evaluate/mixed"} <= made()
        trained = {"students/mixed", "evaluate/mixed", "report"}
        expected = {
            "metric": {"evaluate/teacher", "evaluate/mixed", "report"},
            "estimator": trained,
            "recalibration": {"recalibration", *trained},
        }
        for name, units in expected.items():
            with (tmp_path / f"alone_{name}.py").open("a") as file:
                file.write("\n# changed\n")
            assert made() == units, name
