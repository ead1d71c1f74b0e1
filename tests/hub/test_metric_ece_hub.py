"""The metric as a Space on a Hub: pushed, fetched and loaded back by its name."""

import json
from pathlib import Path

import pytest

from tests.support.hub_server.client import run_client
from tests.support.hub_server.server import HubServer


pytest.importorskip("evaluate", reason="needs evaluate")


def test_push_and_load_back(tmp_path: Path) -> None:
    code = """
import sys
from first_trl.cli import main
assert main(["metric", "push", "alice/my_ece"]) == 0
"""
    load = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "first_trl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import evaluate
module = evaluate.load("alice/my_ece")
result = module.compute(predictions=[0.25, 0.25, 0.55, 0.75, 0.75], references=[0, 0, 1, 1, 1], n_bins=2)
print("RESULT", json.dumps(result["ece"]))
"""
    with HubServer(tmp_path / "hub") as hub:
        run_client(code, hub)
        answer = run_client(load, hub)
        assert json.loads(answer.stdout.split("RESULT")[1]) == pytest.approx(0.29)
        assert answer.contacted_hosts <= {"127.0.0.1", "localhost"}
        assert hub.internal_errors == []
