"""Names, scales and directions of the columns that all reports share."""

from typing import Any, NamedTuple


class Metric(NamedTuple):
    """One column: its key in a report, its heading, and how its values are printed."""

    key: str
    title: str
    scale: int
    digits: int


METRICS = (
    Metric("accuracy", "Accuracy %", 100, 1),
    Metric("ece", "ECE %", 100, 1),
    Metric("trust", "Trust %", 100, 1),
    Metric("nll", "NLL", 1, 3),
    Metric("brier", "Brier", 1, 3),
)
HIGHER_IS_BETTER = frozenset({"accuracy", "trust"})
READINGS = ("full_vocab", "options")
METHOD_SYMBOLS = {
    "probability_temperature": "c",
    "logit_temperature": "T",
    "label_smoothing": "δ",
    "log_label_smoothing": "δ",
}
# The row of tasks whose true answer distribution is known: no student can be it, so it never wins
BAYES = "bayes"
BAYES_LABEL = "True posterior (best possible)"


def role_title(role: str, index: int) -> str:
    """Heading of an evaluation role; the first one is in-domain."""
    if role == "validation":
        return "`validation` (what temperatures and epochs were chosen on: for choices, not for claims)"
    return f"`{role}` ({'in-domain' if index == 0 else 'out-of-domain or shifted'})"


def number(value: float, metric: Metric, *, sign: bool = False) -> str:
    """A score as it is printed, with a true minus sign and without a negative zero."""
    text = f"{metric.scale * value:{'+' if sign else ''}.{metric.digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def score_meaning(sample: dict[str, Any], n_bins: int) -> str:
    """What the columns stand for, given one report of the role."""
    if sample.get("unit") == "token":
        text = "Accuracy: the most likely token is the reference's, over every token of the reference answers. "
    else:
        text = "Accuracy: the most likely token of the whole vocabulary is the gold answer's. "
    text += (
        f"Confidence: its probability. ECE: {n_bins} bins of equal width. Trust = accuracy − ECE. NLL (nats) and "
        "Brier score over the whole vocabulary."
    )
    if sample.get("chance_accuracy"):
        text += f" Picking an option at random is right {100 * sample['chance_accuracy']:.1f} % of the time."
    return text
