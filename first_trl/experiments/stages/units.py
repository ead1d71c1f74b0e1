"""Units of work: what each is made from, whether it is done, and doing it once."""

import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import PartialState

from ...utils.files import plain, write_json
from ...utils.processes import process_state
from ...utils.versions import __version__, training_versions
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
            self.log.append(
                {"unit": name, "seconds": found["seconds"], "skipped": True, "made_with": found.get("made_with")}
            )
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
            write_json(
                marker, {"key": key, "status": "running", "inputs": unit.inputs, "made_with": made_with(self.state)}
            )
        self.state.wait_for_everyone()
        changed = changed_inputs(found.get("inputs"), unit.inputs) if found.get("key") not in (None, key) else []
        if changed:
            self.say(f"    made again, changed: {', '.join(changed)}")
        self.say(f"  {name}: running")
        started = time.perf_counter()
        unit.work(folder)
        self.state.wait_for_everyone()
        seconds = round(time.perf_counter() - started, 2)
        if self.state.is_main_process:
            done = {"key": key, "status": "done", "seconds": seconds, "inputs": unit.inputs}
            write_json(marker, {**done, "made_with": made_with(self.state)})
        self.state.wait_for_everyone()
        self.say(f"  {name}: {seconds:.1f} s")
        self.log.append({"unit": name, "seconds": seconds, "skipped": False, "made_with": made_with(self.state)})


def made_with(state: PartialState) -> dict[str, Any]:
    """
    Libraries, kind of device and number of processes, noted beside a unit. They are no part of its key: what is
    finished is not made again after an upgrade, and the report says that units differ.
    """
    device = torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type
    return {
        **training_versions(),
        "python": platform.python_version(),
        "device": device,
        "processes": state.num_processes,
    }


def changed_inputs(before: Any, now: Any) -> list[str]:
    """
    Names of the inputs in which two units differ, with both values where these are short.

    Args:
        before (`Any`): Inputs as a marker keeps them.
        now (`Any`): Inputs of a unit.
    """
    now = json.loads(json.dumps(now, default=plain))
    if before == now:
        return ["the version of first_trl"]
    return list(_differences("", before, now))


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                yield from _differences(f"{name}.{key}" if name else key, before.get(key), now.get(key))
        return
    old, new = (json.dumps(value) for value in (before, now))
    # Keys of other units say nothing to a reader
    short = len(old) + len(new) <= 60 and not re.fullmatch(r'"[0-9a-f]{16}"', old)
    yield name + (f" ({old} -> {new})" if short else "")


def content_key(value: Any) -> str:
    """Hash of a JSON-able value (dataclasses included) and of this package's version."""
    text = json.dumps([__version__, value], sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# Larger files are weights as a rule, and would take seconds to read
_READ_BYTES = 2**26


def path_fingerprint(path: str | None) -> Any:
    """
    Names and contents of the files behind a local path, of large ones size and time; the name alone for what is on the Hub.
    """
    root = Path(path or "").expanduser()
    if path is None or not root.exists():
        return path
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return [(str(file), file.stat().st_size, _content_or_time(file)) for file in files]


def _content_or_time(file: Path) -> str | int:
    """Times say little: archives, images and version control set them."""
    status = file.stat()
    return status.st_mtime_ns if status.st_size > _READ_BYTES else xxhash.xxh3_64_hexdigest(file.read_bytes())
