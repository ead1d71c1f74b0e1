"""Names, scales and directions of the columns that all reports share."""

from typing import Any, NamedTuple


# Of a run, in order; `experiments.stages.table` says what each does
STAGES = ("data", "pretrain", "teacher", "capture", "recalibrate", "students", "evaluate", "report", "share")
# Label of a position that is not supervised, as in transformers
IGNORE_INDEX = -100
# Column of tokenised rows, and of a teacher cache: whether the label is an answer, or a filler where there is none
HAS_GOLD = "has_gold"
TEACHER_HAS_GOLD = "teacher_has_gold"
# Soft labels over the choices of a row: probabilities, or how many annotators chose each
TARGET_PROBS = "target_probs"
TARGET_VOTES = "target_votes"
# Log-probability of an entry that only fills up a row of a cache: the lowest number of float16, which no softmax gives
NO_ENTRY = -65504.0
# Row of a report for tasks whose true answer distribution is known
BAYES = "bayes"


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
# Rows that thresholds are fitted on, where a recipe has them
THRESHOLD_ROLE = "threshold"
# Share of wrong answers that reports and cards state a threshold for
REPORTED_MAX_ERROR = 0.05
# A question is new where this share of the training rows is nearer to the others than it
NEW_ABOVE = 0.99
# Bins of a diagram with fewer rows tell nothing
FEW_ROWS = 10
READINGS = ("full_vocab", "options")
# No student can be the true posterior, so it never wins
BAYES_LABEL = "True posterior (best possible)"


def role_domain(role: str, index: int, domain: str | None = None) -> str:
    """
    What a score on an evaluation role is a score of: `in-domain`, `out-of-domain` or `validation`.

    Args:
        role (`str`): Its name.
        index (`int`): Its place among the roles; tells where the data do not.
        domain (`str`, *optional*): What the data of the run say.
    """
    if domain is not None:
        return domain
    return "validation" if role == "validation" else "in-domain" if index == 0 else "out-of-domain"


def role_title(role: str, index: int, domain: str | None = None) -> str:
    """Heading of an evaluation role; arguments as in [`role_domain`]."""
    found = role_domain(role, index, domain)
    if found == "validation":
        return f"`{role}` (what temperatures and epochs were chosen on: for choices, not for claims)"
    return f"`{role}` ({found})"


def number(value: float, metric: Metric, *, sign: bool = False) -> str:
    """A score as it is printed, with a true minus sign and without a negative zero."""
    text = f"{metric.scale * value:{'+' if sign else ''}.{metric.digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def score_meaning(sample: dict[str, Any], n_bins: int) -> str:
    """What the columns stand for, given one report of the role."""
    brier = "the whole vocabulary."
    if sample.get("unit") == "token":
        text = "Accuracy: the most likely token is the reference's, over every token of the reference answers. "
    elif sample.get("scoring") == "choices":
        length = sample.get("length", "none")
        how = {
            "none": "the most likely whole text",
            "unconditional": "the whole text whose log-probability the question raises most",
        }.get(length, f"the whole text with the highest log-probability divided by its {length}")
        text = f"Accuracy: the choice with {how} is the gold one. "
        brier = "the choices and everything else."
    else:
        text = "Accuracy: the most likely token of the whole vocabulary is the gold answer's. "
    text += (
        f"Confidence: its probability. ECE: {n_bins} bins of equal width. Trust = accuracy − ECE. NLL (nats) and "
        f"Brier score over {brier}"
    )
    if sample.get("chance_accuracy"):
        text += f" Picking an option at random is right {100 * sample['chance_accuracy']:.1f} % of the time."
    return text


# Arms of a recipe that put temperatures behind another arm
POST_HOC = ("temperature_scaling", "novelty_scaling", "agreement_scaling")
