"""Merged reports: every number by hand, every refusal, and the same bytes for the same runs."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from first_trl.calibration import expected_calibration_error
from first_trl.cli import main
from first_trl.report import MergedReport, merge_runs, write_merged_report
from first_trl.report.content import table_parts, write_parts
from first_trl.report.latex import escape, to_latex
from first_trl.report.markdown import to_markdown


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
    assert "first-trl run made_up" in text and "first-trl report DIR" in text


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
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 4},
    }
    write_run(tmp_path / "seed-0", 0, recipe=recipe)
    other = {
        "seed": 1,
        "output_dir": "there",
        "teacher": {"name_or_path": "/two/model"},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 8},
    }
    write_run(tmp_path / "seed-1", 1, recipe=other)
    merge_runs([tmp_path])
    other["training"]["num_train_epochs"] = 3
    (tmp_path / "seed-1" / "recipe.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match=r"training.num_train_epochs = 2, seed-1 with 3: these are different"):
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
    assert by_key["recalibration_value"]["label"] == "FIRST, c" and by_key["top_k"]["label"] == "K"
    assert by_key["recalibration_value"]["method"] == "probability_temperature"
    # The point of a sweep with the lowest ECE would win; it was chosen on the rows it is reported on
    assert cell.results["first@recalibration_value=0.3"]["test"]["full_vocab"]["ece"]["mean"] < 0.01
    assert cell.best["test"]["full_vocab"]["ece"]["arms"] == ["first"]
    text = write_merged_report([tmp_path]).read_text()
    caption = "FIRST, c, `test`: mean over 2 seeds ± standard deviation for each `recalibration_value`."
    assert row(text, caption, "0.1")[1] == "10.5 ± 0.7"
    for name in ("sweep_recalibration_value_probability_temperature_test", "sweep_top_k_ood", "kept_mass"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    assert "E@ESTIMATOR=BUCKET" in text


def test_curves_show_the_numbers(tmp_path: Path) -> None:
    from first_trl.report.figures import scatter_figure, sweep_figure

    write_sweep(tmp_path)
    (cell,) = merge_runs([tmp_path]).cells
    sweep = next(one for one in cell.sweeps if one["key"] == "recalibration_value")
    figure = sweep_figure(cell, [sweep], "test")
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["FIRST, c"].get_xdata()) == [0.1, 0.3, 1.0]
    assert lines["FIRST, c"].get_ydata() == pytest.approx([10.5, 0.5, 35.5])
    assert lines["SFT"].get_ydata() == pytest.approx([20.5, 20.5])
    assert "DIRECT" in lines and "SFT_TS" not in lines
    (fitted,) = (line for label, line in lines.items() if "fitted on validation" in label)
    assert fitted.get_xdata()[0] == pytest.approx(0.305)
    axes = scatter_figure(cell, "test").axes[0]
    points = {container.get_label(): container.lines[0].get_xydata()[0] for container in axes.containers}
    assert points["FIRST"] == pytest.approx([3.0, 62.5])
    assert "FIRST, c = 0.1" not in points


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
    from first_trl.report import write

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
