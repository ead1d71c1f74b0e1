"""Arms that train on the choices alone, from the recipe to the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import load_dataset, load_from_disk

from first_trl.cli import main
from first_trl.experiments.recipe import load_recipe
from first_trl.utils.resources import recipe_path
from tests.support.quickstart import TINY


ARMS = {
    "teacher": {"kind": "teacher"},
    "first": {
        "kind": "distill", "recalibration": "logit_temperature", "restrict_to_choices": True, "brier_weight": 0.5,
        "rps_weight": 2.0,
    },
    "plus": {"kind": "distill", "restrict_to_choices": True, "data": ["train", "unlabelled"], "lora": {"r": 4}},
}  # fmt: skip
ONE_STEP = [
    "training.global_batch_size=96",
    "training.logging_steps=1",
    "capture.k=253",
    "capture.logprob_dtype=float32",
    "evaluation={splits: [test], null_draws: 100}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    data = yaml.safe_load(recipe_path("quickstart").read_text())
    data["arms"] = ARMS
    data["task"]["splits"]["unlabelled"] = {"split": "unlabelled", "limit": 50}
    folder = tmp_path_factory.mktemp("choices")
    path = folder / "choices.yaml"
    path.write_text(yaml.safe_dump(data))
    assert main(["run", str(path), *TINY, *ONE_STEP, "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def shares(run: Path, role: str) -> np.ndarray:
    """The teacher over the twelve choices of every row, from the files of the cache."""
    rows = load_dataset("parquet", data_files=str(run / "cache" / "data" / f"{role}-*.parquet"), split="train")
    answers = sorted(
        {label for row in load_from_disk(str(run / "data" / "tokens" / "train"))["labels"] for label in row}
    )
    tools = [token for token in answers if token >= 0]
    found = []
    for row in rows:
        entries = dict(zip(row["teacher_topk_ids"][0], row["teacher_topk_logprobs"][0], strict=True))
        logits = np.array([entries[token] for token in tools])
        found.append(np.exp(logits - np.logaddexp.reduce(logits)))
    return np.array(found)


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum(axis=1).mean())


@pytest.mark.slow
def test_students_see_the_choices_alone(run):
    """One step over all rows logs the entropy of its target."""
    fit = json.loads((run / "recalibration" / "logit_temperature-choices.json").read_text())
    plain = json.loads((run / "recalibration" / "logit_temperature.json").read_text())
    assert (fit["top_k"], plain["top_k"]) == (12, 253)
    value = fit["recalibration"]["value"]
    tempered = shares(run, "train") ** (1 / value)
    tempered /= tempered.sum(axis=1, keepdims=True)
    logs = {
        arm: json.loads((run / "students" / arm / "training_log.json").read_text())[0] for arm in ("first", "plus")
    }
    assert logs["first"]["teacher_entropy"] == pytest.approx(entropy(tempered), rel=1e-4)
    assert logs["first"]["loss"] == pytest.approx(logs["first"]["kl"] + logs["first"]["choice_score"], rel=1e-3)
    assert json.loads((run / "students" / "first" / "unit.json").read_text())["inputs"]["fitted"] == value
    assert len(shares(run, "unlabelled")) == 50
    report = json.loads((run / "report" / "report.json").read_text())
    assert set(report["results"]) == {*ARMS, "bayes"}
    assert (
        "| Brier score | 0.5 times that among the choices is added |"
        in (run / "students" / "first" / "model" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "arm, message",
    [
        (
            {"brier_weight": 1.0},
            "arms.one.brier_weight is a score among the choices: set arms.one.restrict_to_choices",
        ),
        ({"rps_weight": -1.0, "restrict_to_choices": True}, "rps_weight"),
        ({"restrict_to_choices": True, "top_k": 3}, "arms.one.restrict_to_choices has no meaning with `top_k=3`"),
        ({"kind": "sft", "restrict_to_choices": True}, "arms.one.restrict_to_choices has no meaning for kind sft"),
        ({"restrict_to_choices": 1}, "restrict_to_choices"),
    ],
)
def test_arms_without_a_meaning(arm, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("quickstart", [f"arms.one={json.dumps({'kind': 'distill', **arm})}"])
