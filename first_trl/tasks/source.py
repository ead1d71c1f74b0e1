"""Where rows come from: a dataset on the Hub, or a local file or folder in a benchmark's original format."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..utils.tables import ENDINGS, file_kind, label_name, load_table


# Words that mark a split in file names of the original releases ("dev_rand_split.jsonl", "test-00000-of-00001.parquet").
SPLIT_WORDS = {
    "validation": ("validation", "valid", "val", "dev"),
    "dev": ("dev",),
    "auxiliary_train": ("auxiliary",),
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def read_rows(
    path: str,
    *,
    split: str,
    hub_split: str,
    config: str | None = None,
    revision: str | None = None,
    many_files: bool = False,
    csv_header: bool = True,
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """
    Yields `(where, row)` for every row of a split, with no change to the row, and `(where, None)` for every empty row.

    Args:
        path (`str`): Existing file or folder, else a Hub dataset id.
        split (`str`): Our name of the split; finds the file in a folder.
        hub_split (`str`): Name of the split on the Hub.
        config (`str`, *optional*): Configuration on the Hub, and sub-folder of a local copy.
        revision (`str`, *optional*): Revision on the Hub.
        many_files (`bool`, *optional*, defaults to `False`): Whether a split may be spread over several files in a
            folder. Shards of one Parquet file always may.
        csv_header (`bool`, *optional*, defaults to `True`): Whether the first row of a CSV file names its columns.
            Without it, a row is `{"file": name of the file, "cells": [...]}`.

    Raises:
        `ValueError`: when a file is missing, unreadable or of an unknown kind.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if looks_local(path):
            raise ValueError(
                f"There is no file or folder {path!r}. Give an existing file ({ENDINGS}), a "
                "folder that holds one per split, or the id of a dataset on the Hub."
            )
        yield from _hub_rows(path, hub_split, config, revision)
        return
    if revision is not None:
        raise ValueError(f"`revision` names a commit on the Hub, but {path!r} is local; remove one of the two.")
    for file in _split_files(local, split, config, many_files) if local.is_dir() else [local]:
        yield from _file_rows(file, csv_header)


def looks_local(path: str) -> bool:
    """Whether a path cannot be the id of a dataset on the Hub."""
    return (
        path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or file_kind(path)[1:] != (None, None)
    )


def _hub_rows(
    path: str, hub_split: str, config: str | None, revision: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import ClassLabel, load_dataset

    try:
        dataset = load_dataset(path, config, split=hub_split, revision=revision)
    except Exception as error:
        # The kinds of failure are many (no network, no such repository, gated) and their own text says which; what it
        # does not say is that a local file would do.
        error.add_note(
            f"While loading split {hub_split!r} of {path!r} from the Hub. Without a network, give `path` a local copy."
        )
        raise
    labels = {name: feature.names for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    for i, row in enumerate(dataset):
        where = f"{path} {hub_split} row {i}"
        named = {name: label_name(row[name], names, f"{where}: {name!r}") for name, names in labels.items()}
        yield where, {**row, **named}


def _split_files(folder: Path, split: str, config: str | None, many_files: bool) -> list[Path]:
    if config is not None and (folder / config).is_dir():
        folder = folder / config
    data = sorted(f for f in folder.rglob("*") if f.is_file() and _stem(f) is not None)
    words = SPLIT_WORDS.get(split, (split,))
    # A release that has both a "val" and a "dev" part means different things by them, so the first word wins.
    found = next((files for word in words if (files := [f for f in data if _has_word(f, folder, word)])), [])
    if not found:
        listed = ", ".join(str(f.relative_to(folder)) for f in data[:10]) or "no data file"
        raise ValueError(
            f"No file of {str(folder)!r} has {' or '.join(map(repr, words))} in its name for split {split!r} (found: "
            f"{listed}). Give the file itself as `path`."
        )
    shards_of_one = len({_SHARD.sub("", _stem(f) or "") for f in found}) == 1 and all(
        _SHARD.search(_stem(f) or "") for f in found
    )
    if len(found) > 1 and not many_files and not shards_of_one:
        listed = ", ".join(str(f.relative_to(folder)) for f in found[:10])
        raise ValueError(
            f"{len(found)} files of {str(folder)!r} could be split {split!r}: {listed}. Give one of them as `path`."
        )
    return found


def names_split(file: Path, split: str) -> bool:
    """Whether the name of a file says that it holds this split."""
    return any(_has_word(file, file.parent, word) for word in SPLIT_WORDS.get(split, (split,)))


def _has_word(file: Path, folder: Path, word: str) -> bool:
    parts = [*file.relative_to(folder).parts[:-1], _stem(file) or ""]
    return any(word in re.split(r"[^a-z]+", part.lower()) for part in parts)


def _stem(file: Path) -> str | None:
    """File name without its data suffix; `None` when it has none."""
    stem, kind, _ = file_kind(file)
    return None if kind is None else stem


def _file_rows(file: Path, csv_header: bool) -> Iterator[tuple[str, dict[str, Any] | None]]:
    table = load_table(file, header=csv_header)
    empty = Counter(table.empty)
    for i, row in enumerate([*table.rows, None]):
        for _ in range(empty[i]):
            yield f"{file}, an empty row behind row {i}", None
        if row is not None:
            # Which file a row stood in is part of the data where the release has one file per subject.
            yield table.place(i), {"file": _stem(file), **row} if "cells" in row and not csv_header else row
