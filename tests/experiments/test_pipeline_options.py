"""What a recipe may ask for beyond the plain run: other teachers, mixed rows, selection, fits of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset, load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from first_trl.cli import main
from first_trl.utils.resources import recipe_path
from tests.support.quickstart import TINY


ARMS = {
    "teacher": {"kind": "teacher"},
    "teacher_selected": {"kind": "teacher", "teacher": "selected"},
    "sft_selected": {"kind": "sft", "select": "nll", "training": {"num_train_epochs": 4, "learning_rate": 3e-2}},
    "sft_dropout": {"kind": "sft", "token_dropout": 0.3},
    "first": {"kind": "distill", "recalibration": "probability_temperature", "top_k": 3},
    "given": {"kind": "distill", "recalibration": "probability_temperature", "recalibration_value": 0.4},
    "plus": {
        "kind": "distill",
        "estimator": "bucket",
        "recalibration": "logit_temperature",
        "objective": "nll",
        "min_value": 1.0,
        "teacher": "selected",
        "data": ["train", "unlabelled"],
        "token_dropout": 0.15,
        "select": "nll",
    },
    "cross": {"kind": "distill", "teacher": "cross", "data": ["train", "unlabelled"]},
    "mean": {"kind": "distill", "teacher": "mean", "recalibration": "logit_temperature"},
    "mean_weighted": {
        "kind": "distill",
        "teacher": "mean",
        "disagreement_weight": 20.0,
        "training": {"logging_steps": 1},
    },
    "choices": {
        "kind": "distill",
        "restrict_to_choices": True,
        "lora": {"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    },
    "mean_disagreement": {"kind": "novelty_scaling", "of": "mean", "novelty": {"feature": "disagreement"}},
}
TEACHERS = {
    "selected": {"select": "nll", "sft": {"num_train_epochs": 3, "learning_rate": 3e-2}},
    "mean": {"committee": ["teacher", "selected"]},
    "cross": {"folds": 3, "fold_by": "group"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    data = yaml.safe_load(recipe_path("quickstart").read_text())
    data |= {"arms": ARMS, "teachers": TEACHERS}
    data["evaluation"]["splits"] = ["test"]
    data["task"]["splits"]["unlabelled"] = {"split": "unlabelled", "limit": 120}
    folder = tmp_path_factory.mktemp("options")
    path = folder / "options.yaml"
    path.write_text(yaml.safe_dump(data))
    assert main(["run", str(path), *TINY, "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def entries(folder: Path, role: str):
    return load_dataset("parquet", data_files=str(folder / "data" / f"{role}-*.parquet"), split="train")


def test_rows_of_a_fold_come_from_the_teacher_that_did_not_see_their_group(run):
    """Every cached entry is recomputed with all three teachers: only the one that was kept away from it fits."""
    teachers = [
        AutoModelForCausalLM.from_pretrained(run / "teacher-cross" / f"fold-{i}" / "model").eval() for i in range(3)
    ]
    group_of = {}
    for role in ("train", "validation", "unlabelled"):
        for row in load_from_disk(str(run / "data" / "tokens" / role)):
            group_of[tuple(row["input_ids"])] = row["group"]
    train_groups = [set(), set(), set()]
    for fold in range(3):
        for row in entries(run / "cache-cross" / f"fold-{fold}", "train"):
            train_groups[fold].add(group_of[tuple(row["input_ids"])])
    assert not train_groups[0] & train_groups[1] and not train_groups[0] & train_groups[2]
    every = set().union(*train_groups)
    seen_rows = 0
    for fold in range(3):
        for role in ("train", "validation", "unlabelled"):
            rows = entries(run / "cache-cross" / f"fold-{fold}", role)
            seen_rows += len(rows)
            groups = {group_of[tuple(ids)] for ids in rows["input_ids"]}
            # Groups that training rows have are in one fold only, in every role
            assert groups & every <= train_groups[fold]
            for row in rows.select(range(min(4, len(rows)))):
                ids, logprobs = np.array(row["teacher_topk_ids"][0]), np.array(row["teacher_topk_logprobs"][0])
                with torch.no_grad():
                    given = torch.tensor([row["input_ids"][:-1]])
                    own = [model(given).logits[0, -1].log_softmax(-1).numpy()[ids] for model in teachers]
                errors = [float(np.abs(values - logprobs).max()) for values in own]
                assert errors[fold] < 5e-3
                assert min(error for i, error in enumerate(errors) if i != fold) > 2e-2
    counts = json.loads((run / "data" / "counts.json").read_text())
    assert seen_rows == sum(counts[role]["rows"] for role in ("train", "validation", "unlabelled"))


def test_a_committee_is_the_mean_of_its_members(run):
    models = [
        AutoModelForCausalLM.from_pretrained(run / name / "model").eval() for name in ("teacher", "teacher-selected")
    ]
    for row in entries(run / "cache-mean", "train").select(range(6)):
        with torch.no_grad():
            given = torch.tensor([row["input_ids"][:-1]])
            own = np.array([model(given).logits[0, -1].double().softmax(-1).numpy() for model in models])
        ids = row["teacher_topk_ids"][0]
        np.testing.assert_allclose(row["teacher_topk_logprobs"][0], np.log(own.mean(0))[ids], atol=5e-3)
        entropies = -(own * np.log(own)).sum(-1)
        mixed = -(own.mean(0) * np.log(own.mean(0))).sum()
        assert row["teacher_mutual_information"] == pytest.approx([mixed - entropies.mean()], abs=1e-5)
    manifest = json.loads((run / "cache-mean" / "manifest" / "train.json").read_text())
    assert manifest["teacher"]["name"] == "Committee of 2: teacher, selected"
    assert manifest["recalibration"]["logit_temperature"]["recalibration"]["value"] > 0
    costs = json.loads((run / "report" / "report.json").read_text())["costs"]
    assert (
        costs["mean"]["teacher_steps"] == costs["first"]["teacher_steps"] + costs["teacher_selected"]["teacher_steps"]
    )


def test_the_disagreement_of_a_committee_weighs_and_scales(run):
    logs = json.loads((run / "students" / "mean_weighted" / "training_log.json").read_text())
    steps = [entry for entry in logs if "loss" in entry]
    assert steps and all(entry["loss"] < 0.99 * entry["kl"] for entry in steps)
    assert "exp(-20 I)" in (run / "students" / "mean_weighted" / "model" / "README.md").read_text()
    fitted = json.loads((run / "evaluate" / "mean_disagreement" / "novelty.json").read_text())
    assert fitted["feature"] == "disagreement" and fitted["slopes"][0] >= 0.0
    assert json.loads((run / "report" / "report.json").read_text())["results"]["mean_disagreement"]["test"]["n"] > 0


def test_an_adapter_with_a_head_of_its_own_learns_the_choices_alone(run):
    saved = load_file(run / "students" / "choices" / "model" / "adapter_model.safetensors")
    assert any("lm_head" in name for name in saved) and any("lora_A" in name for name in saved)
    target = "the distribution over the choices; all other tokens are one bucket"
    assert target in (run / "students" / "choices" / "model" / "README.md").read_text()


def test_the_selected_epoch_is_the_best_and_is_what_is_saved(run):
    for unit in ("teacher-selected", "students/sft_selected", "students/plus"):
        chosen = json.loads((run / unit / "selection.json").read_text())
        assert chosen["nll"] == min(point["nll"] for point in chosen["curve"])
        assert len(chosen["curve"]) == round(chosen["epochs"])
    # The saved model scores what the curve says, on the validation rows
    from trl import SFTConfig, SFTTrainer

    chosen = json.loads((run / "teacher-selected" / "selection.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run / "teacher-selected" / "model")
    rows = load_from_disk(str(run / "data" / "tokens" / "validation"))
    args = SFTConfig(str(run / "check"), report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(chosen["nll"], rel=1e-4)
    manifest = json.loads((run / "cache-selected" / "manifest" / "train.json").read_text())
    assert any("selected by negative log-likelihood" in note for note in manifest["notes"])


def test_every_arm_gets_the_fit_of_its_own_target(run):
    own = json.loads((run / "recalibration" / "probability_temperature-k3.json").read_text())
    assert own["top_k"] == 3
    plus = json.loads((run / "recalibration-selected" / "logit_temperature-bucket-nll-min1.json").read_text())
    assert (plus["estimator"], plus["objective"]) == ("bucket", "nll")
    assert plus["recalibration"]["value"] >= 1.0
    for arm, value in (("first", own["recalibration"]["value"]), ("plus", plus["recalibration"]["value"])):
        unit = json.loads((run / "students" / arm / "unit.json").read_text())
        assert unit["inputs"]["fitted"] == value
    assert "fitted" not in json.loads((run / "students" / "given" / "unit.json").read_text())["inputs"]


def test_mixed_rows_and_costs_are_counted(run):
    report = json.loads((run / "report" / "report.json").read_text())
    costs = report["costs"]
    assert costs["plus"]["cache_rows"] == 96 + 120
    assert costs["cross"]["cache_rows"] == 96 + 120
    assert costs["sft_dropout"]["cache_rows"] == 0 and costs["sft_dropout"]["student_steps"] == 3
    assert costs["plus"]["student_steps"] == -(-216 // 32)
    seen = [96 - len(entries(run / "cache-cross" / f"fold-{fold}", "train")) for fold in range(3)]
    assert costs["cross"]["teacher_steps"] == sum(-(-rows // 32) for rows in seen)
    assert costs["first"]["cache_bytes"] > 0
    assert report["arms"]["plus"]["teacher"] == "selected"
    assert set(report["results"]) == {*ARMS, "bayes"}
    assert all(report["results"][arm]["test"]["null_ece"]["q95"] > 0 for arm in ARMS)


def test_rows_that_share_a_group_with_an_evaluation_role_are_dropped(tmp_path, capsys):
    data = yaml.safe_load(recipe_path("quickstart").read_text())
    data["task"]["splits"]["test"] = {"split": "test", "limit": 20, "unseen": "group"}
    data["task"]["splits"]["unlabelled"] = {"split": "unlabelled", "limit": 120}
    data["arms"] = {"plus": {"kind": "distill", "data": ["train", "unlabelled"]}}
    path = tmp_path / "unseen.yaml"
    path.write_text(yaml.safe_dump(data))
    limits = [word for word in TINY if "splits.test" not in word]
    assert main(["run", str(path), *limits, "--stage", "data", "--output-dir", str(tmp_path / "run")]) == 0
    groups = set(load_from_disk(str(tmp_path / "run" / "data" / "rows" / "test"))["group"])
    counts = json.loads((tmp_path / "run" / "data" / "counts.json").read_text())
    for role, read in (("train", 96), ("validation", 64), ("unlabelled", 120)):
        rows = load_from_disk(str(tmp_path / "run" / "data" / "tokens" / role))
        assert not groups & set(rows["group"])
        assert counts[role]["dropped"]["shares a group with test"] == read - len(rows) > 0
    assert [counts[role]["domain"] for role in ("test", "validation")] == ["out-of-domain", "validation"]
    assert "shares a group with test" in capsys.readouterr().out


def test_no_pair_of_the_out_of_domain_rows_is_in_training(tmp_path):
    """The recipe that is published: every row of `ood`, none dropped, because the world keeps them apart."""
    overrides = ["task.splits.pretrain={split: pretrain, limit: 8}", "--stage", "data"]
    assert main(["run", "quickstart_study", *overrides, "--seed", "0", "--output-dir", str(tmp_path)]) == 0
    data = tmp_path / "seed-0" / "data"
    ood = set(load_from_disk(str(data / "rows" / "ood"))["group"])
    assert len(ood) == 19
    for role in ("train", "validation"):
        assert not ood & set(load_from_disk(str(data / "tokens" / role))["group"])
    counts = json.loads((data / "counts.json").read_text())
    assert counts["train"] == counts["train"] | {"rows": 2400, "dropped": {}}
