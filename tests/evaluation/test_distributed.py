"""Evaluation and fit on two and three processes: row for row what one process finds."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from first_trl.utils.processes import Share


@pytest.mark.filterwarnings("ignore::UserWarning")
# Three share as two do; that shares are disjoint for three is below
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_find_what_one_finds(processes, tmp_path):
    # Imported here: a test that launches needs no model of its own
    from tests.support.evaluation_process import results

    output = tmp_path / "found.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.support.evaluation_process", str(output)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(output.read_text()) == json.loads(json.dumps(results(distributed=False)))


def test_shares_are_disjoint_and_complete():
    parts = [list(Share(rank, 3).part(range(0, 50, 4))) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == list(range(0, 50, 4))
    assert list(Share.of(False).part(range(7))) == list(range(7))
    values = np.arange(3.0)
    Share().merge(np.ones(3, bool), [values])
    assert values.tolist() == [0.0, 1.0, 2.0]
