"""`first-trl metric push`: the metric on a Hub, read back where first_trl is not installed."""

from tests.hub_server import HubServer, run_client


def test_pushed_metric_loads_without_the_package(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        pushed = run_client(
            "import sys; from first_trl.cli import main; sys.exit(main(['metric', 'push', 'alice/ece']))", hub
        )
        assert hub.token not in pushed.output
        commit = pushed.stdout.split(" at ")[1].split(".")[0]
        load = f"""
import sys
sys.modules["first_trl"] = None  # an import of it fails
import evaluate
metric = evaluate.load("alice/ece", revision="{commit}")
print(metric.compute(predictions=[0.25, 0.25, 0.55, 0.75, 0.75], references=[0, 0, 1, 1, 1], n_bins=2)["ece"])
"""
        loaded = run_client(load, hub)
        # Two bins: |0 - .25| * 2/5 and |1 - .6833| * 3/5
        assert abs(float(loaded.stdout.split()[-1]) - 0.29) < 1e-12
        assert hub.foreign_requests == []
