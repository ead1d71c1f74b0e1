"""The processes of a launch."""

import os
import warnings
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


_warned = False


def process_state() -> PartialState:
    """
    The processes this one runs beside, whatever launched them. Its `device` is the one that models are placed on and
    trained on: whatever accelerator PyTorch finds (CUDA, XPU, MPS, ...), or the CPU.

    `PartialState()` alone overlooks a launch on CPUs: it joins the others only when it is told so, and under
    `accelerate launch --cpu` every process would take itself for the only one.

    Raises:
        `RuntimeError`: Something asked for the state before, in the way that overlooks the others.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Others wait while one process reads data, evaluates or uploads, which takes longer than the usual ten minutes
    patience = {"timeout": timedelta(days=1)} if launched > 1 else {}
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, **patience)
    _warn_of_no_accelerator(state)
    if launched > 1 and state.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched but this one runs alone: `PartialState()` was created without "
            "`cpu=True`. Call `first_trl.utils.processes.process_state()` first."
        )
    return state


def on_accelerator() -> bool:
    """Whether models run on a GPU or another accelerator; else they run on the CPU."""
    return process_state().device.type != "cpu"


def _warn_of_no_accelerator(state: PartialState) -> None:
    global _warned
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    if _warned or told not in ("false", "0", "no") or torch.accelerator.is_available() or not state.is_main_process:
        return
    _warned = True
    warnings.warn(
        "`accelerate launch` was started for a GPU, and PyTorch finds none on this machine: everything runs on the CPU, "
        "which can take a hundred times as long. Check `nvidia-smi` and the PyTorch that is installed, or say that it "
        "is meant: `accelerate launch --cpu`.",
        stacklevel=3,
    )
