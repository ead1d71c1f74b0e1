"""Cards of a run, and what is pushed of it, from a folder written by hand: no model is trained."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard

from first_trl.cli import main
from first_trl.evaluation.predictions import multiple_choice_report
from first_trl.experiments.recipe import ArmSpec, HubSpec, TeacherSpec, load_recipe
from first_trl.experiments.share import push as share
from first_trl.experiments.share.cards import write_student_cards
from first_trl.experiments.share.model import run_model_card
from first_trl.experiments.share.push import push_run
from first_trl.experiments.share.run import Run
from tests.support.families import family_tokenizer
from tests.support.predictions import predictions
from tests.support.tiny import tiny_llama


POINT = {"kind": "distill", "recalibration": "probability_temperature"}
ARMS = {
    "teacher": ArmSpec("teacher", label="Teacher"),
    "sft@seed=1": ArmSpec("sft", swept={"seed": 1}),
    "sft": ArmSpec("sft", label="SFT"),
    "first": ArmSpec(**POINT, label="FIRST"),
    "first_nll": ArmSpec(**POINT, label="FIRST", objective="nll", min_value=0.2),
    "cautious": ArmSpec(
        "distill", recalibration="probability_temperature", recalibration_value=0.4, estimator="probability_softmax",
        student_temperature=0.7, teacher="crossfit", data=["train", "unlabelled"],
    ),
    "epoch": ArmSpec("distill", teacher="epoch"),
    "k@top_k=1": ArmSpec("distill", top_k=1, swept={"top_k": 1}),
    "k@top_k=2": ArmSpec("distill", top_k=2, swept={"top_k": 2}),
    "k_ts@top_k=2": ArmSpec("temperature_scaling", of="k@top_k=2", swept={"top_k": 2}),
}  # fmt: skip


def a_fit(objective: str, value: float, ece: float, **changes) -> dict:
    fit = {"recalibration": {"method": "probability_temperature", "value": value}, "objective": objective,
           "estimator": "topk", "top_k": 5, "n": 60, "raw": {"ece": 0.3}, "chosen": {"ece": ece}, "min_value": None}  # fmt: skip
    return {**fit, **changes}


@pytest.fixture
def run(tmp_path) -> Path:
    recipe = load_recipe("quickstart")
    recipe.arms, recipe.capture.k, recipe.seed = ARMS, 5, 0
    recipe.teachers = {
        "crossfit": TeacherSpec(sft={"num_train_epochs": 3, "hub_token": "hf_secret"}, folds=4),
        "epoch": TeacherSpec(select="nll"),
    }
    splits = recipe.task.splits
    splits["unlabelled"] = splits["train"]
    splits["ood"].path = "questions/ood.csv"
    recipe.evaluation.splits = ["validation", "ood", "test"]
    recipe.training = {"learning_rate": 0.1, "adam_beta1": 0.8, "hub_token": "hf_secret", "output_dir": "/home/me"}
    folder = tmp_path / "run"
    (folder / "report").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe), sort_keys=False))
    reports = {
        name: multiple_choice_report(predictions(400, 0.02 * i, seed=i).predictions)
        for i, name in enumerate([*ARMS, "bayes"])
    }
    # The best of all is out of reach
    reports["bayes"] = multiple_choice_report(predictions(400, seed=2).predictions)
    domains = {"validation": "validation", "ood": "out-of-domain", "test": "in-domain"}
    report = {
        "results": {name: dict.fromkeys(domains, value) for name, value in reports.items()},
        "rows": {role: {"rows": 400, "domain": domain} for role, domain in domains.items()}
        | {"train": {"rows": 2400}, "unlabelled": {"rows": 900, "without_answer": 900}},
        "arms": {},
        "recalibration": {},
    }
    (folder / "report" / "report.json").write_text(json.dumps(report))
    for name, arm in ARMS.items():
        if arm.kind in ("sft", "distill"):
            model = folder / "students" / name / "model"
            model.mkdir(parents=True)
            (model / "config.json").write_text("{}")
            (model.parent / "versions.json").write_text(json.dumps({"first_trl": "0.0.9", "trl": "9.8.7"}))
    (folder / "teacher" / "model").mkdir(parents=True)
    (folder / "cache-epoch" / "manifest").mkdir(parents=True)
    (folder / "cache-crossfit" / "fold-0" / "manifest").mkdir(parents=True)
    return folder


def change(folder: Path, name: str, **values) -> None:
    path = folder / name
    data = yaml.safe_load(path.read_text())
    data.update(values)
    path.write_text(yaml.safe_dump(data) if path.suffix == ".yaml" else json.dumps(data))


def card_of(run: Path, arm: str) -> str:
    return write_student_cards(run, arms=[arm])[arm].read_text()


def test_the_fit_is_that_of_the_arm_when_two_share_a_value(run):
    fits = {
        "probability_temperature": a_fit("ece", 0.3, 0.01),
        "probability_temperature-k2": a_fit("ece", 0.3, 0.02, top_k=2),
        "probability_temperature-nll-min0.2": a_fit("nll", 0.3, 0.03, min_value=0.2),
        "probability_temperature-bucket": a_fit("ece", 0.3, 0.04, estimator="bucket"),
    }
    arms = {
        "first": {"fit": "probability_temperature"},
        "first_nll": {"fit": "probability_temperature-nll-min0.2"},
    }
    change(run, "report/report.json", arms=arms, recalibration=fits)
    assert "fitted by ECE" in card_of(run, "first") and "from 30.0 to 1.0 %" in card_of(run, "first")
    other = card_of(run, "first_nll")
    assert "fitted by NLL" in other and "from 30.0 to 3.0 %" in other and "not below 0.2" in other


def test_a_fit_that_the_report_does_not_name_is_not_taken(run):
    (run / "recalibration").mkdir()
    (run / "recalibration" / "probability_temperature.json").write_text(json.dumps(a_fit("ece", 0.5, 0.01)))
    (run / "students" / "first" / "unit.json").write_text(json.dumps({"inputs": {"fitted": 0.3}}))
    text = card_of(run, "first")
    assert "c = 0.3; fitted on the validation rows |" in text


def test_secrets_and_paths_of_the_recipe_stay_away(run):
    for arm in ("first", "cautious"):
        text = card_of(run, arm)
        assert "| `learning_rate` | 0.1 |" in text and "| `adam_beta1` | 0.8 |" in text
        assert "hf_secret" not in text and "/home/me" not in text
    # A file of another working folder is no repository
    assert "questions/ood" not in text


def test_roles_say_what_their_scores_are_of(run):
    text = card_of(run, "first")
    headings = [line.split(":")[0] for line in text.splitlines() if line.startswith("### ")]
    assert headings == ["### `validation` (validation)", "### `ood` (out-of-domain)", "### `test` (in-domain)"]
    results = ModelCard(text).data.eval_results
    assert {result.dataset_name for result in results} == {"noisy_world (ood)", "noisy_world (test)"}
    assert "## Evaluation on `test` (in-domain)" in run_model_card(Run(run), "teacher", "me/teacher")
    # A run from before roles said so
    change(run, "report/report.json", rows={})
    change(run, "recipe.yaml", evaluation={"splits": ["test", "ood"]})
    assert [Run(run).domain(role) for role in ("test", "ood")] == ["in-domain", "out-of-domain"]


def test_points_of_a_sweep_stand_on_their_own_cards_alone(run):
    def table(arm: str) -> set[str]:
        first = card_of(run, arm).split("### `ood`")[1].split("### ")[0]
        return {line.split("|")[1].strip() for line in first.splitlines() if line.startswith("| ") and "[" not in line}

    common = {"Teacher", "SFT", "FIRST (first)", "FIRST (first_nll)", "cautious", "epoch",
              "True posterior (best possible)", "Model", "---"}  # fmt: skip
    assert table("sft") == common - {"SFT"} | {"**SFT** (this model)"}
    assert table("k@top_k=2") == common | {"**k@top_k=2** (this model)", "k_ts@top_k=2"}
    text = card_of(run, "k@top_k=2")
    assert "Not in the table: 2 other points of sweeps, whose ECE lies between" in text
    beaten = [line for line in text.splitlines() if line.startswith("- Lower ECE")]
    assert beaten and not any("True posterior" in line for line in beaten)


def test_a_card_names_what_its_student_learned_from(run):
    text = card_of(run, "cautious")
    assert (
        "| Training data | task `noisy_world`, split `train`, 2,400 rows; `unlabelled`: task `noisy_world`, split "
        "`train`, 900 rows (900 without an answer) |" in text
    )
    assert "| Student temperature | 0.7 " in text and "a softmax over the student's probabilities" in text
    assert "4 times, each without one share of the groups of rows" in text
    assert "teacher `crossfit` of the recipe with `num_train_epochs` 3" in text
    assert "| Made with | first_trl 0.0.9, trl 9.8.7 |" in text
    other = card_of(run, "epoch")
    assert "epoch with the lowest negative log-likelihood" in other and "4 times" not in other


@pytest.fixture
def pushed(monkeypatch) -> dict:
    """What is sent, and how, in place of a Hub."""
    sent: dict = {}

    def push_folder(folder, repo_id, **options):
        sent[repo_id] = options | {"card": (folder / "README.md").read_text()}
        return f"commit of {repo_id}"

    def push_cache(folder, repo_id, **options):
        sent[repo_id] = options | {"folder": folder.name}
        return f"commit of {repo_id}"

    monkeypatch.setattr(share, "push_folder", push_folder)
    monkeypatch.setattr(share, "push_teacher_cache", push_cache)
    return sent


def test_what_is_pushed_is_what_the_recipe_says(run, pushed):
    hub = asdict(HubSpec("alice", license="mit", arms=["first"], cache=False))
    change(run, "recipe.yaml", hub=hub)
    assert set(push_run(run)) == {"first"}
    assert list(pushed) == ["alice/quickstart-first"]
    options = pushed.pop("alice/quickstart-first")
    assert options["private"] is True and "license: mit" in options["card"]
    # What is given wins
    push_run(run, "bob", arms=["sft"], cache=True, private=False, license="apache-2.0")
    assert list(pushed) == ["bob/quickstart-cache", "bob/quickstart-sft"]
    assert pushed["bob/quickstart-sft"]["private"] is False
    assert "license: apache-2.0" in pushed["bob/quickstart-sft"]["card"]
    # Both pushes are on record
    record = json.loads((run / "share.json").read_text())
    assert {name: place["repo_id"] for name, place in record.items()} == {
        "first": "alice/quickstart-first", "cache": "bob/quickstart-cache", "sft": "bob/quickstart-sft",
    }  # fmt: skip


def test_without_a_word_in_the_recipe_the_points_of_sweeps_stay(run, pushed):
    with pytest.raises(ValueError, match=r"no `hub` that names a user .*--namespace"):
        push_run(run)
    assert set(push_run(run, "alice")) == {"cache", "cache-epoch", "sft", "first", "first_nll", "cautious", "epoch"}
    options = pushed["alice/quickstart-first"]
    assert options["private"] is None
    assert pushed["alice/quickstart-cache"]["teacher_name"] == "llama made from scratch, fine-tuned"


@pytest.mark.parametrize("base", [True, False])
def test_a_base_of_this_machine_is_announced_and_may_stay(run, pushed, base, monkeypatch, capsys):
    local = run / "base" / "student" / "model"
    local.mkdir(parents=True)
    (local / "config.json").write_text("{}")
    adapter = run / "students" / "first" / "model" / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": str(local)}))
    push, before = share.push_folder, {}

    def push_folder(folder, repo_id, **options):
        before[repo_id] = capsys.readouterr().out
        return push(folder, repo_id, **options)

    monkeypatch.setattr(share, "push_folder", push_folder)
    words = ["push", str(run), "--namespace", "alice", "--arms", "first", "--no-cache"]
    assert main(words if base else [*words, "--no-base"]) == 0
    assert list(pushed) == [*(["alice/quickstart-base"] if base else []), "alice/quickstart-first"]
    if base:
        said = before["alice/quickstart-base"]
        assert "The base of first is on this machine alone and is uploaded as alice/quickstart-base (--no-base" in said
    else:
        assert "uploaded" not in before["alice/quickstart-first"]


def test_the_cache_of_another_teacher_is_shared_beside_its_student(run, pushed):
    push_run(run, "alice", arms=["epoch", "cautious"])
    place = pushed["alice/quickstart-cache-epoch"]
    assert place["folder"] == "cache-epoch" and place["teacher_name"].endswith("fine-tuned (epoch)")
    assert "alice/quickstart-cache-epoch" in ModelCard(pushed["alice/quickstart-epoch"]["card"]).data.datasets
    assert ModelCard(pushed["alice/quickstart-cautious"]["card"]).data.datasets is None


def test_two_things_of_one_name_are_refused(run, pushed):
    arms = {**{name: asdict(arm) for name, arm in ARMS.items()}, "cache-epoch": asdict(ArmSpec("sft"))}
    change(run, "recipe.yaml", arms=arms)
    (run / "students" / "cache-epoch" / "model").mkdir(parents=True)
    (run / "students" / "cache-epoch" / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="would go to one repository"):
        push_run(run, "alice", arms=["epoch", "cache-epoch"])
    assert pushed == {}


def test_the_licence_of_a_teacher_in_a_folder_is_read(run, tmp_path, pushed):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    change(run, "recipe.yaml", teacher={**recipe["teacher"], "name_or_path": str(folder)})
    push_run(run, "alice", arms=["first"])
    assert pushed["alice/quickstart-cache"]["teacher_license"] == "cc-by-4.0"
    assert "(teacher: cc-by-4.0)" in pushed["alice/quickstart-first"]["card"]


@pytest.mark.parametrize(
    ("completion", "end", "choices"),
    [(" {letter}", "Answer:", [" A", " B"]), ("{letter}", "Answer: (", ["A", "B"]), (" {text}", "Answer:", [])],
)
def test_the_snippet_runs_with_the_choices_of_the_task(run, completion, end, choices, tmp_path, monkeypatch, capsys):
    """Rows of the user's own: neither their questions nor the words of their answers enter the card."""
    template = "{question}\n{choices}\n" + end
    task = {"name": "custom", "path": "mine.csv", "options": {"template": template, "completion": completion}}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    change(run, "recipe.yaml", task={**recipe["task"], **task})
    words = [["Tarn", "Lune", "Esk"], ["iron", "mercury"]]
    rows = [
        {
            "prompt": f"{question}\n(A) {answers[0]}\n(B) {answers[1]}\n{end}",
            "choices": [completion.format(letter=a, text=b) for a, b in zip("ABC", answers, strict=False)],
        }
        for question, answers in zip(("Which river?", "Which metal?"), words, strict=True)
    ]
    Dataset.from_list(rows).save_to_disk(Run(run).folder.rows("validation"))
    tokenizer, model = family_tokenizer(), tmp_path / "student"
    tokenizer.save_pretrained(model)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(model)
    text = write_student_cards(run, arms=["first"], repo_ids={"first": str(model)})["first"].read_text()
    assert "| Task | `custom` with `completion`" in text and "| Prompt template | `" in text
    assert not any(word in text for word in ("Tarn", "mercury", "Which"))
    block = re.search(r"## Use the confidence\n\n```python\n(.*?)```", text, re.S)[1]
    assert (f"choices={json.dumps(choices)}" in block) if choices else "choices" not in block
    if choices:
        assert json.dumps(end)[1:-1] in block
    exec(block, {})
    assert capsys.readouterr().out.split()
