"""Optimiser steps of a training, counted as transformers counts them."""

import dataclasses
import math
from typing import Any

from ...training.config import FirstDistillConfig


def defaults() -> dict[str, Any]:
    """Training arguments that have a plain default."""
    return {
        field.name: field.default
        for field in dataclasses.fields(FirstDistillConfig)
        if field.default is not dataclasses.MISSING
    }


def device_batch(training: dict[str, Any], processes: int) -> int:
    """
    Rows of one forward on one process.

    Raises:
        `ValueError`: `global_batch_size` cannot be divided among processes and accumulation steps.
    """
    accumulation = int(training.get("gradient_accumulation_steps", 1))
    total = training.get("global_batch_size")
    if total is None:
        return int(training.get("per_device_train_batch_size", defaults()["per_device_train_batch_size"]))
    if total % (processes * accumulation):
        raise ValueError(
            f"global_batch_size={total} does not divide by {processes * accumulation} (processes x accumulation steps)"
        )
    return int(total) // (processes * accumulation)


def optimizer_steps(rows: int, training: dict[str, Any], processes: int) -> int:
    """
    Optimiser steps of a training over `rows` rows: epochs x batches of a process, a last partial accumulation too.

    Raises:
        `ValueError`: As [`device_batch`].
    """
    values = {**defaults(), **training}
    if values["max_steps"] > 0:
        return int(values["max_steps"])
    batch, accumulation = device_batch(training, processes), int(values["gradient_accumulation_steps"])
    # The last batches are filled up so that every process has as many, unless they are dropped
    divide = (lambda a, b: a // b) if values["dataloader_drop_last"] else (lambda a, b: -(-a // b))
    batches = divide(divide(rows, batch), processes)
    return math.ceil(values["num_train_epochs"] * max(-(-batches // accumulation), 1))
