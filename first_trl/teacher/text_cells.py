"""Columns that are used as text and hold numbers, booleans or class labels."""

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

from ..utils.tables import as_text, label_name
from ..utils.versions import versioned


def text_columns(dataset: Dataset, required: list[str], optional: list[str]) -> Dataset:
    """
    Make texts of the columns that are used as such: integers, floats, booleans, decimals and days as
    [`~first_trl.utils.tables.as_text`] writes them, class labels by name. Texts, messages and other columns stay as they
    are.

    Args:
        dataset ([`~datasets.Dataset`]): rows.
        required (`list[str]`): columns in which a null is an error.
        optional (`list[str]`): columns in which a null says that the row has none.

    Raises:
        `ValueError`: naming the row, for a null, NaN or infinity; and for a column of floats that are all whole numbers,
            of which nobody can tell whether `4.0` or `4` is meant: pandas makes such of integers beside an empty cell.
    """
    for name in [*required, *optional]:
        if name not in dataset.column_names:
            continue
        feature = dataset.features[name]
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and not _is_text(feature)):
            dataset = _as_text(dataset, name, feature)
        if name in required:
            _refuse_nulls(dataset, name)
    return dataset


def _is_text(feature: Value) -> bool:
    return feature.dtype in ("string", "large_string", "string_view", "null")


def _refuse_nulls(dataset: Dataset, name: str) -> None:
    first = 0
    for table in dataset.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
        missing = np.flatnonzero(table.column(0).is_null().to_numpy())
        if len(missing):
            raise ValueError(
                f"Row {first + missing[0]} of the dataset: the {name} is missing. Fill it in or remove the row."
            )
        first += len(table)


def _as_text(dataset: Dataset, name: str, feature: Any) -> Dataset:
    if isinstance(feature, Value) and feature.dtype.startswith(("float", "double")):
        values = dataset.select_columns([name]).with_format("arrow")[:].column(0).drop_null().to_numpy()
        finite = values[np.isfinite(values)]
        if len(finite) and (finite == np.trunc(finite)).all():
            raise ValueError(
                f"The column {name!r} holds whole numbers as floats, such as {float(finite[0])!r}: pandas makes them of "
                f"integers beside an empty cell. Write it as texts or as integers, so that it is clear whether "
                f"{float(finite[0])!r} or {int(finite[0])} is meant."
            )
    features = Features({**dataset.features, name: Value("string")})
    return dataset.map(
        versioned(_cells_as_text, as_text.__module__),
        batched=True,
        with_indices=True,
        features=features,
        fn_kwargs={"name": name, "feature": feature},
        desc=f"Writing {name} as text",
    )


def _cells_as_text(
    batch: dict[str, list[Any]], indices: list[int], *, name: str, feature: Any
) -> dict[str, list[Any]]:
    texts: list[str | None] = []
    for row, value in zip(indices, batch[name], strict=True):
        place = f"Row {row} of the dataset: the {name}"
        if isinstance(feature, ClassLabel):
            texts.append(label_name(value, feature.names, place))
            continue
        if value is not None and feature.dtype in ("float16", "float32"):
            # The shortest decimal that means this number in its own precision
            value = float(str(np.dtype(feature.dtype).type(value)))
        try:
            texts.append(None if value is None else as_text(value))
        except ValueError as error:
            raise ValueError(f"{place} {error}.") from None
    return {name: texts}
