"""The run's folder: one unit of work per subfolder, skipped when its inputs have not changed."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...utils.files import plain, write_json
from ...utils.processes import process_state
from ...utils.versions import __version__


class Workspace:
    """
    A folder of finished units. A unit's key is a hash of its settings and of its inputs' keys, so a change anywhere
    upstream redoes exactly what depends on it.

    Args:
        folder (`Path`): Root of the run.
        stage (`str`, *optional*): Run only this stage; the others must be finished.
    """

    def __init__(self, folder: Path, stage: str | None = None) -> None:
        self.folder = folder
        self.stage = stage
        self.state = process_state()
        self.log: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)

    def run(self, stage: str, unit: str, inputs: dict[str, Any], work: Callable[[Path], None]) -> str:
        """
        Do a unit's work unless it is done.

        Args:
            stage (`str`): Stage the unit belongs to.
            unit (`str`): Subfolder.
            inputs (`dict`): All that the result depends on: settings and the keys of other units.
            work (`Callable`): Called with the unit's folder, on every process; only the main one should write.

        Returns:
            `str`: The unit's key.
        """
        key = content_key(inputs)
        folder = self.folder / unit
        marker = folder / "unit.json"
        found = json.loads(marker.read_text()) if marker.is_file() else {}
        # Every process must have read the marker before the main one rewrites it
        self.state.wait_for_everyone()
        if found.get("key") == key and found.get("status") == "done":
            self.say(f"  {unit}: done before, kept")
            self.log.append({"unit": unit, "seconds": found["seconds"], "skipped": True})
            return key
        if self.stage is not None and stage != self.stage:
            raise ValueError(
                f"Stage {self.stage!r} needs {unit!r}, which is "
                + ("from other settings" if found else "not there yet")
                + f". Run `--stage {stage}` first, or the recipe without `--stage`."
            )
        if self.state.is_main_process:
            if found.get("key") != key and folder.is_dir():
                # The marker first: killed in between, the rest must not pass for what it was
                marker.unlink(missing_ok=True)
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"key": key, "status": "running", "inputs": inputs})
        self.state.wait_for_everyone()
        self.say(f"  {unit}: running")
        started = time.perf_counter()
        work(folder)
        self.state.wait_for_everyone()
        seconds = round(time.perf_counter() - started, 2)
        if self.state.is_main_process:
            write_json(marker, {"key": key, "status": "done", "seconds": seconds, "inputs": inputs})
        self.state.wait_for_everyone()
        self.say(f"  {unit}: {seconds:.1f} s")
        self.log.append({"unit": unit, "seconds": seconds, "skipped": False})
        return key


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
