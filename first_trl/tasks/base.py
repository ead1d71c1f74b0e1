"""What a task is: rows of a benchmark as prompt, completion, choices and gold, and the registry that finds it by name."""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from datasets import Dataset, Features, List, ReadInstruction, Value
from transformers import PreTrainedTokenizerBase

from ..plugins import TASKS
from ..utils.names import nearest
from ..utils.tables import is_nan, listed
from ..vocabulary import TARGET_PROBS
from .sizes import SplitSize
from .source import read_rows


FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        "completion": Value("string"),
        "choices": List(Value("string")),
        "gold": Value("int64"),
        "group": Value("string"),
        "question": Value("string"),
    }
)


def one_form(text: str) -> str:
    """The same text however its white space and its accents are encoded."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass(frozen=True)
class Example:
    """
    One row of a task, before it gets its `id`.

    Attributes:
        prompt (`str`): Text the model reads.
        completion (`str` or `None`): Gold answer exactly as it is appended to `prompt`. `None` when the row has no
            gold answer (`gold == -1` and there are choices).
        choices (`tuple[str, ...]`): Answers as they are appended to `prompt`; empty for free text.
        gold (`int`): Index of the right answer in `choices`, -1 when there is none.
        group (`str`): Key of rows that belong together (a concept, a subject), `""` when the benchmark has none.
        posterior (`tuple[float, ...]` or `None`): True probability of every choice, where it is known.
        question (`str`): The text that tells this question from others, without options and template. `""` takes the
            prompt.
        key (`str`): What two copies of the same question share, whatever the order of its choices. `""` takes the prompt.
        answer (`str` or `None`): What two copies that contradict each other differ in. `None` takes the completion.
        options (`tuple[str, ...]` or `None`): Texts of the choices without their letters, where they can be put in another
            order.
        target_probs (`tuple[float, ...]` or `None`): Soft labels, one probability per choice.
        kind (`str` or `None`): Type of a System One question.
    """

    prompt: str
    completion: str | None
    choices: tuple[str, ...] = ()
    gold: int = -1
    group: str = ""
    posterior: tuple[float, ...] | None = None
    question: str = ""
    key: str = ""
    answer: str | None = None
    options: tuple[str, ...] | None = None
    target_probs: tuple[float, ...] | None = None
    kind: str | None = None


@dataclass(frozen=True)
class TaskSplit:
    """
    The rows of one split, and what became of the rows that were read.

    `n_read + n_added == len(dataset) + n_dropped + n_not_selected` always holds.

    Attributes:
        dataset ([`~datasets.Dataset`]): Columns `id` (`str`), `prompt` (`str`), `completion` (`str`, null where a row
            is unlabelled), `choices` (`list[str]`), `gold` (`int64`, -1 = none), `group` (`str`), `question` (`str`,
            what tells the question from others); where the true distribution over the choices is known, `posterior`
            (`list[float64]`); of lettered options `options` (`list[str]`, their texts); where rows bring them, soft labels as
            `target_probs` (`list[float64]`) and types of questions as `kind` (`str`).
        n_read (`int`): Rows of the source, after a slice such as `"train[:90%]"`.
        n_not_selected (`int`): Usable rows left out because of `limit`.
        reasons (`dict[str, int]`): Why rows were dropped, with the count of each reason.
        keys (`dict[str, str]`): For each `id` what copies of the row share; empty where the task has `drop_copies=False`.
        answers (`dict[str, str]`): For each `id` with one right choice which it is.
        n_added (`int`): Rows beyond the first that the task makes of one, such as other orders of its options.
    """

    dataset: Dataset
    n_read: int
    n_not_selected: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    n_added: int = 0

    @property
    def n_dropped(self) -> int:
        """Rows dropped, over all reasons."""
        return sum(self.reasons.values())


class DropRow(Exception):
    """Raised while reading a row that cannot be used and may be left out; its text is the reason that is counted."""


@dataclass(frozen=True)
class Task:
    """
    Base of all tasks. The fields of the subclass are the options that [`get_task`] accepts.

    A subclass either implements [`~Task.example`] for rows that come from the Hub or a file, or overrides
    [`~Task.rows`] when it makes its own.

    Attributes:
        drop_copies (`bool`): Whether a run leaves out what it would train or choose on of questions that it also evaluates
            on, or that have two answers, see [`first_trl.tasks.copies`]. Off where rows are drawn anew, as an equal draw
            is no leak there.
    """

    drop_copies: bool = field(default=True, kw_only=True)

    name: ClassVar[str]
    hub_id: ClassVar[str | None] = None
    # Our split name -> the name on the Hub.
    splits: ClassVar[dict[str, str]] = {}
    # Sizes of the splits on the Hub, by our split name; "config/split" where configurations differ.
    published: ClassVar[dict[str, SplitSize]] = {}
    # Splits of a benchmark that come without answers.
    unlabelled_splits: ClassVar[tuple[str, ...]] = ()
    # A split of the original release may be spread over one file per subject.
    many_files: ClassVar[bool] = False
    # The first row of a CSV file names its columns.
    csv_header: ClassVar[bool] = True
    # The rows are the user's own: there is no default place to read them from.
    needs_path: ClassVar[bool] = False

    @property
    def hub_config(self) -> str | None:
        """Configuration of the Hub dataset, also the sub-folder looked for in a local copy."""
        return None

    def tokenizer(
        self, path: str | None = None, revision: str | None = None, seed: int = 0
    ) -> PreTrainedTokenizerBase | None:
        """
        Tokenizer that belongs to a task; `None` for text that any tokenizer reads. The arguments are those of
        [`~Task.load`], for vocabularies that depend on the training rows.
        """
        return None

    # Types of System One questions that the answers of this task fit
    decision_kinds: ClassVar[tuple[str, ...]] = ("choice",)

    @property
    def prompt_template(self) -> str:
        """`str.format` template of the prompt, for tasks that have one."""
        raise NotImplementedError(f"{type(self).__name__} makes its prompts without a template")

    def decision_fields(self) -> dict[str, str] | None:
        """
        Where the fields of [`prompt_template`] come from in a System One request: `question` (state and instructions),
        `state`, `instructions`, `choices` (lettered criteria) or `nothing`. `None`: the state is the whole prompt.
        """
        return None

    def example(self, row: dict[str, Any], *, split: str) -> Example:
        """Turns one source row into an [`Example`]; raises `ValueError` or [`DropRow`] with the reason alone."""
        raise NotImplementedError(f"{type(self).__name__} reads no source rows")

    def forms(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The forms in which a usable row enters the split: itself, unless the task says otherwise."""
        return [row]

    def hint(self, rows: Sequence[dict[str, Any]]) -> str:
        """What the rows as a whole tell about their mend, when some of them cannot be used; `""` for nothing."""
        return ""

    def rows(
        self, split: str, path: str | None, revision: str | None, seed: int
    ) -> Iterable[tuple[str, dict[str, Any] | Example | None]]:
        """Yields `(where, row)`: `where` names the row in error messages, and an empty row is `None`."""
        return read_rows(
            path or self.hub_id or "",
            split=split,
            hub_split=self.splits[split],
            config=self.hub_config,
            revision=revision,
            many_files=self.many_files,
            csv_header=self.csv_header,
        )

    def split_name(self, split: str) -> str:
        """Name of a split without its slice; `ValueError` when the task has no such split."""
        match = re.fullmatch(r"([^\[\]]+)(\[[^\[\]]*\])?", split)
        name = match.group(1) if match else split
        if name not in self.splits:
            raise ValueError(f"Task {self.name!r} has no split {split!r}.{nearest(name, self.splits)}")
        return name

    def check_path(self, path: str | None) -> None:
        """`ValueError` when the task needs a path and has none."""
        if self.needs_path and path is None:
            raise ValueError(
                f"Task {self.name!r} has no data of its own: give `path`, a file, a folder with one file per split, "
                "or the id of a dataset on the Hub."
            )

    def load(
        self,
        split: str,
        path: str | None = None,
        revision: str | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> TaskSplit:
        """
        Reads one split.

        Args:
            split (`str`):
                Name of the split, with an optional slice in the notation of `datasets`: `"train"`,
                `"train[:90%]"`, `"validation[100:200]"`. The slice counts source rows, before any is dropped.
            path (`str`, *optional*):
                Hub dataset id, or local file or folder in the benchmark's original format, see
                [`first_trl.utils.tables`]. Defaults to the benchmark's own repository on the Hub.
            revision (`str`, *optional*):
                Commit, tag or branch of the Hub dataset.
            limit (`int`, *optional*):
                Keep this many rows, drawn at random without replacement, in source order.
            seed (`int`, *optional*, defaults to `0`):
                Seed of that draw; for a generated task, also of the world that is generated.

        Returns:
            [`TaskSplit`]

        Raises:
            `ValueError`: for an unknown split, a missing file, a malformed row (its place is named), or no rows.
        """
        name = self.split_name(split)
        if limit is not None and limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {limit}.")
        self.check_path(path)
        generated = self.hub_id is None and not self.needs_path
        if revision is not None and generated:
            raise ValueError(f"Task {self.name!r} is generated, so `revision` has no meaning; remove it.")
        if path is not None and generated:
            raise ValueError(f"Task {self.name!r} is generated, so `path` has no meaning; remove it.")
        found: list[tuple[str, dict[str, Any] | Example]] = []
        empty: Counter[int] = Counter()
        for where, row in self.rows(name, path, revision, seed):
            if row is None:
                # Counted with the row in front of it when a slice is taken
                empty[max(len(found) - 1, 0)] += 1
            else:
                found.append((where, row))
        source = list(enumerate(found))
        if name != split:
            source = _slice(source, name, split)
        n_empty = sum(empty[index] for index, _ in source)
        kept: list[dict[str, Any]] = []
        reasons: Counter[str] = Counter({"empty row": n_empty} if n_empty else {})
        seen: dict[str, str] = {}
        errors: list[str] = []
        for index, (where, row) in source:
            try:
                example = row if isinstance(row, Example) else self.example(row, split=name)
                row_id = row.get("id") if isinstance(row, dict) else None
                row_id = f"{self.name}-{name}-{index}" if row_id in (None, "") else str(row_id)
                if isinstance(row, dict) and is_nan(row.get("id")):
                    raise ValueError("the id is NaN. Fill it in, or leave it out")
                if row_id in seen:
                    raise ValueError(
                        f"id {row_id!r} was already used by {seen[row_id]}. Predictions are joined by id, so ids must be "
                        "unique; rename one of them or remove the duplicate row."
                    )
            except DropRow as error:
                reasons[str(error)] += 1
                continue
            except ValueError as error:
                errors.append(f"{where}: {error}")
                continue
            seen[row_id] = where
            values = {field: value for field, value in vars(example).items() if value is not None}
            kept.append(
                {
                    **values,
                    "id": row_id,
                    "question": example.question or example.prompt,
                    "key": example.key or one_form(example.prompt),
                    "answer": one_form(example.answer or example.completion or "") if example.gold >= 0 else None,
                }
            )
        if errors:
            hint = self.hint([row for _, (_, row) in source if isinstance(row, dict)])
            text = listed(errors, len(source))
            raise ValueError(f"{text.rstrip('.')}. {hint}" if hint else text)
        if not kept:
            raise ValueError(
                f"Split {split!r} of task {self.name!r} has no usable rows ({len(source)} read, dropped: "
                f"{dict(reasons)}). Give another split, or a file with rows."
            )
        n_usable = len(kept)
        if limit is not None and limit < n_usable:
            chosen = np.sort(np.random.default_rng(seed).choice(n_usable, size=limit, replace=False))
            kept = [kept[i] for i in chosen]
        n_kept = len(kept)
        kept = [form for row in kept for form in self.forms(row)]
        features = FEATURES
        lists = ("posterior", "float64"), ("options", "string"), (TARGET_PROBS, "float64")
        for column, kind in (*((name, List(Value(kind))) for name, kind in lists), ("kind", Value("string"))):
            if any(column in row for row in kept):
                features = Features({**features, column: kind})
        # `from_list` takes the columns of the first row, and an unlabelled row has no completion.
        columns = {name: [row.get(name) for row in kept] for name in features}
        dataset = Dataset.from_dict(columns, features=features)
        return TaskSplit(
            dataset,
            len(source) + n_empty,
            n_usable - n_kept,
            dict(reasons),
            {row["id"]: row["key"] for row in kept} if self.drop_copies else {},
            {row["id"]: row["answer"] for row in kept if row["answer"] is not None} if self.drop_copies else {},
            len(kept) - n_kept,
        )

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Builds the task, refusing options it does not have."""
        known = [option.name for option in dataclasses.fields(cls)]
        for option in options:
            if option not in known:
                raise ValueError(f"Task {cls.name!r} has no option {option!r}.{nearest(option, known)}")
        return cls(**options)


def get_task(name: str, **options: Any) -> Task:
    """
    Finds a task by name.

    Args:
        name (`str`): One of [`list_tasks`].
        options: Options of that task, for example `template`.

    Raises:
        `ValueError`: when the name or an option is unknown; the message names the nearest known one.

    Example:

    ```python
    >>> from first_trl.tasks import get_task
    >>> split = get_task("noisy_world").load("test", limit=2)
    >>> split.dataset[0]["choices"][:2]
    [' hammer', ' saw']
    ```
    """
    task: Task = TASKS.find(name).from_options(**options)
    return task


def list_tasks() -> list[str]:
    """Names that [`get_task`] knows, sorted."""
    return sorted(TASKS)


def _slice(source: list[Any], name: str, spec: str) -> list[Any]:
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute({name: len(source)})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"Cannot read the slice of split {spec!r} ({len(source)} rows): {error} Write it as in "
            f"'{name}[:90%]' or '{name}[100:200]'."
        ) from None
    return [row for part in parts for row in source[part.from_ : part.to]]
