"""A recipe that names a user's task, estimator, recalibration, teacher backend and report metric, up to its report."""

import json

import numpy as np
import pytest
import yaml
from datasets import load_dataset

from first_trl.cli import main


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
