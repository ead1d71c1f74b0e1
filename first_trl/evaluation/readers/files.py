"""One door for every file that holds confidences."""

import os
from typing import Any

import numpy as np

from ...calibration.distribution import check_distribution
from ...utils.tables import Table, file_kind, load_table
from ..confidence import Confidences
from ..predictions import MultipleChoiceResult
from .harness import table_harness_samples
from .table import table_confidences


# Of a table; others have to be named
_COLUMNS = {"confidence_column": "confidence", "correct_column": "correct"}


def read_confidences(
    path: str | os.PathLike[str],
    *,
    reading: str | None = None,
    filter: str | None = None,
    target_delimiter: str | None = None,
    **table_options: Any,
) -> list[Confidences]:
    """
    Read a file of confidences, whatever it is.

    | file | what comes out |
    | --- | --- |
    | `samples_*.jsonl` of lm-evaluation-harness, a line or one list | one result per filter and metric (`acc`, `acc_norm`, ...) |
    | predictions of [`evaluate_multiple_choice`] (its rows as `.jsonl` or `.parquet`) | over the full vocabulary, and renormalised over the choices |
    | `predictions.jsonl` of `first-trl evaluate` | of the options alone; questions without one right option are left out |
    | a table (any file of [`first_trl.utils.tables`]) | one result, see [`read_table`] |

    Args:
        path (`str` or `os.PathLike`):
            The file.
        reading (`str`, *optional*):
            Only this one: a metric of the harness, or a definition of
            [`~first_trl.evaluation.predictions.MultipleChoiceResult.confidences`] for our own predictions.
        filter (`str`, *optional*):
            Only this filter of a harness log.
        target_delimiter (`str`, *optional*):
            Of the harness task, see [`~first_trl.evaluation.readers.harness.HarnessSamples.confidences`].
        **table_options:
            Passed to [`read_table`]. A file of any kind whose columns are named is read as a table.

    Returns:
        `list[Confidences]`

    Raises:
        `ValueError`: naming file and row for what cannot be read.
    """
    table = load_table(path)
    # What was asked for by name comes before what the file looks like
    named = {name for name, value in table_options.items() if value not in (None, _COLUMNS.get(name))}
    first = {} if named else table.rows[0]
    if "filtered_resps" in first:
        found = []
        for samples in table_harness_samples(table, filter=filter):
            readings = samples.readings if reading is None else [reading]
            found += [samples.confidences(name, target_delimiter=target_delimiter) for name in readings]
        return found
    if {"choice_logprobs", "gold", "top_prob"} <= set(first):
        _no_log(table, filter, target_delimiter)
        result = MultipleChoiceResult.from_rows(table.rows)
        name = file_kind(table.path)[0]
        definitions = ["full_vocab", "renormalized"] if reading is None else [reading]
        return [result.confidences(definition, name=f"{name} {definition}") for definition in definitions]
    if {"probabilities", "gold", "options"} <= set(first):
        if reading not in (None, "renormalized"):
            raise ValueError(f"{table.path} holds probabilities of the options alone: its reading is renormalized.")
        _no_log(table, filter, target_delimiter)
        return [_option_confidences(table)]
    if reading is not None or filter is not None:
        raise ValueError(f"{table.path} is a table: it has neither readings nor filters to choose from.")
    _no_log(table, filter, target_delimiter)
    return [table_confidences(table, **table_options)]


def _no_log(table: Table, filter: str | None, target_delimiter: str | None) -> None:
    if filter is not None or target_delimiter is not None:
        raise ValueError(
            f"{table.path} is no log of lm-evaluation-harness: it has neither filter nor target delimiter."
        )


def _option_confidences(table: Table) -> Confidences:
    """The most likely option of each question that has one right option."""
    rows = []
    for number, row in enumerate(table.rows):
        try:
            for name in ("probabilities", "gold"):
                check_distribution(row[name], f"{name!r}")
            p, gold = (np.array(row[name], dtype=np.float64) for name in ("probabilities", "gold"))
            if len(p) != len(gold):
                raise ValueError(f"{len(p)} probabilities and a gold over {len(gold)} options.")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{table.place(number)}: {error}") from None
        if gold.max() == 1.0:
            rows.append((p, gold))
    if not rows:
        raise ValueError(
            f"{table.path}: the gold of every question is a distribution, so no answer is right or wrong."
        )
    return Confidences(
        f"{file_kind(table.path)[0]} renormalized",
        np.array([p.max() for p, _ in rows]),
        np.array([p.argmax() == gold.argmax() for p, gold in rows]),
        "renormalized",
        dropped={"gold is a distribution": len(table.rows) - len(rows)} if len(rows) < len(table.rows) else {},
    )
