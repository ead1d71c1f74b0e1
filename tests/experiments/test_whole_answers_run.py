"""A recipe whose answers have two tokens, from its data to its report and cards."""

import contextlib
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from first_trl import answer_pipeline, expected_calibration_error
from first_trl.cli import main
from first_trl.tasks.decision_extras import read_decision_extras
from tests.support.quickstart import TINY
from tests.support.tiny import tiny_llama


COLOURS, ANIMALS = ["red", "blue", "green"], ["fox", "hen", "cow"]
WORDS = [*COLOURS, *ANIMALS, "which", "animal", "number", "?", "Answer", "Choices", ":", "A", "B", "C"]
ARMS = (
    "arms={teacher: {kind: teacher}, sft: {kind: sft}, sft_ts: {kind: temperature_scaling, of: sft}, "
    "first: {kind: distill, estimator: bucket, recalibration: logit_temperature, objective: nll}}"
)
STEPS = "{num_train_epochs: 1, learning_rate: 1.0e-2, global_batch_size: 8}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, beside its model and questions."""
    folder = tmp_path_factory.mktemp("whole")
    vocabulary = ["<pad>", "<eos>", "<unk>", "\n", *(f"{i}" for i in range(60)), *(f"({letter})" for letter in "ABC")]
    vocabulary += [*WORDS, *(f" {word}" for word in [*WORDS, *map(str, range(60))])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_next")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    tiny_llama(vocab_size=len(vocabulary), max_position_embeddings=64).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        # Two of the three share their first token, so that the second one decides
        colours, animals = rng.permutation(COLOURS), rng.permutation(ANIMALS)
        options = [f"{colours[0]} {animals[0]}", f"{colours[0]} {animals[1]}", f"{colours[1]} {animals[0]}"]
        rows.append(f"which animal number {i} ?,{','.join(options)},{'ABC'[i % 3]}\n")
    (folder / "questions.csv").write_text("question,A,B,C,answer\n" + "".join(rows))
    command = [
        "run",
        "my_questions",
        f"task.path={folder / 'questions.csv'}",
        'task.options={shuffle_seed: null, completion: " {text}"}',
        "task.max_length=60",
        f"teacher.name_or_path={folder / 'model'}",
        f"student.name_or_path={folder / 'model'}",
        f"teacher.sft={STEPS}",
        "teacher.lora=null",
        f"training={STEPS}",
        "recalibration={positions: all, methods: []}",
        ARMS,
        "evaluation.scoring=choices",
        "evaluation.length=tokens",
        "evaluation.permutations=3",
        "task.splits.train={split: 'train[:70%]', options: {permutations: 2}}",
        "evaluation.null_draws=100",
        "--output-dir",
        str(folder / "run"),
    ]
    assert main([*command, "--dry-run"]) == 0
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(command) == 0
    assert (
        "first is no decision model of stock transformers: its answers are scored by their whole text"
        in output.getvalue()
    )
    assert not list((folder / "run").rglob("decision.json"))
    return folder


def test_keys_that_have_no_meaning_are_refused(tmp_path, capsys):
    run = ["run", "quickstart", "--output-dir", str(tmp_path / "run")]
    for word, message in (
        ("evaluation.permutations=1", "evaluation.permutations must be 0 or at least 2"),
        ("evaluation.length=tokens", "evaluation.length is about whole texts"),
        ("evaluation.scoring=words", "evaluation.scoring"),
    ):
        assert main([*run, word, "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert main([*run, *TINY, "evaluation.permutations=2", "--stage", "data"]) == 2
    assert "none of the evaluated roles has lettered options to permute" in capsys.readouterr().err


def test_the_teacher_is_captured_at_every_answer_token(folder):
    files = str(folder / "run" / "cache" / "data" / "train-*.parquet")
    for row in load_dataset("parquet", data_files=files, split="train"):
        assert len(row["teacher_topk_ids"]) == sum(label != -100 for label in row["labels"]) == 2


def test_predictions_are_sums_over_the_tokens_of_each_choice(folder):
    run = folder / "run"
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = load_from_disk(str(run / "data" / "rows" / "test"))
    for arm, source in (("first", "first"), ("sft_ts", "sft")):
        model = AutoModelForCausalLM.from_pretrained(run / "students" / source / "model")
        stored = run / "evaluate" / arm / "temperature.json"
        temperature = json.loads(stored.read_text())["temperature"] if stored.is_file() else 1.0
        predictions = pq.read_table(run / "evaluate" / arm / "test.parquet").to_pylist()
        assert len(predictions) == len(rows) > 0
        for row, prediction in zip(rows, predictions, strict=True):
            expected = []
            for choice in row["choices"]:
                ids, start = tokenizer(row["prompt"] + choice)["input_ids"], len(tokenizer(row["prompt"])["input_ids"])
                with torch.no_grad():
                    lp = (model(torch.tensor([ids])).logits[0] / temperature).double().log_softmax(-1)
                assert len(ids) - start == 2
                expected.append(sum(float(lp[t - 1, ids[t]]) for t in range(start, len(ids))))
            np.testing.assert_allclose(prediction["choice_logprobs"], expected, atol=1e-5)
            np.testing.assert_allclose(prediction["choice_scores"], np.array(expected) / 2, atol=1e-5)
    assert json.loads((run / "evaluate" / "sft_ts" / "temperature.json").read_text())["temperature"] != 1.0


def test_the_student_brings_its_scoring_temperature_and_thresholds(folder):
    """What the answers are scored by lives with the student: the pipeline and the command give the evaluation of the run."""
    run = folder / "run"
    student = run / "students" / "sft" / "model"
    extras = read_decision_extras(student)
    temperature = json.loads((run / "evaluate" / "sft_ts" / "temperature.json").read_text())["temperature"]
    assert extras["scoring"] == {"scoring": "choices", "length": "tokens"}
    assert extras["temperature"] == extras["thresholds"]["temperature"] == temperature
    rows = load_from_disk(str(run / "data" / "rows" / "test"))
    stored = pq.read_table(run / "evaluate" / "sft_ts" / "test.parquet").to_pylist()
    pipe = answer_pipeline(student, confidence="renormalized", batch_size=4)
    answers = pipe(rows)
    for answer, row in zip(answers, stored, strict=True):
        scores = np.array(row["choice_scores"])
        assert answer["confidence"] == pytest.approx(np.exp(scores - np.logaddexp.reduce(scores)).max(), abs=1e-5)
        np.testing.assert_allclose(answer["choices"], np.exp(row["choice_logprobs"]), atol=1e-5)
    report = json.loads((run / "report" / "report.json").read_text())
    confidence = np.array([answer["confidence"] for answer in answers])
    correct = np.array([answer["index"] == gold for answer, gold in zip(answers, rows["gold"], strict=True)])
    ece = expected_calibration_error(confidence, correct.astype(int), n_bins=10)
    assert report["decisions"]["sft"]["roles"]["test"]["ece"] == pytest.approx(ece, abs=1e-6)
    assert report["results"]["sft_ts"]["test"]["options"]["ece"] == pytest.approx(ece, abs=1e-6)
    # 9 rows cannot promise 5 % of errors, and a promise is about answers scored in one way
    with pytest.raises(ValueError, match=r"No threshold keeps max_error=0\.05"):
        pipe(rows[0], abstain_below="max_error=0.05")
    with pytest.raises(ValueError, match="scored by scoring='choices'"):
        answer_pipeline(student, scoring="choices", length="none", abstain_below="max_error=0.05")
    words = ["--option=completion= {text}", f"--path={folder / 'questions.csv'}", "--split=train[85%:]"]
    assert main(["evaluate", str(student), "--task=custom", *words, f"--output-dir={folder / 'own'}"]) == 0
    found = json.loads((folder / "own" / "report.json").read_text())
    assert (found["scoring"], found["length"], found["temperature"]) == ("choices", "tokens", temperature)
    assert found["scores"]["model"]["ece_argmax"] == pytest.approx(ece, abs=1e-6)


def test_the_report_says_what_its_numbers_are(folder):
    run = folder / "run"
    text = (run / "report" / "report.md").read_text()
    assert "the whole text with the highest log-probability divided by its tokens is the gold one" in text
    report = json.loads((run / "report" / "report.json").read_text())["results"]["first"]["test"]
    assert report["scoring"] == "choices" and report["length"] == "tokens" and "unit" not in report
    assert report["full_vocab"]["accuracy"] == report["options"]["accuracy"]
    assert 0 < report["option_mass"] < 1
    card = (run / "students" / "first" / "model" / "README.md").read_text()
    assert 'pipe(prompt, choices=[...], scoring="choices", abstain_below=0.5)' in card
    assert (
        "Confidence: the probability of that text" in card
        and "most likely token" not in card.split("## Evaluation")[1]
    )
    order = report["option_order"]
    assert order["n"] == report["n"] == 9 and order["n_orders"] == 3
    assert "| Flips % |" in text and f"| {100 * order['flip_rate']:.1f} |" in text
    assert main(["report", str(run), "--output-dir", str(folder / "merged")]) == 0
    merged = (folder / "merged" / "report.md").read_text()
    assert "divided by its tokens" in merged and "| Flips % |" in merged
    counts = json.loads((run / "data" / "counts.json").read_text())
    assert counts["train"]["rows"] == 84 and counts["train"]["added"] == 42 and "added" not in counts["test"]
