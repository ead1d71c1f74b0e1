"""Recipes whose arms train on soft labels of the rows, and whose teacher has another tokenizer, to their report."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from first_trl import answer_pipeline, expected_calibration_error
from first_trl.cache.folder import load_manifest
from first_trl.calibration.conditional import OptionTemperature
from first_trl.cli import main
from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
from first_trl.experiments.recipe import load_recipe
from first_trl.experiments.share.push import write_student_cards
from first_trl.tasks import get_task
from first_trl.tasks.decision_extras import read_temperature
from first_trl.vocabulary import NO_ENTRY
from tests.support.words import save_word_model


WORDS = ["which", "kind", "number", "?", "Answer", "Choices", ":", *"ABCD", "cork", "anvil", "brick", "kite", "\n"]
WORDS += [*(f"({letter})" for letter in "ABCD"), "\nAnswer", "\n(A)", "\n(B)", "\n(C)", "\n(D)", *map(str, range(96))]
ONE_STEP = {"num_train_epochs": 1, "learning_rate": 1e-3, "global_batch_size": 64, "logging_steps": 1}
# What the three arms share one step of is the student before it
ARMS = {
    "teacher": {"kind": "teacher"},
    "teacher_ts": {"kind": "temperature_scaling", "of": "teacher"},
    "plain": {"kind": "distill", "restrict_to_choices": True},
    "soft": {"kind": "distill", "soft_label_weight": 1.0, "brier_weight": 0.5},
    "soft_t": {"kind": "distill", "soft_label_weight": 1.0, "recalibration": "logit_temperature", "objective": "nll"},
    "both": {"kind": "distill", "soft_label_weight": 0.25},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("soft")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(96):
        options = rng.permutation(["cork", "anvil", "brick", "kite"])[: 2 + i % 3].tolist()
        votes = rng.multinomial(5, np.arange(1, len(options) + 1) / sum(range(len(options) + 1))).tolist()
        rows.append({"question": f"which kind number {i} ?", "choices": options, "target_votes": votes})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "soft",
        "task": {
            "name": "custom",
            "path": str(folder / "rows.jsonl"),
            "splits": {"train": "train[:64]", "validation": "train[64:80]", "test": "train[80:]"},
        },
        # Words of the teacher in another order, so that none of its ids means the same to the student
        "teacher": str(save_word_model(folder / "teacher", WORDS[::-1], seed=1)),
        "student": str(save_word_model(folder / "student", WORDS)),
        "capture": {"target": "options", "k": 4, "logprob_dtype": "float32"},
        "recalibration": {"methods": []},
        "training": ONE_STEP,
        "arms": ARMS,
        "evaluation": {"null_draws": 100},
        "output_dir": str(folder / "run"),
    }
    (folder / "soft.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(folder / "soft.yaml"), "--dry-run"]) == 0
    assert main(["run", str(folder / "soft.yaml")]) == 0
    return folder / "run"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def logged(run: Path, arm: str) -> dict:
    return json.loads((run / "students" / arm / "training_log.json").read_text())[0]


def votes(run: Path) -> list[np.ndarray]:
    return [np.array(row) for row in load_from_disk(str(run / "data" / "rows" / "train"))["target_probs"]]


def asked(run: Path, model: str) -> list[np.ndarray]:
    """Log-probabilities of the choices of the training rows by a model before any training, among all tokens."""
    folder = run.parent / model
    rows = load_from_disk(str(run / "data" / "rows" / "train"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = evaluate_multiple_choice(model, tokenizer, rows, disable_tqdm=True).predictions
    return [row[:n] for row, n in zip(found["choice_logprobs"], found["n_choices"], strict=True)]


def kl(targets: list[np.ndarray], logprobs: list[np.ndarray]) -> float:
    """The loss of one step over all rows: what else the student may say has no part in the target."""
    return float(
        np.mean([
            (p[p > 0] * (np.log(p[p > 0]) - q[p > 0])).sum() for p, q in zip(targets, logprobs, strict=True)
        ])
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_students_train_on_the_soft_labels_of_their_rows(run):
    soft, student = votes(run), asked(run, "student")
    shares = [np.exp(row - np.logaddexp.reduce(row)) for row in asked(run, "teacher")]
    assert logged(run, "plain")["kl"] == pytest.approx(kl(shares, student), rel=1e-4)
    assert logged(run, "soft")["kl"] == pytest.approx(kl(soft, student), rel=1e-4)
    mixed = [0.25 * p + 0.75 * q for p, q in zip(soft, shares, strict=True)]
    assert logged(run, "both")["kl"] == pytest.approx(kl(mixed, student), rel=1e-4)
    fit = read(run / "recalibration" / "logit_temperature-nll-soft_labels.json")
    power = [p ** (1 / fit["recalibration"]["value"]) for p in soft]
    assert logged(run, "soft_t")["kl"] == pytest.approx(kl([p / p.sum() for p in power], student), rel=1e-4)
    assert logged(run, "soft")["loss"] > logged(run, "soft")["kl"] + 0.01
    card = (run / "students" / "both" / "model" / "README.md").read_text()
    assert "| Soft labels | those of the training rows are 25% of the target, over the choices |" in card


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_teacher_of_another_tokenizer_is_matched_by_option(run):
    """Its cache holds the student's tokens with the teacher's probabilities, and its own scores are with its own tokens."""
    rows = load_dataset("parquet", data_files=str(run / "cache" / "data" / "train-*.parquet"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "student")
    letters = tokenizer.convert_tokens_to_ids([f" {letter}" for letter in "ABCD"])
    assert letters != AutoTokenizer.from_pretrained(run.parent / "teacher").convert_tokens_to_ids(
        [" A", " B", " C", " D"]
    )
    for row, logprobs in zip(rows, asked(run, "teacher"), strict=True):
        entries = dict(zip(row["teacher_topk_ids"][0], row["teacher_topk_logprobs"][0], strict=True))
        expected = logprobs - np.logaddexp.reduce(logprobs)
        np.testing.assert_allclose([entries[token] for token in letters[: len(expected)]], expected, atol=1e-5)
        assert all(value == NO_ENTRY for token, value in entries.items() if token not in letters[: len(expected)])
    manifest = load_manifest(run / "cache", "train")
    assert manifest.backend["name"] == "options" and "another tokenizer" in manifest.notes[0]
    report = read(run / "report" / "report.json")
    assert set(report["results"]) == set(ARMS)
    test = load_from_disk(str(run / "data" / "rows" / "test"))
    folder = run.parent / "teacher"
    model, own = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = evaluate_multiple_choice(model, own, test, disable_tqdm=True).report
    assert report["results"]["teacher"]["test"]["options"]["nll"] == pytest.approx(found["options"]["nll"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_temperature_by_number_of_options_lives_with_the_student(run, tmp_path):
    """Fitted where questions have 2, 3 or 4 options: the pipeline and the command give what the report scores."""
    folder = run / "students" / "plain" / "model"
    temperature = read_temperature(folder)
    assert isinstance(temperature, OptionTemperature) and temperature.depends_on_options
    assert (
        read_temperature(folder).to_dict() == read(run / "evaluate" / "plain" / "decisions.json")["option_temperature"]
    )
    rows = load_from_disk(str(run / "data" / "rows" / "test"))
    stored = pq.read_table(run / "evaluate" / "plain" / "test.parquet")["choice_logprobs"].to_pylist()
    divisors = [temperature.temperature("choice", len(row)) for row in stored]
    assert len(set(divisors)) == 3
    scaled = [np.array(row) / divisor for row, divisor in zip(stored, divisors, strict=True)]
    expected = [np.exp(row - np.logaddexp.reduce(row)) for row in scaled]
    answers = answer_pipeline(str(folder), batch_size=8)(rows)
    for answer, p in zip(answers, expected, strict=True):
        np.testing.assert_allclose(np.array(answer["choices"]) / answer["option_mass"], p, atol=1e-5)
    report = read(run / "report" / "report.json")["decisions"]["plain"]
    correct = np.array([p.argmax() == gold for p, gold in zip(expected, rows["gold"], strict=True)])
    ece = expected_calibration_error(np.array([p.max() for p in expected]), correct.astype(int), n_bins=10)
    assert report["roles"]["test"]["ece"] == pytest.approx(ece, abs=1e-6) and "(n/" in report["temperature_text"]
    words = [f"--path={run.parent / 'rows.jsonl'}", "--split=train[80:]", f"--output-dir={tmp_path}"]
    assert main(["evaluate", str(folder), "--task=custom", *words]) == 0
    for line, p in zip((tmp_path / "predictions.jsonl").read_text().splitlines(), expected, strict=True):
        np.testing.assert_allclose(json.loads(line)["probabilities"], p, atol=1e-5)
    scores = read(tmp_path / "report.json")["scores"]["model"]
    gold = [np.array(row) for row in rows["target_probs"]]
    assert scores["kl"] == pytest.approx(kl(gold, [np.log(p) for p in expected]), rel=1e-5)
    # Stock transformers has one temperature, and that is said
    config = read(folder / "decision.json")
    assert config["temperature"]["choice"] == pytest.approx(temperature.scalars()["choice"])
    with pytest.warns(UserWarning, match="stock transformers divides by .* whatever the number of options"):
        write_student_cards(run, arms=["plain"])


def test_soft_labels_of_a_file_of_ones_own(tmp_path):
    rows = [
        {"question": "q1", "choices": ["a", "b", "c"], "target_votes": [1, 3, 0]},
        {"question": "q2", "choices": ["a", "b"], "target_probs": [0.5, 0.5]},
        {"question": "q3", "choices": ["a", "b"], "target_probs": "[0.9, 0.1]", "answer": "B"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = get_task("custom").load("train", path=str(path)).dataset
    assert loaded["gold"][:] == [1, 0, 1]
    assert loaded["target_probs"][:] == [[0.25, 0.75, 0.0], [0.5, 0.5], [0.9, 0.1]]
    permuted = get_task("custom", permutations=2).load("train", path=str(path)).dataset
    assert len(permuted) == 6 and permuted["options"][:2] != loaded["options"][:1] * 2
    for row in permuted:
        moved = dict(zip(row["options"], row["target_probs"], strict=True))
        own = loaded[loaded["question"].index(row["question"])]
        assert [moved[option] for option in own["options"]] == own["target_probs"]
    for bad, message in (
        ({"target_votes": [1, 2]}, "row 2.*2 numbers for 3 choices"),
        ({"target_probs": [0.5, 0.2, 0.1]}, "adds up to 0.8"),
        ({"target_votes": [1, 0, 0], "target_probs": [1, 0, 0]}, "both there"),
        ({"target_probs": [True, 0, 0]}, "no number"),
        ({}, "'answer' is missing"),
    ):
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in [rows[0], {"question": "q", "choices": ["a", "b", "c"], **bad}])
        )
        with pytest.raises(ValueError, match=message):
            get_task("custom").load("train", path=str(path))


@pytest.mark.parametrize(
    "words, message",
    [
        (['arms.one={"kind": "sft", "soft_label_weight": 1.0}'], "arms.one.soft_label_weight has no meaning for kind sft"),
        (['arms.one={"kind": "distill", "soft_label_weight": 1.5}'], "soft_label_weight must be in"),
        (['arms.one={"kind": "distill", "soft_label_weight": 1.0, "top_k": 3}'], "soft_label_weight has no meaning with"),
        (["capture.target=options"], "fine-tune it in a recipe of its own"),
        (["capture.target=options", "capture.num_draws=5"], "no draws"),
        (["capture.target=option"], "capture.target"),
    ],
)  # fmt: skip
def test_keys_without_a_meaning(words, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("quickstart", words)


def test_rows_without_soft_labels_are_said_before_anything_is_trained(tmp_path, capsys):
    words = ['arms={"one": {"kind": "distill", "soft_label_weight": 0.5}}', "report={}", "--stage", "data"]
    assert main(["run", "quickstart", *words, "--output-dir", str(tmp_path)]) == 2
    assert "arms.one.soft_label_weight: the rows of 'train' have no soft labels" in capsys.readouterr().err
