"""The cache on disk and on the Hub: parquet shards in `data/`, one manifest a split in `manifest/`."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset

from ..hub import pull_folder
from ..utils.files import write_atomically
from .manifest import Manifest, attach_manifest


def manifest_path(folder: str | os.PathLike[str], split: str) -> Path:
    return Path(folder) / "manifest" / f"{split}.json"


def shard_path(folder: str | os.PathLike[str], split: str, index: int, count: int) -> Path:
    return Path(folder) / "data" / f"{split}-{index:05d}-of-{count:05d}.parquet"


def shard_paths(folder: str | os.PathLike[str], split: str) -> list[Path]:
    return sorted((Path(folder) / "data").glob(f"{split}-*-of-*.parquet"))


def finished_splits(folder: str | os.PathLike[str]) -> list[str]:
    """Splits that a cache folder holds whole, by name; an unfinished one has a hidden file."""
    return sorted(path.stem for path in (Path(folder) / "manifest").glob("[!.]*.json"))


def load_manifest(folder: str | os.PathLike[str], split: str = "train") -> Manifest:
    """Raises `ValueError` when the folder holds no finished cache of that split."""
    path = manifest_path(folder, split)
    if not path.is_file():
        found = finished_splits(folder)
        raise ValueError(
            f"No teacher cache of split {split!r} in {folder}: {path} does not exist"
            + (f" (splits there: {found})" if found else "")
            + ". Capture it with `add_teacher_topk(..., output_dir=...)` or `first-trl precompute`; an interrupted "
            "capture is finished by running the same command again."
        )
    return _read_manifest_file(path)


def _read_manifest_file(path: Path) -> Manifest:
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}. Restore the original manifest.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def store_recalibration(folder: str | os.PathLike[str], split: str, method: str, fit: dict[str, Any]) -> None:
    """
    Keep a fitted recalibration (value and curve) with the cache, where `recalibration_value=None` finds it.

    Raises:
        `ValueError`: The fit is one of another method.
    """
    own = fit.get("recalibration", {}).get("method", method)
    if own != method:
        raise ValueError(
            f"A fit of {own!r} cannot be stored as {method!r}: a student would train on another rescale than it asks for. "
            f"Give `method={own!r}`, or fit with `fit_recalibration(..., method={method!r})`."
        )
    manifest = load_manifest(folder, split)
    manifest.recalibration[method] = fit
    write_atomically(manifest_path(folder, split), manifest.to_json())


def forget_recalibrations(folder: str | os.PathLike[str], split: str, keep: Iterable[str] = ()) -> None:
    """Remove the fits of other methods than `keep` from a cache's manifest."""
    manifest = load_manifest(folder, split)
    kept = {method: fit for method, fit in manifest.recalibration.items() if method in set(keep)}
    if kept != manifest.recalibration:
        manifest.recalibration = kept
        write_atomically(manifest_path(folder, split), manifest.to_json())


def load_teacher_cache(
    path_or_repo: str | os.PathLike[str],
    split: str = "train",
    revision: str | None = None,
    *,
    streaming: bool = False,
    token: str | None = None,
) -> Dataset | IterableDataset:
    """
    Load a teacher cache from a folder or a Hub dataset repository, with its manifest attached.

    Args:
        path_or_repo (`str` or `os.PathLike`):
            Folder written by [`add_teacher_topk`], or a Hub dataset id.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the cache.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. The load is pinned to the commit it resolves to.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an [`~datasets.IterableDataset`] that reads rows as they are needed.
        token (`str`, *optional*):
            Hub token, for private repositories.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`].

    Raises:
        `ValueError`: The folder holds no finished cache of that split, a shard is missing or not as it was written
            (SHA-256, which a stream from the Hub leaves out), or the manifest is of another format.

    Example:

    ```python
    >>> from first_trl import load_teacher_cache, verify_teacher_cache

    >>> cache = load_teacher_cache("outputs/teacher-cache")
    >>> verify_teacher_cache(cache, tokenizer)
    ```
    """
    folder = Path(path_or_repo)
    options: dict[str, Any] = {}
    homepage = ""
    if not folder.is_dir():
        if str(path_or_repo).count("/") != 1 or str(path_or_repo).startswith((".", "/", "~")):
            raise ValueError(
                f"{path_or_repo} is neither a folder nor a Hub dataset id ('name/repository'). Check the path."
            )
        patterns = [f"manifest/{split}.json"] + ([] if streaming else [f"data/{split}-*.parquet"])
        pulled = pull_folder(str(path_or_repo), revision=revision, allow_patterns=patterns, token=token)
        folder = Path(pulled.path)
        if not manifest_path(folder, split).is_file():
            raise ValueError(
                f"{path_or_repo} at {pulled.commit} holds no manifest of split {split!r}: it is no teacher cache, or "
                "was pushed without `first-trl cache push`."
            )
        # The files themselves and not the card's configuration, which may name other splits with other columns
        pattern = f"hf://datasets/{path_or_repo}@{pulled.commit}/data/{split}-*.parquet"
        options = {"path": "parquet", "data_files": {split: pattern}, "token": token}
        # The card of a student trained on it names the repository and the commit
        homepage = f"https://huggingface.co/datasets/{path_or_repo}/tree/{pulled.commit}"
    manifest = load_manifest(folder, split)
    if not streaming or not options:
        files = intact_shards(folder, split, manifest)
        options = {"path": "parquet", "data_files": {split: [str(file) for file in files]}}
    dataset = datasets.load_dataset(split=split, streaming=streaming, **options)
    dataset.info.homepage = homepage
    if streaming:
        dataset.info.description = json.dumps({"first_trl_manifest": json.loads(manifest.to_json())})
        return dataset
    if len(dataset) != manifest.counts.get("rows", len(dataset)):
        raise ValueError(
            f"{path_or_repo} holds {len(dataset)} rows of split {split!r}, its manifest says "
            f"{manifest.counts['rows']}. Pull or capture the cache again."
        )
    return attach_manifest(dataset, manifest)


def complete_shards(folder: str | os.PathLike[str], split: str) -> list[Path]:
    """Every shard of a finished split in order; `ValueError` naming the ones that are missing."""
    files = shard_paths(folder, split)
    if not files:
        raise ValueError(f"No shards of split {split!r} in {Path(folder) / 'data'}. Pull or capture the cache again.")
    count = int(files[0].stem.rsplit("-", 1)[1])
    expected = [shard_path(folder, split, index, count) for index in range(count)]
    missing = sorted({file.name for file in expected} - {file.name for file in files})
    surplus = sorted({file.name for file in files} - {file.name for file in expected})
    if missing or surplus:
        raise ValueError(
            f"Shards of split {split!r} in {folder}: missing {missing}, not of this capture {surplus}. Remove what is "
            "not of this capture and run it again to finish it, or pull the cache again."
        )
    return expected


def intact_shards(folder: str | os.PathLike[str], split: str, manifest: Manifest) -> list[Path]:
    """
    Every shard of a finished split in order, each byte as it was written: a shard that is cut, changed or exchanged
    with another one is sound Parquet at times, so nothing but its SHA-256 tells.

    Raises:
        `ValueError`: A shard is missing, damaged or not listed in the manifest, or this is another split's manifest.
    """
    if manifest.split != split:
        raise ValueError(
            f"{manifest_path(folder, split)} is the manifest of split {manifest.split!r}. Restore the original file name."
        )
    files = complete_shards(folder, split)
    listed = manifest.counts["shards"]
    if [file.name for file in files] != sorted(listed):
        raise ValueError(
            f"The manifest of split {split!r} in {folder} lists {len(listed)} shards, the folder holds the {len(files)} "
            "of another capture. Pull or capture the cache again."
        )
    for file in files:
        if sha256(file) != listed[file.name]["sha256"]:
            raise ValueError(
                f"{file} is damaged: its SHA-256 differs from the manifest's. Run the capture again, which computes "
                "this shard again and keeps the others, or pull the cache again."
            )
    return files


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_size(folder: str | os.PathLike[str], split: str) -> dict[str, float]:
    """Bytes of the shards: the whole file, and the compressed teacher columns alone."""
    total, teacher = 0, 0
    for file in shard_paths(folder, split):
        total += file.stat().st_size
        metadata = pq.ParquetFile(file).metadata
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                if column.path_in_schema.split(".")[0].startswith("teacher_"):
                    teacher += column.total_compressed_size
    return {"bytes": total, "teacher_bytes": teacher}
