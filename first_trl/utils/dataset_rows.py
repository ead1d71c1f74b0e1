"""Rows to score or to look at, from wherever a command is told to take them."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from .tables import ENDINGS, as_text, file_kind, load_columns, load_table


if TYPE_CHECKING:
    from datasets import Dataset


# Columns that a capture reads as texts
_TEXTS = ("prompt", "completion", "text")


def load_rows(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
) -> "Dataset":
    """
    Rows of a file, of a folder saved by `datasets`, or of a dataset on the Hub.

    Args:
        source (`str`): a file that [`~first_trl.utils.tables.load_table`] reads, a folder from `save_to_disk`, or a Hub id.
        split (`str`, *optional*, defaults to `"train"`): split, with an optional slice such as `"train[:100]"`. A file
            is one split, whatever its name.
        config (`str`, *optional*): configuration of a Hub dataset.
        revision (`str`, *optional*): branch, tag or commit of a Hub dataset.
        max_rows (`int`, *optional*): take the first rows only.

    Returns:
        [`~datasets.Dataset`]

    Raises:
        `ValueError`: for what cannot be read, naming file and row.
    """
    import datasets

    path = Path(source)
    name = split.split("[")[0]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded: Any = datasets.load_from_disk(path)
        if isinstance(loaded, dict):
            if name not in loaded:
                raise ValueError(f"{path} has splits {sorted(loaded)}, not {name!r}. Choose one with `--split`.")
            loaded = loaded[name]
        loaded = slice_rows(loaded, split)
    elif path.is_file():
        loaded = slice_rows(_from_file(path), split)
    elif path.is_dir():
        raise ValueError(f"{path} is a folder that `datasets` did not save. Give one file in it ({ENDINGS}).")
    elif file_kind(path)[1:] != (None, None) or source.startswith(("/", ".")):
        raise ValueError(f"{path} does not exist. Check the path.")
    else:
        loaded = datasets.load_dataset(source, config, split=split, revision=revision)
    return loaded if max_rows is None else loaded.select(range(min(max_rows, len(loaded))))


def slice_rows(rows: "Dataset", split: str) -> "Dataset":
    """The rows that a slice such as `"train[:10%]"` names; all rows where there is none."""
    from datasets import ReadInstruction

    name = split.split("[")[0]
    if name == split:
        return rows
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"Cannot read the slice {split!r} of {len(rows)} rows: {error}") from None
    return rows.select([i for part in parts for i in range(part.from_, part.to)])


def _from_file(path: Path) -> "Dataset":
    from datasets import Dataset
    from datasets.table import InMemoryTable

    _, kind, compression = file_kind(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has no rows.")
    if kind == "parquet" and compression is None:
        return _from_parquet(path)
    if kind == "arrow" and compression is None:
        return Dataset(InMemoryTable(load_columns(path, path, kind)))
    table = load_table(path)
    if table.empty:
        warnings.warn(f"{path}: {len(table.empty)} empty rows are left out.")
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in table.rows] for name in names}
    for name, values in columns.items():
        kinds: dict[str, int] = {}
        for i, value in enumerate(values):
            if value is not None:
                kinds.setdefault(_kind(value), i)
        if name in _TEXTS and set(kinds) == {"a whole number", "a number"}:
            # A column of Arrow has one type, in which 4 would become 4.0; what has no text is refused where texts are made
            if not any(isinstance(value, float) and not math.isfinite(value) for value in values):
                columns[name] = [None if value is None else as_text(value) for value in values]
        elif len(kinds) > 1 and set(kinds) != {"a whole number", "a number"}:
            (one, i), (other, j) = list(kinds.items())[:2]
            raise ValueError(
                f"{path}: column {name!r} is {one} in {table.place(i).rpartition(', ')[2]} and {other} in "
                f"{table.place(j).rpartition(', ')[2]}. Write all of its cells as texts, or all as numbers."
            )
    try:
        return Dataset.from_dict(columns)
    except (pa.ArrowException, OverflowError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path}: a column holds values of different types ({reason}). Give each column one type."
        ) from None


def _from_parquet(path: Path) -> "Dataset":
    """Rows that may be more than fit into memory, which `datasets` maps."""
    from datasets import Dataset

    try:
        # `datasets` would log what is damaged besides raising it
        pq.ParquetFile(path).close()
        rows = cast("Dataset", Dataset.from_parquet(str(path)))
    except Exception as error:
        # `datasets` wraps whatever Arrow raises into errors of its own
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} is damaged or no Parquet file: {reason}. Write or download it again.") from None
    if not len(rows):
        raise ValueError(f"{path} has no rows.")
    return rows


def _kind(value: Any) -> str:
    for kind, name in (
        (bool, "a boolean"),
        (str, "a text"),
        (int, "a whole number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    ):
        if isinstance(value, kind):
            return name
    return type(value).__name__
