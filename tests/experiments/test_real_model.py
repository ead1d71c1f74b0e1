"""The recipe of the pretrained model on 200 rows: from precompute to an exported student in stock transformers."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_from_disk
from transformers import pipeline

from first_trl.cli import main
from first_trl.experiments.smoke.rows import write_mmlu_questions
from first_trl.tasks.decision import decision_request
from first_trl.tasks.decision_extras import read_temperature
from first_trl.utils.resources import recipe_path
from tests.conftest import DATA
from tests.support.smollm2 import smollm2


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

KEPT = ("teacher", "sft", "direct", "direct_ts", "direct_novelty", "first", "first_t")
SIZES = {"train": 200, "validation": 64, "test": 64, "ood": 64}


def test_from_precompute_to_export(tmp_path):
    model = smollm2()
    questions = DATA / "mmlu" if (DATA / "mmlu").is_dir() else write_mmlu_questions(tmp_path / "mmlu")
    data = yaml.safe_load(Path(recipe_path("real/smollm2_mmlu_field")).read_text())
    data["arms"] = {name: data["arms"][name] for name in KEPT}
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(data, sort_keys=False))
    overrides = [
        f"teacher.name_or_path={model}",
        f"student.name_or_path={model}",
        f"task.path={questions}",
        "student.keep_layers=4",
        "teacher.sft.num_train_epochs=1",
        "training.num_train_epochs=1",
        "report.baselines=[sft, direct]",
        *(f"task.splits.{role}.limit={size}" for role, size in SIZES.items()),
    ]
    assert main(["run", str(recipe), "--seed", "0", *overrides, "--output-dir", str(tmp_path / "run")]) == 0
    run = tmp_path / "run" / "seed-0"
    report = json.loads((run / "report" / "report.json").read_text())
    assert set(report["results"]) == set(KEPT)
    # The fine-tuned model reads the questions: four answers, a quarter right by chance
    assert report["results"]["teacher"]["test"]["full_vocab"]["accuracy"] > 0.4
    student = run / "students" / "direct" / "model"
    assert json.loads((student / "config.json").read_text())["num_hidden_layers"] == 4
    decide = pipeline("decision", model=str(student))
    rows = load_from_disk(str(run / "data" / "rows" / "test"))
    answers = [decide(decision_request(row))["answer"]["probabilities"] for row in rows.select(range(16))]
    stored = pq.read_table(run / "evaluate" / "direct" / "test.parquet").to_pydict()["choice_logprobs"][:16]
    scaled = np.array(stored) / read_temperature(student)
    expected = np.exp(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))
    np.testing.assert_allclose([list(answer.values()) for answer in answers], expected, atol=1e-4)
