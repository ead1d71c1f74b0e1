"""The `first-trl` command."""

import argparse
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ..utils.errors import explain
from ..utils.versions import __version__


# Name -> (module with `add_arguments(parser)` and `main(args) -> int`, help). Only the module of the command that is
# asked for is imported: `first-trl --help` and a mistyped recipe are answered without loading torch.
_COMMANDS = {
    "run": ("first_trl.cli.run", "run a recipe: teacher, cache, recalibration, students, report"),
    "report": ("first_trl.cli.report", "merge the reports of several runs: seeds, sweeps"),
    "push": ("first_trl.cli.push", "share the students and the cache of a finished run, with their cards"),
    "recipes": ("first_trl.cli.recipes", "list the recipes that travel with the package, or check recipe files"),
    "inspect": ("first_trl.cli.inspect", "print rows token by token, with what is supervised"),
    "precompute": ("first_trl.cli.precompute", "run a teacher once over a dataset and store its top-k"),
    "cache": ("first_trl.cli.cache", "verify, describe, push or pull a teacher cache"),
    "evaluate": ("first_trl.cli.evaluate", "score any model on a task: accuracy, calibration, baselines"),
    "calibrate": ("first_trl.cli.calibrate", "calibration report of files you already have"),
    "metric": ("first_trl.cli.metric", "publish the calibration metric as a Space"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `first-trl`; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in _COMMANDS:
        _overview().parse_args(words)
        return 2
    path, text = _COMMANDS[words[0]]
    try:
        # Libraries take seconds to import, in which Ctrl-C is pressed too
        module = importlib.import_module(path)
        parser = argparse.ArgumentParser(prog=f"first-trl {words[0]}", description=text[0].upper() + text[1:] + ".")
        module.add_arguments(parser)
        # Intermixed, so that overrides may stand before and after options
        args = parser.parse_intermixed_args(words[1:])
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return module.main(args)
    except BrokenPipeError:
        # The reader of a pipe has seen enough; what is still to be written must not fail when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("\nfirst-trl: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
    except Exception as error:
        said = explain(error)
        if said is None:
            raise
        print(f"first-trl: {said}", file=sys.stderr)
        return 2


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="first-trl", description="Trustworthy distillation: cache a teacher once, calibrate it, distil it."
    )
    parser.add_argument("--version", action="version", version=f"first_trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in _COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    # The place in the source, which Python prints by default, says nothing to a user of the command. Deprecations of
    # other libraries are for developers.
    if not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        print(f"warning: {message}", file=sys.stderr)
