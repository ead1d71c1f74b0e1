"""Evaluation and fit on two and three processes: row for row what one process finds."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from first_trl.utils.processes import Share


def launch(processes, *command):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", *command], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore::UserWarning")
# Quick are the shares themselves, below, and a launch of two processes in tests/experiments/test_pipeline.py
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_find_what_one_finds(processes, tmp_path):
    # Imported here: a test that launches needs no model of its own
    from tests.support.evaluation_process import results

    output = tmp_path / "found.json"
    launch(processes, "tests.support.evaluation_process", str(output))
    found = json.loads(output.read_text())
    assert found.pop("minutes") == 60
    assert found == json.loads(json.dumps(results(distributed=False)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_several_processes_fit_the_rescales_that_one_fits(tmp_path):
    """Each fit is one process's; on two and three, files and what travels with the cache are the same bytes."""
    from first_trl.experiments.recipe import load_recipe
    from first_trl.experiments.stages.run import run_recipe
    from tests.support.quickstart import TINY

    before, one = tmp_path / "before", tmp_path / "one"
    for stage in ("data", "pretrain", "teacher", "capture"):
        run_recipe(load_recipe("quickstart", TINY, output_dir=str(before)), stage)
    shutil.copytree(before, one)
    run_recipe(load_recipe("quickstart", TINY, output_dir=str(one)), "recalibrate")
    wanted = stored(one)
    assert len([name for name in wanted if name.startswith("recalibration")]) == 2 and wanted != stored(before)
    for processes in (2, 3):
        several = tmp_path / str(processes)
        shutil.copytree(before, several)
        launch(processes, "first_trl", "run", "quickstart", *TINY, "--stage=recalibrate", f"--output-dir={several}")
        assert stored(several) == wanted


def stored(run):
    """Files of the fits and manifests of the caches; the markers of units hold times."""
    paths = [
        path
        for path in run.rglob("*.json")
        if path.name != "unit.json" and path.relative_to(run).parts[0].startswith(("cache", "recalibration"))
    ]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def test_shares_are_disjoint_and_complete():
    parts = [list(Share(rank, 3).part(range(0, 50, 4))) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == list(range(0, 50, 4))
    assert list(Share.of(False).part(range(7))) == list(range(7))
    values = np.arange(3.0)
    Share().merge(np.ones(3, bool), [values])
    assert values.tolist() == [0.0, 1.0, 2.0]
