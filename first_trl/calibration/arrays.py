"""Turning what people pass (lists, numpy, torch, bfloat16, table columns) into checked numpy arrays.

No framework is imported: a torch tensor is recognised by its methods, so that the calibration core needs numpy only.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt


FloatArray = npt.NDArray[np.floating[Any]]

# Relative spacing of the formats an array may arrive in.
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def as_numbers(values: Any, name: str) -> tuple[npt.NDArray[Any], str]:
    """
    Read `values` as a real-valued numpy array.

    Args:
        values (array-like):
            List, numpy array, torch or JAX tensor, pandas or `datasets` column.
        name (`str`):
            What to call the argument in error messages.

    Returns:
        `tuple[numpy.ndarray, str]`: the array (float64, float32, an integer type or bool) and the name of the floating
        point format in which its values were rounded (`"float64"` for anything that is not a float array).

    Raises:
        `ValueError`: if the values are not numbers or the rows differ in length; names the first such row.
    """
    if values is None:
        raise ValueError(f"{name} is None: pass a sequence of numbers.")
    if isinstance(values, (str, bytes, dict, set, frozenset)):
        raise ValueError(f"{name} is a {type(values).__name__}: pass a list, an array or a tensor of numbers.")
    if isinstance(values, (list, tuple)) and any(map(_is_tensor, set(map(type, values)))):
        # As a loop collects them: one by one, whatever their precision, device and gradient
        parts = [as_numbers(value, f"{name} row {row}") for row, value in enumerate(values)]
        source = max((part for _, part in parts), key=EPSILON.__getitem__)
        if len({array.shape for array, _ in parts}) > 1:
            raise ValueError(f"{name} cannot be read as an array: {_first_odd_row([array for array, _ in parts])}")
        return np.stack([array for array, _ in parts]), source
    if _is_tensor(values):
        values = values.detach().cpu()
        source = str(values.dtype).removeprefix("torch.")
        values = (values.float() if source == "bfloat16" else values).numpy()
    elif isinstance(values, np.ma.MaskedArray):
        if np.ma.getmaskarray(values).any():
            row = int(np.argwhere(np.ma.getmaskarray(values))[0][0])
            raise ValueError(f"{name} row {row} is masked: drop the masked rows first.")
        values = values.data
        source = values.dtype.name
    else:
        source = getattr(getattr(values, "dtype", None), "name", "")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} cannot be read as an array: {_first_odd_row(values)}") from error
    if source == "bfloat16" and array.dtype != np.float32:  # numpy's bfloat16 comes from the ml_dtypes package
        array = array.astype(np.float32)
    if array.dtype.kind == "O" and array.ndim == 0:
        raise ValueError(f"{name} is of type {type(values).__name__}: pass a list, an array or a tensor of numbers.")
    if array.dtype.kind == "O":
        # A column that was merged or filled may hold plain numbers or booleans as objects
        try:
            array = np.asarray(array.tolist())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} cannot be read as an array: {_first_odd_row(values)}") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name} must hold numbers, got {_first_odd_row(array if array.dtype.kind == 'O' else values)}"
        )
    if array.dtype == np.float16:
        source, array = "float16", array.astype(np.float32)
    elif array.dtype.kind == "f" and array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if array.dtype.kind != "f" or source not in EPSILON:
        source = "float32" if array.dtype == np.float32 else "float64"
    return array, source


def same_order(first: Any, second: Any, names: str) -> None:
    """
    Rows are paired by position. Two columns of one table, one of them sorted or shuffled, would pair wrong rows.

    Raises:
        `ValueError`: for pandas columns with the same index in different order.
    """
    # Lists have an `index` too, which is a method
    a: Any = getattr(first, "index", None)
    b: Any = getattr(second, "index", None)
    known = hasattr(a, "equals") and hasattr(b, "equals") and len(a) == len(b)
    if known and not a.equals(b) and a.sort_values().equals(b.sort_values()):
        raise ValueError(
            f"{names} have the same index in different order, and rows are paired by position. Sort both alike "
            "(`.sort_index()`), or take `.to_numpy()` of both if their positions belong together."
        )


def warn_of_probabilities(logits: npt.NDArray[Any], name: str) -> None:
    """Warn where every row of what should be logits is a distribution: their softmax would be nearly uniform."""
    # A short prefix settles nearly every case without a pass over the data; rows of 0 and 1 are made by hand
    for part in (logits[:64], logits):
        if not (part.min() >= 0 and np.abs(part.sum(axis=1) - 1).max() <= 1e-3 and ((part > 0) & (part < 1)).any()):
            return
    warnings.warn(
        f"Every row of {name} is at least 0 and adds up to 1: these look like probabilities and are read as logits. Pass "
        "their logarithms.",
        UserWarning,
        stacklevel=5,
    )


def _is_tensor(value: Any) -> bool:
    """Whether this is a torch tensor, or the type of one."""
    return hasattr(value, "detach") and hasattr(value, "cpu")


def _first_odd_row(values: Any) -> str:
    """Describe the first entry that is not a number, or the first row whose length differs."""
    try:
        rows = list(values)
    except TypeError:
        return f"{type(values).__name__}."
    width: int | None = None
    for row, entry in enumerate(rows):
        if isinstance(entry, (list, tuple, np.ndarray)):
            if width is None:
                width = len(entry)
            if len(entry) != width:
                return f"row {row} has {len(entry)} values where row 0 has {width}."
            for value in entry:
                if not _is_number(value):
                    return f"row {row} contains {value!r} ({type(value).__name__})."
        elif not _is_number(entry):
            return f"row {row} is {entry!r} ({type(entry).__name__})."
        elif width is not None:
            return f"row {row} is the single number {entry!r} where row 0 has {width} values."
    return f"{type(values).__name__} of numbers too large for 64 bits or of mixed kinds."


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)) or (
        hasattr(value, "item") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) == 0
    )


def first_boolean(values: Any) -> int | None:
    """
    Index of the first entry of a 1-d sequence that is a boolean, `None` where there is none.

    To be asked before [`as_numbers`], which reads `[True, 2]` as the integers 1 and 2.
    """
    name = str(getattr(values, "dtype", "")).removeprefix("torch.")
    if name == "category":
        # Categories of pandas may stand for anything
        values = np.asarray(values)
        name = values.dtype.name
    if isinstance(values, (list, tuple)) or name == "object":
        return next((row for row, value in enumerate(values) if isinstance(value, (bool, np.bool_))), None)
    if not name:
        name = np.asarray(values).dtype.name
    return 0 if name in ("bool", "boolean", "bool[pyarrow]") and len(values) else None


def round_to(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """Round to the nearest value of `dtype` (ties to even) and return it as float64."""
    if dtype == "float64":
        return values
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float64)
    single = values.astype(np.float32)
    if dtype == "float32":
        return single.astype(np.float64)
    bits = single.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def stored_precision(values: FloatArray, source: str) -> str:
    """
    The coarsest of float16, float32 and float64 that holds every value exactly (`source` when that is bfloat16).

    A probability of 0.3 that passed through float32 is 0.30000001; comparing it with the float64 edge 0.3 moves it to
    the next bin. Rounding the edges to the precision of the values keeps it where it was. The test is on the values
    because `.tolist()` and Arrow hide the original format. bfloat16 is taken from the array's type alone: its grid is
    so coarse that honest fractions (votes out of 256) would be mistaken for it.
    """
    if source == "bfloat16" or values.size == 0:
        return source
    for dtype in (np.float16, np.float32):
        # A short prefix settles nearly every case without a pass over the data.
        for part in (values[:256], values):
            if not np.array_equal(part.astype(dtype).astype(values.dtype), part):
                break
        else:
            return np.dtype(dtype).name
    return "float64"
