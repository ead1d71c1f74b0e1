"""The life of a capture's folder: begun, interrupted, continued, finished."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from filelock import FileLock, Timeout

from ..cache.folder import complete_shards, load_manifest, manifest_path, sha256, shard_path, shard_paths
from ..cache.manifest import Manifest
from ..cache.shards import ShardRows, shard_batch, whole_shard
from ..cache.verify import check_rows
from ..utils.files import write_atomically
from ..utils.versions import code_version
from .backends import TeacherBackend
from .journal import journal_path


logger = logging.getLogger(__name__)


@dataclass
class OpenCapture:
    """
    A capture under way.

    Args:
        shard_size (`int`): Rows a shard; the one the capture was begun with.
        missing (`list[int]`): Shards to compute.
        total (`int`): Shards in all.
    """

    shard_size: int
    missing: list[int]
    total: int


# What the entries of a capture come from
_CAPTURE_CODE = tuple(
    f"first_trl.{name}"
    for name in (
        "tasks.conversation", "tasks.encode", "tasks.tokenize", "teacher.backends.committee", "teacher.backends.topk",
        "teacher.backends.transformers", "teacher.backends.vllm",
        "teacher.capture", "teacher.conversations", "teacher.padding", "teacher.prepare", "teacher.rows", "utils.adapters",
    )
)  # fmt: skip


def default_folder(manifest: Manifest) -> Path:
    """Another version of the code does not take up, or hand out, what an earlier one captured."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "first_trl" / f"{manifest.id}-{code_version(_CAPTURE_CODE)}"


def in_progress_path(folder: Path, split: str) -> Path:
    """Exists from before the first shard until after the manifest is written."""
    return folder / "manifest" / f".{split}.in-progress.json"


def is_finished(folder: Path, manifest: Manifest, backend: TeacherBackend, state: PartialState) -> bool:
    """
    Whether the folder holds this very cache and all its shards as they were written; `ValueError` when it holds
    another one.
    """
    if not manifest_path(folder, manifest.split).is_file():
        return False
    stored = load_manifest(folder, manifest.split)
    if stored.id != manifest.id:
        _refuse(folder, stored.identity, manifest)
    backend.confirm(stored.teacher)
    shards = sorted(stored.counts["shards"].items())[state.process_index :: state.num_processes]
    intact = all(_is_intact(folder / "data" / name, entry) for name, entry in shards)
    if not all(gather_object([intact])):
        return False
    if state.is_main_process:
        in_progress_path(folder, manifest.split).unlink(missing_ok=True)
    return True


def _is_intact(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and sha256(path) == entry["sha256"]


@contextmanager
def open_capture(
    folder: Path, manifest: Manifest, backend: TeacherBackend, rows: Dataset, shard_size: int, state: PartialState
) -> Iterator[OpenCapture]:
    """
    Begin a capture, or continue the one the folder holds: note what is being captured before the first shard, keep
    the finished shards that hold the rows they must, remove what a killed process left. The manifest of a finished
    capture stays until the one of its repair takes its place.
    """
    lock = FileLock(folder / "manifest" / f".{manifest.split}.lock")
    if state.is_main_process:
        (folder / "manifest").mkdir(parents=True, exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Another capture is writing to {folder}. Wait for it or end it; its finished shards are kept."
            ) from error
    try:
        path = in_progress_path(folder, manifest.split)
        if state.is_main_process:
            for stale in folder.glob(f"*/.{manifest.split}*.tmp"):
                stale.unlink()
            if not path.is_file() or manifest_path(folder, manifest.split).is_file():
                record = _begin(folder, manifest, shard_size)
                write_atomically(path, json.dumps(record, sort_keys=True, default=str))
        state.wait_for_everyone()
        begun = _read_record(path)
        if begun["identity"] != json.loads(json.dumps(manifest.identity, default=str)):
            _refuse(folder, begun["identity"], manifest)
        backend.confirm(begun["teacher"])
        manifest.recalibration = begun["recalibration"]
        capture = OpenCapture(begun["shard_size"], [], -(-manifest.counts["rows"] // begun["shard_size"]))
        _remove_damaged(folder, manifest, rows, capture, state)
        state.wait_for_everyone()
        paths = [shard_path(folder, manifest.split, index, capture.total) for index in range(capture.total)]
        capture.missing = [index for index, path in enumerate(paths) if not path.is_file()]
        if state.is_main_process:
            for path in paths:
                if path.is_file():  # killed between the shard's rename and the end of its journal
                    journal_path(path).unlink(missing_ok=True)
        state.wait_for_everyone()  # nobody writes a shard while another still looks which are there
        yield capture
    finally:
        if state.is_main_process:
            lock.release()


def _begin(folder: Path, manifest: Manifest, shard_size: int) -> dict[str, Any]:
    """Record of a capture that starts, or of a finished one that lost shards and fills them in."""
    recalibration: dict[str, Any] = {}
    if manifest_path(folder, manifest.split).is_file():
        stored = load_manifest(folder, manifest.split)
        shard_size, recalibration = stored.counts["shard_size"], stored.recalibration
    elif shard_paths(folder, manifest.split):
        raise ValueError(
            f"{folder} holds shards of split {manifest.split!r} without a record of their capture. Restore "
            f"{manifest_path(folder, manifest.split).name}, or delete the shards."
        )
    return {
        "identity": manifest.identity,
        "teacher": manifest.teacher,
        "shard_size": shard_size,
        "recalibration": recalibration,
    }


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record.keys() >= {"identity", "teacher", "shard_size", "recalibration"}:
            return record
    except (ValueError, AttributeError):
        pass
    raise ValueError(
        f"{path} is damaged, so nothing says which capture the shards beside it are of. Delete the folder and run the "
        "capture again."
    )


def _remove_damaged(
    folder: Path, manifest: Manifest, rows: Dataset, capture: OpenCapture, state: PartialState
) -> None:
    listed: dict[str, Any] = {}
    if manifest_path(folder, manifest.split).is_file():
        listed = load_manifest(folder, manifest.split).counts["shards"]
    for index in range(state.process_index, capture.total, state.num_processes):
        path = shard_path(folder, manifest.split, index, capture.total)
        if not path.is_file():
            continue
        if path.name in listed:
            keep = _is_intact(path, listed[path.name])
        else:
            start = index * capture.shard_size
            span = ShardRows.read(rows, start, min(len(rows), start + capture.shard_size))
            keep = whole_shard(path, span, manifest)
        if not keep:
            logger.warning("%s is damaged and is computed again.", path)
            path.unlink()


def close_capture(
    folder: Path, manifest: Manifest, capture: OpenCapture, started: float, tokens: int, state: PartialState
) -> None:
    """Check every shard and write the manifest: from here on the cache is complete."""
    names = [path.name for path in complete_shards(folder, manifest.split)]
    found = []
    for name in names[state.process_index :: state.num_processes]:
        path = folder / "data" / name
        rows = check_rows([shard_batch(path)], manifest)
        found.append((name, rows.rows, rows.kept_mass, sha256(path)))
    # Summed in the order of the shards, so that the number of processes leaves no trace
    gathered = sorted(gather_object(found))
    all_tokens = sum(gather_object([tokens]))
    if not state.is_main_process:
        return
    seconds = time.perf_counter() - started
    kept = np.sum([mass for _, _, mass, _ in gathered], axis=0)
    manifest.kept_mass = np.cumsum(kept / manifest.counts["positions"]).tolist()
    manifest.counts["shard_size"] = capture.shard_size
    manifest.counts["shards"] = {name: {"rows": rows, "sha256": digest} for name, rows, _, digest in gathered}
    manifest.timing = {
        "seconds": round(seconds, 3),
        "tokens": all_tokens,
        "tokens_per_second": round(all_tokens / seconds, 1),
        "processes": state.num_processes,
        "shards_of_earlier_runs": capture.total - len(capture.missing),
    }
    write_atomically(manifest_path(folder, manifest.split), manifest.to_json())
    in_progress_path(folder, manifest.split).unlink(missing_ok=True)


def _refuse(folder: Path, stored: dict[str, Any], manifest: Manifest) -> None:
    differing = [key for key, value in manifest.identity.items() if stored.get(key) != value]
    details = "; ".join(f"{key}: {stored.get(key)} there, {manifest.identity[key]} now" for key in differing)
    raise ValueError(
        f"{folder} holds a capture of other inputs ({details}). Two captures must not be mixed: choose another "
        "output folder, or delete this one."
    )
