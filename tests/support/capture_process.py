"""A capture in processes of its own, to be killed: one process, or several under torch.distributed."""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from first_trl import add_teacher_topk
from first_trl.teacher.backends import TransformersBackend
from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer


ROWS, SHARD_SIZE, BATCH = 160, 16, 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LoggedBackend(TransformersBackend):
    """Notes how many rows it scored, and takes its time over them."""

    def __init__(self, log: Path, seconds: float) -> None:
        super().__init__(tiny_llama())
        self.log, self.seconds = log, seconds

    def score(self, rows: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(self.seconds)
        scores = super().score(rows, *args, **kwargs)
        with open(self.log, "a") as file:
            file.write(f"{len(rows)}\n")
        return scores


def run_capture(folder: Path, log: Path, rank: int = 0, world: int = 1, port: int = 0, seconds: float = 0.01) -> None:
    """Target of a child process."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
    sys.stderr = open(log.with_name(f"stderr-{rank}.txt"), "a")  # noqa: SIM115 (for the length of the process)
    add_teacher_topk(
        Dataset.from_list([{**row, "id": i} for i, row in enumerate(tiny_rows(ROWS, longest=24))]),
        LoggedBackend(log.with_suffix(f".{rank}"), seconds),
        tiny_tokenizer(),
        output_dir=folder,
        shard_size=SHARD_SIZE,
        max_rows_per_batch=BATCH,
        num_draws=3,
        disable_tqdm=True,
    )
    if world > 1:
        torch.distributed.destroy_process_group()
