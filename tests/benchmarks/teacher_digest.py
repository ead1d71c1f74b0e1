"""
What the digest of a teacher's weights costs against loading them, warm and with the file's pages dropped.

Loads and digests take turns, and medians are printed, by processor time and by wall clock: processor time is what holds on a
machine with other work, and wall clock is what a user waits for on a quiet one. Dropping pages (`posix_fadvise`) is a request
that a file system may ignore; the wall clock of "cold" beside that of "warm" shows whether it did.

    python tests/benchmarks/teacher_digest.py MODEL_FOLDER --dtype auto float32
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoModelForCausalLM

from first_trl.teacher.backends.transformers import weights_digest


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, processor seconds of all threads, wall seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def drop_pages(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print("| dtype | pages | load, CPU s / wall s | digest, CPU s / wall s | digest / load, CPU % / wall % |")
    print(f"|{' --- |' * 5}")
    for dtype in args.dtype:
        found: dict[str, list[tuple[float, ...]]] = {"warm": [], "cold": []}
        for repeat in range(2 * args.repeats + 1):
            pages = ("warm", "cold")[repeat % 2]
            if pages == "cold":
                drop_pages(args.model)
            model, *load = timed(lambda dtype=dtype: AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype))
            _, *digest = timed(lambda model=model: weights_digest(model))
            del model
            gc.collect()
            if repeat:  # the first one imports modules
                found[pages].append((*load, *digest))
        for pages, rows in found.items():
            load_cpu, load_wall, cpu, wall = (median(column) for column in zip(*rows, strict=True))
            print(
                f"| {dtype} | {pages} | {load_cpu:.3f} / {load_wall:.3f} | {cpu:.3f} / {wall:.3f} | "
                f"{100 * cpu / load_cpu:.1f} / {100 * wall / load_wall:.1f} |"
            )


if __name__ == "__main__":
    main()
