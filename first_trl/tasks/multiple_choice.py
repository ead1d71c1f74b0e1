"""What the lettered multiple-choice benchmarks share: one template, letters by position, and the checks of a row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..utils.tables import as_text, is_nan
from .base import Example, Task, one_form
from .option_orders import has_free_order, option_orders
from .template import check_template


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = "{question}\nAnswer Choices:\n{choices}\nAnswer:"


@dataclass(frozen=True)
class MultipleChoice(Task):
    """
    A question with lettered options.

    The default prompt, with the completion `" B"`:

    ```text
    What do people use to absorb extra ink from a pen?
    Answer Choices:
    (A) shirt pocket
    (B) blotter
    Answer:
    ```

    Letters are given by position, whatever the labels of the source are (`1` to `4` in some ARC rows). Byte-pair
    tokenizers of the GPT-2 kind have `" B"` as one token. Where it is two (some sentencepiece and all
    character-level vocabularies split it into `"▁"` and `"B"`), end the prompt just before the letter:
    `template="{question}\\nAnswer Choices:\\n{choices}\\nAnswer: ("` with `completion="{letter}"`.

    Attributes:
        template (`str`): The prompt; fields `{question}`, `{choices}` (one `(A) text` line each) and `{group}`
            (subject or concept).
        completion (`str`): What is appended for an answer; fields `{letter}` and `{text}`.
        permutations (`int`): Ask every question this many times, with its options in different random orders, so that the
            place of an option tells nothing; at most as often as there are orders. 0 keeps the order of the source. For
            training rows: `splits: {train: {split: train, options: {permutations: 4}}}` in a recipe.
        permutation_seed (`int`): Seed of these orders.
    """

    template: str = TEMPLATE
    completion: str = " {letter}"
    permutations: int = 0
    permutation_seed: int = 0

    n_choices: ClassVar[tuple[int, int]]
    decision_kinds: ClassVar[tuple[str, ...]] = ("choice", "score")

    @property
    def prompt_template(self) -> str:
        return self.template

    def decision_fields(self) -> dict[str, str]:
        return {"question": "question", "choices": "choices", "group": "nothing"}

    def __post_init__(self) -> None:
        check_template("template", self.template, ("question", "choices", "group"), ("question",))
        check_template("completion", self.completion, ("letter", "text"), ())
        if "{" not in self.completion:
            raise ValueError(
                f"`completion` {self.completion!r} is the same for every answer; use {{letter}} or {{text}}."
            )
        for name, least in (("permutations", 0), ("permutation_seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number from {least}, got {value!r}.")

    def fill(self, question: str, texts: list[str], gold: int, group: str = "") -> Example:
        """Writes prompt and completions for a checked question; `gold` is -1 when unknown."""
        question = question.strip()
        texts = [text.strip() for text in texts]
        if not question:
            raise ValueError("the question is empty")
        low, high = self.n_choices
        if not low <= len(texts) <= high:
            wanted = f"{low}" if low == high else f"{low} to {high}"
            raise ValueError(f"{len(texts)} choices, expected {wanted}")
        for letter, text in zip(LETTERS, texts, strict=False):
            if not text:
                raise ValueError(f"choice {letter} is empty")
        lines = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False))
        choices = tuple(
            self.completion.format(letter=letter, text=text) for letter, text in zip(LETTERS, texts, strict=False)
        )
        return Example(
            prompt=self.template.format(question=question, choices=lines, group=group),
            completion=choices[gold] if gold >= 0 else None,
            choices=choices,
            gold=gold,
            group=group,
            question=question,
            key="\x1f".join(map(one_form, [question, *sorted(texts, key=lambda text: (text.casefold(), text))])),
            answer=texts[gold] if gold >= 0 else None,
            options=tuple(texts),
        )

    def reorder(self, row: Mapping[str, Any], order: Sequence[int]) -> Example:
        """A row of this task (`question`, `options`, `gold`, `group`) with its options in another order."""
        gold = int(row.get("gold", -1))
        texts = [row["options"][i] for i in order]
        gold = list(order).index(gold) if gold >= 0 else -1
        # NaN is how pandas keeps an empty cell in a row that is asked
        group = "" if is_nan(row.get("group")) else optional_text(row, "group")
        return self.fill(row["question"], texts, gold, group)

    def forms(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if not self.permutations or not has_free_order(row.get("kind")):
            return [row]
        orders = option_orders(len(row["options"]), self.permutations, seed=self.permutation_seed, key=row["id"])
        forms = []
        for number, order in enumerate(orders):
            example = self.reorder(row, order)
            changed = {name: getattr(example, name) for name in ("prompt", "completion", "choices", "gold", "options")}
            if row.get("target_probs") is not None:
                changed["target_probs"] = tuple(row["target_probs"][i] for i in order)
            forms.append({**row, **changed, "id": row["id"] if number == 0 else f"{row['id']}-order-{number}"})
        return forms


def labelled_choices(choices: Any, answer_key: str | None, *, gold_required: bool = True) -> tuple[list[str], int]:
    """
    Reads labelled choices in the original form (`[{"label", "text"}, ...]`) or the Hub's (`{"label": [...], "text":
    [...]}`).

    Returns:
        `tuple[list[str], int]`: the texts in order, and the index of `answer_key` among the labels (-1 when there is
        no key and none is required).

    Raises:
        `ValueError`: when labels repeat, or the key is missing or not among them.
    """
    if isinstance(choices, Mapping):
        labels, texts = list(required(choices, "label")), list(required(choices, "text"))
        if len(labels) != len(texts):
            raise ValueError(f"{len(labels)} choice labels for {len(texts)} choice texts")
    elif isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        labels = [required(choice, "label") for choice in choices]
        texts = [required(choice, "text") for choice in choices]
    else:
        raise ValueError("`choices` must be a list of {label, text}, or {label: [...], text: [...]}")
    labels = [str(label).strip() for label in labels]
    if len(set(labels)) != len(labels):
        raise ValueError(f"choice labels repeat: {labels}")
    key = str(answer_key or "").strip()
    if key in labels:
        return cell_texts(texts), labels.index(key)
    if key:
        raise ValueError(f"answerKey {key!r} is not among the labels {labels}")
    if gold_required:
        raise ValueError("answerKey is missing, and this split must have one")
    return cell_texts(texts), -1


def required(row: Mapping[str, Any], field: str) -> Any:
    """Value of a field that must be there."""
    if row.get(field) is None:
        raise ValueError(f"field {field!r} is missing (the row has: {', '.join(row)})")
    if is_nan(row[field]):
        raise ValueError(f"field {field!r} is NaN, which pandas writes for an empty cell. Fill it in")
    return row[field]


def required_text(row: Mapping[str, Any], field: str) -> str:
    """Text of a field that must be there."""
    required(row, field)
    return optional_text(row, field)


def optional_text(row: Mapping[str, Any], field: str) -> str:
    """Text of a field that may be absent, then `""`; a NaN is refused, as it is not the word "nan"."""
    if row.get(field) is None:
        return ""
    try:
        return as_text(row[field])
    except ValueError as error:
        raise ValueError(f"field {field!r} {error}") from None


def cell_texts(choices: Iterable[Any]) -> list[str]:
    """Texts of the choices of a row; one that is missing is refused, as it is not the word "None"."""
    texts = []
    for i, choice in enumerate(choices):
        name = LETTERS[i] if i < len(LETTERS) else f"number {i + 1}"
        if choice is None:
            raise ValueError(f"choice {name} is empty")
        try:
            texts.append(as_text(choice))
        except ValueError as error:
            raise ValueError(f"choice {name} {error}") from None
    return texts
