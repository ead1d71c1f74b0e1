"""The quickstart as shipped: what it must show on every seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk

from first_trl import answer_pipeline, expected_calibration_error
from first_trl.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_margins(seed, tmp_path):
    """
    Margins that held on seven seeds of a prototype of the same experiment. Nothing is said about temperature scaling:
    it is a strong baseline and may win.
    """
    assert main(["run", "quickstart", "--seed", str(seed), "--output-dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    scores = {arm: result["test"]["full_vocab"] for arm, result in report["results"].items()}
    assert scores["teacher"]["ece"] > 0.06
    assert scores["sft"]["ece"] - scores["first"]["ece"] > 0.10
    assert scores["direct"]["ece"] - scores["first"]["ece"] > 0.03
    assert scores["first"]["accuracy"] >= scores["sft"]["accuracy"]
    assert report["kept_mass"][4] > 0.93
    assert {"sft_ts", "sft_short", "direct_ts", "label_smoothing", "first_t", "first_lora"} <= set(scores)
    for arm in ("first", "first_t", "first_lora"):
        check_answers(tmp_path, arm)


def check_answers(run: Path, arm: str) -> None:
    """The helper's confidence has the report's ECE, and who abstains below its median is right more often."""
    rows = load_from_disk(str(run / "data" / "rows" / "test"))
    answers = answer_pipeline(str(run / "students" / arm / "model"), temperature=1.0, batch_size=256)(rows)
    confidence = np.array([answer["confidence"] for answer in answers])
    right = np.array([answer["index"] == gold for answer, gold in zip(answers, rows["gold"], strict=True)])
    report = json.loads((run / "report" / "report.json").read_text())["results"][arm]["test"]["full_vocab"]
    assert abs(expected_calibration_error(confidence, right.astype(int), n_bins=10) - report["ece"]) < 1e-6
    assert right.mean() == report["accuracy"]
    given = confidence >= np.median(confidence)
    assert right[given].mean() > right.mean() > right[~given].mean()
