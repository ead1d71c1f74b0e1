"""Columns of an Arrow table as arrays."""

import numpy as np
import pyarrow as pa


def column(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    found = table.column(name).combine_chunks()
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def list_offsets(array: pa.ListArray) -> np.ndarray:
    """Where the lists begin and end, int64, from 0 for a slice too."""
    found = np.asarray(array.offsets).astype(np.int64)
    return found - (found[0] if len(found) else 0)


def flat_values(array: pa.Array) -> np.ndarray:
    """
    The numbers of an array, or of the lists in it.

    Raises:
        `ValueError`: Some are null.
    """
    # `flatten` honours the slice of a sliced list array, `values` does not
    found = array.flatten() if hasattr(array, "flatten") and hasattr(array, "offsets") else array
    if found.null_count:
        raise ValueError("A cache column holds null values; capture or pull the cache again.")
    return found.to_numpy(zero_copy_only=False)


def list_column(table: pa.Table, name: str) -> tuple[np.ndarray, pa.Array]:
    """
    Offsets from 0 and what is in the lists of a column.

    Raises:
        `ValueError`: It is no column of lists, or a row is null.
    """
    found = column(table, name)
    if found.null_count:
        raise ValueError(f"Column `{name}` holds null rows; capture or pull the cache again.")
    if not hasattr(found, "offsets"):
        raise ValueError(f"Column `{name}` has type {found.type} instead of a list; capture or pull the cache again.")
    return list_offsets(found), found.flatten()


def flat_column(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """As [`list_column`], with the numbers as an array; raises as [`flat_values`] does."""
    starts, found = list_column(table, name)
    return starts, flat_values(found)
