"""Seeds of a recipe side by side: one process each, one log, and no more threads than cores."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock


# What the libraries beneath torch take their number of threads from
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run_seeds(words: Sequence[str], seeds: Sequence[int], jobs: int) -> list[int]:
    """
    Run `first-trl run` for several seeds, `jobs` at a time.

    Every line of their logs is printed as it comes, behind its seed; of a progress bar, its last state. A seed that
    fails does not end the others, and all of them end with this process.

    Args:
        words (`Sequence[str]`): What stands behind `first-trl run`, without a seed.
        seeds (`Sequence[int]`): Seeds to run.
        jobs (`int`): Processes at a time; each has an equal share of the cores.

    Returns:
        `list[int]`: The seeds that failed.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**dict.fromkeys(_THREADS, threads), **os.environ}
    running: list[subprocess.Popen[str]] = []
    lock = Lock()
    stopped = False

    def run(seed: int) -> int:
        command = [sys.executable, "-m", "first_trl", "run", *words, "--seed", str(seed)]
        with lock:
            if stopped:
                return 130
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
            )
            running.append(process)
        assert process.stdout is not None
        # Universal newlines: the states of a bar, which end in a carriage return, are lines as well; its last one counts
        bar = ""
        for line in process.stdout:
            text = line.rstrip("\n")
            if "it/s]" in text or "s/it]" in text:
                bar = text
                continue
            with lock:
                for part in (bar, text):
                    if part.strip():
                        print(f"[seed {seed}] {part.rstrip()}", flush=True)
            bar = ""
        return process.wait()

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, seed) for seed in seeds]
        try:
            codes = [future.result() for future in futures]
        except BaseException:
            with lock:
                stopped = True
                for process in running:
                    process.terminate()
            raise
    return [seed for seed, code in zip(seeds, codes, strict=True) if code != 0]
