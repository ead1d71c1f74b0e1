"""Checks on the rows of a teacher cache: structure, numbers, digests, tokenizer."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
from datasets import Dataset

from ..vocabulary import TEACHER_HAS_GOLD
from .manifest import Manifest, read_manifest, split_cache_id, tokenizer_fingerprint
from .schema import (
    CACHE_ID,
    DRAW_IDS,
    MUTUAL_INFORMATION,
    REQUIRED_COLUMNS,
    CacheBatch,
    DrawBatch,
    iterate_batches,
    supervised_positions,
)


# Largest |1 - (kept mass + tail mass)| that rounding explains: float16 keeps 11 bits of a log-probability, so a
# probability near exp(-1) is off by up to 2^-12 relative, and the errors of k entries can add up. A column that was cast
# to a wider type afterwards is as exact as what was stored.
_MASS_TOLERANCE = {"float16": 4e-3, "float32": 1e-4, "float64": 1e-4}


def verify_teacher_cache(
    dataset: Dataset,
    processing_class: Any = None,
    *,
    head_size: int | None = None,
    batch_size: int = 1000,
) -> None:
    """
    Check the rows of a teacher cache. Any subset or reordering of a sound cache passes; whether rows are *missing* is
    a question about the stored folder, answered by `first-trl cache verify`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with the teacher columns.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer. Its fingerprint must equal the one the cache was captured with.
        head_size (`int`, *optional*):
            Rows of the student's output head. Every cached id must exist in it.
        batch_size (`int`, *optional*, defaults to `1000`):
            Rows read at a time.

    Raises:
        `ValueError`: Names what is wrong, the first row where it is, and how to mend it.
    """
    check_columns(dataset.column_names)
    if len(dataset) == 0:
        raise ValueError("The teacher cache is empty: no row to train on. Check the filter or slice that made it.")
    fingerprint = None if processing_class is None else tokenizer_fingerprint(processing_class)
    check_rows(iterate_batches(dataset, batch_size), read_manifest(dataset), fingerprint, head_size)


def check_columns(columns: list[str]) -> None:
    """Raises `ValueError` when a column of the cache is missing."""
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"Missing teacher cache columns {missing}; the dataset has {columns}. Make them with "
            "`add_teacher_topk(dataset, teacher, processing_class)` or load a cache with `load_teacher_cache`."
        )


@dataclass
class RowStatistics:
    """What a walk over the rows found: `kept_mass` sums the mass of the i-th most likely token over positions."""

    rows: int = 0
    positions: int = 0
    k: int | None = None
    num_draws: int | None = None
    kept_mass: float | np.ndarray = 0.0
    rows_without_gold: int = 0
    positions_without_gold: int = 0


def check_rows(
    batches: Iterable[CacheBatch],
    manifest: Manifest | None = None,
    fingerprint: str | None = None,
    head_size: int | None = None,
) -> RowStatistics:
    """
    Check rows one Arrow batch at a time.

    Args:
        batches (iterable of [`CacheBatch`]): The rows.
        manifest ([`Manifest`], *optional*): The cache they must belong to.
        fingerprint (`str`, *optional*): The tokenizer they must be captured with.
        head_size (`int`, *optional*): Rows of the student's head.

    Returns:
        [`RowStatistics`].
    """
    found = RowStatistics()
    if manifest is not None:
        found.k, found.num_draws = manifest.k, manifest.num_draws
    for batch in batches:
        check_batch(batch, found, manifest, fingerprint, head_size)
        found.rows += batch.num_rows
        found.positions += len(batch.tail_logprob)
        found.rows_without_gold += int((~batch.has_gold).sum())
        found.positions_without_gold += int(np.diff(batch.entry_offsets)[~batch.has_gold].sum())
    if found.positions == 0:
        raise ValueError(
            "All labels are masked (-100): the cache has no supervised position. Leave the completion's labels "
            "unmasked before the capture."
        )
    return found


def check_batch(
    batch: CacheBatch,
    found: RowStatistics,
    manifest: Manifest | None,
    fingerprint: str | None,
    head_size: int | None,
) -> None:
    def fail(row: int, what: str) -> NoReturn:
        raise ValueError(f"Row {found.rows + row} of the teacher cache: {what}")

    if not np.array_equal(batch.offsets, batch.label_offsets):
        row = int(np.flatnonzero(np.diff(batch.offsets) != np.diff(batch.label_offsets))[0])
        fail(row, "`labels` and `input_ids` differ in length. Capture the row again.")

    for cache_id in dict.fromkeys(batch.cache_ids):
        row = batch.cache_ids.index(cache_id)
        if not cache_id:
            fail(row, f"`{CACHE_ID}` is empty, so its teacher and tokenizer are unknown. Capture it again.")
        _, cached_fingerprint = split_cache_id(cache_id)
        if fingerprint is not None and cached_fingerprint != fingerprint:
            fail(
                row,
                f"the cache was captured with tokenizer {cached_fingerprint}, the student's tokenizer is "
                f"{fingerprint}: the same ids would mean other tokens. Use the teacher's tokenizer (a student of the "
                "same family), or capture a cache with this tokenizer.",
            )
        if manifest is not None and cache_id != manifest.cache_id:
            fail(
                row,
                f"it belongs to cache {cache_id}, the manifest that travels with the dataset to {manifest.cache_id}. "
                "Verify the caches one by one before putting them together, or restore the manifest.",
            )

    mask = supervised_positions(batch.labels, batch.offsets[:-1])
    row_of_token = np.repeat(np.arange(batch.num_rows), np.diff(batch.offsets))
    expected = np.bincount(row_of_token[mask], minlength=batch.num_rows)
    for name, offsets in (
        ("teacher_topk_ids", batch.entry_offsets),
        ("teacher_topk_logprobs", batch.logprob_offsets),
        ("teacher_tail_logprob", batch.tail_offsets),
        *([] if batch.information_offsets is None else [(MUTUAL_INFORMATION, batch.information_offsets)]),
    ):
        # A row of one teacher, put together with those of a committee, has no disagreement
        there = True if name != MUTUAL_INFORMATION or batch.informed is None else batch.informed
        wrong = np.flatnonzero(there & (np.diff(offsets) != expected))
        if len(wrong):
            row = int(wrong[0])
            fail(
                row,
                f"`{name}` has {np.diff(offsets)[row]} entries for {expected[row]} supervised positions (labels other "
                "than -100 after the first token). Labels changed after the capture, or the columns come from "
                "another row; capture it again.",
            )
    unequal = np.flatnonzero(mask & (batch.labels != batch.input_ids))
    if len(unequal):
        fail(
            int(row_of_token[unequal[0]]),
            "a label differs from the token it stands at. `labels[t]` must be `input_ids[t]` or -100: the trainer "
            "does the shift.",
        )

    row_of_entry = np.repeat(np.arange(batch.num_rows), expected)
    if len(row_of_entry):
        if found.k is None:
            found.k = int(batch.topk_lengths[0])
        wrong = np.flatnonzero((batch.topk_lengths != found.k) | (batch.logprob_lengths != found.k))
        if len(wrong):
            other = int(batch.topk_lengths[wrong[0]])
            fail(
                int(row_of_entry[wrong[0]]),
                f"a position holds another number of entries than {found.k}: {other}. Caches of different k cannot be "
                "trained on together, and `top_k` cuts them only when they are apart: capture both with one k, and "
                "give a smaller `top_k` to the training where that is wanted.",
            )
        if found.k < 1:
            fail(int(row_of_entry[0]), "a position holds no entry (k = 0).")
        found.kept_mass = found.kept_mass + _check_numbers(batch, found.k, row_of_entry, head_size, fail)
    if batch.draws is not None:
        _check_draws(batch.draws, expected, found, row_of_entry, head_size, fail)
    elif found.num_draws:
        fail(0, f"column `{DRAW_IDS}` is gone, the manifest says {found.num_draws} draws. Keep the draw columns.")
    committee = 0 if manifest is None else manifest.committee_size
    if batch.mutual_information is not None and batch.information_offsets is not None:
        row_of_value = np.repeat(np.arange(batch.num_rows), np.diff(batch.information_offsets))
        _check_information(batch.mutual_information, committee, row_of_value, fail)
    if committee and (batch.informed is None or not batch.informed.all()):
        row = 0 if batch.informed is None else int(np.argmin(batch.informed))
        fail(row, f"`{MUTUAL_INFORMATION}` is gone, the manifest names a committee of {committee}. Keep it.")

    wrong = np.flatnonzero(~_digests_match(batch))
    if len(wrong):
        fail(
            int(wrong[0]),
            "its contents differ from what was captured (digest mismatch): tokens, labels, ids, log-probabilities or "
            f"`{TEACHER_HAS_GOLD}` were edited, damaged, or exchanged with another row's. Pull or capture the cache again.",
        )


def _narrowed(values: np.ndarray, dtype: Any) -> np.ndarray | None:
    """The values in a narrower type, `None` where that type does not hold them exactly."""
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    return narrow if np.array_equal(narrow.astype(values.dtype), values) else None


def _digests_match(batch: CacheBatch) -> np.ndarray:
    """Whether each row has its digest, in the type of its log-probabilities or in the one they were cast from."""
    match = np.asarray(batch.row_digests() == batch.digests)
    for dtype in (np.float16, np.float32):
        if not match.all() and batch.logprobs.dtype.itemsize > np.dtype(dtype).itemsize:
            narrow = _narrowed(batch.logprobs, dtype)
            if narrow is not None:
                match |= replace(batch, logprobs=narrow).row_digests() == batch.digests
    return match


def _check_draws(
    draws: DrawBatch,
    expected: np.ndarray,
    found: RowStatistics,
    row_of_entry: np.ndarray,
    head_size: int | None,
    fail: Any,
) -> None:
    wrong = np.flatnonzero(np.diff(draws.offsets) != expected)
    if len(wrong):
        fail(int(wrong[0]), f"`{DRAW_IDS}` does not have one entry per supervised position. Capture it again.")
    if not len(row_of_entry):
        return
    entry = np.repeat(np.arange(len(draws.lengths)), draws.lengths)
    totals = np.bincount(entry, weights=draws.counts, minlength=len(draws.lengths)).astype(np.int64)
    if found.num_draws is None:
        found.num_draws = int(totals[0])
    order = np.lexsort((draws.ids, entry))
    repeated = np.flatnonzero((np.diff(draws.ids[order]) == 0) & (np.diff(entry[order]) == 0))
    out_of_range = (draws.ids < 0) | (draws.ids >= head_size if head_size is not None else False)
    for bad, what in (
        (np.flatnonzero(totals != found.num_draws), f"the draws of a position do not add up to {found.num_draws}."),
        (entry[draws.counts < 1], "a drawn id has count 0."),
        (entry[order][repeated], f"`{DRAW_IDS}` repeats an id."),
        (entry[out_of_range], f"`{DRAW_IDS}` holds an id outside the student's head of {head_size} rows."),
    ):
        if len(bad):
            fail(int(row_of_entry[bad[0]]), what)


def _check_information(values: np.ndarray, committee: int, row_of_entry: np.ndarray, fail: Any) -> None:
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if len(bad):
        fail(
            int(row_of_entry[bad[0]]),
            f"`{MUTUAL_INFORMATION}` is {values[bad[0]]}, and can only be a number from 0 up. Capture it again.",
        )
    # In the type that is stored, to which the largest value was rounded
    bad = np.flatnonzero(values > np.float32(np.log(committee))) if committee else bad
    if len(bad):
        fail(
            int(row_of_entry[bad[0]]),
            f"`{MUTUAL_INFORMATION}` is {values[bad[0]]:.4f}, more than the log {committee} = {np.log(committee):.4f} by which "
            f"{committee} teachers can disagree. Capture it again.",
        )


def _check_numbers(
    batch: CacheBatch, k: int, row_of_entry: np.ndarray, head_size: int | None, fail: Any
) -> np.ndarray:
    ids = batch.ids.reshape(-1, k)
    stored_dtype = str(batch.logprobs.dtype)
    if stored_dtype not in _MASS_TOLERANCE:
        fail(0, f"`teacher_topk_logprobs` holds {stored_dtype} values instead of floats. Capture it again.")
    logprobs = batch.logprobs.reshape(-1, k).astype(np.float64)
    tail = batch.tail_logprob.astype(np.float64)

    def first(bad: np.ndarray) -> int | None:
        where = np.flatnonzero(bad.any(axis=-1) if bad.ndim > 1 else bad)
        return int(where[0]) if len(where) else None

    with np.errstate(invalid="ignore"):  # -inf minus -inf
        rising = np.diff(logprobs, axis=1) > 0
    checks = (
        (
            np.isnan(logprobs),
            "`teacher_topk_logprobs` holds NaN. The teacher's forward overflowed: capture in bf16/fp32.",
        ),
        (np.isnan(tail), "`teacher_tail_logprob` is NaN. Capture it again."),
        (logprobs > 0, "`teacher_topk_logprobs` holds a positive value: not log-probabilities (logits, perhaps?)."),
        (tail > 0, "`teacher_tail_logprob` is positive: not a log-probability."),
        (rising, "`teacher_topk_logprobs` is not sorted from most to least likely."),
        (ids < 0, "`teacher_topk_ids` holds a negative id."),
        (np.diff(np.sort(ids, axis=1), axis=1) == 0, "`teacher_topk_ids` repeats an id."),
    )
    for bad, what in checks:
        entry = first(bad)
        if entry is not None:
            fail(int(row_of_entry[entry]), what)
    probabilities = np.exp(logprobs)
    mass = probabilities.sum(axis=1) + np.exp(tail)
    written_dtype = "float16" if _narrowed(batch.logprobs, np.float16) is not None else stored_dtype
    entry = first(np.abs(mass - 1) > _MASS_TOLERANCE[written_dtype] * max(1.0, k / 16))
    if entry is not None:
        fail(
            int(row_of_entry[entry]),
            f"kept and tail mass add up to {mass[entry]:.4f} instead of 1: the log-probabilities are not those of a "
            "full-vocabulary softmax at temperature 1.",
        )
    if head_size is not None:
        entry = first(ids >= head_size)
        if entry is not None:
            absent = np.unique(ids[ids >= head_size])[:10].tolist()
            fail(
                int(row_of_entry[entry]),
                f"cached ids {absent} do not exist in the student's head of {head_size} rows. Resize the student's "
                "embeddings, or use a student of the teacher's family.",
            )
    return probabilities.sum(axis=0)
