"""Teachers of another tokenizer, for choices: matched option by option, where ids of tokens cannot be."""

import warnings
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from ..cache.choices import CHOICE_IDS, LOG_ZERO
from ..cache.manifest import tokenizer_fingerprint
from ..cache.schema import INPUT_IDS
from ..cache.scores import Scores
from ..calibration import CalibrationWarning
from ..evaluation.multiple_choice import evaluate_multiple_choice
from ..evaluation.option_order import evaluate_option_order
from ..evaluation.whole_answers import evaluate_whole_answers
from ..tasks.answers import NotOneToken, answer_token_ids_of_rows
from ..tasks.multiple_choice import MultipleChoice
from ..vocabulary import NO_ENTRY, TARGET_PROBS
from .backends import TransformersBackend


def add_option_probs(
    dataset: Dataset,
    teacher: Any,
    processing_class: Any,
    *,
    asked: Dataset | None = None,
    scoring: str = "token",
    length: str = "none",
    task: MultipleChoice | None = None,
    permutations: int = 0,
    temperature: float = 1.0,
    **options: Any,
) -> Dataset:
    """
    Add a teacher's distribution over the choices of each row, as soft labels for a student of any tokenizer.

    The student learns how the teacher divides its probability among the options; what the teacher gives to anything else
    is left out. Run it once and keep the result (`save_to_disk`, `to_parquet`, `push_to_hub`): training needs no teacher.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of the student: `prompt`, `choices` and, where there is one, `id`.
        teacher ([`~transformers.PreTrainedModel`]):
            A causal language model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        asked ([`~datasets.Dataset`], *optional*):
            The same questions as the teacher reads them, in the same order: another template, a conversation, letters instead
            of texts. Choice `i` there is choice `i` here. By default the teacher reads the rows themselves. `id` (else
            `question`), `options` and `gold` are compared where both have them; a warning says that none tells the order.
        scoring (`str`, *optional*, defaults to `"token"`):
            `"token"`: each choice is one token of the teacher. `"choices"`: the probability of its whole text.
        length (`str`, *optional*, defaults to `"none"`):
            With `"choices"`, see [`evaluate_whole_answers`].
        task ([`~first_trl.tasks.multiple_choice.MultipleChoice`], *optional*), permutations (`int`, *optional*, defaults to `0`):
            Average over this many orders of the options, which `task` writes from `question` and `options` of the rows that
            the teacher reads: what a place or letter is preferred for does not enter the labels.
        temperature (`float`, *optional*, defaults to `1.0`):
            The teacher's logits are divided by it.
        options:
            `batch_size`, `max_length`, `chat_template_kwargs`, `disable_tqdm` of the evaluation.

    Returns:
        [`~datasets.Dataset`]: with the column `target_probs` (`list[float64]`, one probability per choice, sum 1).

    Raises:
        `ValueError`: the rows hold `target_probs` already, `asked` are other questions, or what the evaluation refuses.

    Example:

    ```python
    >>> from first_trl import add_option_probs, get_task
    >>> rows = get_task("commonsense_qa").load("train").dataset
    >>> rows = add_option_probs(rows, teacher, teacher_tokenizer)  # of another family than the student
    >>> rows[0]["target_probs"]
    [0.02, 0.91, 0.04, 0.02, 0.01]
    ```
    """
    if TARGET_PROBS in dataset.column_names:
        raise ValueError(f"The rows hold {TARGET_PROBS!r} already; remove the column to ask another teacher.")
    rows = dataset if asked is None else asked
    _check_same(dataset, rows)
    # The answer is not asked for: rows without one are scored like all others
    rows = _with_column(rows, "gold", [0] * len(rows), Value("int64"))
    options["temperature"] = temperature
    if permutations:
        if task is None:
            raise ValueError("`permutations` needs `task`, which writes the prompts of the other orders.")
        if "id" not in rows.column_names:
            rows = _with_column(rows, "id", [str(i) for i in range(len(rows))], Value("string"))
        found = evaluate_option_order(
            teacher, processing_class, task, rows, permutations=permutations, scoring=scoring, length=length, **options
        )
        probabilities = found.averaged
    else:
        with warnings.catch_warnings():
            # About answers, which there are none of here
            warnings.simplefilter("ignore", CalibrationWarning)
            if scoring == "choices":
                predicted = evaluate_whole_answers(
                    teacher, processing_class, rows, length=length, **options
                ).predictions
            else:
                predicted = evaluate_multiple_choice(teacher, processing_class, rows, **options).predictions
        scores = predicted.get("choice_scores", predicted["choice_logprobs"])
        shares = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        probabilities = [values[:n] for values, n in zip(shares, predicted["n_choices"], strict=True)]
    return _with_column(dataset, TARGET_PROBS, [values.tolist() for values in probabilities], List(Value("float64")))


class OptionBackend:
    """
    An engine of [`~first_trl.add_teacher_topk`] for a teacher of another tokenizer: at the answer of each row, its
    distribution over the options, as the tokens that the student answers with. What it gives to anything else is left out.

    Choices that are one token of the teacher each are read at that token, others by the probability of their whole texts.

    Args:
        engine ([`~first_trl.teacher.backends.TransformersBackend`]):
            The teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rows ([`~datasets.Dataset`]):
            Rows of the student that will be scored: `input_ids`, `labels` and `choice_ids` (the student's token of each
            choice).
        asked ([`~datasets.Dataset`]):
            The same questions, in the same order, with `prompt` and `choices` (texts).
        options:
            As in [`add_option_probs`].
    """

    head_size = None
    max_length = None
    ranks_per_teacher = 1

    def __init__(
        self, engine: TransformersBackend, processing_class: Any, rows: Dataset, asked: Dataset, **options: Any
    ):
        self._engine, self._tokenizer = engine, processing_class
        self.scoring = "token"
        try:
            answer_token_ids_of_rows(processing_class, asked)
        except NotOneToken:
            self.scoring = "choices"
        self.notes = [
            "Distribution over the options alone, of a teacher with another tokenizer, matched by option and read "
            + ("at one token a choice." if self.scoring == "token" else "by the probability of whole choices."),
            *engine.notes,
        ]
        asked = asked.remove_columns([name for name in (TARGET_PROBS,) if name in asked.column_names])
        found = add_option_probs(asked, engine.model, processing_class, scoring=self.scoring, **options)
        self._entries: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
        columns = (rows[INPUT_IDS], rows[CHOICE_IDS], found[TARGET_PROBS])
        for number, (input_ids, tokens, shares) in enumerate(zip(*columns, strict=True)):
            with np.errstate(divide="ignore"):
                logprobs = np.maximum(np.log(shares), LOG_ZERO)
            order = np.lexsort((tokens, -logprobs))
            before = self._entries.get(tuple(input_ids))
            if before is not None and set(before[0].tolist()) != set(tokens):
                raise ValueError(
                    f"Row {number} has the tokens of an earlier row and other choices, which nothing tells apart. Show the "
                    "options in the student's prompt, or remove one of the rows."
                )
            self._entries[tuple(input_ids)] = np.array(tokens, np.int32)[order], logprobs[order].astype(np.float32)

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        teacher, backend = self._engine.describe()
        return teacher, {
            **backend, "name": "options", "scoring": self.scoring, "tokenizer": tokenizer_fingerprint(self._tokenizer)
        }  # fmt: skip

    def confirm(self, teacher: dict[str, Any]) -> None:
        self._engine.confirm(teacher)

    def score(
        self,
        rows: list[np.ndarray],
        positions: list[np.ndarray],
        k: int,
        num_tokens: int,
        uniforms: list[np.ndarray] | None = None,
    ) -> list[Scores]:
        scores = []
        for row, at in zip(rows, positions, strict=True):
            tokens, logprobs = self._entries[tuple(row.tolist())]
            assert len(at) == 1 and uniforms is None
            # A row of few options is filled up with entries that count as absent
            spare = [token for token in range(2 * k) if token not in tokens][: max(k - len(tokens), 0)]
            ids = np.concatenate([tokens[:k], np.array(spare, np.int32)])
            values = np.concatenate([logprobs[:k], np.full(len(spare), NO_ENTRY, np.float32)])
            tail = np.logaddexp.reduce(logprobs[k:].astype(np.float64)) if len(tokens) > k else -np.inf
            scores.append(Scores(ids[None], values[None], np.array([tail], np.float32)))
        return scores


def _with_column(dataset: Dataset, name: str, values: list[Any], feature: Any) -> Dataset:
    dataset = dataset.remove_columns(name) if name in dataset.column_names else dataset
    return dataset.add_column(name, values, feature=feature)


def _check_same(dataset: Dataset, asked: Dataset) -> None:
    if len(dataset) != len(asked):
        raise ValueError(f"`asked` has {len(asked)} rows for {len(dataset)}: it must ask the same questions.")
    both = {*dataset.column_names} & {*asked.column_names}
    # `asked` may put a question in other words
    known = [name for name in ("id", "question") if name in both][:1]
    for column in [*known, *(name for name in ("options", "gold") if name in both)]:
        for i, (ours, theirs) in enumerate(zip(dataset[column], asked[column], strict=True)):
            unknown = column == "gold" and {ours, theirs} & {None, -1}
            if ours != theirs and not unknown:
                raise ValueError(f"Row {i} has the {column} {ours!r}, and {theirs!r} in `asked`: use the same order.")
    if not known and any(ours != theirs for ours, theirs in zip(dataset["prompt"], asked["prompt"], strict=True)):
        warnings.warn(
            "Nothing tells whether the rows of `asked` are in the order of the dataset: give both an `id` or a "
            "`question`, which are compared."
        )
    for i, (mine, other) in enumerate(zip(dataset["choices"], asked["choices"], strict=True)):
        if len(mine) != len(other):
            raise ValueError(
                f"Row {i} has {len(mine)} choices, and {len(other)} in `asked`: there must be one for one."
            )
