"""
Targets over the choices of a question: a cached teacher's, and soft labels that anyone may give.

Both become cache rows of one kind, which are verified, recalibrated and trained on like any other: the position of the
answer is the only supervised one, and its entries are the tokens of the choices. `teacher_choice_index` says which choice
an entry is; rows with fewer choices than others are filled up with entries that count as absent.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from ..calibration.distribution import soft_label
from ..tasks.answers import answer_token_ids_of_rows, choice_texts
from ..tasks.encode import encode_prompts, filler_token_id, template_columns
from ..utils.versions import versioned
from ..vocabulary import HAS_GOLD, IGNORE_INDEX, NO_ENTRY, TARGET_PROBS, TARGET_VOTES, TEACHER_HAS_GOLD
from .manifest import tokenizer_fingerprint
from .schema import (
    CACHE_COLUMNS,
    CHOICE_INDEX,
    INPUT_IDS,
    LABELS,
    MUTUAL_INFORMATION,
    SOFT_LABELS,
    TEACHER_COLUMNS,
    CacheBatch,
    cache_features,
    refuse_transform,
    row_digest,
)
from .verify import check_columns


# Column of tokenised rows: the token of each choice, in their order
CHOICE_IDS = "choice_ids"
# Stored for a choice of probability 0, which is a choice all the same; float32 has no smaller probabilities
LOG_ZERO = -100.0


class _Row(NamedTuple):
    """One question: `logprobs` and `soft` are in the order of the choices."""

    input_ids: np.ndarray
    labels: np.ndarray
    choices: Sequence[int]
    logprobs: np.ndarray
    cache_id: str
    has_gold: bool
    soft: np.ndarray | None = None
    information: np.ndarray | None = None


class _Lists(NamedTuple):
    """One list a row, as two arrays: `map` hashes what it is given, and takes long over many lists."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[Sequence[Any] | np.ndarray]) -> "_Lists":
        return cls(np.concatenate(lists), np.concatenate([[0], np.cumsum([len(values) for values in lists])]))

    def row(self, row: int) -> list[Any]:
        found: list[Any] = self.values[self.offsets[row] : self.offsets[row + 1]].tolist()
        return found


def has_soft_labels(columns: Sequence[str]) -> bool:
    """Whether one of the columns holds distributions or votes over the choices."""
    return TARGET_PROBS in columns or TARGET_VOTES in columns


def restrict_to_choices(cache: Dataset, processing_class: Any = None) -> Dataset:
    """
    A teacher cache whose target is the distribution over the choices of each question.

    The entries of the answer position become the choices, with the teacher's probabilities divided by their sum; all other
    tokens are one bucket of probability 0. Nothing of the target is left to what is no answer. Positions behind the answer
    (an end token) are no longer supervised. A choice that is not among the cached entries counts as 0, as everything outside
    the top k does; a warning says how many there are.

    Args:
        cache ([`~datasets.Dataset`]):
            Teacher cache with `prompt` and `choices` (texts, as they stand behind the prompt), or with `choice_ids` (token
            ids, `list[int]`). Answers have one token each. Soft labels in it (`target_probs` or `target_votes`) are
            carried along, for `soft_label_weight` of the trainer, and so is the disagreement of a committee.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the cache; needed where there are no `choice_ids`.

    Returns:
        [`~datasets.Dataset`]: The cache columns and `teacher_choice_index`, without a manifest.

    Raises:
        `ValueError`: Naming the row, where a choice is not one token of its own, the answer is not at the first supervised
            position, none of the choices is cached, or the soft labels are no distribution.
    """
    refuse_transform(cache)
    check_columns(cache.column_names)
    choice_ids = _choice_ids(cache, processing_class)
    soft = _Lists.of(_soft_labels(cache, choice_ids)) if has_soft_labels(cache.column_names) else None
    columns = [name for name in CACHE_COLUMNS if name in cache.column_names]
    extra = {} if soft is None else {SOFT_LABELS: List(List(Value("float32")))}
    if MUTUAL_INFORMATION in columns:
        extra[MUTUAL_INFORMATION] = List(Value("float32"))
    found = _map(cache.select_columns(columns), partial(_restricted, soft=soft), choice_ids, extra)
    total = sum(map(len, choice_ids))
    absent = sum(
        int((batch.logprobs == np.float32(LOG_ZERO)).sum())
        for table in found.select_columns([c for c in CACHE_COLUMNS if c in found.column_names])
        .with_format("arrow")
        .iter(1000)
        for batch in [CacheBatch.from_arrow(table)]
    )
    if absent:
        warnings.warn(
            f"{absent} of {total} choices ({100 * absent / total:.2g} %) are not among the teacher's cached entries and "
            "count as probability 0. Capture more entries (a larger `k`) where that is too many."
        )
    return found


def add_soft_labels(dataset: Dataset, processing_class: Any) -> Dataset:
    """
    Soft labels as a teacher cache, so that [`FirstDistillTrainer`] trains on them; it makes this of such rows by itself.

    One column holds them. `target_probs`: one probability per choice, adding up to 1. `target_votes`: how many annotators
    chose each (0, 1, 2, ...); the counts are divided by their sum. Which of the two it is, the name says, never the values.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` (text or conversation) and `choices` (texts, as they stand behind the prompt, one token
            each); `gold`, the index of the right choice, where there is one (-1 or null: none). Or tokenised rows with
            `input_ids`, `labels` and `choice_ids` (the token of each choice).
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.

    Returns:
        [`~datasets.Dataset`]: The cache columns and `teacher_choice_index`. Rows without a right choice have
        `teacher_has_gold` false.

    Raises:
        `ValueError`: Naming the row: a distribution that is missing, empty, of another length than the choices, not made of
            numbers, not finite, negative, or does not add up to 1; votes that are no counts, or none at all; a choice that
            is not one token of its own; an answer position that is missing.

    Example:

    ```python
    >>> rows = Dataset.from_list([{"prompt": "Is it spam? Answer:", "choices": [" yes", " no"], "target_votes": [3, 1]}])
    >>> cache = add_soft_labels(rows, tokenizer)
    ```
    """
    refuse_transform(dataset)
    dataset = dataset.with_format(None)
    names = dataset.column_names
    if any(name in names for name in TEACHER_COLUMNS):
        raise ValueError(
            "The rows hold a cached teacher beside the soft labels: use `restrict_to_choices`, which keeps both, or remove "
            "the teacher's columns."
        )
    if not len(dataset):
        raise ValueError("The dataset is empty: there is no row to train on. Check the filter or slice that made it.")
    choice_ids = _choice_ids(dataset, processing_class)
    soft = _Lists.of(_soft_labels(dataset, choice_ids))
    if INPUT_IDS not in names:
        dataset = _tokenized(dataset, processing_class, choice_ids)
    elif LABELS not in names:
        raise ValueError(f"Tokenised rows need `{LABELS}`, -100 but for the answer; the dataset has {names}.")
    cache_id = f"soft-labels:{tokenizer_fingerprint(processing_class)}"
    columns = [name for name in (INPUT_IDS, LABELS, HAS_GOLD, TEACHER_HAS_GOLD) if name in dataset.column_names]
    make = partial(_soft_rows, soft=soft, cache_id=cache_id)
    return _map(dataset.select_columns(columns), make, choice_ids, {})


def _map(dataset: Dataset, make: Any, choice_ids: list[list[int]], extra: dict[str, Any]) -> Dataset:
    """The rows that `make` builds of every table, as a dataset."""
    features = Features(
        {
            **cache_features("float32", has_gold=True),
            CHOICE_INDEX: List(List(Value("int32"))),
            **extra,
        }
    )
    found = dataset.with_format("arrow").map(
        versioned(_make_table),
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        fn_kwargs={
            "make": make,
            "choices": _Lists.of(choice_ids),
            "width": max(map(len, choice_ids)),
            "schema": features.arrow_schema,
        },
        desc="Targets over the choices",
    )
    found.info.description = ""  # the manifest is of other entries
    if all(found[TEACHER_HAS_GOLD]):
        found = found.remove_columns(TEACHER_HAS_GOLD)
    return found.with_format(None)


def _make_table(
    table: pa.Table,
    indices: list[int],
    *,
    make: Any,
    choices: _Lists,
    width: int,
    schema: pa.Schema,
) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in make(table, indices, [choices.row(i) for i in indices]):
        order = np.argsort(-row.logprobs, kind="stable")
        taken = set(row.choices)
        spare = [token for token in range(2 * width) if token not in taken][: width - len(order)]
        ids = np.array([*np.asarray(row.choices)[order], *spare], np.int32)
        logprobs = np.full(width, NO_ENTRY, np.float32)
        logprobs[: len(order)] = row.logprobs[order]
        index = np.full(width, -1, np.int32)
        index[: len(order)] = order
        tail = np.array([-np.inf], np.float32)
        values = {
            INPUT_IDS: row.input_ids.astype(np.int32),
            LABELS: row.labels.astype(np.int32),
            CHOICE_INDEX: [index],
            TEACHER_HAS_GOLD: row.has_gold,
            **dict(
                zip(
                    TEACHER_COLUMNS,
                    (
                        [ids],
                        [logprobs],
                        tail,
                        row.cache_id,
                        row_digest(
                            row.input_ids,
                            row.labels,
                            ids,
                            logprobs,
                            tail,
                            row.cache_id,
                            has_gold=row.has_gold,
                            mutual_information=row.information,
                        ),
                    ),
                    strict=True,
                )
            ),
        }
        if row.soft is not None:
            share = np.zeros(width, np.float32)
            share[: len(order)] = row.soft[order]
            values[SOFT_LABELS] = [share]
        if MUTUAL_INFORMATION in columns:
            values[MUTUAL_INFORMATION] = row.information
        for name, value in values.items():
            columns[name].append(value)
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names})


def _restricted(
    table: pa.Table, indices: list[int], choice_ids: list[list[int]], *, soft: _Lists | None
) -> list[_Row]:
    batch, rows = CacheBatch.from_arrow(table), []
    starts = np.concatenate([[0], np.cumsum(batch.topk_lengths)])
    for i, (number, choices) in enumerate(zip(indices, choice_ids, strict=True)):
        text = slice(*batch.offsets[i : i + 2])
        labels = _only_answer(batch.labels[text], choices, bool(batch.has_gold[i]), number)
        entry = batch.entry_offsets[i]
        kept = slice(*starts[entry : entry + 2])
        ids, logprobs = batch.ids[kept].tolist(), batch.logprobs[kept].astype(np.float64)
        cached = dict(zip(ids, logprobs.tolist(), strict=True))
        found = np.array([cached.get(token, -np.inf) for token in choices])
        if not np.isfinite(found).any():
            _fail(
                number,
                f"none of the {len(choices)} choices is among its {len(ids)} cached entries. Capture a larger `k`.",
            )
        found = np.maximum(found - np.logaddexp.reduce(found), LOG_ZERO)
        own = None if soft is None else np.array(soft.row(number))
        # The answer is the first of the positions
        information = batch.information(i)
        information = None if information is None else information[:1]
        rows.append(
            _Row(
                batch.input_ids[text], labels, choices, found, batch.cache_ids[i], bool(batch.has_gold[i]), own, information
            )
        )  # fmt: skip
    return rows


def _soft_rows(
    table: pa.Table, indices: list[int], choice_ids: list[list[int]], *, soft: _Lists, cache_id: str
) -> list[_Row]:
    rows, columns = [], table.to_pydict()
    flags = columns.get(HAS_GOLD) or columns.get(TEACHER_HAS_GOLD) or [True] * len(indices)
    for i, (number, choices) in enumerate(zip(indices, choice_ids, strict=True)):
        input_ids, given = np.array(columns[INPUT_IDS][i] or []), np.array(columns[LABELS][i] or [])
        if len(input_ids) != len(given):
            _fail(number, f"`{INPUT_IDS}` and `{LABELS}` differ in length.")
        has_gold = flags[i] is not False
        labels = _only_answer(given, choices, has_gold, number)
        with np.errstate(divide="ignore"):
            logprobs = np.maximum(np.log(soft.row(number)), LOG_ZERO)
        rows.append(_Row(input_ids, labels, choices, logprobs, cache_id, has_gold))
    return rows


def only_answers(dataset: Dataset) -> Dataset:
    """
    Tokenised rows with the position of the answer alone supervised, where a teacher of another tokenizer has something to say.

    Args:
        dataset ([`~datasets.Dataset`]): With `input_ids`, `labels` and `choice_ids`; `has_gold` where rows have no answer.
    """
    has_gold = dataset[HAS_GOLD][:] if HAS_GOLD in dataset.column_names else [True] * len(dataset)
    given = zip(dataset[LABELS], dataset[CHOICE_IDS], has_gold, strict=True)
    labels = [
        _only_answer(np.array(row), choices, known, number).tolist()
        for number, (row, choices, known) in enumerate(given)
    ]
    return dataset.remove_columns(LABELS).add_column(LABELS, labels, feature=dataset.features[LABELS])


def _only_answer(labels: np.ndarray, choices: Sequence[int], has_gold: bool, row: int) -> np.ndarray:
    """The labels with the answer's position alone supervised."""
    at = np.flatnonzero(labels[1:] != IGNORE_INDEX) + 1
    if not len(at):
        _fail(row, "it has no answer position: no label behind the first token is other than -100.")
    if len(at) > 2:
        _fail(
            row,
            f"it has {len(at)} supervised positions. A target over the choices needs rows that end in the answer, one token, "
            "and an end token at most: mask the labels of everything before it with -100.",
        )
    if has_gold and labels[at[0]] not in choices:
        _fail(
            row,
            f"its first supervised token {int(labels[at[0]])} is none of the choices {list(choices)}: that is not the answer "
            "position. Mask the labels before the answer with -100, and write choices as they stand behind the prompt.",
        )
    found = np.full(len(labels), IGNORE_INDEX, np.int32)
    found[at[0]] = labels[at[0]]
    return found


def _tokenized(dataset: Dataset, processing_class: Any, choice_ids: list[list[int]]) -> Dataset:
    """Prompts, and behind each the right choice, or a filler where there is none."""
    columns = dataset.column_names
    prompts = encode_prompts(processing_class, dataset["prompt"][:], **template_columns(dataset))
    gold = dataset["gold"][:] if "gold" in columns else [None] * len(dataset)
    answers = []
    for row, (choices, index) in enumerate(zip(choice_ids, gold, strict=True)):
        has_gold = index is not None and index != -1
        if has_gold and (isinstance(index, bool) or not (isinstance(index, int) and 0 <= index < len(choices))):
            _fail(
                row,
                f"`gold` is {index!r}, and there are {len(choices)} choices: give the index of one, or -1 for none.",
            )
        answers.append(choices[index] if has_gold else None)
    filler = None if None not in answers else filler_token_id(processing_class)
    pairs = [(prompt, filler if answer is None else answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Dataset.from_dict(
        {
            INPUT_IDS: [[*prompt, token] for prompt, token in pairs],
            LABELS: [[IGNORE_INDEX] * len(prompt) + [token] for prompt, token in pairs],
            HAS_GOLD: [answer is not None for answer in answers],
        }
    )


def _choice_ids(dataset: Dataset, processing_class: Any) -> list[list[int]]:
    names = dataset.column_names
    if CHOICE_IDS in names:
        found = dataset.with_format(None)[CHOICE_IDS][:]
        for row, ids in enumerate(found):
            if not ids or not all(isinstance(token, int) and token >= 0 for token in ids) or len(set(ids)) < len(ids):
                _fail(row, f"`{CHOICE_IDS}` must be the distinct token ids of its choices, got {ids!r}.")
        return [list(ids) for ids in found]
    if not {"prompt", "choices"} <= set(names):
        raise ValueError(
            f"A target over the choices needs the columns `prompt` and `choices`, or `{CHOICE_IDS}` (the token id of each "
            f"choice); the dataset has {names}."
        )
    if processing_class is None:
        raise ValueError("Give the tokenizer as `processing_class`: the choices are texts.")
    dataset = dataset.with_format(None)
    for row, choices in enumerate(dataset["choices"]):
        if not choice_texts(choices, f"Row {row}"):
            _fail(row, f"`choices` must be a list of texts, got {choices!r}.")
    return answer_token_ids_of_rows(processing_class, dataset)


def _soft_labels(dataset: Dataset, choice_ids: list[list[int]]) -> list[np.ndarray]:
    """The distribution of every row, in the order of its choices."""
    given = [name for name in (TARGET_PROBS, TARGET_VOTES) if name in dataset.column_names]
    if len(given) != 1:
        raise ValueError(
            f"Soft labels are one column, `{TARGET_PROBS}` (probabilities) or `{TARGET_VOTES}` (counts); the dataset has "
            f"{'both. Remove one' if given else f'neither: {dataset.column_names}'}."
        )
    found = []
    for row, (values, choices) in enumerate(zip(dataset.with_format(None)[given[0]], choice_ids, strict=True)):
        try:
            found.append(soft_label(given[0], values, len(choices)))
        except ValueError as error:
            _fail(row, str(error))
    return found


def _fail(row: int, what: str) -> NoReturn:
    raise ValueError(f"Row {row}: {what}")
