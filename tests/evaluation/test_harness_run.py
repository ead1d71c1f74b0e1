"""A real run of lm-evaluation-harness (not a dependency: `pip install lm-eval`) on real questions with a real model."""

import argparse
import gzip
import json

import numpy as np
import pytest

from first_trl import expected_calibration_error
from first_trl.cli import calibrate
from first_trl.evaluation.readers import add_ece_to_harness_task, read_harness_log, read_harness_results
from tests.conftest import DATA
from tests.support.harness import run_harness


pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}"),
    pytest.mark.filterwarnings("ignore"),
]

TASK = """\
task: arc_easy_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: "\\n"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
  - metric: acc_mutual_info
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The first 80 test questions of ARC-Easy and all with 3 or 5 choices, through the harness."""
    from lm_eval.loggers import EvaluationTracker

    folder = tmp_path_factory.mktemp("harness")
    with gzip.open(DATA / "arc_easy" / "test.jsonl.gz", "rt") as file:
        questions = [json.loads(line) for line in file]
    ragged = [q for q in questions[80:] if len(q["question"]["choices"]) != 4]
    with open(folder / "arc.jsonl", "w") as file:
        for q in questions[:80] + ragged:
            choices = q["question"]["choices"]
            gold = [choice["label"] for choice in choices].index(q["answerKey"])
            row = {"question": q["question"]["stem"], "choices": [choice["text"] for choice in choices], "gold": gold}
            file.write(json.dumps(row) + "\n")
    base = folder / "arc_easy_local.yaml"
    base.write_text(TASK.format(data=folder / "arc.jsonl"))
    add_ece_to_harness_task(base, gold='doc["gold"]')
    results = run_harness(folder, DATA / "tiny_llama" / "stories260K", ["arc_easy_local", "arc_easy_local_ece"])
    in_process = read_harness_results(results)
    tracker = EvaluationTracker(output_path=str(folder / "out"))
    tracker.save_results_aggregated(results=results, samples=results["samples"])
    for task, samples in results["samples"].items():
        tracker.save_results_samples(task_name=task, samples=samples)
    (log,) = (folder / "out").rglob("samples_arc_easy_local_20*.jsonl")
    return results["results"], in_process, log


def test_log_equals_the_results_in_process(run):
    results, in_process, log = run
    (memory,) = in_process["arc_easy_local"]
    (logged,) = read_harness_log(log)
    assert logged.task == "arc_easy_local" and len(logged) == len(memory) >= 90
    assert len({len(row) for row in logged.logprobs}) >= 2
    assert logged.readings == ["acc", "acc_norm", "acc_mutual_info"]
    for reading in logged.readings:
        one, two = memory.confidences(reading), logged.confidences(reading)
        ece = expected_calibration_error(one.confidence, one.correct.astype(int))
        assert two.report()["ece"] == pytest.approx(ece, abs=1e-12)
        # The accuracy the harness itself reports.
        assert two.correct.mean() == pytest.approx(results["arc_easy_local"][f"{reading},none"], abs=1e-12)


def test_ece_inside_the_harness_equals_ours(run):
    results, _, log = run
    (logged,) = read_harness_log(log)
    result = logged.confidences("acc")
    assert results["arc_easy_local_ece"]["ece,none"] == pytest.approx(result.report()["ece"], abs=1e-12)
    assert results["arc_easy_local_ece"]["acc,none"] == pytest.approx(result.correct.mean(), abs=1e-12)


def test_calibrate_prints_it(run, tmp_path, capsys):
    results, _, log = run
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    assert calibrate.main(parser.parse_args([str(log), "--output-dir", str(tmp_path)])) == 0
    report = json.loads((tmp_path / "report.json").read_text())["arc_easy_local acc"]
    expected = results["arc_easy_local_ece"]["ece,none"]
    assert report["ece"] == pytest.approx(expected, abs=1e-12)
    assert f"{expected:.6f}" in capsys.readouterr().out
    assert np.isfinite(report["extras"]["nll"])
