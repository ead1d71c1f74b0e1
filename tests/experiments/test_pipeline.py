"""A whole recipe, small: every stage, what is kept, what is redone, on one process and on two."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from safetensors.torch import load_file

from first_trl import answer_pipeline
from first_trl.cache.folder import load_manifest
from first_trl.calibration import expected_calibration_error
from first_trl.cli import main
from first_trl.experiments.smoke.rows import DATA as SMOKE_DATA
from tests.support.forked import start
from tests.support.quickstart import TINY


# Small enough for seconds: one arm of each kind
ARMS = {
    "teacher": {"kind": "teacher"},
    "sft": {"kind": "sft"},
    "sft_ts": {"kind": "temperature_scaling", "of": "sft"},
    "first": {"kind": "distill", "recalibration": "probability_temperature"},
    "bucket": {"kind": "distill", "estimator": "bucket", "ce_weight": 0.2},
    "lora": {"kind": "distill", "lora": {"r": 4, "target_modules": "all-linear"}},
    "sft_novelty": {"kind": "novelty_scaling", "of": "sft"},
    "sft_agreement": {"kind": "agreement_scaling", "of": "sft", "prompts": "ood"},
    "lora_novelty": {"kind": "novelty_scaling", "of": "lora", "novelty": {"fit": "cross_group", "layers": [1]}},
    "lora_clusters": {
        "kind": "novelty_scaling",
        "of": "lora",
        "novelty": {"fit": "cross_group", "layers": [1], "groups": "cluster", "clusters": 8},
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    data = yaml.safe_load(Path(load_recipe_file()).read_text())
    data["arms"] = ARMS
    data["report"] = {"title": "Tiny run", "notes": ["A note."]}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def load_recipe_file() -> str:
    from first_trl.utils.resources import recipe_path

    return str(recipe_path("quickstart"))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", recipe, *TINY, "--output-dir", str(folder)]) == 0
    return folder


def test_report_holds_every_arm_and_agrees_with_the_predictions(run):
    report = json.loads((run / "report" / "report.json").read_text())
    assert set(report["results"]) == {*ARMS, "bayes"}
    markdown = (run / "report" / "report.md").read_text()
    for figure in ("reliability_test.png", "reliability_ood.png", "topk_mass.png"):
        assert (run / "report" / figure).stat().st_size > 5000
        assert figure in markdown
    assert "A note." in markdown and "10 bins of equal width" in markdown
    for arm in report["results"]:
        for role, n in (("test", 60), ("ood", 50)):
            scores = report["results"][arm][role]
            predictions = load_dataset(
                "parquet", data_files=str(run / "evaluate" / arm / f"{role}.parquet"), split="train"
            )
            confidence, right = np.array(predictions["top_prob"]), np.array(predictions["top_is_gold"])
            assert scores["n"] == len(predictions) == n
            assert scores["full_vocab"]["accuracy"] == pytest.approx(right.mean())
            ece = expected_calibration_error(confidence, right.astype(int), n_bins=10)
            assert scores["full_vocab"]["ece"] == pytest.approx(ece)
            assert scores["full_vocab"]["trust"] == pytest.approx(right.mean() - ece)
            assert scores["full_vocab"]["nll"] == pytest.approx(-np.mean(predictions["gold_logprob"]))
            assert scores["chance_accuracy"] == pytest.approx(1 / 12)


def test_temperature_scaling_leaves_accuracy_and_changes_confidence(run):
    results = json.loads((run / "report" / "report.json").read_text())["results"]
    assert results["sft"]["test"]["full_vocab"]["accuracy"] == results["sft_ts"]["test"]["full_vocab"]["accuracy"]
    assert results["sft"]["test"]["full_vocab"]["ece"] != results["sft_ts"]["test"]["full_vocab"]["ece"]


def test_temperature_by_novelty_leaves_accuracy_and_says_how_new_rows_are(run):
    report = json.loads((run / "report" / "report.json").read_text())
    results = report["results"]
    for arm, of in (("sft_novelty", "sft"), ("lora_novelty", "lora")):
        for role in ("test", "ood"):
            mine, plain = (results[name][role]["full_vocab"] for name in (arm, of))
            assert mine["accuracy"] == plain["accuracy"]
        fitted = json.loads((run / "evaluate" / arm / "novelty.json").read_text())
        predictions = load_dataset("parquet", data_files=str(run / "evaluate" / arm / "ood.parquet"), split="train")
        given = np.array(predictions["temperature"])
        assert fitted["roles"]["ood"]["temperature"]["mean"] == pytest.approx(given.mean())
        assert 0.0 <= fitted["auroc"]["ood"]["feature"] <= 1.0 and set(fitted["auroc"]) == {"ood"}
        assert (run / "evaluate" / arm / "novelty.safetensors").stat().st_size < 5_000_000
        if fitted["slopes"] == [0.0]:
            assert given == pytest.approx(fitted["scalar"])
    assert set(fitted["choice"]["cross_group"]) == {"1"}
    markdown = (run / "report" / "report.md").read_text()
    assert "## How new the rows are" in markdown and "novelty.png" in markdown
    assert (run / "report" / "novelty.png").stat().st_size > 5000 and set(report["novelty"]) == {
        "sft_novelty",
        "lora_novelty",
        "lora_clusters",
    }
    clusters = json.loads((run / "evaluate" / "lora_clusters" / "novelty.json").read_text())
    assert clusters["settings"]["clusters"] == 8
    own, made = (each["choice"]["cross_group"]["1"]["groups"] for each in (fitted, clusters))
    assert 4 <= made <= 8 < own
    exported = (run / "students" / "sft" / "model" / "novelty.safetensors").read_bytes()
    assert exported == (run / "evaluate" / "sft_novelty" / "novelty.safetensors").read_bytes()
    assert not (run / "students" / "first" / "model" / "novelty.safetensors").exists()
    assert "novelty=True" in (run / "students" / "sft" / "model" / "README.md").read_text()
    # Of two arms of a student, the first one of the file, whose keys are sorted
    assert report["novelty_of"] == {"sft": "sft_novelty", "lora": "lora_clusters"}
    pipe = answer_pipeline(run / "students" / "sft" / "model", novelty=True, device="cpu", batch_size=8)
    rows = Dataset.load_from_disk(str(run / "data" / "rows" / "ood")).select(range(8))
    given = [row["confidence"] for row in pipe([{"prompt": row["prompt"], "choices": row["choices"]} for row in rows])]
    predictions = load_dataset(
        "parquet", data_files=str(run / "evaluate" / "sft_novelty" / "ood.parquet"), split="train"
    )
    assert given == pytest.approx(predictions["top_prob"][:8], abs=2e-3)
    agreed = json.loads((run / "evaluate" / "sft_agreement" / "agreement.json").read_text())
    assert (
        agreed["prompts"] == "ood"
        and 0 < agreed["agreed"] <= agreed["n"] == 50
        and 0.125 <= agreed["temperature"] <= 16
    )
    ece = [results[arm]["ood"]["full_vocab"]["nll"] for arm in ("sft", "sft_agreement")]
    assert ece[0] != ece[1]
    # The one temperature is the one of temperature scaling, to the digits of the table it is read from
    scalar = json.loads((run / "evaluate" / "sft_novelty" / "novelty.json").read_text())["scalar"]
    scaled = json.loads((run / "evaluate" / "sft_ts" / "temperature.json").read_text())["temperature"]
    assert scalar == pytest.approx(scaled, rel=1e-3)


def test_a_finished_run_is_extended_without_training(run, recipe, capsys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    assert "not all made alike" not in (run / "report" / "report.md").read_text()
    path = folder / "students" / "sft" / "unit.json"
    marker = json.loads(path.read_text())
    marker["made_with"] |= {"transformers": "5.0.0", "processes": 2}
    path.write_text(json.dumps(marker))
    extra = "arms.first_novelty={kind: novelty_scaling, of: first, novelty: {feature: distance_and_max_probability}}"
    assert main(["run", recipe, *TINY, extra, "--output-dir", str(folder)]) == 0
    redone = {
        line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines() if line.endswith(": running")
    }
    assert redone == {"states/first", "evaluate/first_novelty", "report"}
    # Nothing is made again after an upgrade, and the report says which units it mixes
    (mixed,) = (line for line in (folder / "report" / "report.md").read_text().splitlines() if "made alike" in line)
    assert "transformers" in mixed and " and 5.0.0" in mixed and "processes 1 and 2" in mixed and "torch" not in mixed


def test_the_fitted_value_reaches_the_student(run):
    fit = json.loads((run / "recalibration" / "probability_temperature.json").read_text())
    stored = json.loads((run / "cache" / "manifest" / "train.json").read_text())
    assert stored["recalibration"]["probability_temperature"]["recalibration"] == fit["recalibration"]
    assert len(fit["curve"]) > 10


def test_fits_that_a_recipe_no_longer_names_leave_the_cache(run, recipe, tmp_path):
    """Its manifest is what others train from, and what is pushed."""
    cache = tmp_path / "copy" / "cache"
    shutil.copytree(run, cache.parent)
    assert set(load_manifest(cache).recalibration) == {"probability_temperature", "logit_temperature"}
    command = ["run", recipe, *TINY, "--stage", "recalibrate", "--output-dir", str(cache.parent)]
    assert main([*command, "recalibration.methods=[probability_temperature]"]) == 0
    assert set(load_manifest(cache).recalibration) == {"probability_temperature"}
    assert main([*command, "recalibration.methods=[]", "arms={sft: {kind: sft}}"]) == 0
    assert load_manifest(cache).recalibration == {}


def test_a_second_run_trains_nothing(run, recipe, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert before
    assert main(["run", recipe, *TINY, "--output-dir", str(run)]) == 0
    assert ": running" not in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def test_a_change_redoes_what_depends_on_it_and_nothing_else(run, recipe, capsys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    assert main(["run", recipe, *TINY, "arms.first.training.learning_rate=1e-4", "--output-dir", str(folder)]) == 0
    redone = {
        line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines() if line.endswith(": running")
    }
    assert redone == {"students/first", "evaluate/first", "report"}


def test_one_stage_needs_the_ones_before(recipe, tmp_path, capsys):
    assert main(["run", recipe, *TINY, "--stage", "capture", "--output-dir", str(tmp_path / "a")]) == 2
    assert "Run `--stage data` first" in capsys.readouterr().err
    assert main(["run", recipe, *TINY, "--stage", "data", "--output-dir", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "data" / "counts.json").is_file()
    assert not (tmp_path / "a" / "base").exists()


def test_missing_file_and_answers_of_two_tokens(tmp_path, capsys, stories):
    common = ["--output-dir", str(tmp_path), f"teacher.name_or_path={stories}", f"student.name_or_path={stories}"]
    assert main(["run", "commonsense_qa", f"task.path={tmp_path}/absent.jsonl", *common]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    fixture = SMOKE_DATA / "commonsense_qa"
    # Said before any teacher is trained
    assert main(["run", "commonsense_qa", f"task.path={fixture}", *common, "--stage", "data"]) == 2
    assert "tokens behind the prompt" in capsys.readouterr().err


def test_global_batch_must_divide(recipe, tmp_path, capsys):
    extra = ["teacher.pretrain.gradient_accumulation_steps=5"]
    assert main(["run", recipe, *TINY, *extra, "--output-dir", str(tmp_path)]) == 2
    assert "does not divide by 5" in capsys.readouterr().err


# On CPUs `accelerate launch` starts one process whatever `--num_processes` says (it needs MPI for more); torchrun starts two
LAUNCHERS = {
    1: ["accelerate.commands.launch", "--cpu", "--num_processes", "2"],
    2: ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


# Quick is the launch of two processes, which could write twice; the other starts one
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_launch_writes_each_output_once(processes, recipe, run, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCHERS[processes], "-m", "first_trl", "run", recipe, *TINY]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=540,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: running") == 1
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    expected = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert files == expected
    assert not [name for name in files if name.endswith(".tmp")]
    manifest = json.loads((tmp_path / "cache" / "manifest" / "train.json").read_text())
    assert manifest["timing"]["processes"] == processes
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["results"]["first"]["test"]["n"] == 60
    # Every optimiser step saw the same global batch, whatever the number of processes
    for arm in ("sft", "first"):
        logs = [folder / "students" / arm / "training_log.json" for folder in (run, tmp_path)]
        steps = [json.loads(log.read_text())[-1]["step"] for log in logs]
        assert steps[0] == steps[1]
    alone, here = (json.loads((folder / "report" / "report.json").read_text()) for folder in (run, tmp_path))
    nll = [data["results"]["first"]["test"]["full_vocab"]["nll"] for data in (alone, here)]
    assert nll[0] == pytest.approx(nll[1], rel=0.1)


def test_a_killed_run_continues_from_its_checkpoint(recipe, run, tmp_path):
    """Killed in the middle of a student; the same command ends with the weights of an undisturbed run."""
    changes = ["arms.sft.training={save_strategy: steps, save_steps: 2, num_train_epochs: 4}"]
    changes += ["arms.first.training.learning_rate=1e-4"]  # so that it too is trained after the kill
    options = [*TINY, *changes, "--stage", "students"]
    for name in ("whole", "killed"):
        shutil.copytree(run, tmp_path / name)
    assert main(["run", recipe, *options, "--output-dir", str(tmp_path / "whole")]) == 0
    process = start(["run", recipe, *options, "--output-dir", str(tmp_path / "killed")], tmp_path / "log.txt")
    deadline = time.monotonic() + 240
    while not list((tmp_path / "killed").glob("students/sft/checkpoints/*/trainer_state.json")):
        assert process.is_alive(), "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "students" / "sft" / "model").exists()
    assert main(["run", recipe, *options, "--output-dir", str(tmp_path / "killed")]) == 0
    for arm in ("sft", "first"):
        weights = [
            load_file(tmp_path / name / "students" / arm / "model" / "model.safetensors")
            for name in ("whole", "killed")
        ]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_a_further_evaluation_role_and_a_smaller_batch_train_nothing_again(run, recipe, capsys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    changes = ["task.splits.more={split: test, limit: 20}", "evaluation.splits=[test, ood, more]"]
    changes += ["capture.max_tokens_per_batch=512", "capture.shard_size=10"]
    assert main(["run", recipe, *TINY, *changes, "--output-dir", str(folder)]) == 0
    redone = {
        line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines() if line.endswith(": running")
    }
    read = {f"states/{arm['of']}" for arm in ARMS.values() if arm["kind"] in ("novelty_scaling", "agreement_scaling")}
    assert redone == {"data", "report", *read, *(f"evaluate/{arm}" for arm in (*ARMS, "bayes"))}
    # Other training rows are another matter; one arm shows it
    changes = ["task.splits.train.limit=80", "arms={sft: {kind: sft}}"]
    assert main(["run", recipe, *TINY, *changes, "--output-dir", str(folder)]) == 0
    assert "students/sft: running" in capsys.readouterr().out


def test_an_adapter_loads_from_any_working_folder(recipe, run, tmp_path, monkeypatch):
    # What comes before the students is there; the adapter is trained anew, in a run that is named by a relative path
    shutil.copytree(run, tmp_path / "here" / "run", ignore=shutil.ignore_patterns("students", "evaluate"))
    monkeypatch.chdir(tmp_path / "here")
    only = "arms={lora: {kind: distill, lora: {r: 4, target_modules: all-linear}}}"
    assert main(["run", recipe, *TINY, only, "--output-dir", "run"]) == 0
    monkeypatch.chdir(tmp_path)
    pipe = answer_pipeline(str(tmp_path / "here" / "run" / "students" / "lora" / "model"))
    prompt = "question : bela the nurse at harbor in rain carries what ? answer :"
    assert 0 < pipe(prompt, choices=[" hammer", " saw"])["confidence"] <= 1
