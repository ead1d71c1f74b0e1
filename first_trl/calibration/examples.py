"""Checked examples: (predictions, references) become confidences, outcomes and, where given, full probability rows."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import EPSILON, FloatArray, as_numbers, first_boolean, same_order, stored_precision, warn_of_probabilities
from .config import CalibrationConfig


# How far a probability may leave [0, 1] before it is an error rather than rounding (it is then clipped).
RANGE_TOLERANCE = 1e-6
# How far a row of probabilities may be from summing to one; wider for formats whose own rounding is larger.
SUM_TOLERANCE = 1e-3
_CHUNK = 1 << 14


class CalibrationWarning(UserWarning):
    """A calibration number that is correct but easily misread."""


@dataclass(frozen=True)
class Examples:
    """
    Args:
        confidence (`numpy.ndarray` of shape `(N,)`):
            Confidence of the answer given (top-label), in [0, 1].
        correct (`numpy.ndarray` of bool, shape `(N,)`):
            Whether that answer is right.
        probabilities (`numpy.ndarray` of shape `(N, C)`, *optional*):
            Full rows, when the predictions were class probabilities.
        labels (`numpy.ndarray` of int64, shape `(N,)`, *optional*):
            Class ids that go with `probabilities`.
        label_logprob (`numpy.ndarray` of float64, shape `(N,)`, *optional*):
            Natural-log probability of the label; exact even where the probability underflows.
        weight (`numpy.ndarray` of float64, shape `(N,)`, *optional*):
            Sample weights.
        edge_dtype (`str`):
            Precision to which bin edges are rounded.
        ties (`int`):
            Rows in which several classes share the top probability (the first one counts as the answer).
        hard (`bool`):
            Whether every prediction is exactly 0 or 1.
    """

    confidence: FloatArray
    correct: npt.NDArray[np.bool_]
    probabilities: FloatArray | None
    labels: npt.NDArray[np.int64] | None
    label_logprob: npt.NDArray[np.float64] | None
    weight: npt.NDArray[np.float64] | None
    edge_dtype: str
    ties: int
    hard: bool

    def __len__(self) -> int:
        return len(self.confidence)


def prepare(predictions: Any, references: Any, config: CalibrationConfig, sample_weight: Any = None) -> Examples:
    """
    Validate the inputs and reduce them to what the estimators need.

    Raises:
        `ValueError`: naming the first bad row and its value.
    """
    pred, source = as_numbers(predictions, "predictions")
    if config.edge_dtype != "auto":
        # A stated precision tells what the storage hides, for example bfloat16 rows that came through Arrow.
        source = max(source, config.edge_dtype, key=EPSILON.__getitem__)
    refs, _ = as_numbers(references, "references")
    same_order(predictions, references, "predictions and references")
    same_order(predictions, sample_weight, "predictions and sample_weight")
    weight = None if sample_weight is None else as_numbers(sample_weight, "sample_weight")[0].astype(np.float64)
    _check_shapes(pred, refs, weight)
    check_references(references, pred.ndim)

    rows: npt.NDArray[np.intp] | None = None
    if config.ignore_index is not None:
        kept = refs != config.ignore_index
        if not kept.all():
            rows = np.flatnonzero(kept)
            if rows.size == 0:
                raise ValueError(f"Every reference equals ignore_index={config.ignore_index}: nothing is left.")
            if pred.ndim == 1 and config.ignore_index in (0, 1):
                raise ValueError(
                    f"ignore_index={config.ignore_index} would leave out every "
                    f"{'correct' if config.ignore_index else 'wrong'} answer: with (N,) confidences a reference is 1 "
                    "where the answer is correct and 0 where it is not."
                )
            pred, refs = pred[rows], refs[rows]
            weight = None if weight is None else weight[rows]
    if weight is not None:
        _check_weights(weight, rows)

    if pred.ndim == 1:
        examples = _binary(pred, refs, weight, source, config, rows)
    else:
        examples = _multiclass(pred, refs, weight, source, config, rows)
    if examples.hard:
        warnings.warn(
            "Every prediction is exactly 0 or 1. Predicted labels were probably passed where probabilities belong "
            "(`evaluate.evaluator` does so); the calibration error of labels is their error rate.",
            CalibrationWarning,
            stacklevel=4,
        )
    return examples


def check_references(references: Any, n_dimensions: int) -> None:
    """
    Refuse correctness flags where class ids belong.

    Args:
        references (array-like of shape `(N,)`):
            As they were passed, before they become numbers.
        n_dimensions (`int`):
            Dimensions of the predictions that go with them.

    Raises:
        `ValueError`: for booleans beside `(N, C)` predictions, naming the first.
    """
    row = first_boolean(references) if n_dimensions == 2 else None
    if row is not None:
        raise ValueError(
            f"references row {row} is a boolean, and booleans are no class ids. With (N, C) class probabilities "
            "a reference is the id of the right class. If these say whether the answer is correct, pass the confidence of "
            "the answer, `probabilities.max(axis=1)`, of shape (N,)."
        )


def _check_shapes(pred: npt.NDArray[Any], refs: npt.NDArray[Any], weight: npt.NDArray[np.float64] | None) -> None:
    if pred.ndim not in (1, 2):
        raise ValueError(
            f"predictions have shape {pred.shape}: pass (N,) confidences or (N, C) class probabilities. Token-level "
            "logits of shape (B, T, V) flatten with `.reshape(-1, V)` and their labels with `.reshape(-1)`."
        )
    if pred.ndim == 2 and pred.shape[1] < 2:
        raise ValueError(
            f"predictions have shape {pred.shape}: rows of class probabilities need at least two classes. "
            "For one confidence per row pass shape (N,)."
        )
    if refs.ndim != 1:
        raise ValueError(
            f"references have shape {refs.shape}, expected (N,): class ids for (N, C) predictions "
            "(`onehot.argmax(-1)`), 0 or 1 for (N,) confidences."
        )
    if len(pred) != len(refs):
        raise ValueError(f"predictions have {len(pred)} rows but references have {len(refs)}.")
    if len(pred) == 0:
        raise ValueError("predictions and references are empty: a calibration error needs at least one example.")
    if weight is not None and weight.shape != refs.shape:
        raise ValueError(f"sample_weight has shape {weight.shape}, expected {refs.shape}.")


def _check_weights(weight: npt.NDArray[np.float64], rows: npt.NDArray[np.intp] | None) -> None:
    bad = ~(np.isfinite(weight) & (weight >= 0))
    if bad.any():
        raise ValueError(f"sample_weight {_at(bad, weight, rows)}: weights must be finite and not negative.")
    if not weight.sum() > 0:
        raise ValueError("sample_weight sums to 0: at least one weight must be positive.")


def _binary(
    pred: npt.NDArray[Any],
    refs: npt.NDArray[Any],
    weight: npt.NDArray[np.float64] | None,
    source: str,
    config: CalibrationConfig,
    rows: npt.NDArray[np.intp] | None,
) -> Examples:
    if config.mode != "top-label":
        raise ValueError(
            f"mode={config.mode!r} needs full rows: pass (N, C) class probabilities, not (N,) confidences."
        )
    if config.temperature != 1.0 and config.input != "logits":
        raise ValueError(
            f"temperature={config.temperature} cannot act on (N,) {config.input}: pass (N,) logits "
            '(input="logits", read as log-odds) or (N, C) rows.'
        )
    if refs.dtype != np.bool_ and not _only_zero_one(refs):
        bad = ~((refs == 0) | (refs == 1))
        raise ValueError(
            f"references {_at(bad, refs, rows)}: with (N,) confidences a reference is 1 where the answer is correct "
            "and 0 where it is not. For class ids pass (N, C) class probabilities."
        )
    values = pred if pred.dtype.kind == "f" else pred.astype(np.float64)
    if config.input == "logits":
        _check_finite(values, rows, what="logits")
        values = _sigmoid(values.astype(np.float64) / config.temperature)
    elif config.input == "logprobs":
        values = np.exp(_check_logprobs(values.astype(np.float64), rows))
    else:
        values = _check_range(values, rows)
    edge_dtype = _edge_dtype(values, source, config)
    return Examples(
        confidence=values,
        correct=refs.astype(np.bool_),
        probabilities=None,
        labels=None,
        label_logprob=None,
        weight=weight,
        edge_dtype=edge_dtype,
        ties=0,
        hard=config.input == "probs" and _only_zero_one(values),
    )


def _multiclass(
    pred: npt.NDArray[Any],
    refs: npt.NDArray[Any],
    weight: npt.NDArray[np.float64] | None,
    source: str,
    config: CalibrationConfig,
    rows: npt.NDArray[np.intp] | None,
) -> Examples:
    n_classes = pred.shape[1]
    labels = _check_labels(refs, n_classes, rows)
    values = pred if pred.dtype.kind == "f" else pred.astype(np.float64)
    label_logprob: npt.NDArray[np.float64] | None = None
    if config.input != "probs":
        if config.input == "logprobs":
            _check_logprob_rows(values, rows, source)
        else:
            _check_logits(values, rows)
        values, label_logprob = _softmax(values.astype(np.float64), labels, config.temperature)
    elif config.temperature != 1.0:
        values = _top_label(values, labels, rows, source)[-1]  # checks the rows as they were given
        with np.errstate(divide="ignore"):
            values, label_logprob = _softmax(np.log(values.astype(np.float64)), labels, config.temperature)
    if label_logprob is not None:
        source = "float64"
    confidence, correct, ties, values = _top_label(values, labels, rows, source)
    return Examples(
        confidence=confidence,
        correct=correct,
        probabilities=values,
        labels=labels,
        label_logprob=label_logprob,
        weight=weight,
        edge_dtype=_edge_dtype(confidence, source, config),
        ties=ties,
        hard=config.input == "probs" and bool((confidence[:256] == 1).all()) and _only_zero_one(values),
    )


def _top_label(
    values: FloatArray, labels: npt.NDArray[np.int64], rows: npt.NDArray[np.intp] | None, source: str
) -> tuple[FloatArray, npt.NDArray[np.bool_], int, FloatArray]:
    """Confidence and correctness of the first largest class; checks range and row sums in the same pass."""
    n, n_classes = values.shape
    confidence = np.empty(n, dtype=values.dtype)
    correct = np.empty(n, dtype=np.bool_)
    ties = 0
    clip = False
    tolerance = max(SUM_TOLERANCE, EPSILON[source])
    step = max(1, 4 * _CHUNK // n_classes)
    for start in range(0, n, step):
        block = values[start : start + step]
        if n_classes <= 32:
            # A column at a time: numpy reduces short rows an element at a time, long columns with vector instructions.
            block = np.ascontiguousarray(block.T)
            axis = 0
        else:
            axis = 1
        low, total = block.min(axis=axis), block.sum(axis=axis, dtype=np.float64)
        high = block.max(axis=axis)
        # NaN fails every comparison, so `not (... <= ...)` catches it too.
        if not (low.min() >= 0 and np.abs(total - 1).max() <= tolerance and high.max() <= 1):
            clip |= _check_rows(values[start : start + step], start, rows, tolerance)
        chosen = labels[start : start + step]
        if axis == 0:
            picked = block[chosen, np.arange(block.shape[1])]
        else:
            picked = block[np.arange(block.shape[0]), chosen]
        right = picked == high
        shared = np.count_nonzero(block == (high if axis == 0 else high[:, None]), axis=axis) > 1
        if shared.any():
            ties += int(np.count_nonzero(shared))
            where = np.flatnonzero(shared)
            first = (block[:, where] if axis == 0 else block[where]).argmax(axis=axis)
            right[where] = first == chosen[where]
        confidence[start : start + step] = high
        correct[start : start + step] = right
    if clip:
        values, confidence = np.clip(values, 0, 1), np.clip(confidence, 0, 1)
    return confidence, correct, ties, values


def _check_rows(block: FloatArray, start: int, rows: npt.NDArray[np.intp] | None, tolerance: float) -> bool:
    """Raise for the first bad row of the block; return whether values within tolerance of [0, 1] need clipping."""
    shift = np.arange(start, start + len(block)) if rows is None else rows[start : start + len(block)]
    bad = ~np.isfinite(block).all(axis=1)
    if bad.any():
        raise ValueError(f"predictions {_at(bad, block, shift)}: not finite.")
    outside = ((block < -RANGE_TOLERANCE) | (block > 1 + RANGE_TOLERANCE)).any(axis=1)
    if outside.any():
        raise ValueError(
            f"predictions {_at(outside, block, shift)}: not within [0, 1]. If these are logits or log-probabilities, "
            'say input="logits" or input="logprobs".'
        )
    total = block.sum(axis=1, dtype=np.float64)
    bad = np.abs(total - 1) > tolerance
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"predictions {_at(bad, block, shift)}: sums to {total[row]:.6g}, not 1 (tolerance {tolerance:.2g}). Was "
            'the softmax left out (input="logits" applies it), or were classes dropped without renormalising?'
        )
    return True


def _check_labels(refs: npt.NDArray[Any], n_classes: int, rows: npt.NDArray[np.intp] | None) -> npt.NDArray[np.int64]:
    if refs.dtype.kind == "f":
        bad = ~np.isfinite(refs)
        bad |= np.where(bad, False, refs != np.floor(np.where(bad, 0, refs)))
        if bad.any():
            raise ValueError(f"references {_at(bad, refs, rows)}: class ids must be integers.")
    if refs.dtype.kind == "u" and refs.size and refs.max() > np.iinfo(np.int64).max:
        raise ValueError(f"references {_at(refs >= n_classes, refs, rows)}: class ids must be below {n_classes}.")
    if refs.size and (refs.min() < 0 or refs.max() >= n_classes):
        bad = (refs < 0) | (refs >= n_classes)
        raise ValueError(
            f"references {_at(bad, refs, rows)}: class ids must lie in 0..{n_classes - 1} for predictions with "
            f"{n_classes} classes. Padding such as -100 is dropped with ignore_index=-100."
        )
    return refs.astype(np.int64, copy=False)


def _check_finite(values: FloatArray, rows: npt.NDArray[np.intp] | None, what: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(f"predictions {_at(bad, values, rows)}: {what} must be finite.")


def _check_range(values: FloatArray, rows: npt.NDArray[np.intp] | None) -> FloatArray:
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1:
        return values
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(f"predictions {_at(bad, values, rows)}: not finite.")
    bad = (values < -RANGE_TOLERANCE) | (values > 1 + RANGE_TOLERANCE)
    if bad.any():
        raise ValueError(
            f"predictions {_at(bad, values, rows)}: a confidence must lie in [0, 1]. If these are logits or "
            'log-probabilities, say input="logits" or input="logprobs"; percentages need dividing by 100.'
        )
    return np.clip(values, 0, 1)


def _check_logprobs(values: npt.NDArray[np.float64], rows: npt.NDArray[np.intp] | None) -> npt.NDArray[np.float64]:
    bad = np.isnan(values) | (values > RANGE_TOLERANCE)
    if bad.any():
        raise ValueError(
            f"predictions {_at(bad, values, rows)}: a natural-log probability is at most 0 and never NaN. "
            'Raw scores want input="logits".'
        )
    return np.minimum(values, 0)


def _check_logprob_rows(values: FloatArray, rows: npt.NDArray[np.intp] | None, source: str) -> None:
    bad = (np.isnan(values) | (values > RANGE_TOLERANCE)).any(axis=1)
    if bad.any():
        raise ValueError(
            f"predictions {_at(bad, values, rows)}: a natural-log probability is at most 0 and never NaN. "
            'Raw scores want input="logits".'
        )
    total = np.exp(values.astype(np.float64)).sum(axis=1)
    # A log-probability l that was rounded to relative precision eps moves its probability by |l| eps.
    tolerance = max(SUM_TOLERANCE, 4 * EPSILON[source])
    bad = np.abs(total - 1) > tolerance
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"predictions {_at(bad, values, rows)}: probabilities sum to {total[row]:.6g}, not 1 (tolerance "
            f'{tolerance:.2g}). input="logits" renormalises scores of a few answers.'
        )


def _check_logits(values: FloatArray, rows: npt.NDArray[np.intp] | None) -> None:
    # -inf is a masked class and carries probability 0; a row needs one finite value.
    bad = (np.isnan(values) | (values == np.inf)).any(axis=1) | (values == -np.inf).all(axis=1)
    if bad.any():
        raise ValueError(
            f"predictions {_at(bad, values, rows)}: logits must not be NaN or +inf, nor a whole row -inf."
        )
    warn_of_probabilities(values, "predictions")


def _softmax(
    logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], temperature: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Probabilities and the log-probability of each label, at `temperature`."""
    # Shift before dividing: a tiny temperature then sends the other classes to -inf instead of overflowing to inf - inf.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    unnormalised = np.exp(scaled)
    total = unnormalised.sum(axis=1, keepdims=True)
    logprob = scaled[np.arange(len(labels)), labels] - np.log(total[:, 0])
    return unnormalised / total, logprob


def _sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def _edge_dtype(confidence: FloatArray, source: str, config: CalibrationConfig) -> str:
    return stored_precision(confidence, source) if config.edge_dtype == "auto" else config.edge_dtype


def _only_zero_one(values: npt.NDArray[Any]) -> bool:
    # A short prefix settles nearly every case without a pass over the data.
    return all(((part == 0) | (part == 1)).all() for part in (values[:256], values))


def _at(bad: Any, values: npt.NDArray[Any], rows: npt.NDArray[np.intp] | None) -> str:
    """`row 3 (nan)`: the first bad row, by its number in what the caller passed."""
    index = int(np.flatnonzero(bad)[0])
    row = index if rows is None else int(rows[index])
    entry = values[index].tolist()
    if isinstance(entry, list) and len(entry) > 8:
        return f"row {row} ([{', '.join(f'{v:.6g}' for v in entry[:8])}, ...])"
    return f"row {row} ({entry})"
