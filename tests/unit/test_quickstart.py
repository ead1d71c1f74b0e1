"""The quickstart as shipped: what it must show on every seed."""

import json

import pytest

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
