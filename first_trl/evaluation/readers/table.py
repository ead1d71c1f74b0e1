"""Confidences in a table, see [`first_trl.utils.tables`]."""

import os
import unicodedata
from typing import Any

import numpy as np

from ...utils.tables import Table, as_number, file_kind, is_nan, listed, load_table
from ..confidence import Confidences


_RIGHT, _WRONG = {"1", "1.0", "true"}, {"0", "0.0", "false"}


def read_table(
    path: str | os.PathLike[str],
    *,
    confidence_column: str = "confidence",
    correct_column: str = "correct",
    correct_value: str | None = None,
) -> Confidences:
    """
    Read a column of confidences and a column of outcomes.

    Args:
        path (`str` or `os.PathLike`):
            Any file of [`first_trl.utils.tables`].
        confidence_column (`str`, *optional*, defaults to `"confidence"`):
            Numbers in [0, 1], with a decimal point or comma.
        correct_column (`str`, *optional*, defaults to `"correct"`):
            0 / 1 or true / false.
        correct_value (`str`, *optional*):
            Where outcomes are words: this one is right, all others are wrong.

    Returns:
        [`~first_trl.evaluation.confidence.Confidences`]

    Raises:
        `ValueError`: naming file and row for a missing column or a value that is neither.
    """
    return table_confidences(
        load_table(path),
        confidence_column=confidence_column,
        correct_column=correct_column,
        correct_value=correct_value,
    )


def table_confidences(
    table: Table,
    *,
    confidence_column: str = "confidence",
    correct_column: str = "correct",
    correct_value: str | None = None,
) -> Confidences:
    """[`read_table`] for rows that were read already."""
    path = table.path
    confidence, correct, errors = [], [], []
    for number, row in enumerate(table.rows):
        place = table.place(number)
        try:
            for column, option in ((confidence_column, "--confidence-column"), (correct_column, "--correct-column")):
                if column not in row:
                    raise ValueError(
                        f"{place} has no column {column!r}; it has {list(row)}. Name the right one with {option}."
                    )
            value = as_number(row[confidence_column])
            if value is None or not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"{place}: the confidence is {row[confidence_column]!r}, it must be a number from 0 to 1."
                )
            right = _outcome(row[correct_column], correct_value, place, correct_column)
        except ValueError as error:
            errors.append(str(error))
            if number == 0 and not {confidence_column, correct_column} <= set(row):
                break  # The same for every row
            continue
        confidence.append(value)
        correct.append(right)
    if errors:
        raise ValueError(listed(errors, len(table.rows)))
    if correct_value is not None and not any(correct):
        raise ValueError(f"{path}: no row has {correct_column} = {correct_value!r}.")
    dropped = {"empty row": len(table.empty)} if table.empty else {}
    return Confidences(
        file_kind(path)[0],
        np.array(confidence),
        np.array(correct, dtype=bool),
        f"column {confidence_column!r}",
        dropped=dropped,
    )


def _loose(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _outcome(value: Any, correct_value: str | None, place: str, column: str) -> bool:
    text = str(value).strip()
    if value is None or text == "" or is_nan(value):
        raise ValueError(f"{place}: {column!r} is empty.")
    if correct_value is not None:
        if isinstance(value, int | float) and not isinstance(value, bool) and as_number(correct_value) is not None:
            return value == as_number(correct_value)
        if text != correct_value and _loose(text) == _loose(correct_value):
            raise ValueError(
                f"{place}: {column!r} is {value!r}, which is --correct-value {correct_value!r} but for case or the form of "
                "its characters. Write all of them alike."
            )
        return text == correct_value
    if text.lower() in _RIGHT:
        return True
    if text.lower() in _WRONG:
        return False
    raise ValueError(
        f"{place}: {column!r} is {value!r}, neither 0/1 nor true/false. Say which value is right with --correct-value."
    )
