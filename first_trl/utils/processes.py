"""The processes of a launch."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """
    The processes this one runs beside, whatever launched them.

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
    if launched > 1 and state.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched but this one runs alone: `PartialState()` was created without "
            "`cpu=True`. Call `first_trl.utils.processes.process_state()` first."
        )
    return state
