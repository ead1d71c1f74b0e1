"""One choice of a device for all that is placed, trained and evaluated."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from first_trl.experiments.run_folder import TrainingFolder
from first_trl.experiments.stages import training
from first_trl.experiments.stages.training import training_arguments
from first_trl.training.config import FirstDistillConfig
from first_trl.utils import processes


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "cuda"])
def test_a_training_runs_where_models_are_placed(device, tmp_path, monkeypatch):
    """Any accelerator that PyTorch finds, not CUDA alone."""
    monkeypatch.setattr(processes, "process_state", lambda: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(training, "is_torch_bf16_gpu_available", lambda: device == "xpu")
    seen = {}
    monkeypatch.setattr(FirstDistillConfig, "__init__", lambda self, **values: seen.update(values))
    recipe = SimpleNamespace(name="one", seed=0, report_to="none")
    training_arguments(FirstDistillConfig, recipe, {}, TrainingFolder(tmp_path))
    assert seen["use_cpu"] == (device == "cpu")
    assert seen["bf16"] == (device == "xpu")


@pytest.mark.parametrize("found", [True, False])
def test_models_are_placed_on_whatever_accelerator_there_is(found, monkeypatch):
    """On a machine without CUDA, as those with MPS or XPU are."""
    seen = []

    def state(**options):
        seen.append(options["cpu"])
        return SimpleNamespace(num_processes=1, is_main_process=True)

    monkeypatch.setattr(processes, "PartialState", state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found)
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    processes.process_state()
    assert seen == [not found]


@pytest.mark.parametrize(
    "told, found, warned", [("false", False, 1), ("False", True, 0), ("true", False, 0), (None, False, 0)]
)
def test_a_launch_for_a_gpu_without_one_warns_once(told, found, warned, monkeypatch):
    monkeypatch.setattr(processes, "_warned", False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if told is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", told)
    monkeypatch.setattr(processes, "PartialState", lambda **_: SimpleNamespace(is_main_process=True, num_processes=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processes.process_state()
        processes.process_state()
    assert len(caught) == warned
    assert all("PyTorch finds none on this machine: everything runs on the CPU" in str(w.message) for w in caught)
