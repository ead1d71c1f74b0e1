"""
The options of the trainer that are known without torch: [`FirstDistillConfig`] takes its fields from here, and so does an
arm of a recipe. What an option is, which values it may have and which others it goes with is said here only.
"""

import operator
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Strict

from ..plugins import ESTIMATORS, RECALIBRATIONS, estimator_target
from ..recalibration import Recalibration
from ..utils.names import nearest


T = TypeVar("T")

# What decides the result, in the order of a card; recalibration has a line of its own there
CARD_OPTIONS = (
    "estimator", "top_k", "ce_weight", "student_temperature", "restrict_to_choices", "soft_label_weight",
    "disagreement_weight", "brier_weight", "rps_weight", "token_dropout", "token_dropout_id",
)  # fmt: skip


@dataclass(frozen=True)
class For:
    """Marks an option with the kinds of arm that it means something for; without the mark, `distill` only."""

    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """
    Marks an option that the card of a student tells, where it is set.

    Args:
        title (`str`): What the line begins with.
        text (`str`): A format of `value`, and of `k`, the entries in the cache.
    """

    title: str
    text: str


def estimators() -> tuple[str, ...]:
    """Names for `estimator`."""
    return tuple(ESTIMATORS)


def recalibrations() -> tuple[str, ...]:
    """Names for `recalibration`, with `"none"` first."""
    return tuple(RECALIBRATIONS)


def _documented(cls: type[T]) -> type[T]:
    """The help of every field, as command lines print it, from its entry in the docstring."""
    texts = dict(re.findall(r"^ {8}(\w+) \(.*\):\n((?: {12}.+\n)+)", cls.__doc__ or "", re.MULTILINE))
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name in texts:
            f.metadata = MappingProxyType({"help": " ".join(texts[f.name].split())})
    return cls


@_documented
@dataclass
class DistillOptions:
    r"""
    What a student is distilled on, and what it sees of it.

    Parameters:
        estimator (`str`, *optional*, defaults to `"topk"`):
            How the KL divergence to the teacher is estimated from its cached entries. `"topk"`: target renormalised
            over the k ids, student's full softmax. `"bucket"`: target over the k ids and one entry for all other
            tokens, with the teacher's exact tail mass. `"renormalized"`: teacher and student both renormalised over
            the k ids; constrains ratios only, for students that were fine-tuned before. `"sampled"`: draws from the
            teacher stored at capture; unbiased for the full KL. `"probability_softmax"`: softmax of the student's
            probabilities over `student_temperature`, as in the authors' code; for replication only.
        ce_weight (`float`, *optional*, defaults to `0.0`):
            Weight `w` of the hard-label cross-entropy: the loss is `(1 - w) * KL + w * CE`.
        student_temperature (`float`, *optional*):
            Divides the student's probabilities at the k ids, for `estimator="probability_softmax"` only, where 1 is
            used when not set. Equal to `c` of `recalibration="probability_temperature"`, the optimum is the raw
            teacher up to a constant: nothing is recalibrated.
        top_k (`int`, *optional*):
            Number of cached entries to use, from the most likely. The others move into the tail. When not set, all
            are used.
        recalibration (`str`, *optional*, defaults to `"none"`):
            Rescale of the cached teacher probabilities, never applied to the student. `"probability_temperature"`:
            softmax of probabilities over `c`, as in the paper. `"logit_temperature"`: power `1/T`.
            `"label_smoothing"`: `delta` moved from rank 1 to the others. `"log_label_smoothing"`: the same between
            log-probabilities, as in the authors' code, which is far milder.
        recalibration_value (`float`, *optional*):
            c, T or delta. When not set, the value fitted for this method and stored with the cache is used.
        restrict_to_choices (`bool`, *optional*, defaults to `False`):
            Whether the target is the teacher's distribution over the choices of each question, all other tokens being
            one bucket of probability 0, see [`restrict_to_choices`]. The cache needs `prompt` and `choices`, or `choice_ids`. Soft labels
            (`target_probs`, `target_votes`) are over the choices by themselves.
        brier_weight (`float`, *optional*, defaults to `0.0`):
            Factor of the Brier score among the choices, which is added to the loss. For targets over choices.
        rps_weight (`float`, *optional*, defaults to `0.0`):
            Factor of the ranked probability score among the choices, which is added to the loss. For targets over
            choices that are ordered, lowest first.
        soft_label_weight (`float`, *optional*):
            Where rows hold soft labels beside a cached teacher: share `w` of theirs in the target, the teacher's (after
            its recalibration) has `1 - w`. In a recipe, 1 trains on the soft labels alone, and `recalibration` rescales
            them.
        disagreement_weight (`float`, *optional*, defaults to `0.0`):
            For the cache of a committee of teachers: the divergence at a position is multiplied by `exp(-w I)`, with `w` this
            number and `I` their disagreement there in nats (`teacher_mutual_information`), so that the student learns less where
            they do not know. In training only: `eval_loss` counts all positions alike.
        token_dropout (`float`, *optional*, defaults to `0.0`):
            Probability that a token of the student's input is replaced in training, while the teacher's target stays
            that of the whole text (word dropout). Special tokens, padding and supervised tokens are never replaced.
    """

    estimator: Annotated[str, Strict()] = "topk"
    ce_weight: Annotated[
        float,
        Strict(),
        Ge(0.0),
        Le(1.0),
        Fact("Weight of the labels", "{value:g} (cross-entropy), the rest is the teacher's"),
    ] = 0.0
    top_k: Annotated[int, Strict(), Ge(1), Fact("Entries used", "{value} of the {k} in the cache")] | None = None
    student_temperature: (
        Annotated[
            float,
            Strict(),
            Gt(0.0),
            Lt(float("inf")),
            Fact("Student temperature", "{value:g} divides its probabilities in training"),
        ]
        | None
    ) = None
    recalibration: Annotated[str, Strict()] = "none"
    recalibration_value: Annotated[float, Strict()] | None = None
    restrict_to_choices: Annotated[
        bool, Strict(), Fact("Target", "the distribution over the choices; all other tokens are one bucket")
    ] = False
    brier_weight: Annotated[
        float,
        Strict(),
        Ge(0.0),
        Lt(float("inf")),
        Fact("Brier score", "{value:g} times that among the choices is added"),
    ] = 0.0
    rps_weight: Annotated[
        float,
        Strict(),
        Ge(0.0),
        Lt(float("inf")),
        Fact("Ranked probability score", "{value:g} times that among the choices is added"),
    ] = 0.0
    soft_label_weight: (
        Annotated[
            float,
            Strict(),
            Ge(0.0),
            Le(1.0),
            Fact("Soft labels", "those of the training rows are {value:.0%} of the target, over the choices"),
        ]
        | None
    ) = None
    disagreement_weight: Annotated[
        float,
        Strict(),
        Ge(0.0),
        Lt(float("inf")),
        Fact("Weights", "exp(-{value:g} I), with I the disagreement of the teachers in nats"),
    ] = 0.0
    token_dropout: Annotated[
        float,
        Strict(),
        Ge(0.0),
        Lt(1.0),
        For(("sft", "distill")),
        Fact("Token dropout", "{value:g} of the input tokens, in training only"),
    ] = 0.0

    @property
    def target(self) -> str:
        """
        What the student learns: the teacher over the `vocabulary` or over the `choices`, `soft_labels` alone, or `both` of the
        latter.
        """
        if self.soft_label_weight is not None:
            return "soft_labels" if self.soft_label_weight == 1.0 else "both"
        return "choices" if self.restrict_to_choices else "vocabulary"

    def options(self) -> dict[str, Any]:
        """The options by name, without what a subclass adds."""
        return {f.name: getattr(self, f.name) for f in fields(DistillOptions)}

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is wrong with the options: the name of one, and the rest of a sentence that begins with it."""
        yield from _outside(self)
        for key, known in (("estimator", estimators()), ("recalibration", recalibrations())):
            value = getattr(self, key)
            if value not in known:
                yield (
                    key,
                    f"must be one of {', '.join(known)}, got {value!r}.{nearest(value, known, list_known=False)}",
                )
        if self.recalibration_value is not None and self.recalibration in recalibrations():
            if self.recalibration == "none":
                methods = ", ".join(recalibrations()[1:])
                yield (
                    "recalibration_value",
                    f"has no effect with `recalibration='none'`. Name the method it belongs to, one of {methods}.",
                )
            else:
                try:
                    Recalibration(self.recalibration, self.recalibration_value)
                except ValueError as error:
                    yield "recalibration_value", f"is out of range: {error}"
        # The estimator of a plugin says itself, when it is built, whether it has this option
        without = set(ESTIMATORS.builtin) - {"probability_softmax"}
        if self.student_temperature is not None and self.estimator in without:
            yield (
                "student_temperature",
                f"has no effect with estimator={self.estimator!r}: it belongs to the estimator probability_softmax. "
                "Leave it unset, or choose that estimator.",
            )
        if estimator_target(self.estimator) == "draws" and self.recalibration != "none":
            yield (
                "recalibration",
                f"has no meaning with `estimator={self.estimator!r}`, which trains on draws from the raw teacher, which cannot be "
                "rescaled afterwards. Set `recalibration='none'`, or use `estimator='bucket'`.",
            )
        if estimator_target(self.estimator) == "draws" and self.top_k is not None:
            yield (
                "top_k",
                f"has no meaning with `estimator={self.estimator!r}`: leaving draws out would bias it. Leave it unset.",
            )
        if self.target != "vocabulary" and (self.top_k is not None or estimator_target(self.estimator) == "draws"):
            other = f"`top_k={self.top_k}`" if self.top_k is not None else f"`estimator={self.estimator!r}`"
            yield (
                "restrict_to_choices" if self.soft_label_weight is None else "soft_label_weight",
                f"has no meaning with {other}: its target is all the choices. Leave one of the two out.",
            )


@_documented
@dataclass
class TrainerOptions(DistillOptions):
    r"""
    The options of [`FirstDistillConfig`]: those of [`DistillOptions`], and two that a recipe does not have.

    Parameters:
        loss_chunk_size (`int`, *optional*):
            Supervised tokens per chunk of the fused loss. When not set, chosen from the vocabulary size.
        token_dropout_id (`int`, *optional*):
            Token put in place of dropped ones. When not set, the first that the tokenizer has of unknown, mask,
            padding and end-of-sequence token.
    """

    loss_chunk_size: Annotated[int, Ge(1)] | None = None
    token_dropout_id: int | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """As in [`DistillOptions`]."""
        yield from super().problems()
        if self.token_dropout_id is not None and self.token_dropout == 0.0:
            yield "token_dropout_id", "has no effect with `token_dropout=0`. Set the rate, or leave the id unset."
        elif self.token_dropout_id is not None and self.token_dropout_id < 0:
            yield "token_dropout_id", f"must be an id of the vocabulary, got {self.token_dropout_id}."


def check_options(options: DistillOptions) -> None:
    """Raises `ValueError` with all that is wrong with the options."""
    found = [f"`{key}` {text}" for key, text in options.problems()]
    if found:
        raise ValueError(" ".join(found))


@cache
def marks(cls: type) -> dict[str, list[Any]]:
    """Field name -> what its type is annotated with, of a dataclass."""
    return {name: marks_of(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}


def marks_of(hint: Any) -> list[Any]:
    """What a type is annotated with, `None` or not."""
    found = []
    if typing.get_origin(hint) is Annotated:
        found = list(hint.__metadata__)
        hint = hint.__origin__
    # Of a list or a mapping, the marks are about its items
    if typing.get_origin(hint) not in (list, dict):
        found += [mark for part in typing.get_args(hint) for mark in marks_of(part)]
    return found


def limits_text(found: list[Any]) -> str:
    """`at least 1`, `in [0, 1)`, ... from the marks of a field."""
    limits = _limits(found)
    low = limits.get("ge", limits.get("gt"))
    high = limits.get("le", limits.get("lt"))
    if high is None:
        return f"at least {low:g}" if "ge" in limits else f"above {low:g}"
    if low is None:
        return f"at most {high:g}" if "le" in limits else f"below {high:g}"
    if high == float("inf"):
        return f"finite and {'at least' if 'ge' in limits else 'above'} {low:g}"
    return f"in {'[' if 'ge' in limits else '('}{low:g}, {high:g}{']' if 'le' in limits else ')'}"


def _limits(found: list[Any]) -> dict[str, Any]:
    return {name: getattr(mark, name) for mark in found for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)}


def inside(value: Any, found: list[Any]) -> bool:
    """Whether a number is within the limits among these marks; NaN is within none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    compare = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    return all(compare[name](value, limit) for name, limit in _limits(found).items())


def _outside(options: DistillOptions) -> Iterator[tuple[str, str]]:
    cls = TrainerOptions if isinstance(options, TrainerOptions) else DistillOptions
    for key, found in marks(cls).items():
        value = getattr(options, key)
        if value is not None and _limits(found) and not inside(value, found):
            yield key, f"must be {limits_text(found)}, got {value!r}."
