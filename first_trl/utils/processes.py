"""The processes of a launch."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env


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
    # Others wait while one process reads data or uploads, which may take longer than the usual ten minutes
    patience = {"timeout": timedelta(minutes=60)} if launched > 1 else {}
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


def gpu_memory() -> float | None:
    """Bytes of this process's CUDA device; `None` without one."""
    device = process_state().device
    return None if device.type != "cuda" else float(torch.cuda.get_device_properties(device).total_memory)


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


@dataclass(frozen=True)
class Share:
    """
    What one process does of work that all do together: every `count`-th batch, from its `rank` on.

    Args:
        rank (`int`): Of this process.
        count (`int`): Processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, distributed: bool) -> "Share":
        """This process's share among those of the launch; all of the work unless `distributed`."""
        if not distributed:
            return cls()
        state = process_state()
        return cls(state.process_index, state.num_processes)

    def part(self, items: range) -> range:
        """The items of this process."""
        return items[self.rank :: self.count]

    def merge(self, done: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        """
        Fill in what the other processes have done. Every process must call.

        Args:
            done (`numpy.ndarray` of shape `(n,)`, bool): Rows that this process has done.
            arrays (sequence of `numpy.ndarray` of shape `(n, ...)`): Results, filled in place.
        """
        if self.count == 1:
            return
        mine: list[Any] = [(np.flatnonzero(done), [array[done] for array in arrays])]
        for index, parts in gather_object(mine):
            for array, part in zip(arrays, parts, strict=True):
                array[index] = part


# All of the work, for one process alone
ALL = Share()
