"""Units of work: what each is made from, whether it is done, and doing it once."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...utils.files import plain, write_json
from ...utils.processes import process_state
from ...utils.versions import __version__
from ..run_folder import RunFolder


@dataclass(frozen=True)
class Unknown:
    """
    Stands for a value that a unit makes and that is not there yet.

    Args:
        unit (`str`): The unit that makes it.
    """

    unit: str


Key = str | Unknown


@dataclass(frozen=True)
class Unit:
    """
    The smallest piece of work that is kept or done again.

    Args:
        name (`str`): Subfolder of the run.
        inputs (`dict`): All that the result depends on: settings and the keys of other units.
        work (`Callable`): Called with the unit's folder, on every process; only the main one should write.
    """

    name: str
    inputs: dict[str, Any]
    work: Callable[[Path], None]

    @property
    def key(self) -> Key:
        """Hash of the inputs, so a change anywhere upstream redoes exactly what depends on it."""
        return _unknown(self.inputs) or content_key(self.inputs)


def _unknown(value: Any) -> Unknown | None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, map(_unknown, value)), None)
    return value if isinstance(value, Unknown) else None


class Workspace:
    """
    The finished units of a run.

    Args:
        folder ([`RunFolder`]): The run.
        stage (`str`, *optional*): Run only this stage; the others must be finished.
    """

    def __init__(self, folder: RunFolder, stage: str | None = None) -> None:
        self.folder = folder
        self.stage = stage
        self.state = process_state()
        self.log: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)

    def status(self, unit: Unit) -> str:
        """`done`, `running`, `changed`, `unchecked` (its inputs are not known yet) or `to do`."""
        found, key = self.folder.load_marker(unit.name), unit.key
        if not found:
            return "to do"
        if isinstance(key, Unknown):
            return "unchecked"
        same = found.get("key") == key and found.get("status") in ("done", "running")
        return str(found["status"]) if same else "changed"

    def run(self, stage: str, unit: Unit) -> None:
        """
        Do a unit's work unless it is done.

        Raises:
            `ValueError`: It belongs to another stage than the one asked for, or files that it needs were removed.
        """
        key, name = unit.key, unit.name
        if isinstance(key, Unknown):
            marker = self.folder.marker(key.unit)
            raise ValueError(
                f"{name!r} needs what {key.unit!r} has made, and that is missing. Delete {marker} and run the recipe "
                "again."
            )
        found = self.folder.load_marker(name)
        # Every process must have read the marker before the main one rewrites it
        self.state.wait_for_everyone()
        if found.get("key") == key and found.get("status") == "done":
            self.say(f"  {name}: done before, kept")
            self.log.append({"unit": name, "seconds": found["seconds"], "skipped": True})
            return
        if self.stage is not None and stage != self.stage:
            raise ValueError(
                f"Stage {self.stage!r} needs {name!r}, which is "
                + ("from other settings" if found else "not there yet")
                + f". Run `--stage {stage}` first, or the recipe without `--stage`."
            )
        marker, folder = self.folder.marker(name), self.folder.root / name
        if self.state.is_main_process:
            if found.get("key") != key and folder.is_dir():
                # The marker first: killed in between, the rest must not pass for what it was
                marker.unlink(missing_ok=True)
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"key": key, "status": "running", "inputs": unit.inputs})
        self.state.wait_for_everyone()
        self.say(f"  {name}: running")
        started = time.perf_counter()
        unit.work(folder)
        self.state.wait_for_everyone()
        seconds = round(time.perf_counter() - started, 2)
        if self.state.is_main_process:
            write_json(marker, {"key": key, "status": "done", "seconds": seconds, "inputs": unit.inputs})
        self.state.wait_for_everyone()
        self.say(f"  {name}: {seconds:.1f} s")
        self.log.append({"unit": name, "seconds": seconds, "skipped": False})


def content_key(value: Any) -> str:
    """Hash of a JSON-able value (dataclasses included) and of this package's version."""
    text = json.dumps([__version__, value], sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def path_fingerprint(path: str | None) -> Any:
    """Names, sizes and times of the files behind a local path; the name alone for what is on the Hub."""
    root = Path(path or "").expanduser()
    if path is None or not root.exists():
        return path
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
