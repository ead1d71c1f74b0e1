"""Commands in processes that can be killed, forked from one that has imported the libraries, which takes longer than they do."""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["first_trl.experiments.stages.run", "first_trl.training.trainer"])


def start(words: list[str], log: Path) -> BaseProcess:
    """Start `first-trl` with these words, in the folder of the log; the exit code is that of the command."""
    process = _CONTEXT.Process(target=_run, args=(words, log))
    process.start()
    return process


def _run(words: list[str], log: Path) -> None:
    from first_trl.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(log.parent)
    raise SystemExit(main(words))
