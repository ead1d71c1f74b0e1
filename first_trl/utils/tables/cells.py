"""What the value of a cell says as a number or as a text."""

import datetime
import decimal
import math
import re
from typing import Any


_NUMBER = re.compile(r"[-+]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d+)?")


def is_nan(value: Any) -> bool:
    """Whether a value is the float NaN, which pandas has for an empty cell."""
    return isinstance(value, float) and math.isnan(value)


def as_number(value: Any) -> float | None:
    """
    A finite number, from a number or its text with a decimal point or comma; `None` for anything else.

    Example:

    ```python
    >>> as_number("0,8"), as_number(" .5 "), as_number("nan"), as_number(True)
    (0.8, 0.5, None, None)
    ```
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            return None
        value = value.strip().replace(",", ".")
    elif not isinstance(value, int | float):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def as_text(value: Any) -> str:
    """
    The text of a cell that is used as one: texts as they are, numbers as Python writes them, booleans as `True` and
    `False`, days and times in ISO 8601.

    Raises:
        `ValueError`: for a missing value, NaN, and values that have no text of their own, such as lists.

    Example:

    ```python
    >>> as_text(4), as_text(1.5), as_text(True)
    ('4', '1.5', 'True')
    ```
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise ValueError("is missing")
    if is_nan(value):
        raise ValueError("is NaN, which pandas writes for an empty cell. Fill it in, or leave it out")
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"is {value!r}, not a text")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bool | int | float | decimal.Decimal):
        return str(value)
    raise ValueError(f"is {value!r}, not a text")
