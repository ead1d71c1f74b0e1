"""Merged reports: every number by hand, every refusal, and the same bytes for the same runs."""

import gzip
import json
import re
import shlex
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from first_trl.calibration import calibration_report, expected_calibration_error, reliability_diagram
from first_trl.cli import main
from first_trl.experiments.report import MergedReport, merge_runs, write_merged_report, write_report
from first_trl.experiments.report.content import table_parts, write_parts
from first_trl.experiments.report.latex import escape, to_latex
from first_trl.experiments.report.markdown import to_markdown


KINDS = {
    "teacher": {"kind": "teacher"},
    "sft": {"kind": "sft"},
    "sft_ts": {"kind": "temperature_scaling", "of": "sft"},
    "direct": {"kind": "distill", "recalibration": "none"},
    "first": {"kind": "distill", "recalibration": "probability_temperature"},
}
# Accuracy and ECE of seeds 0, 1, 2
ACCURACY = {
    "teacher": (0.9, 0.9, 0.9),
    "sft": (0.5, 0.6, 0.7),
    "sft_ts": (0.5, 0.6, 0.7),
    "direct": (0.61, 0.64, 0.79),
    "first": (0.6, 0.65, 0.8),
    "bayes": (0.95, 0.95, 0.95),
}
ECE = {
    "teacher": (0.01, 0.01, 0.01),
    "sft": (0.2, 0.21, 0.22),
    "sft_ts": (0.05, 0.05, 0.05),
    "direct": (0.1, 0.12, 0.11),
    "first": (0.02, 0.04, 0.03),
    "bayes": (0.001, 0.001, 0.001),
}


def scores(accuracy: float, ece: float, n: int = 200) -> dict[str, Any]:
    numbers = {"accuracy": accuracy, "ece": ece, "trust": accuracy - ece, "nll": 2 - accuracy, "brier": 1 - accuracy}
    return {
        "n": n,
        "n_rows": n,
        "option_mass": 0.9,
        "chance_accuracy": 0.25,
        "full_vocab": dict(numbers),
        "options": dict(numbers),
        "null_ece": {"mean": 0.015, "q95": 0.035},
    }


def write_run(
    folder: Path,
    seed: int,
    *,
    arms: dict[str, dict[str, Any]] | None = None,
    values: dict[str, tuple[float, float]] | None = None,
    roles: tuple[str, ...] = ("test", "ood"),
    predictions: bool = False,
    recipe: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A finished run as `first-trl run` leaves it; numbers come from the tables above unless given."""
    specs = KINDS if arms is None else arms
    if values is None:
        values = {name: (ACCURACY[name][seed], ECE[name][seed]) for name in (*specs, "bayes")}
    report = {
        "recipe": "made_up",
        "title": "A made-up study",
        "description": "Numbers by hand.",
        "notes": ["A note on `first`."],
        "seed": seed,
        "n_bins": 10,
        "labels": {name: name.upper() for name in values if name != "bayes"},
        "results": {name: {role: scores(*pair) for role in roles} for name, pair in values.items()},
        "arms": {
            name: {"base": name.split("@")[0], "values": {}, "recalibration_value": None, **spec}
            for name, spec in specs.items()
        },
        "posthoc_temperatures": {"sft_ts": 1.5 + seed / 10},
        "recalibration": {
            "probability_temperature": {
                "recalibration": {"method": "probability_temperature", "value": 0.3 + seed / 100},
                "raw": {"ece": 0.1, "nll": 1.0},
                "chosen": {"ece": 0.02, "nll": 0.9},
            }
        },
        "kept_mass": [0.7 + seed / 100, 0.9, 0.95],
        "costs": {name: {"student_steps": 100 + seed, "cache_bytes": 2_000_000} for name in specs},
        "models": {"teacher": {"name_or_path": "/somewhere/big-model", "architecture": "llama", "config": {}}},
        "recipe_key": f"{seed:040x}",
        "seconds": {"teacher": 12.3 + seed},
        **changes,
    }
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "report.json").write_text(json.dumps(report))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if predictions:
        for name in values:
            for role in roles:
                path = folder / "evaluate" / name / f"{role}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.table(draw(seed, name, role)), path)
    return folder


def draw(seed: int, name: str, role: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, len(name), len(role)])
    confidence = rng.uniform(0.2, 1, 200)
    # The last 10 rows have no answer
    gold = np.where(np.arange(200) < 190, 1, -1)
    return {"gold": gold, "top_prob": confidence, "top_is_gold": rng.random(200) < confidence**2}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for seed in range(3):
        write_run(tmp_path / "study" / f"seed-{seed}", seed)
    return tmp_path / "study"


@pytest.fixture
def predicted(tmp_path: Path) -> Path:
    """A smaller study, whose runs still have their predictions."""
    arms = {name: KINDS[name] for name in ("sft", "direct", "first")}
    for seed in range(3):
        write_run(tmp_path / "study" / f"seed-{seed}", seed, arms=arms, roles=("test",), predictions=True)
    return tmp_path / "study"


def markdown(folder: Path) -> str:
    """The text alone: drawing takes seconds."""
    return to_markdown(write_parts(merge_runs([folder])))


def edit(folder: Path, change: Any) -> None:
    path = folder / "report" / "report.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def row(markdown: str, caption: str, first: str) -> list[str]:
    """The cells behind a row's name, in the table under a caption."""
    table = markdown.split(f"*{caption}*")[1].split("\n\n")[1]
    line = next(line for line in table.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_means_deviations_and_intervals_by_hand(study: Path) -> None:
    (cell,) = merge_runs([study]).cells
    summary = cell.results["first"]["test"]["full_vocab"]["accuracy"]
    assert summary["mean"] == pytest.approx((0.6 + 0.65 + 0.8) / 3)
    assert summary["sd"] == pytest.approx(np.std([0.6, 0.65, 0.8], ddof=1))
    assert summary["n"] == 3
    assert summary["values"] == {"seed-0": 0.6, "seed-1": 0.65, "seed-2": 0.8}
    found = cell.difference("first", "sft", "test", "accuracy")
    # Differences .1, .05, .1; the 97.5 % point of Student's t with 2 degrees of freedom is 4.302653
    sd = np.sqrt((2 * (0.1 - 0.25 / 3) ** 2 + (0.05 - 0.25 / 3) ** 2) / 2)
    assert found["mean"] == pytest.approx(0.25 / 3)
    assert found["sd"] == pytest.approx(sd)
    assert found["low"] == pytest.approx(0.25 / 3 - 4.302653 * sd / np.sqrt(3), abs=1e-7)
    assert found["high"] == pytest.approx(0.25 / 3 + 4.302653 * sd / np.sqrt(3), abs=1e-7)
    assert (found["better"], found["n"]) == (3, 3)
    ece = cell.difference("first", "direct", "ood", "ece", "options")
    assert ece["mean"] == pytest.approx(-0.08) and ece["better"] == 3
    assert cell.difference("sft", "first", "test", "ece") is None  # FIRST is no baseline
    # A tie is not better
    assert cell.difference("sft_ts", "sft", "test", "accuracy")["better"] == 0


def test_printed_numbers(study: Path) -> None:
    text = markdown(study)
    caption = "`test`: mean over 3 seeds ± standard deviation."
    assert row(text, caption, "FIRST") == [
        "**68.3 ± 10.4**", "**3.0 ± 1.0**", "**65.3 ± 10.2**", "**1.317 ± 0.104**", "**0.317 ± 0.104**",
        "1.5 (2/3)", "3",
    ]  # fmt: skip
    assert row(text, caption, "TEACHER")[:2] == ["90.0 ± 0.0", "1.0 ± 0.0"]
    cells = row(text, "`test`: arm minus SFT, paired by seed.", "FIRST")
    assert cells[:2] == ["**+8.3 [+1.2, +15.5] 3/3**", "**−18.0 [−20.5, −15.5] 3/3**"]
    assert row(text, "`test`: arm minus SFT, paired by seed.", "SFT_TS")[0] == "0.0 [0.0, 0.0] 0/3"
    assert row(text, "`test`, seeds 0, 1, 2 in this order.", "DIRECT")[1] == "10.0 / 12.0 / 11.0"
    assert (
        row(text, "Rescale of the teacher, fitted on `validation`.", "`probability_temperature`")[0]
        == "c = 0.31 ± 0.01"
    )
    assert row(text, "Costs, mean over the seeds.", "DIRECT") == ["2.00", "101"]
    assert "SFT_TS 1.60 ± 0.10" in text
    assert "A note on `first`." in text and "Numbers by hand." in text
    assert "Picking an option at random is right 25.0 % of the time." in text
    assert (
        "`first-trl run seed-0/recipe.yaml` in the folder above this report" in text and "first-trl report DIR" in text
    )


def test_best_and_marks(study: Path) -> None:
    (cell,) = merge_runs([study]).cells
    accuracy = cell.best["test"]["full_vocab"]["accuracy"]
    # Teacher and true posterior are higher, and are no students. Direct differs from FIRST by +.01, -.01, -.01; SFT by
    # an interval without 0 (above).
    assert accuracy == {"arms": ["first"], "level": ["direct"]}
    assert cell.best["test"]["full_vocab"]["ece"] == {"arms": ["first"], "level": ["sft_ts"]}
    text = markdown(study)
    assert row(text, "`test`: mean over 3 seeds ± standard deviation.", "DIRECT")[0] == "68.0 ± 9.6†"
    assert "†: the paired difference to the best has a 95 % interval that holds 0" in text


def test_baselines_are_told_by_settings(tmp_path: Path) -> None:
    arms = {
        "a": {"kind": "sft"},
        "b": {"kind": "temperature_scaling", "of": "a"},
        "c": {"kind": "distill", "recalibration": "none"},
        "d": {"kind": "temperature_scaling", "of": "c"},
        "e": {"kind": "distill", "recalibration": "none", "token_dropout": 0.1},
        "f": {"kind": "distill", "recalibration": "logit_temperature"},
        "g": {"kind": "temperature_scaling", "of": "f"},
        "h": {"kind": "sft", "lora": {"r": 4}},
        "i": {"kind": "distill", "recalibration": "none", "estimator": "bucket"},
    }
    for seed in range(2):
        values = {name: (0.5 + seed / 10 + index / 100, 0.1) for index, name in enumerate(arms)}
        write_run(tmp_path / f"seed-{seed}", seed, arms=arms, values=values)
    (cell,) = merge_runs([tmp_path]).cells
    assert [name for name, arm in cell.arms.items() if arm["baseline"]] == ["a", "b", "c", "d"]
    asked = merge_runs([tmp_path], baselines=["f"])
    assert {one["baseline"] for one in asked.cells[0].differences} == {"f"} and asked.baselines == ["f"]
    with pytest.raises(ValueError, match=r"No run has an arm 'nope'.*a, b, c"):
        merge_runs([tmp_path], baselines=["nope"])
    edit(tmp_path / "seed-0", lambda data: data.update(baselines=["g"]))
    assert {one["baseline"] for one in merge_runs([tmp_path]).cells[0].differences} == {"g"}


def test_one_seed_gets_no_interval(tmp_path: Path) -> None:
    write_run(tmp_path / "seed-0", 0)
    (cell,) = merge_runs([tmp_path]).cells
    found = cell.difference("first", "sft", "test", "accuracy")
    assert found["low"] is None and found["sd"] is None and found["n"] == 1
    text = markdown(tmp_path)
    assert "Where there is one seed, no spread and no interval can be given" in text
    assert row(text, "`test`: seed 0 only.", "FIRST")[1] == "**2.0**"
    assert row(text, "`test`: arm minus SFT, paired by seed.", "FIRST")[0] == "+10.0"
    assert "†" not in text and "±" not in text


def test_a_missing_arm_is_named_and_does_not_win(study: Path) -> None:
    edit(study / "seed-1", lambda data: data["results"].pop("first"))
    (cell,) = merge_runs([study]).cells
    assert cell.arms["first"]["missing"] == ["seed-1"]
    assert cell.results["first"]["test"]["full_vocab"]["accuracy"]["n"] == 2
    assert "first" not in cell.best["test"]["full_vocab"]["accuracy"]["arms"]
    assert cell.difference("first", "sft", "test", "accuracy")["n"] == 2
    text = markdown(study)
    assert "FIRST is missing in `seed-1`: its means are over 2 of 3 seeds" in text
    assert row(text, "`test`: mean over 3 seeds ± standard deviation.", "FIRST")[-1] == "2 of 3"
    assert row(text, "`test`, seeds 0, 1, 2 in this order.", "FIRST")[0] == "60.0 / – / 80.0"


def test_printed_results_tell_an_arm_that_lacks_a_seed(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(study / "seed-1", lambda data: data["results"].pop("first"))
    assert main(["report", str(study)]) == 0
    capsys.readouterr()
    command = ["report", "--from", str(study / "report" / "results.csv.gz"), "--metric", "accuracy", "--role", "test"]
    # Also where the arms that have every seed are not shown
    assert main([*command, "--arm", "FIRST"]) == 0
    assert "| FIRST | 70.0 ± 14.1 (2 of 3) |" in capsys.readouterr().out
    assert main(command) == 0
    assert "| SFT | 60.0 ± 10.0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--from", "R", "--output-dir", "x", "--format", "pdf"],
            "--output-dir, --format can be given only with folders",
        ),
        (["--from", "R", "--intervals"], "name the arm to compare with"),
        (["S", "--metric", "ece", "--arm", "SFT"], "--metric, --arm can be given only with --from"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(words: list[str], said: str, capsys: Any) -> None:
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err


def test_nothing_wins_where_no_arm_has_every_seed(study: Path) -> None:
    edit(study / "seed-0", lambda data: [data["results"].pop(name) for name in ("first", "sft_ts")])
    edit(study / "seed-2", lambda data: [data["results"].pop(name) for name in ("direct", "sft")])
    (cell,) = merge_runs([study]).cells
    # Means over seeds 1 and 2 against means over seeds 0 and 1
    assert cell.best["test"] == {}
    # A role that one run lacks altogether has fewer seeds
    for name in ("first", "sft_ts", "teacher", "bayes"):
        edit(study / "seed-2", lambda data, name=name: data["results"][name].pop("ood"))
    edit(study / "seed-0", lambda data: data["results"].update(first=data["results"]["direct"]))
    (cell,) = merge_runs([study]).cells
    assert cell.best["ood"]["full_vocab"]["accuracy"]["arms"] == ["first"]


def test_settings_that_only_later_seeds_have_must_agree(tmp_path: Path) -> None:
    for seed, rate in enumerate((None, 1e-4, 1e-2)):
        arms = {"sft": KINDS["sft"], **({} if rate is None else {"first": {**KINDS["first"], "learning_rate": rate}})}
        write_run(tmp_path / f"seed-{seed}", seed, arms=arms)
    with pytest.raises(ValueError, match=r"seed-1 was run with arms.first.learning_rate = 0.0001, seed-2 with 0.01"):
        merge_runs([tmp_path])


def test_arms_of_one_label_are_told_apart(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        edit(study / f"seed-{seed}", lambda data: data["labels"].update(first="STUDENT", direct="STUDENT"))
    assert main(["report", str(study)]) == 0
    capsys.readouterr()
    results = study / "report" / "results.csv.gz"
    assert main(["report", "--from", str(results), "--metric", "ece", "--role", "test"]) == 0
    table = capsys.readouterr().out
    assert "| STUDENT (first) | 3.0 ± 1.0 |" in table and "| STUDENT (direct) | 11.0 ± 1.0 |" in table
    # Of one that was written before
    text = gzip.decompress(results.read_bytes()).decode().replace("STUDENT (first)", "STUDENT (direct)")
    results.write_bytes(gzip.compress(text.encode()))
    assert main(["report", "--from", str(results)]) == 2
    assert "is there twice" in capsys.readouterr().err


def test_arms_of_the_same_seeds_are_compared_beside_a_teacher_of_more(study: Path) -> None:
    students = [name for name in KINDS if name != "teacher"]
    edit(study / "seed-2", lambda data: [data["results"].pop(name, None) for name in students])
    (cell,) = merge_runs([study]).cells
    assert "first" in cell.best["test"]["full_vocab"]["accuracy"]["arms"]


def test_numbers_that_a_run_lacks_are_missing_not_zero(study: Path) -> None:
    def drop(data: dict[str, Any]) -> None:
        data["results"]["first"]["test"]["full_vocab"]["ece"] = None
        # Free text has no options
        del data["results"]["direct"]["ood"]["options"]

    edit(study / "seed-0", drop)
    (cell,) = merge_runs([study]).cells
    assert cell.results["first"]["test"]["full_vocab"]["ece"]["mean"] == pytest.approx(0.035)
    assert cell.results["direct"]["ood"]["options"]["accuracy"]["n"] == 2
    assert "first" not in cell.best["test"]["full_vocab"]["ece"]["arms"]
    assert row(markdown(study), "`test`: mean over 3 seeds ± standard deviation.", "FIRST")[-1] == ("2 of 3")


REFUSALS = {
    "recipes": (
        lambda data: data.update(recipe="other"),
        r"seed-0 is a run of the recipe 'made_up', seed-1 one of 'other'",
    ),
    "bins": (lambda data: data.update(n_bins=15), r"seed-0 has ECE over 10 bins, seed-1 over 15"),
    "seed twice": (lambda data: data.update(seed=0), r"seed-0 and seed-1 are both seed 0"),
    "arm": (lambda data: data["arms"]["first"].update(estimator="bucket"), None),
    "other arm": (
        lambda data: data["arms"]["first"].update(recalibration="logit_temperature"),
        r"seed-0 was run with arms.first.recalibration = 'probability_temperature', seed-1 with 'logit_temperature'",
    ),
    "no common arm": (
        lambda data: data.update(results={"x": data["results"]["first"], "bayes": data["results"]["bayes"]}),
        r"seed-0 and seed-1 have no arm in common",
    ),
    "no report": (lambda data: data.pop("n_bins"), r"report.json is no report of a run: it has no n_bins"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_runs_that_do_not_belong_together(study: Path, name: str) -> None:
    change, message = REFUSALS[name]
    edit(study / "seed-1", change)
    if message is None:  # a setting that the other run does not state has its default there
        merge_runs([study])
        return
    with pytest.raises(ValueError, match=message):
        merge_runs([study])


def test_settings_of_two_seeds_must_agree(tmp_path: Path) -> None:
    recipe = {
        "seed": 0,
        "output_dir": "here",
        "teacher": {"name_or_path": "/one/model"},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 4, "global_batch_size": 32},
    }
    write_run(tmp_path / "seed-0", 0, recipe=recipe)
    other = {
        "seed": 1,
        "output_dir": "there",
        "teacher": {"name_or_path": "/two/model"},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "global_batch_size": 32},
    }
    write_run(tmp_path / "seed-1", 1, recipe=other)
    merge_runs([tmp_path])
    other["training"]["num_train_epochs"] = 3
    (tmp_path / "seed-1" / "recipe.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match=r"training.num_train_epochs = 2, seed-1 with 3: these are different"):
        merge_runs([tmp_path])
    # Without a number of rows a step, the batch size says how many there are
    other["training"] = {"num_train_epochs": 2, "per_device_train_batch_size": 8}
    (tmp_path / "seed-1" / "recipe.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match=r"training.per_device_train_batch_size = 4, seed-1 with 8"):
        merge_runs([tmp_path])


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("/one/model", "/two/model", True),
        ("someone/model", "/two/model", True),
        ("someone/model", "another/model", False),
        ("someone/model", "model", False),
        ("/one/model", "/one/other", False),
    ],
)
def test_two_models_of_one_name_are_two(tmp_path: Path, one: str, two: str, same: bool) -> None:
    for seed, name in enumerate((one, two)):
        write_run(tmp_path / f"seed-{seed}", seed, recipe={"student": {"name_or_path": name}})
    if same:
        assert len(merge_runs([tmp_path]).runs) == 2
        return
    with pytest.raises(ValueError, match=rf"student.name_or_path = '{one}', seed-1 with '{two}'"):
        merge_runs([tmp_path])


def test_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no folder"):
        merge_runs([tmp_path / "absent"])
    with pytest.raises(ValueError, match="No finished run below"):
        merge_runs([tmp_path])
    (tmp_path / "seed-0" / "report").mkdir(parents=True)
    (tmp_path / "seed-0" / "report" / "report.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        merge_runs([tmp_path])


def test_runs_are_found_once_however_they_are_named(study: Path) -> None:
    merged = merge_runs([study / "seed-1", study, study / "seed-0" / "report"])
    assert [run["run"] for run in merged.runs] == ["seed-0", "seed-1", "seed-2"]
    write_merged_report([study])
    # The merged report in the folder is not taken for a run
    assert len(merge_runs([study]).runs) == 3


def sweep_arms() -> dict[str, dict[str, Any]]:
    arms = dict(KINDS)
    for value in (1.0, 0.1, 0.3):
        arms[f"first@recalibration_value={value:g}"] = {
            "kind": "distill",
            "recalibration": "probability_temperature",
            "recalibration_value": value,
            "values": {"recalibration_value": value},
        }
    for value in (10, 2, 100):
        arms[f"k@top_k={value}"] = {"kind": "distill", "top_k": value, "values": {"top_k": value}}
    for estimator in ("bucket", "topk"):
        arms[f"e@estimator={estimator}"] = {"kind": "distill", "values": {"estimator": estimator}}
    return arms


def write_sweep(folder: Path) -> None:
    arms = sweep_arms()
    for seed in range(2):
        values = {
            name: (0.6 + seed / 10, abs(arm["values"].get("recalibration_value", 0.5) - 0.3) / 2 + 0.01 * seed)
            if "@" in name
            else (ACCURACY[name][seed], ECE[name][seed])
            for name, arm in ((name, {"values": {}, **arm}) for name, arm in arms.items())
        }
        run = write_run(folder / f"seed-{seed}", seed, arms=arms, values=values)

        def label(data: dict[str, Any]) -> None:
            data["labels"] |= {name: f"FIRST, c = {name.split('=')[1]}" for name in arms if "recalibration_v" in name}
            data["labels"] |= {name: f"K, top_k = {name.split('=')[1]}" for name in arms if "top_k" in name}

        edit(run, label)


def test_sweeps_become_curves(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (cell,) = merge_runs([tmp_path]).cells
    by_key = {sweep["key"]: sweep for sweep in cell.sweeps}
    assert set(by_key) == {"recalibration_value", "top_k"}  # names are no numbers
    assert [point["value"] for point in by_key["recalibration_value"]["points"]] == [0.1, 0.3, 1.0]
    assert [point["value"] for point in by_key["top_k"]["points"]] == [2, 10, 100]
    assert by_key["recalibration_value"]["label"] == "FIRST" and by_key["top_k"]["label"] == "K"
    assert by_key["recalibration_value"]["method"] == "probability_temperature"
    # The point of a sweep with the lowest ECE would win; it was chosen on the rows it is reported on
    assert cell.results["first@recalibration_value=0.3"]["test"]["full_vocab"]["ece"]["mean"] < 0.01
    assert cell.best["test"]["full_vocab"]["ece"]["arms"] == ["first"]
    text = write_merged_report([tmp_path]).read_text()
    caption = "FIRST, `test`: mean over 2 seeds ± standard deviation for each c."
    assert "## Sweep of c (probability temperature)" in text and "## Sweep of k (`top_k`)" in text
    assert row(text, caption, "0.1")[1] == "10.5 ± 0.7"
    for name in ("sweep_recalibration_value_probability_temperature_test", "sweep_top_k_ood", "kept_mass"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    assert "E@ESTIMATOR=BUCKET" in text


def test_every_point_of_a_sweep_is_in_the_latex_tables(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    text = (write_merged_report([tmp_path], formats=("pdf",)).parent / "report.tex").read_text()
    for caption, values in (("for each c", ("0.1", "0.3", "1")), ("for each k", ("2", "10", "100"))):
        for role in ("test", "ood"):
            (table,) = (one for one in text.split(r"\end{table}") if caption in one and rf"\texttt{{{role}}}" in one)
            assert [line.split(" & ")[0] for line in table.splitlines() if line[:1].isdigit()] == list(values)
    for file in (tmp_path / "report").glob("*.png"):
        assert file.with_suffix(".pdf").is_file(), file
    for folder in (tmp_path / "seed-0", tmp_path / "seed-1"):
        edit(folder, lambda data: data.update(kept_mass=None))
    write_merged_report([tmp_path])
    assert not (tmp_path / "report" / "kept_mass.pdf").exists()


def test_a_number_of_tokens_has_ticks_at_integers(tmp_path: Path) -> None:
    from first_trl.experiments.report.figures import sweep_figure

    arms = {**KINDS} | {f"k@top_k={k}": {"kind": "distill", "top_k": k, "values": {"top_k": k}} for k in (1, 2, 3)}
    values = dict.fromkeys(arms, (0.6, 0.1))
    write_run(tmp_path / "seed-0", 0, arms=arms, values=values)
    (cell,) = merge_runs([tmp_path]).cells
    figure = sweep_figure(cell, cell.sweeps, "test")
    assert figure is not None
    for axis in figure.axes:
        low, high = axis.get_xlim()
        ticks = [float(tick) for tick in axis.get_xticks() if low <= tick <= high]
        assert {1.0, 2.0, 3.0} <= set(ticks) and all(tick.is_integer() for tick in ticks)


@pytest.mark.parametrize("k", [4, 40])
def test_the_kept_mass_has_ticks_at_integers(k: int) -> None:
    from first_trl.experiments.report.figures import mass_figure

    (axis,) = mass_figure(np.linspace(0.5, 0.9, k)).axes
    ticks = axis.get_xticks().tolist()
    assert 4 <= len(ticks) <= 12 and all(float(tick).is_integer() for tick in ticks) and ticks[0] == 1


def test_the_command_of_a_report_is_one_that_works(tmp_path: Path) -> None:
    from first_trl.experiments.recipe import load_recipe

    mine = asdict(load_recipe("quickstart", [f"output_dir={tmp_path / 'mine 2'}", "name=mine2"]))
    write_run(tmp_path / "mine 2", 0, recipe=mine)
    edit(tmp_path / "mine 2", lambda data: data.update(recipe="mine2"))
    text = write_merged_report([tmp_path]).read_text()
    (command,) = re.findall(r"Made by `first-trl run (.*?)`", text)
    (file,) = shlex.split(command)
    assert load_recipe(str(tmp_path / file)).name == "mine2"
    edit(tmp_path / "mine 2", lambda data: data.update(recipe="quickstart"))
    (command,) = re.findall(r"Made by `first-trl run (.*?)`", write_merged_report([tmp_path]).read_text())
    assert load_recipe(command).name == "quickstart"


def test_curves_show_the_numbers(tmp_path: Path) -> None:
    from first_trl.experiments.report.figures import sweep_figure

    write_sweep(tmp_path)
    (cell,) = merge_runs([tmp_path]).cells
    sweep = next(one for one in cell.sweeps if one["key"] == "recalibration_value")
    figure = sweep_figure(cell, [sweep], "test")
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["FIRST"].get_xdata()) == [0.1, 0.3, 1.0]
    assert lines["FIRST"].get_ydata() == pytest.approx([10.5, 0.5, 35.5])
    assert lines["SFT"].get_ydata() == pytest.approx([20.5, 20.5])
    assert "DIRECT" in lines and "SFT_TS" not in lines
    (fitted,) = (line for label, line in lines.items() if "fitted on validation" in label)
    assert fitted.get_xdata()[0] == pytest.approx(0.305)
    assert fitted.get_label() == "fitted on validation, c = 0.305 (0.3 to 0.31 over the seeds)"
    assert figure.get_suptitle() == "test: FIRST, ECE and accuracy over c"
    assert figure.axes[0].get_xlabel() == "c"


def test_the_fit_of_a_sweep_is_that_of_its_target(tmp_path: Path) -> None:
    """A plain fit keeps the bare name of its method; the arm that is swept trains on another target."""
    common = {"kind": "distill", "recalibration": "probability_temperature", "estimator": "topk", "top_k": 2}
    arms: dict[str, dict[str, Any]] = {"first": {**common, "fit": "fit-b"}, "late": {**common, "min_value": 0.1}}
    arms["plain"] = {**common, "top_k": 3, "fit": "probability_temperature"}
    arms["selected"] = {**common, "teacher": "selected"}
    for value in (0.1, 0.5):
        arms[f"c@recalibration_value={value}"] = {
            **common,
            "recalibration_value": value,
            "values": {"recalibration_value": value},
            "fit": None,
        }
    details = {"estimator": "topk", "objective": "ece", "min_value": None, "raw": {"ece": 0.1, "nll": 1.0}}
    details |= {"chosen": {"ece": 0.02, "nll": 0.9}}
    method = "probability_temperature"
    fits = {
        "probability_temperature": (3, 0.24, {}),
        "fit-b": (2, 0.35, {}),
        "fit-nll": (2, 0.5, {"objective": "nll"}),
        "fit-min": (2, 0.6, {"min_value": 0.1}),
        "fit-selected": (2, 0.7, {}),
    }
    recalibration = {
        name: {"recalibration": {"method": method, "value": value}, "top_k": k, **details, **more}
        for name, (k, value, more) in fits.items()
    }
    values = dict.fromkeys(arms, (0.5, 0.1))
    write_run(tmp_path / "seed-0", 0, arms=arms, values=values, recalibration=recalibration)

    def fit() -> Any:
        (sweep,) = merge_runs([tmp_path]).cells[0].sweeps
        return sweep["fit"]

    assert fit() == "fit-b"
    # Reports of an older version do not name the fit of an arm
    edit(tmp_path / "seed-0", lambda data: [spec.pop("fit", None) for spec in data["arms"].values()])
    assert fit() == "fit-b"
    edit(tmp_path / "seed-0", lambda data: data["recalibration"].update(again=data["recalibration"]["fit-b"]))
    assert fit() is None
    from first_trl.experiments.report.figures import sweep_figure

    (cell,) = merge_runs([tmp_path]).cells
    figure = sweep_figure(cell, cell.sweeps, "test")
    assert figure is not None and "fitted" not in str([line.get_label() for line in figure.axes[0].lines])


def test_points_of_the_scatter_are_numbered_and_told_apart(tmp_path: Path) -> None:
    from first_trl.experiments.report.scatter import scatter_figure

    write_sweep(tmp_path)
    for seed in range(2):
        best = {"test": scores(0.95, 0.001)}
        edit(tmp_path / f"seed-{seed}", lambda data, best=best: data["results"].update(bayes=best))
    (cell,) = merge_runs([tmp_path]).cells
    figure = scatter_figure(cell, "test")
    axes = figure.axes[0]
    points = {container.get_label(): container.lines[0] for container in axes.containers}
    assert points["5  FIRST"].get_xydata()[0] == pytest.approx([3.0, 62.5])
    assert [text.get_text() for text in axes.texts] == [str(index + 1) for index in range(len(points))]
    assert not [label for label in points if "c = 0.1" in label]
    looks = {(line.get_color(), line.get_marker()) for line in points.values()}
    assert len(looks) == len(points) == len(KINDS) + 2
    # Nothing is above the teacher's 90: the true posterior at 95 does not set the scale, and its numbers are told
    assert axes.get_ylim()[1] < 95
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "True posterior (best possible), not drawn: accuracy 95.0, ECE 0.1" in legend
    assert "FIRST over c" in legend


def test_numbers_of_points_in_one_place_stay_apart() -> None:
    from matplotlib.figure import Figure

    from first_trl.experiments.report.scatter import _number

    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    points = [(0.5, 0.5)] * 3 + [(0.51, 0.5), (0.5, 0.51)]
    _number(figure, axes, points)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


@pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")
def test_bins_with_few_rows_are_hatched() -> None:
    confidence = [0.15] * 9 + [0.55] * 10
    given = calibration_report(confidence, [1] * 9 + [1] * 5 + [0] * 5, n_bins=10)
    axes = reliability_diagram(given, min_count=10).axes[0]
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert [patch.get_height() for patch in hatched] == pytest.approx([0.15])
    marks = [line for line in axes.lines if line.get_label() == "accuracy of the bin"]
    assert [line.get_ydata()[0] for line in marks] == [0.5]
    assert not [patch for patch in reliability_diagram(given).axes[0].patches if patch.get_hatch()]


def test_what_a_role_stands_for_is_told_by_its_data(study: Path) -> None:
    assert "## `test` (in-domain)" in markdown(study) and "## `ood` (out-of-domain)" in markdown(study)
    rows = {"test": {"domain": "out-of-domain"}, "ood": {"domain": "validation"}}
    edit(study / "seed-1", lambda data: data.update(rows=rows))
    text = markdown(study)
    assert "## `test` (out-of-domain)" in text and "## `ood` (what temperatures and epochs were chosen on" in text


def test_wins_and_losses_over_all_cells(tmp_path: Path) -> None:
    rows = {"test": {"domain": "in-domain"}, "ood": {"domain": "out-of-domain"}}
    for case, shift in (("easy", 0.0), ("hard", 0.3)):
        for seed in range(3):
            values = {name: (ACCURACY[name][seed], ECE[name][seed]) for name in KINDS}
            values["first"] = (values["first"][0] - shift, values["first"][1] + shift)
            extra = {"cell": {"case": case}, "rows": rows, "highlight": ["first"], "baselines": ["sft", "sft_ts"]}
            write_run(tmp_path / case / f"seed-{seed}", seed, values=values, **extra)
    text = markdown(tmp_path)
    assert text.index("## hard") < text.index("## FIRST: wins and losses") < text.index("## Runs")
    part = text[text.index("## FIRST: wins and losses") :]
    assert "| baseline | `test` NLL | `test` Accuracy % | `test` ECE % | `ood` ECE % | `ood` NLL |" in part
    easy = row(part, "easy: FIRST minus each baseline, paired by seed.", "SFT")
    assert easy[1:3] == ["**+8.3 [+1.2, +15.5] 3/3**", "**−18.0 [−20.5, −15.5] 3/3**"]
    assert row(part, "hard: FIRST minus each baseline, paired by seed.", "SFT")[2].endswith("0/3**")
    count = re.search(r"\*(Number of baselines that FIRST is better than[^*]*)\*", part)
    assert count is not None
    # SFT and SFT_TS have the same accuracy; the ECE of SFT_TS is .05 against .02, .04, .03
    assert row(part, count[1], "easy") == ["2 / 0 / 0", "2 / 0 / 0", "1 / 1 / 0", "1 / 1 / 0", "2 / 0 / 0"]
    assert row(part, count[1], "hard")[1:3] == ["0 / 0 / 2", "0 / 0 / 2"]
    for folder in tmp_path.glob("*/*"):
        edit(folder, lambda data: data.pop("highlight"))
    assert "wins and losses" not in markdown(tmp_path)


def test_only_baselines_of_the_command_are_told_again(study: Path) -> None:
    for seed in range(3):
        edit(study / f"seed-{seed}", lambda data: data.update(baselines=["sft"]))
    text = markdown(study)
    assert "with `first-trl report DIR`." in text and "arm minus SFT, paired" in text
    asked = to_markdown(write_parts(merge_runs([study], baselines=["direct"])))
    assert "with `first-trl report DIR --baseline direct`." in asked


def test_pooled_numbers_are_told_from_means(predicted: Path) -> None:
    figures = json.loads((write_merged_report([predicted]).parent / "report.json").read_text())["figures"]
    assert "It is not the mean of the table" in figures["reliability_test.png"]
    alone = write_merged_report([predicted / "seed-0"], predicted / "alone").parent / "report.json"
    assert "mean of the table" not in json.loads(alone.read_text())["figures"]["reliability_test.png"]


def fit_of_run(message: str | None) -> dict[str, Any]:
    point = {"ece": 0.1, "nll": 1.0}
    return {
        "recalibration": {"method": "probability_temperature", "value": 0.3},
        "objective": "ece",
        "raw": point,
        "chosen": {"ece": 0.02, "nll": None},
        "bootstrap": {"low": 0.2, "high": 0.4},
        "curve": [{"value": value, **point} for value in (0.1, 0.3, 1.0)],
        "messages": [] if message is None else [message],
    }


def test_report_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from first_trl.experiments.report import run as module

    drawn: dict[str, Any] = {}
    original = module.reliability_diagram

    def spy(panels: Any, **options: Any) -> Any:
        drawn.update(panels)
        return original(panels, **options)

    monkeypatch.setattr(module, "reliability_diagram", spy)
    rng = np.random.default_rng(0)
    calibration = calibration_report(rng.random(300), rng.integers(0, 2, 300), n_bins=10)
    calibration["config"] = {"n_bins": 10}
    one = {**scores(0.5, 0.2), "n_truncated": 3, "n_unlabelled": 2}
    one["full_vocab"]["calibration"] = calibration
    specs = {"first": {}, "c@recalibration_value=0.1": {"recalibration_value": 0.1}}
    specs["c@recalibration_value=1"] = {"recalibration_value": 1.0}
    recipe = SimpleNamespace(
        name="tiny",
        seed=7,
        description="About.",
        arms={
            name: SimpleNamespace(label=None, swept=swept, recalibration="probability_temperature")
            for name, swept in specs.items()
        },
        evaluation=SimpleNamespace(splits=["unseen", "seen"], n_bins=10),
        report=SimpleNamespace(title=None, notes=["A  note."], baselines=[]),
    )
    manifest = SimpleNamespace(
        k=2, kept_mass=[0.8, 0.9], cache_id="x", teacher={"parameters": 5}, counts={"positions": 4, "rows": 4}
    )
    count = {"read": 9, "rows": 8, "not_selected": 0, "dropped": {"too long": 1}}
    counts = {"unseen": {**count, "domain": "out-of-domain"}, "seen": {**count, "domain": "in-domain"}}
    write_report(
        tmp_path,
        recipe=recipe,  # type: ignore[arg-type]
        arms=list(specs),
        results={name: {"unseen": one, "seen": one} for name in specs},
        temperatures={},
        decisions={},
        fits={"a": fit_of_run("Too few rows."), "b": fit_of_run("Too few rows."), "c": fit_of_run("Another.")},
        manifest=manifest,  # type: ignore[arg-type]
        counts=counts,
        timings=[{"unit": "data", "seconds": 1.0}],
    )
    text = (tmp_path / "report.md").read_text()
    assert set(drawn) == {"first"} and "The points of sweeps are left out." in text
    assert "## `unseen` (out-of-domain)" in text and "## `seen` (in-domain)" in text
    assert row(text, "`seen`, seed 7.", "c@recalibration_value=1") == [
        "50.0", "20.0", "30.0", "1.500", "0.500", "200",
    ]  # fmt: skip
    assert row(text, "`seen` over the answer options, seed 7.", "first")[-1] == "90.0"
    assert text.count("Too few rows.") == 1
    assert "- Warning about `a`, `b`: Too few rows." in text and "- Warning about `c`: Another." in text
    assert "c = 0.3 (0.20 to 0.40) | 10.0 | 2.0 | 1.000 | – |" in text
    assert "![Choice of c on validation (b): the teacher's ECE and NLL over c.](recalibration_b.png)" in text
    assert "![Reliability on seen." in text and "Curve" not in text
    assert "3 of 200 prompts were cut" in text and "2 of 200 rows have no answer" in text
    assert "| seen | 9 | 8 | 0 | 0 | 1 (too long) |" in text and "- A note." in text
    for file in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert (tmp_path / file).stat().st_size > 5000


def test_the_legend_of_a_fit_names_both_curves_and_hides_none() -> None:
    from first_trl.experiments.report.figures import curve_figure

    figure = curve_figure("a", fit_of_run(None))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "ECE (left)" in labels and "NLL (right)" in labels and "chosen c = 0.3 (by ECE)" in labels
    figure.draw_without_rendering()
    assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_window_extent())


def test_cells_of_a_grid(tmp_path: Path) -> None:
    for k in (10, 2):
        for seed in range(2):
            values = {name: (ACCURACY[name][seed], ECE[name][seed] + k / 1000) for name in (*KINDS, "bayes")}
            write_run(tmp_path / f"k={k}" / f"seed-{seed}", seed, values=values, cell={"capture.k": k})
    write_run(tmp_path / "digits" / "seed-0", 0, arms={"sft": KINDS["sft"]}, cell={"case": "digits"}, roles=("test",))
    merged = merge_runs([tmp_path])
    assert [cell.title for cell in merged.cells] == ["capture.k = 2", "capture.k = 10", "digits"]
    assert merged.cells[1].results["first"]["test"]["full_vocab"]["ece"]["mean"] == pytest.approx(0.04)
    assert merged.cells[0].runs == ["k=2/seed-0", "k=2/seed-1"]
    text = markdown(tmp_path)
    for title in ("## All cells", "## capture.k = 2", "## digits", "### `test` (in-domain)"):
        assert f"\n{title}\n" in text
    across = "ECE %, `test`, mean over the seeds ± standard deviation."
    assert row(text, across, "FIRST") == ["**3.2 ± 1.4**", "**4.0 ± 1.4**", "–"]
    assert row(text, across, "SFT")[2] == "20.0"


def test_every_number_leads_to_its_run(study: Path) -> None:
    path = write_merged_report([study])
    data = json.loads((path.parent / "report.json").read_text())
    keys = {run["run"]: run["recipe_key"] for run in data["runs"]}
    assert keys == {f"seed-{seed}": f"{seed:040x}" for seed in range(3)}
    seen = 0
    for arm, roles in data["cells"][0]["results"].items():
        for role, readings in roles.items():
            for reading in ("full_vocab", "options"):
                for metric, summary in readings[reading].items():
                    for run, value in summary["values"].items():
                        own = json.loads((path.parent.parent / run / "report" / "report.json").read_text())
                        assert value == own["results"][arm][role][reading][metric]
                        seen += 1
    assert seen == 6 * 2 * 2 * 5 * 3
    assert "`seed-2` | 2 | `0000000000000000`" in path.read_text()


def test_json_round_trip(study: Path) -> None:
    merged = merge_runs([study])
    assert MergedReport.from_dict(json.loads(json.dumps(merged.to_dict()))) == merged
    with pytest.raises(ValueError, match="no merged report"):
        MergedReport.from_dict({"recipe": "x"})


def test_same_runs_same_bytes_wherever_and_whenever(predicted: Path, tmp_path: Path) -> None:
    write_merged_report([predicted])
    moved = tmp_path / "elsewhere" / "copy"
    for seed in (2, 0, 1):
        shutil.copytree(predicted / f"seed-{seed}", moved / f"seed-{seed}")
        edit(moved / f"seed-{seed}", lambda data: data.update(seconds={"teacher": 999.0}))
    write_merged_report([moved / "seed-2", moved / "seed-0", moved / "seed-1"], moved / "report")
    first = {path.name: path.read_bytes() for path in (predicted / "report").iterdir()}
    second = {path.name: path.read_bytes() for path in (moved / "report").iterdir()}
    assert first == second
    assert {"report.md", "report.json", "report.tex", "report.html"} < set(first)
    for name in ("report.md", "report.json", "report.tex", "report.html"):
        assert str(tmp_path) not in first[name].decode() and "/somewhere" not in first[name].decode()
    write_merged_report([predicted])
    assert first == {path.name: path.read_bytes() for path in (predicted / "report").iterdir()}


def test_figures_that_no_longer_belong_are_removed(predicted: Path) -> None:
    write_merged_report([predicted])
    assert (predicted / "report" / "reliability_test.png").is_file()
    (predicted / "report" / "mine.txt").write_text("kept")
    for seed in range(3):
        shutil.rmtree(predicted / f"seed-{seed}" / "evaluate")
    write_merged_report([predicted])
    assert not (predicted / "report" / "reliability_test.png").exists()
    assert (predicted / "report" / "kept_mass.png").is_file() and (predicted / "report" / "mine.txt").is_file()


def test_reliability_is_pooled_over_seeds(predicted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from first_trl.experiments.report import write

    drawn: dict[str, Any] = {}
    original = write.reliability_diagram

    def spy(panels: Any, **options: Any) -> Any:
        drawn[options["suptitle"]] = panels
        return original(panels, **options)

    monkeypatch.setattr(write, "reliability_diagram", spy)
    (predicted / "seed-1" / "evaluate" / "direct" / "test.parquet").unlink()
    text = write_merged_report([predicted]).read_text()
    panels = drawn["made_up, test: accuracy against confidence"]
    pooled = [draw(seed, "first", "test") for seed in range(3)]
    confidence = np.concatenate([one["top_prob"][:190] for one in pooled])
    right = np.concatenate([one["top_is_gold"][:190] for one in pooled])
    assert panels["FIRST"]["n"] == 570
    assert panels["FIRST"]["ece"] == pytest.approx(
        expected_calibration_error(confidence, right.astype(int), n_bins=10)
    )
    assert "DIRECT" not in panels and "left out: DIRECT." in text
    shutil.rmtree(predicted / "seed-0" / "evaluate")
    assert "There is no reliability diagram" in write_merged_report([predicted]).read_text()


def test_latex_is_escaped_and_balanced(study: Path) -> None:
    edit(study / "seed-0", lambda data: data["labels"].update(first="100 % A&B_c {#1} $x$ δ~^\\ <|>"))
    merged = merge_runs([study])
    text = to_latex(table_parts(write_parts(merged)), merged.title)
    assert r"100 \% A\&B\_c \{\#1\} \$x\$ $\delta$\textasciitilde{}\textasciicircum{}\textbackslash{}" in text
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    for environment in ("table", "tabular", "adjustbox"):
        assert body.count(rf"\begin{{{environment}}}") == body.count(rf"\end{{{environment}}}") > 5
    plain = re.sub(r"\\[\\{}%&_#$]", "", body)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert "%" not in plain and "#" not in plain and "_" not in plain
    # Every row of a table has as many columns as the table
    for tabular in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", body, re.S):
        rows = [line for line in tabular[1].splitlines() if line.endswith(r"\\")]
        assert rows and {line.replace(r"\&", "").count("&") + 1 for line in rows} == {len(tabular[0])}
    assert all(ord(character) < 128 for character in body.replace("–", ""))
    assert escape("`a_b` **c** −1") == r"\texttt{a\_b} \textbf{c} $-$1"


def test_page_stands_alone(predicted: Path) -> None:
    edit(predicted / "seed-0", lambda data: data["labels"].update(first="<script>alert(1)</script>"))
    edit(predicted / "seed-0", lambda data: data.update(title="A & B <i>"))
    page = (write_merged_report([predicted]).parent / "report.html").read_text()
    opened: list[str] = []
    addresses: list[str] = []
    closed_late: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            addresses.extend(value for name, value in attrs if name in ("src", "href", "srcset", "data"))
            if tag not in ("img", "meta"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if opened.pop() != tag:
                closed_late.append(tag)

    Reader().feed(page)
    assert not opened and not closed_late
    assert addresses and all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert sum(address.startswith("data:") for address in addresses) == len(list((predicted / "report").glob("*.png")))
    assert {address[1:] for address in addresses if address[0] == "#"} <= set(re.findall(r'id="([^"]+)"', page))
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert "<title>A &amp; B &lt;i&gt;</title>" in page and 'name="viewport"' in page


def test_markdown_survives_a_label_with_a_bar(study: Path) -> None:
    edit(study / "seed-0", lambda data: data["labels"].update(first="a|b"))
    text = markdown(study)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_a_run_is_never_overwritten(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (study / "seed-0" / "report" / "report.json").read_bytes()
    status = main(["report", str(study), "--output-dir", str(study / "seed-0" / "report")])
    assert status == 2 and "is the report of a single run" in capsys.readouterr().err
    assert (study / "seed-0" / "report" / "report.json").read_bytes() == before


def test_command(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["report", str(study / "seed-0"), str(study / "seed-2"), "--baseline", "first", "--baseline", "sft"]) == 0
    )
    assert f"Merged report: {study / 'report' / 'report.md'}" in capsys.readouterr().out
    data = json.loads((study / "report" / "report.json").read_text())
    assert data["seeds"] == [0, 2] and data["baselines"] == ["first", "sft"]
    assert "first-trl report DIR --baseline first --baseline sft" in (study / "report" / "report.md").read_text()
    assert main(["report", str(study), "--output-dir", str(tmp_path / "out" / "merged")]) == 0
    assert json.loads((tmp_path / "out" / "merged" / "report.json").read_text())["runs"][0]["run"] == "../study/seed-0"
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_how_new_the_rows_are_over_the_seeds(tmp_path):
    kinds = {**KINDS, "sft_novelty": {"kind": "novelty_scaling", "of": "sft"}}
    for seed in (0, 1, 2):
        tenths = {"temperature": {"mean": 1.2 + seed / 10}, "feature": {"mean": 0.0}}
        novelty = {
            "sft_novelty": {
                "slopes": [0.1 + seed / 10],
                "roles": {"test": tenths, "ood": tenths},
                "auroc": {"ood": {"feature": 0.8, "max_probability": 0.5}},
            }
        }
        values = dict.fromkeys((*kinds, "bayes"), (0.5, 0.1))
        write_run(tmp_path / f"seed-{seed}", seed, arms=kinds, values=values, novelty=novelty)
    merged = merge_runs([tmp_path / f"seed-{seed}" for seed in (0, 1, 2)])
    found = merged.cells[0].novelty["sft_novelty"]
    assert found["slope"]["mean"] == pytest.approx(0.2) and found["ood.feature"]["mean"] == pytest.approx(0.8)
    text = to_markdown(write_parts(merged))
    assert "| SFT_NOVELTY | 0.20 ± 0.10 | test | 1.30 ± 0.10 | – | – |" in text
    assert "| ood | 1.30 ± 0.10 | 0.80 ± 0.00 | 0.50 ± 0.00 |" in text
    assert MergedReport.from_dict(merged.to_dict()).cells[0].novelty == merged.cells[0].novelty
