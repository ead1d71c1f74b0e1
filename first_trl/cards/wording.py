"""Sentences that the cards of students share, whoever writes them: a trainer or a finished run."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..cache.manifest import Manifest
from ..plugins import method_symbol


# What decides the result. Everything else a training is given concerns its machine, and part of that is private.
_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "global_batch_size",
    "per_device_train_batch_size", "gradient_accumulation_steps", "average_tokens_across_devices", "max_length",
    "truncation_mode", "packing", "packing_strategy", "padding_free", "group_by_length", "bf16", "fp16", "tf32",
    "label_smoothing_factor", "neftune_noise_alpha",
)  # fmt: skip
PROCESSES = "number of processes"
_LAST = ("seed", "data_seed", "full_determinism", PROCESSES)
_ESTIMATORS = {
    "topk": "the kept probabilities, scaled to sum to one, against the student's whole vocabulary",
    "bucket": "the kept probabilities and one bucket for all other tokens",
    "renormalized": "ratios among the kept tokens only",
    "sampled": "draws from the teacher, against the student's whole vocabulary",
    "probability_softmax": "a softmax over the student's probabilities at the kept tokens, as in the authors' code; "
    "for replication, since nothing is recalibrated at equal temperatures",
}


def shown_arguments(arguments: Mapping[str, Any], own: Iterable[str] = ()) -> dict[str, Any]:
    """
    The training arguments that a card tells, in a fixed order: never a token, an address or a path. `own` are options
    of a trainer that decide the result too.
    """
    values = {name: arguments[name] for name in (*_ARGUMENTS, *own, *_LAST) if arguments.get(name) is not None}
    return {name: getattr(value, "value", value) for name, value in values.items()}


def recalibration_text(method: str, value: float | None, how: str) -> str:
    """`method` with its value and where the value comes from."""
    if method == "none" or value is None:
        return "none: the teacher's probabilities as they are"
    return f"`{method}`, {method_symbol(method)} = {value:.4g}; {how}"


def estimator_text(name: str) -> str:
    """An estimator, and what it compares."""
    return f"`{name}`: {_ESTIMATORS[name]}" if name in _ESTIMATORS else f"`{name}`"


def cache_text(manifests: list[Manifest]) -> str | None:
    """What a student learned from, over all caches it was given; `None` without a manifest."""
    if not manifests:
        return None
    rows, positions = (sum(m.counts[name] for m in manifests) for name in ("rows", "positions"))
    without = sum(m.counts.get("rows_without_gold", 0) for m in manifests)
    ids = ", ".join(dict.fromkeys(f"`{manifest.id}`" for manifest in manifests))
    kept = sum(m.kept_mass[-1] * m.counts["positions"] for m in manifests) / max(1, positions)
    return (
        f"manifest {ids}: the {manifests[0].k} most likely tokens at {positions:,} positions of {rows:,} rows"
        + (f" ({without:,} without an answer)" if without else "")
        + f", {100 * kept:.1f} % of the teacher's mass"
    )


def shared_cache_text(repo_id: str, commit: str | None, text: str | None) -> str:
    """A cache with its place on the Hub."""
    link = f"[{repo_id}](https://huggingface.co/datasets/{repo_id})" + (f" at commit `{commit}`" if commit else "")
    return f"{link}; {text}" if text else link


def legend(units: set[str], n_bins: int, *, in_metadata: bool = True) -> str:
    """What the columns and brackets of the tables mean, for what was scored: rows, tokens of free text, or both."""
    both = len(units) > 1
    by_ends = "accuracy: Wilson; ECE: inverted bootstrap; trust: from the worst ends of these two to the best"
    over_rows = f"95 % intervals over the rows ({by_ends}; NLL and Brier: normal)"
    parts = []
    if "row" in units:
        parts += [
            ("Rows. " if both else "")
            + f"In brackets: {over_rows}. Accuracy: the most likely of all tokens is the right "
            "answer's."
        ]
    if "answer" in units:
        parts += [
            ("Answers. " if both else "")
            + f"In brackets: {over_rows}. Accuracy: the choice whose whole text the model "
            "prefers is the right one. Confidence: the probability of that text; the Brier score is summed over the choices "
            "and everything else."
        ]
    if "token" in units:
        parts += [
            ("Free text. " if both else "")
            + "In brackets: 95 % intervals over whole texts, whose tokens hang together "
            f"({by_ends}; NLL and Brier: Student's t). Accuracy: the most likely of all tokens is the reference's, over every "
            "token of the reference given the ones before it."
        ]
    tokens = units != {"answer"}
    parts += [
        f"The intervals say nothing of other seeds.{' Confidence: the probability of the most likely token.' if tokens else ''} "
        f"ECE: {n_bins} bins of equal width. Trust = accuracy − ECE. NLL in nats"
        f"{', Brier score summed over the vocabulary' if tokens else ''}."
    ]
    return " ".join([*parts, "The same figures are in the metadata, as fractions."] if in_metadata else parts)


def limits(units: set[str], distilled: bool) -> list[str]:
    """What the student is for and what nobody has measured; `units` is empty without an evaluation."""
    if units == {"token"}:
        use = (
            "Meant for text in the form of its training data. Its confidence is that in the next token, and was measured "
            "on the tokens of reference texts, each given the ones before it."
        )
        unmeasured = "How sure to be of a whole answer, or of text that it goes on from itself, was not measured."
    else:
        use = (
            "Meant for short answers in the form of its training data, where a confidence decides what happens next: "
            "answer, abstain, ask a person. The confidence is the probability of the answer's "
            + ("whole text." if units == {"answer"} else "first token.")
        )
        unmeasured = "Confidence in free text, over several tokens, was not measured."
        if units == {"row", "token"}:
            unmeasured = (
                "In free text the confidence in single tokens was measured, each given the reference before it; that in "
                "a whole answer was not."
            )
    if distilled:
        unmeasured += " What the teacher does not know, or believes wrongly, the student has no other source for."
    once = "" if units else ", once there is one"
    return [
        use,
        f"Calibration holds on data like that of the evaluation{once}. On other topics, prompts or languages it has to be "
        "measured again; models tend to be over-confident on what they have not seen.",
        "Calibration is a property of averages. A single answer at 90 % may be wrong, and groups within the data may be "
        "calibrated worse than the whole.",
        unmeasured,
        "Quantising, merging or fine-tuning it further changes its probabilities: measure again afterwards.",
    ]
