"""`first-trl evaluate`: any model on any task, from files to printed scores."""

import json
import shutil

import numpy as np
import pytest
import yaml

from first_trl import answer_pipeline
from first_trl.calibration.conditional import KindTemperature, OptionTemperature
from first_trl.calibration.novelty import NoveltyTemperature
from first_trl.cli import main
from first_trl.evaluation.answer_states import collect_answer_states
from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
from first_trl.evaluation.novelty import fit_reference
from first_trl.evaluation.novelty_scaling import NoveltyScaling
from first_trl.tasks import get_task
from first_trl.tasks.decision import decision_request, save_decision_config
from first_trl.tasks.decision_extras import write_decision_extras
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("student")
    task = get_task("digits")
    tokenizer = task.tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_decision_config(folder, task, tokenizer, task.load("test", limit=40).dataset, temperature=2.5)
    return str(folder)


def test_one_token_answers(student, tmp_path, capsys):
    task = get_task("digits")
    rows = task.load("test", limit=40).dataset
    command = [
        "evaluate",
        student,
        "--task",
        "digits",
        "--limit",
        "40",
        "--output-dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main([*command, "--eval-results", "someone/digits"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    ours = evaluate_multiple_choice(
        tiny_llama(vocab_size=143), task.tokenizer(), rows, temperature=2.5, disable_tqdm=True
    ).report["options"]
    assert report["temperature"] == 2.5 and report["scoring"] == "token"
    for name, value in {"accuracy": ours["accuracy"], "nll": ours["nll"], "ece_argmax": ours["ece"]}.items():
        assert report["scores"]["model"][name] == pytest.approx(value, abs=1e-6)
    assert report["scores"]["uniform"]["mean_confidence"] == pytest.approx(0.1)
    assert {"model", "uniform", "prior"} <= set(capsys.readouterr().out.split())
    entries = yaml.safe_load((tmp_path / ".eval_results" / "digits.yaml").read_text())
    assert entries[0]["dataset"] == {"id": "someone/digits", "task_id": "digits_accuracy"}


def test_a_temperature_by_novelty_is_that_of_the_answer_pipeline(student, tmp_path, capsys):
    task, folder = get_task("digits"), tmp_path / "student"
    shutil.copytree(student, folder)
    model, tokenizer = tiny_llama(vocab_size=143), task.tokenizer()
    train = collect_answer_states(model, tokenizer, task.load("train", limit=60).dataset, [2], disable_tqdm=True)
    fit = NoveltyTemperature(0.3, (0.6,), 1.3, False, 60, 0.0)
    reference = fit_reference(train.states[2], layer=2, k=5)
    digest = NoveltyScaling("distance", fit, reference, None, None, {}).save(folder)
    write_decision_extras(folder, novelty={"file": "novelty.safetensors", "sha256": digest})
    rows = task.load("test", limit=40).dataset
    command = ["evaluate", str(folder), "--task", "digits", "--limit", "40", "--device", "cpu"]
    assert main([*command, "--novelty", "--batch-size", "7", "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    given = answer_pipeline(folder, novelty=True, batch_size=3, device="cpu")(rows)
    for ours, pipe in zip(found, given, strict=True):
        shares = np.array(pipe["choices"]) / pipe["option_mass"]
        assert ours["probabilities"] == pytest.approx(shares, abs=1e-6)
        assert ours["novelty"] == pytest.approx(pipe["novelty"], abs=1e-6)
    report = json.loads((tmp_path / "out/report.json").read_text())
    new = np.mean([pipe["new"] for pipe in given])
    assert report["novelty"]["new"] == pytest.approx(new) and f"Novelty: {100 * new:.1f} %" in printed
    assert report["temperature"]["by"] == "novelty"
    temperatures = [row["temperature"] for row in found]
    assert report["temperature"]["mean"] == pytest.approx(np.mean(temperatures)) and np.ptp(temperatures) > 0.1
    for more in (["--temperature", "2"], ["--permutations", "2"], ["--scoring", "choices"]):
        assert main([*command, "--novelty", *more]) != 0
        assert "brings its own temperatures" in capsys.readouterr().err
    assert main(["evaluate", student, *command[2:], "--novelty"]) != 0
    assert "brings no novelty.safetensors" in capsys.readouterr().err


def test_answers_of_several_tokens_are_scored_by_their_text(data_folder, tmp_path):
    model = str(data_folder / "tiny_llama" / "stories260K")
    command = ["evaluate", model, "--task", "openbook_qa", "--path", str(data_folder / "openbook_qa"), "--limit", "12"]
    for length in ("none", "tokens", "unconditional"):
        folder = tmp_path / length
        options = ["--option", "completion= {text}", "--length", length, "--output-dir", str(folder)]
        assert main([*command, *options, "--device", "cpu"]) == 0
        report = json.loads((folder / "report.json").read_text())
        assert report["scoring"] == "choices" and report["scores"]["model"]["n"] == 12
        assert report["length"] == length and report["scores"]["prior"]["accuracy"] < 0.9
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert all(np.isclose(sum(row["probabilities"]), 1) for row in rows)


@pytest.mark.filterwarnings("ignore:The temperature depends on the number:UserWarning")
def test_a_temperature_by_number_of_options(student, tmp_path, capsys):
    task, folder = get_task("digits"), tmp_path / "student"
    shutil.copytree(student, folder)
    rows = task.load("test", limit=40).dataset
    fitted = OptionTemperature(1.0, {"choice": KindTemperature(0.1, 0.3, 4.0, 500)})
    save_decision_config(folder, task, task.tokenizer(), rows, temperature=fitted)
    output = ["--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    command = ["evaluate", str(folder), "--task", "digits", "--limit", "40", *output]
    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["temperature"] == fitted.to_dict()
    wanted = fitted.temperature("choice", 10)
    result = evaluate_multiple_choice(
        tiny_llama(vocab_size=143), task.tokenizer(), rows, temperature=wanted, disable_tqdm=True
    )
    assert report["scores"]["model"]["nll"] == pytest.approx(result.report["options"]["nll"], abs=1e-6)
    # Requests too
    path = tmp_path / "cases.jsonl"
    gold = rows[0]["choices"][rows[0]["gold"]].strip()
    path.write_text(json.dumps({"id": "one", **decision_request(rows[0]), "gold": {"answer": gold}}))
    assert main(["evaluate", str(folder), "--task", "system_one", "--path", str(path), *output]) == 0
    (line,) = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    p = np.exp(result.predictions["choice_logprobs"][0])
    assert json.loads(line)["probabilities"] == pytest.approx((p / p.sum()).tolist(), abs=1e-5)
    assert main([*command, "--scoring", "choices"]) == 2
    assert "depends on the number of options" in capsys.readouterr().err


def test_requests_of_decision_models(student, tmp_path):
    path = tmp_path / "cases.jsonl"
    case = {"id": "one", "questions": {"digit": {"type": "choice", "criteria": dict.fromkeys("0123456789")}}}
    path.write_text(json.dumps({**case, "state": {"prompt": "r0c0=1 digit :"}, "gold": {"digit": "7"}}))
    command = ["evaluate", student, "--task", "system_one", "--path", str(path), "--output-dir", str(tmp_path)]
    assert main([*command, "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["scoring"] == "decision"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "system_one"], "needs --path"),
        (["--task", "digitz"], "Did you mean 'digits'"),
        (["--task", "digits", "--option", "x"], "KEY=VALUE"),
        (["--task", "digits", "--scoring", "decision"], "belongs to --task system_one"),
        (["--task", "digits", "--scoring", "token", "--length", "bytes"], "--length is about whole texts"),
        (["--task", "digits", "--permutations", "1"], "--permutations must be 2 or more"),
        (
            ["--task", "digits", "--permutations", "3", "--limit", "4"],
            "Option order needs rows of a task with lettered",
        ),
        (["--task", "digits", "--temperature", "0"], "--temperature must be above 0"),
    ],
)
def test_bad_requests_are_answered_with_one_sentence(student, tmp_path, capsys, options, message):
    assert main(["evaluate", student, *options, "--output-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_cut_prompts_are_said(student, tmp_path, capsys):
    command = ["evaluate", student, "--task", "digits", "--limit", "8", "--max-length", "6", "--device", "cpu"]
    assert main([*command, "--output-dir", str(tmp_path)]) == 0
    assert "8 of 8 prompts are longer than 6 tokens and lose their beginning" in capsys.readouterr().err
