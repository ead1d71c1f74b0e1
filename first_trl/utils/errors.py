"""Errors of other libraries that a user can mend, as one sentence."""

import errno
import re
import traceback
from pathlib import Path
from typing import Any

from .extras import MissingExtra


_DISK = {
    errno.ENOSPC: "the disk is full. Free space and run the same command again to continue",
    errno.EDQUOT: "the disk quota is used up. Free space and run the same command again to continue",
    errno.EFBIG: "larger than a file may be here. Lift the limit (`ulimit -f`), or choose another folder",
    errno.EROFS: "the file system is read-only. Choose another folder, such as with --output-dir",
    errno.EACCES: "permission denied. Choose another folder, or mend its permissions",
    errno.EEXIST: "a file of this name is in the way. Choose another folder, such as with --output-dir",
    errno.ENOTDIR: "a file is where a folder should be. Choose another folder, such as with --output-dir",
    errno.EPERM: "permission denied. Choose another folder, or mend its permissions",
}
_TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "comet", "swanlab")


def explain(error: BaseException) -> str | None:
    """What went wrong and how to mend it; `None` for what only a developer can mend."""
    if name := re.search(r"^Repo id must .*: '(.*)'\.", str(error)):
        return f"{name[1]} is no folder, and no id of a repository on the Hub. Check the path."
    if isinstance(error, ValueError | MissingExtra):
        return str(error)
    if isinstance(error, OSError):
        # What transformers says of a model that it cannot find or reach has no number of the system
        return _disk(error) or (str(error) or None if error.errno is None else None)
    if type(error).__name__ == "SafetensorError" or "incomplete metadata" in str(error).lower():
        code = _named_code(str(error))
        if code is not None:
            return f"{_file(error) or 'A file of weights'}: {_DISK[code]}."
        return (
            f"{_file(error) or 'A file of weights (*.safetensors)'} is damaged or cut short ({error}). Restore or "
            "download it again; if a run has made it, delete its unit's folder and run the same command again."
        )
    if isinstance(error, RuntimeError | ImportError):
        missing = next((name for name in _TRACKERS if name in str(error).lower()), None)
        if missing and re.search(r"install|requires", str(error), re.IGNORECASE):
            return f"`report_to` asks for {missing}, which is not installed: `pip install {missing}`, or set report_to: none."
    # What torch says of a file that it cannot write
    if isinstance(error, RuntimeError) and re.search(r"file write failed|unexpected pos", str(error)):
        return f"A file could not be written ({error}). Is the disk full? Free space and run the same command again."
    cause = error.__cause__ or error.__context__
    return _disk(cause) if isinstance(cause, OSError) else None


def _disk(error: OSError) -> str | None:
    code = error.errno if error.errno in _DISK else _named_code(str(error))
    if code is None:
        return None
    return f"{error.filename or 'A file could not be written'}: {_DISK[code]}."


def _named_code(text: str) -> int | None:
    # Arrow and safetensors give the system's words, not its number
    words = {
        "No space left on device": errno.ENOSPC,
        "Disk quota exceeded": errno.EDQUOT,
        "File too large": errno.EFBIG,
        "Read-only file system": errno.EROFS,
    }
    return next((code for word, code in words.items() if word in text), None)


def _file(error: BaseException) -> str | None:
    """The file of weights that was being read, which safetensors does not name."""
    from safetensors import SafetensorError, safe_open

    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            for name in _names(value):
                try:
                    with safe_open(name, "np"):
                        pass
                except (SafetensorError, OSError):
                    return name
    return None


def _names(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [str(one) for one in values if isinstance(one, str | Path) and str(one).endswith(".safetensors")]
