"""A recipe of several seeds: missing runs are made, killed ones continued, and the merged report does not tell."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from first_trl.cli import main
from first_trl.utils.resources import recipe_path
from tests.support.forked import start
from tests.support.quickstart import TINY


ARMS = {
    "teacher": {"kind": "teacher"},
    "sft": {"kind": "sft"},
    "c": {"kind": "distill", "recalibration": "probability_temperature"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    data = yaml.safe_load(recipe_path("quickstart").read_text())
    data |= {"arms": ARMS, "seeds": [0, 1], "grid": {"arms.c.recalibration_value": [0.2, 0.5]}}
    data["evaluation"]["splits"] = ["test"]
    path = tmp_path_factory.mktemp("recipe") / "sweep.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def merged(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "report" / name).read_bytes() for name in ("report.md", "report.json", "report.tex")}


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main(["run", recipe, *TINY, "--output-dir", str(folder)]) == 0
    return folder


def test_a_seed_that_is_there_is_kept_and_the_missing_one_made(recipe, whole, tmp_path, capsys):
    shutil.copytree(whole / "seed-1", tmp_path / "seed-1")
    assert main(["run", recipe, *TINY, "--output-dir", str(tmp_path), "--seed", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed-1"]
    assert ": running" not in capsys.readouterr().out
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert main(["run", recipe, *TINY, "--output-dir", str(tmp_path)]) == 0
    assert weights.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}.items()
    assert merged(tmp_path) == merged(whole)


def test_the_report_command_gives_the_same_report(whole, tmp_path):
    assert main(["report", str(whole), "--output-dir", str(tmp_path / "again")]) == 0
    tables = [
        [
            line
            for line in (folder / "report.md").read_text().splitlines()
            if line.startswith("|") and "seed-" not in line
        ]
        for folder in (whole / "report", tmp_path / "again")
    ]
    assert len(tables[0]) > 20 and tables[0] == tables[1]


# Quick is the test below: `--jobs` starts the seeds, and says which one failed
@pytest.mark.slow
def test_two_seeds_side_by_side_give_the_same_report(recipe, whole, tmp_path):
    command = [sys.executable, "-m", "first_trl", "run", recipe, *TINY, "--output-dir", str(tmp_path), "--jobs", "2"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=540
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = ended.stdout.splitlines()
    for seed in (0, 1):
        assert any(line.startswith(f"[seed {seed}]") and "cache: running" in line for line in lines)
    # One after the other, all lines of the first would come before those of the second
    seeds = [line[6] for line in lines if line.startswith("[seed ")]
    assert seeds != sorted(seeds) and seeds != sorted(seeds, reverse=True)
    assert merged(tmp_path) == merged(whole)


def test_a_seed_that_fails_is_named_and_the_others_end(recipe, tmp_path, capfd):
    blocked = tmp_path / "seed-1"
    blocked.write_text("a file where the folder of the run should be")
    command = ["run", recipe, *TINY, "--output-dir", str(tmp_path), "--jobs", "2", "--stage", "data"]
    assert main(command) == 2
    printed = capfd.readouterr()
    assert "Of the seeds 0, 1, 1 did not finish" in printed.err
    assert (tmp_path / "seed-0" / "data" / "unit.json").is_file()


@pytest.mark.parametrize("words", [["--jobs", "0"], ["--jobs", "2", "--seed", "1"], ["--jobs", "2", "--smoke"]])
def test_jobs_that_make_no_sense(recipe, words, capsys):
    assert main(["run", recipe, *words]) == 2
    assert "--jobs takes a number from 1" in capsys.readouterr().err


def test_jobs_of_a_recipe_with_one_seed(capsys):
    assert main(["run", "quickstart", "--jobs", "2"]) == 2
    assert "this recipe names fewer than two" in capsys.readouterr().err


# Quick is a kill of one run, in test_pipeline.py
@pytest.mark.slow
def test_killed_at_five_random_moments(recipe, whole, tmp_path):
    """Each attempt is killed somewhere; the one that is left alone ends with the report of an undisturbed sweep."""
    command, log = ["run", recipe, *TINY, "--output-dir", str(tmp_path / "run")], tmp_path / "log.txt"
    chance = random.Random(7)
    units = len(list(whole.glob("seed-*/**/unit.json")))
    kills = 0
    while kills < 5:
        process = start(command, log)
        # A moment counted in finished units, so that a slow machine is killed in the middle of its work too
        before = len(done(tmp_path / "run"))
        target = before + chance.randint(0, max(1, (units - before) // (6 - kills)))
        deadline = time.monotonic() + 300
        while len(done(tmp_path / "run")) <= target and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(chance.random() * 0.5)
        assert process.is_alive(), "finished before it could be killed five times"
        process.kill()
        process.join()
        kills += 1
    finished = start(command, log)
    finished.join(540)
    printed = log.read_text()
    assert finished.exitcode == 0, printed[-2000:]
    assert "done before, kept" in printed
    assert merged(tmp_path / "run") == merged(whole)


def done(folder: Path) -> list[Path]:
    """Units that are finished; a marker that is being replaced while it is read counts as not."""
    found = []
    # Not `glob`, which fails when a folder it is about to look into is removed meanwhile, as checkpoints are
    for path in (Path(place) / "unit.json" for place, _, names in os.walk(folder) if "unit.json" in names):
        try:
            found += [path] if json.loads(path.read_text())["status"] == "done" else []
        except (OSError, ValueError):
            continue
    return found
