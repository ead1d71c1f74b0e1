"""Trained students in stock transformers: the pipeline and the server give the probabilities of our own evaluation."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer, pipeline
from transformers.utils.import_utils import is_serve_available

from first_trl import answer_pipeline, evaluate_multiple_choice, expected_calibration_error, get_task
from first_trl.calibration.threshold import ConfidenceThreshold, fit_threshold
from first_trl.cli import main
from first_trl.evaluation.loading import load_model
from first_trl.experiments.share.push import write_student_cards
from first_trl.tasks.decision import decision_request, save_decision_config
from first_trl.tasks.decision_extras import read_decision_extras, read_temperature
from first_trl.utils.resources import recipe_path
from tests.support.quickstart import TINY


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ARMS = {
    "sft": {"kind": "sft"},
    "sft_ts": {"kind": "temperature_scaling", "of": "sft"},
    "lora": {"kind": "distill", "lora": {"r": 4, "target_modules": "all-linear"}},
}
ROWS = 200
SIZES = [
    "task.splits.validation={split: 'validation[:50%]', limit: 64}",
    "task.splits.threshold={split: 'validation[50%:]', limit: 100}",
    f"task.splits.test={{split: test, limit: {ROWS}}}",
    "evaluation.splits=[test]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decisions")
    data = yaml.safe_load(Path(recipe_path("quickstart")).read_text())
    data |= {"arms": ARMS, "report": {}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    assert main(["run", str(folder / "tiny.yaml"), *TINY, *SIZES, "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def rows_of(run: Path, role: str = "test") -> Dataset:
    return load_from_disk(str(run / "data" / "rows" / role))


def expected(run: Path, arm: str) -> np.ndarray:
    """Option probabilities of the run's own evaluation, at the temperature that lives with the student."""
    temperature = read_temperature(run / "students" / arm / "model")
    assert isinstance(temperature, float) and temperature != 1.0
    stored = pq.read_table(run / "evaluate" / arm / "test.parquet").to_pydict()["choice_logprobs"]
    scaled = np.array(stored) / temperature
    return np.exp(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))


def check(run: Path, arm: str, answers: list[dict]) -> None:
    found = np.array([list(answer["probabilities"].values()) for answer in answers])
    assert found.shape == (ROWS, 12)
    np.testing.assert_allclose(found, expected(run, arm), atol=1e-5)
    gold = np.array(rows_of(run)["gold"])
    ece = expected_calibration_error(found.max(1), (found.argmax(1) == gold).astype(int), n_bins=10)
    report = read(run / "report" / "report.json")
    assert ece == pytest.approx(report["decisions"][arm]["roles"]["test"]["ece"], abs=1e-6)
    if arm == "sft":
        assert ece == pytest.approx(report["results"]["sft_ts"]["test"]["options"]["ece"], abs=1e-6)
    # Not what the answer calls its confidence
    stated = np.array([answer["confidence"] for answer in answers])
    assert np.abs(stated - found.max(1)).max() > 1e-3


@pytest.mark.parametrize("arm", ["sft", "lora"])
def test_stock_pipeline_has_our_probabilities(run, arm):
    folder = str(run / "students" / arm / "model")
    # An adapter is loaded onto its base, where the pipeline looks for everything else unless it is told
    names = {"tokenizer": folder, "decision_config": folder} if arm == "lora" else {}
    decide = pipeline("decision", model=folder, **names)
    check(run, arm, [decide(decision_request(row))["answer"] for row in rows_of(run)])


@pytest.mark.parametrize("arm", ["sft", "lora"])
def test_our_pipeline_reads_the_same_temperature(run, arm):
    answers = answer_pipeline(str(run / "students" / arm / "model"), batch_size=64)(rows_of(run))
    found = np.array([np.array(answer["choices"]) / answer["option_mass"] for answer in answers])
    np.testing.assert_allclose(found, expected(run, arm), atol=1e-5)


def test_thresholds_are_fitted_on_rows_of_their_own(run):
    folder = run / "students" / "sft" / "model"
    stored = read_decision_extras(folder)["thresholds"]
    assert stored["fitted_on"] == "threshold"
    assert stored["temperature"] == pytest.approx(
        read(run / "evaluate" / "sft_ts" / "temperature.json")["temperature"]
    )
    rows = rows_of(run, "threshold")
    assert len(rows) == 100 and not set(rows["prompt"]) & set(rows_of(run, "validation")["prompt"])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(str(folder))[0]
    result = evaluate_multiple_choice(model, tokenizer, rows, temperature=stored["temperature"], disable_tqdm=True)
    for reading, thresholds in stored["readings"].items():
        given = result.confidences(reading)
        for values in thresholds:
            again = fit_threshold(given.confidence, given.correct, max_error=values["max_error"])
            kept = ConfidenceThreshold.from_dict(values)
            assert (kept.n, kept.coverage, kept.error) == (100, again.coverage, again.error)
    report = (run / "report" / "report.md").read_text()
    assert "## Decision models" in report and "task.splits.threshold" not in report
    assert (run / "report" / "risk_coverage_test.png").stat().st_size > 5000
    card = (folder / "README.md").read_text()
    assert "No threshold on 100 `threshold` rows keeps the error rate below 5 %." in card
    assert card.count('pipeline("decision"') == 1


def test_a_run_of_an_earlier_version_says_what_is_missing(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluate" / "sft" / "decisions.json").unlink()
    cards = write_student_cards(tmp_path / "run", arms=["sft", "lora"])
    assert "sft was evaluated before students brought their temperature" in capsys.readouterr().out
    assert [card.read_text().count('pipeline("decision"') for card in cards.values()] == [0, 1]


def test_another_evaluation_leaves_nothing_of_the_one_before(run, tmp_path):
    """Answers scored by their whole text, then by one token again, then by neither, of the same student."""
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "students" / "sft" / "model"
    fitted = tmp_path / "run" / "evaluate" / "sft" / "decisions.json"
    before, token = read_decision_extras(folder), read(fitted)

    def written(values: dict) -> tuple[bool, dict]:
        fitted.write_text(json.dumps(values))
        write_student_cards(tmp_path / "run", arms=["sft"])
        return (folder / "decision.json").is_file(), read_decision_extras(folder)

    stock, extras = written(token | {"scoring": "choices"})
    assert not stock and extras["scoring"]["scoring"] == "choices"
    assert written(token) == (True, before)
    assert written({"reason": "Answers merge with the prompt."}) == (False, {})


def test_thresholds_are_not_evaluated(tmp_path, capsys):
    words = [*SIZES, "evaluation.splits=[test, threshold]", "--output-dir", str(tmp_path), "--dry-run"]
    assert main(["run", "quickstart", *words]) == 2
    assert "thresholds are fitted on its rows" in capsys.readouterr().err


def ask(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
@pytest.mark.parametrize("arm", ["sft", "lora"])
def test_stock_server_has_our_probabilities(run, arm, tmp_path):
    folder = run / "students" / arm / "model"
    if arm == "lora":
        # The server reads whole models: the adapter goes into a subfolder of its base
        shutil.copytree(run / "base" / "student" / "model", tmp_path / "served")
        shutil.copytree(folder, tmp_path / "served" / "lora")
        tokenizer, temperature = AutoTokenizer.from_pretrained(folder), read_temperature(folder)
        folder = tmp_path / "served"
        save_decision_config(
            folder, get_task("noisy_world"), tokenizer, rows_of(run), temperature=temperature, adapter="lora"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "server.txt"
    with open(log, "w") as output:
        options = {"stdout": output, "stderr": output, "cwd": tmp_path, "env": {**os.environ, "HF_HUB_OFFLINE": "1"}}
        server = subprocess.Popen([*command, "--device", "cpu", "--dtype", "float32"], **options)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                ask(port, "/health")
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        requests = [{"model": str(folder), **decision_request(row)} for row in rows_of(run)]
        answers = [ask(port, "/v1/systemone", request)["answers"]["answer"] for request in requests]
    finally:
        server.kill()
        server.wait(timeout=30)
    check(run, arm, answers)
