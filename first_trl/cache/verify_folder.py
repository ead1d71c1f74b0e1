"""Checks on a stored cache as a whole: nothing missing, nothing surplus, every byte as it was written."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .folder import finished_splits, load_manifest, manifest_path, sha256, shard_paths
from .manifest import Manifest
from .shards import shard_batch
from .verify import RowStatistics, check_rows


_COUNTS = ("rows", "positions", "rows_without_gold", "positions_without_gold")


def verify_cache_folder(path: str | os.PathLike[str], split: str | None = None) -> dict[str, Manifest]:
    """
    Check a cache folder for completeness and damage: manifests unedited, exactly the shards they list, every shard's
    SHA-256, and every row as [`verify_teacher_cache`] does. Memory stays at one shard.

    Args:
        path (`str` or `os.PathLike`):
            Folder written by [`add_teacher_topk`] or pulled from the Hub.
        split (`str`, *optional*):
            Split to check. Defaults to all, and then a shard that belongs to no split is an error too.

    Returns:
        `dict[str, Manifest]`: The manifest of every split checked.

    Raises:
        `ValueError`: Names the file, the row where one is at fault, and how to mend it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give the folder of a cache; `first-trl cache pull` fetches one.")
    unfinished = sorted(file.name for file in (folder / "manifest").glob(f".{split or '*'}.in-progress.json"))
    if unfinished:
        raise ValueError(
            f"{folder} holds an unfinished capture ({', '.join(unfinished)}). Run the capture's command again: it "
            "continues where it stopped."
        )
    splits = [split] if split is not None else finished_splits(folder)
    if not splits:
        raise ValueError(f"{folder} holds no manifest, so it is no teacher cache. Pull or capture it again.")
    manifests = {name: _verify_split(folder, name) for name in splits}
    if split is None:
        listed = {name for manifest in manifests.values() for name in manifest.counts["shards"]}
        surplus = sorted(file.name for file in (folder / "data").glob("[!.]*") if file.name not in listed)
        if surplus:
            raise ValueError(
                f"{folder / 'data'} holds {surplus}, which no manifest lists: a manifest is missing, or the files are "
                "of another capture. Pull the cache again, or remove them."
            )
    return manifests


def _verify_split(folder: Path, split: str) -> Manifest:
    file = manifest_path(folder, split)
    manifest = load_manifest(folder, split)
    # The digest covers the contents; this also finds damage that leaves them readable, like a changed blank
    if file.read_bytes() != manifest.to_json().encode():
        raise ValueError(f"{file} is not as it was written. Restore the original manifest.")
    if manifest.split != split:
        raise ValueError(f"{file} is the manifest of split {manifest.split!r}. Restore the original file name.")
    listed: dict[str, Any] = manifest.counts["shards"]
    found = {path.name for path in shard_paths(folder, split)}
    missing, surplus = sorted(listed.keys() - found), sorted(found - listed.keys())
    if missing or surplus:
        raise ValueError(
            f"Shards of split {split!r} in {folder / 'data'}: missing {missing}, not listed in the manifest {surplus}. "
            "Pull the cache again, or remove what is not listed and run its capture again."
        )
    total = RowStatistics(kept_mass=np.zeros(manifest.k))
    for name, entry in listed.items():
        shard = _verify_shard(folder / "data" / name, entry, manifest)
        for what in (*_COUNTS, "kept_mass"):
            setattr(total, what, getattr(total, what) + getattr(shard, what))
    for what in _COUNTS:
        # A manifest from before there were rows without an answer does not count them
        stated = manifest.counts.get(what, 0)
        if getattr(total, what) != stated:
            raise ValueError(
                f"Split {split!r} in {folder} holds {getattr(total, what)} {what.replace('_', ' ')}, its manifest "
                f"says {stated}. Pull the cache again."
            )
    if not np.allclose(np.cumsum(total.kept_mass) / total.positions, manifest.kept_mass, atol=1e-9):
        raise ValueError(f"The kept mass in {file} is not that of the rows. Restore the original manifest.")
    return manifest


def _verify_shard(path: Path, entry: dict[str, Any], manifest: Manifest) -> RowStatistics:
    intact = sha256(path) == entry["sha256"]
    detail = ""
    try:
        statistics = check_rows([shard_batch(path)], manifest)
        if intact and statistics.rows == entry["rows"]:
            return statistics
        detail = f"{statistics.rows} rows where {entry['rows']} were written" if intact else ""
    except (ValueError, OSError, KeyError, pa.ArrowException) as error:
        detail = str(error)
    raise ValueError(
        f"{path} is damaged"
        + ("" if intact else ": its SHA-256 differs from the manifest's")
        + (f" ({detail})" if detail else "")
        + ". Pull the cache again, or remove the shard and run its capture again: the other shards are kept."
    )
