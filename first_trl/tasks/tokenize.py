"""
Rows of text -> `input_ids` and `labels`.

A prompt always gets the tokens it has when it stands alone, because that is what the model reads at evaluation; the
completion gets the tokens that follow when both are tokenized together. [`~first_trl.tasks.encode`] says what becomes
of special tokens.

A prompt without an answer becomes a row whose last token is a filler: the position it stands at is where an answer
would begin. A causal model's distribution there does not depend on it.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..utils.versions import versioned
from ..vocabulary import HAS_GOLD, IGNORE_INDEX
from .encode import encode_pairs, encode_prompts, filler_token_id, front_tokens


Supervise = Literal["completion", "all", "answer_position"]
OnOverflow = Literal["error", "drop", "truncate_prompt_left", "truncate_right"]

_SUPERVISE = ("completion", "all", "answer_position")
_ON_OVERFLOW = ("error", "drop", "truncate_prompt_left", "truncate_right")
# Values of the helper column that tells what became of a row.
_KEPT, _TRUNCATED, _OVERFLOW, _NOTHING_LEFT = range(4)
_REASONS = {
    _OVERFLOW: "longer than max_length",
    _NOTHING_LEFT: "no completion token left within max_length",
}


@dataclass(frozen=True)
class TokenizedSplit:
    """
    Tokenized rows, and what became of the rows that went in.

    `n_in == n_out + n_dropped` always holds.

    Attributes:
        dataset ([`~datasets.Dataset`]): Columns `input_ids` and `labels` (both `list[int32]`; `labels[t]` is
            `input_ids[t]` where supervised and -100 elsewhere), `id` and `group` (`str`). With
            `supervise="answer_position"`, `has_gold` (`bool`) too, false everywhere.
        n_in (`int`): Rows that went in.
        n_truncated (`int`): Rows that were shortened and kept.
        n_retokenized (`int`): Rows whose completion would have merged with the end of the prompt into one token. The
            completion of such a row is tokenized on its own.
        reasons (`dict[str, int]`): Why rows were dropped, with the count of each reason.
    """

    dataset: Dataset
    n_in: int
    n_truncated: int = 0
    n_retokenized: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def n_out(self) -> int:
        """Rows that came out."""
        return len(self.dataset)

    @property
    def n_dropped(self) -> int:
        """Rows dropped, over all reasons."""
        return sum(self.reasons.values())


def tokenize_rows(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    append_eos: bool = False,
    supervise: Supervise = "completion",
    on_overflow: OnOverflow = "drop",
) -> TokenizedSplit:
    """
    Tokenizes the `prompt` and `completion` columns for training.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and, but for `supervise="answer_position"`, `completion` (`str`); `id` and `group` are
            kept where there are any.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        max_length (`int`, *optional*):
            Longest sequence, in tokens. `None` sets no bound.
        append_eos (`bool`, *optional*, defaults to `False`):
            Whether to end each row with the end-of-sequence token, which is supervised. Rows without an answer have no
            end: it does nothing with `supervise="answer_position"`.
        supervise (`str`, *optional*, defaults to `"completion"`):
            `"completion"` masks the prompt's labels with -100, `"all"` masks none. The first token of a row is never
            a target either way. `"answer_position"` reads no completion, whether there is one or not: a row is its
            prompt and a filler token (see [`~first_trl.tasks.encode.filler_token_id`]), whose position alone is supervised, for a teacher that
            tells what could stand there. The column `has_gold` says that the label is no answer.
        on_overflow (`str`, *optional*, defaults to `"drop"`):
            What happens to a row longer than `max_length`: `"error"`, `"drop"`, `"truncate_prompt_left"` (cut the
            start of the prompt behind the leading special tokens; a row whose completion alone is too long is
            dropped) or `"truncate_right"` (cut the end; a row with nothing of its completion left is dropped). All
            rows cut or dropped are counted.

    Returns:
        [`TokenizedSplit`]

    Raises:
        `ValueError`: for an empty dataset, a missing column, an empty or missing completion, an unknown choice of
        `supervise` or `on_overflow`, or when no row is left.
    """
    if supervise not in _SUPERVISE:
        raise ValueError(f"`supervise` must be one of {', '.join(_SUPERVISE)}; got {supervise!r}.")
    if on_overflow not in _ON_OVERFLOW:
        raise ValueError(f"`on_overflow` must be one of {', '.join(_ON_OVERFLOW)}; got {on_overflow!r}.")
    if max_length is not None and max_length < 2:
        raise ValueError(f"`max_length` must be at least 2 (one token to read, one to predict), got {max_length}.")
    append_eos = append_eos and supervise != "answer_position"
    if append_eos and processing_class.eos_token_id is None:
        raise ValueError(
            "`append_eos=True` needs a tokenizer with an `eos_token`; set one or pass `append_eos=False`."
        )
    for column in ("prompt",) if supervise == "answer_position" else ("prompt", "completion"):
        if column not in dataset.column_names:
            raise ValueError(f"The dataset has no column {column!r} (it has {', '.join(dataset.column_names)}).")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is no row to tokenize.")

    kept_columns = [column for column in ("id", "group") if column in dataset.column_names]
    ids = List(Value("int32"))
    tokenized = dataset.map(
        versioned(_tokenize_batch, "first_trl.tasks.conversation", "first_trl.tasks.encode"),
        batched=True,
        with_indices=True,
        remove_columns=[column for column in dataset.column_names if column not in kept_columns],
        features=Features(
            {column: dataset.features[column] for column in kept_columns}
            | {"input_ids": ids, "labels": ids, "_fate": Value("int8"), "_retokenized": Value("bool")}
            | ({HAS_GOLD: Value("bool")} if supervise == "answer_position" else {})
        ),
        fn_kwargs={
            "processing_class": processing_class,
            "max_length": max_length,
            "append_eos": append_eos,
            "supervise": supervise,
            "on_overflow": on_overflow,
        },
        desc="Tokenizing rows",
    )
    fates = tokenized["_fate"][:]
    counts = Counter(fates)
    rows = [i for i, fate in enumerate(fates) if fate in (_KEPT, _TRUNCATED)]
    reasons = {reason: counts[fate] for fate, reason in _REASONS.items() if counts[fate]}
    if not rows:
        raise ValueError(
            f"All {len(dataset)} rows were dropped ({reasons}). Raise `max_length` (now {max_length}) or choose an "
            "`on_overflow` that truncates."
        )
    n_retokenized = sum(flag for i, flag in enumerate(tokenized["_retokenized"][:]) if fates[i] in (_KEPT, _TRUNCATED))
    tokenized = tokenized.remove_columns(["_fate", "_retokenized"])
    if len(rows) < len(tokenized):
        tokenized = tokenized.select(rows)
    return TokenizedSplit(tokenized, len(dataset), counts[_TRUNCATED], n_retokenized, reasons)


def _tokenize_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    append_eos: bool,
    supervise: str,
    on_overflow: str,
) -> dict[str, list[Any]]:
    names = batch.get("id") or [f"row {i}" for i in indices]
    prompts = batch["prompt"]
    without_answer = supervise == "answer_position"
    completions = [""] * len(prompts) if without_answer else batch["completion"]
    for name, prompt, completion in zip(names, prompts, completions, strict=True):
        if not isinstance(prompt, str):
            raise ValueError(f"{name}: the prompt is {prompt!r}, not a text.")
        if without_answer and not prompt:
            raise ValueError(f"{name}: the prompt is empty, so nothing tells what could follow it; remove the row.")
        if not without_answer and (not isinstance(completion, str) or not completion):
            raise ValueError(
                f"{name}: the completion is {'empty' if completion == '' else 'missing'}. Rows without an answer "
                "cannot be trained on; use a labelled split or remove them. For a teacher to answer them, tokenize "
                "with `supervise='answer_position'`."
            )
    front = front_tokens(processing_class, [prompts[0] + completions[0]])
    all_completion_ids: list[list[int] | None]
    if without_answer:
        all_prompt_ids = encode_prompts(processing_class, prompts)
        all_completion_ids = [[filler_token_id(processing_class)]] * len(prompts)
    else:
        all_prompt_ids, all_completion_ids = encode_pairs(processing_class, prompts, completions)
    output: dict[str, list[Any]] = {"input_ids": [], "labels": [], "_fate": [], "_retokenized": []}
    for name, completion, prompt_ids, joint_completion_ids in zip(
        names, completions, all_prompt_ids, all_completion_ids, strict=True
    ):
        completion_ids = joint_completion_ids
        if completion_ids is None:
            completion_ids = list(processing_class(completion, add_special_tokens=False)["input_ids"])
        if not completion_ids:
            raise ValueError(f"{name}: the completion {completion!r} has no tokens in this tokenizer; remove the row.")
        if append_eos:
            completion_ids = [*completion_ids, processing_class.eos_token_id]
        fate = _KEPT
        excess = len(prompt_ids) + len(completion_ids) - max_length if max_length is not None else 0
        if excess > 0:
            if on_overflow == "error":
                raise ValueError(
                    f"{name}: {len(prompt_ids) + len(completion_ids)} tokens, `max_length` is {max_length}. Raise it, "
                    "or choose another `on_overflow`."
                )
            n_front = len(front) if prompt_ids[: len(front)] == front else 0
            prompt_ids, completion_ids, fate = _shorten(prompt_ids, completion_ids, excess, n_front, on_overflow)
        labels = prompt_ids if supervise == "all" else [IGNORE_INDEX] * len(prompt_ids)
        output["input_ids"].append([*prompt_ids, *completion_ids])
        output["labels"].append([*labels, *completion_ids])
        output["_fate"].append(fate)
        output["_retokenized"].append(joint_completion_ids is None)
    if without_answer:
        output[HAS_GOLD] = [False] * len(prompts)
    return output


def _shorten(
    prompt_ids: list[int], completion_ids: list[int], excess: int, n_front: int, on_overflow: str
) -> tuple[list[int], list[int], int]:
    if on_overflow == "truncate_prompt_left":
        # A token has to be left to predict the first completion token from.
        if len(prompt_ids) - excess < max(n_front, 1):
            return prompt_ids, completion_ids, _OVERFLOW
        return prompt_ids[:n_front] + prompt_ids[n_front + excess :], completion_ids, _TRUNCATED
    if on_overflow == "truncate_right":
        if excess >= len(completion_ids):
            return prompt_ids, completion_ids, _NOTHING_LEFT
        return prompt_ids, completion_ids[:-excess], _TRUNCATED
    return prompt_ids, completion_ids, _OVERFLOW
