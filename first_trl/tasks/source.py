"""Where rows come from: a dataset on the Hub, or a local file or folder in a benchmark's original format."""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
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
    csv_header: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yields `(where, row)` for every row of a split, with no change to the row.

    Args:
        path (`str`): Existing file or folder, else a Hub dataset id.
        split (`str`): Our name of the split; finds the file in a folder.
        hub_split (`str`): Name of the split on the Hub.
        config (`str`, *optional*): Configuration on the Hub, and sub-folder of a local copy.
        revision (`str`, *optional*): Revision on the Hub.
        many_files (`bool`, *optional*, defaults to `False`): Whether a split may be spread over several files in a
            folder. Shards of one Parquet file always may.
        csv_header (`bool`, *optional*, defaults to `False`): Whether the first row of a CSV file names its columns.
            Without it, a row is `{"file": name of the file, "cells": [...]}`.

    Raises:
        `ValueError`: when a file is missing, unreadable or of an unknown kind.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if _looks_local(path):
            raise ValueError(
                f"There is no file or folder {path!r}. Give an existing {', '.join(_SUFFIXES)} file (also gzipped), a "
                "folder that holds one per split, or the id of a dataset on the Hub."
            )
        yield from _hub_rows(path, hub_split, config, revision)
        return
    if revision is not None:
        raise ValueError(f"`revision` names a commit on the Hub, but {path!r} is local; remove one of the two.")
    for file in _split_files(local, split, config, many_files) if local.is_dir() else [local]:
        yield from _file_rows(file, csv_header)


def _looks_local(path: str) -> bool:
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or "\\" in path
        or path.removesuffix(".gz").endswith(_SUFFIXES)
    )


def _hub_rows(
    path: str, hub_split: str, config: str | None, revision: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(path, config, split=hub_split, revision=revision)
    except Exception as error:
        # The kinds of failure are many (no network, no such repository, gated) and their own text says which; what it
        # does not say is that a local file would do.
        error.add_note(
            f"While loading split {hub_split!r} of {path!r} from the Hub. Without a network, give `path` a local copy."
        )
        raise
    for i, row in enumerate(dataset):
        yield f"{path} {hub_split} row {i}", row


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
    name = file.name.removesuffix(".gz")
    suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
    return None if suffix is None else name.removesuffix(suffix)


def _file_rows(file: Path, csv_header: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    stem = _stem(file)
    if stem is None:
        raise ValueError(f"{str(file)!r} is not a {', '.join(_SUFFIXES)} file (also gzipped); convert it to one.")
    suffix = file.name.removesuffix(".gz").removeprefix(stem)
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            rows: Iterable = enumerate(pq.read_table(file).to_pylist())
        else:
            raw = gzip.decompress(file.read_bytes()) if file.name.endswith(".gz") else file.read_bytes()
            text = raw.decode("utf-8-sig")
            rows = {".jsonl": _jsonl, ".json": _json, ".csv": _csv_with_header if csv_header else _csv}[suffix](text)
        for i, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"row {i} is {type(row).__name__}, not an object with named fields")
            # Which file a row stood in is part of the data where the release has one file per subject.
            yield f"{file} row {i}", {"file": stem, **row} if suffix == ".csv" and not csv_header else row
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, ValueError, csv.Error) as error:
        raise ValueError(f"Cannot read {str(file)!r}: {error}. Give an undamaged UTF-8 {suffix} file.") from None


def _jsonl(text: str) -> Iterator[tuple[int, Any]]:
    # Only "\n" ends a row: `splitlines` would also cut at the line separators that JSON strings may hold unescaped.
    for i, line in enumerate(text.split("\n")):
        if line.strip():
            try:
                yield i, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {i + 1} is not JSON ({error})") from None


def _json(text: str) -> Iterator[tuple[int, Any]]:
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError("a .json file must hold one list of rows (one row a line is .jsonl)")
    yield from enumerate(value)


def _csv(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV file without header, the form of the original MMLU release: `{"cells": [...]}`."""
    for i, cells in enumerate(csv.reader(io.StringIO(text, newline=""))):
        if cells:
            yield i, {"cells": cells}


def _csv_with_header(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV file by the names of its columns; an empty cell is an absent value."""
    reader = csv.reader(io.StringIO(text, newline=""))
    names = [name.strip() for name in next(reader, [])]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"the first row must name the columns, each differently: {names}")
    rows = (cells for cells in reader if cells)
    for i, cells in enumerate(rows):
        if len(cells) != len(names):
            raise ValueError(
                f"row {i} has {len(cells)} cells under {len(names)} columns ({', '.join(names)}); put a text that "
                'holds a comma or a line break into double quotes, and double the quotes inside it ("")'
            )
        yield i, {name: cell if cell.strip() else None for name, cell in zip(names, cells, strict=True)}
