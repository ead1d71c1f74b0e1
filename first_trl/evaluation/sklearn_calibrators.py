"""Calibrators of scikit-learn for the log-probabilities of a language model."""

from typing import Any

import numpy as np

from ..calibration.arrays import as_numbers, same_order
from ..utils.extras import optional


optional("sklearn", extra="tasks", what="A scikit-learn calibrator")

# ruff: noqa: E402
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_array


class LogprobClassifier(ClassifierMixin, BaseEstimator):
    """
    A fitted scikit-learn classifier whose input are the model's logits or log-probabilities themselves.

    Wrapped in [`~sklearn.frozen.FrozenEstimator`] it can be given to [`~sklearn.calibration.CalibratedClassifierCV`]. Its
    decision values are normalised log-probabilities: one-versus-rest methods look at one class at a time, and a raw logit
    means nothing without the others (they then leave a model worse calibrated than it was).

    Args:
        n_classes (`int`):
            Columns of the input.
    """

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes

    @property
    def classes_(self) -> np.ndarray:
        """Class ids 0 .. C-1."""
        return np.arange(self.n_classes)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: Any, y: Any = None) -> "LogprobClassifier":
        """Nothing to fit: the model was trained elsewhere."""
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-probabilities `[N, C]`, or the log-odds of class 1 `[N]` where there are two classes."""
        z = check_array(X, dtype=np.float64)
        if z.shape[1] != self.n_classes:
            raise ValueError(f"Expected {self.n_classes} columns, got {z.shape[1]}.")
        lp = z - np.logaddexp.reduce(z, axis=1)[:, None]
        return lp[:, 1] - lp[:, 0] if self.n_classes == 2 else lp

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[N, C]` as the model gives them."""
        z = check_array(X, dtype=np.float64)
        return np.exp(z - np.logaddexp.reduce(z, axis=1)[:, None])

    def predict(self, X: Any) -> np.ndarray:
        """Most likely class of each row, the first of equal ones."""
        return check_array(X, dtype=np.float64).argmax(axis=1)


def fit_sklearn_calibrator(logits: Any, labels: Any, *, method: str = "isotonic") -> CalibratedClassifierCV:
    """
    Fit a calibrator of scikit-learn on the probabilities of a few classes, for example the options of a question.

    These methods fit each class against the rest, so they can change the ranking, need examples of every class, and make no
    sense over a whole vocabulary: see [`fit_confidence_calibrator`] there, or [`~first_trl.calibration.temperature.fit_temperature`].

    Args:
        logits (`array-like` of shape `[N, C]`):
            Logits or log-probabilities, finite.
        labels (`array-like` of shape `[N]`):
            Class ids; each of the C classes has to occur.
        method (`str`, *optional*, defaults to `"isotonic"`):
            `"isotonic"`, `"sigmoid"` (Platt), or `"temperature"` (scikit-learn 1.8 and later).

    Returns:
        [`~sklearn.calibration.CalibratedClassifierCV`]: `predict_proba(logits)` gives calibrated probabilities.

    Raises:
        `ValueError`: for shapes that do not fit, or a class without an example.
    """
    z, y = as_numbers(logits, "`logits`")[0].astype(np.float64), as_numbers(labels, "`labels`")[0]
    same_order(logits, labels, "`logits` and `labels`")
    if z.ndim != 2 or z.shape[1] < 2 or y.shape != z.shape[:1]:
        raise ValueError(f"`logits` [N, C >= 2] and `labels` [N] are needed, got the shapes {z.shape} and {y.shape}.")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"`labels` must be integer class ids, got {y.dtype}.")
    missing = sorted(set(range(z.shape[1])) - set(y.tolist()))
    extra = sorted(set(y.tolist()) - set(range(z.shape[1])))
    if missing or extra:
        raise ValueError(
            f"Classes without an example: {missing}, labels outside the {z.shape[1]} columns: {extra}. Give more examples or "
            "fewer columns."
        )
    calibrator = CalibratedClassifierCV(FrozenEstimator(LogprobClassifier(z.shape[1])), method=method)
    return calibrator.fit(z, y)


class ConfidenceCalibrator:
    """A fitted map from confidence to probability of being right; see [`fit_confidence_calibrator`]."""

    def __init__(self, method: str, model: Any) -> None:
        self.method, self.model = method, model

    def __call__(self, confidence: Any) -> np.ndarray:
        """
        Args:
            confidence (`array-like` of shape `[N]`):
                In [0, 1].

        Returns:
            `np.ndarray` of shape `[N]`.
        """
        c = _confidence(confidence)
        if self.method == "isotonic":
            return self.model.predict(c)
        return self.model.predict_proba(_log_odds(c))[:, 1]


def fit_confidence_calibrator(confidence: Any, correct: Any, *, method: str = "isotonic") -> ConfidenceCalibrator:
    """
    Fit a map from the confidence of an answer to the probability that it is right.

    The answers stay as they are, whatever produced the confidence: a vocabulary of any size, a generated text, an API.

    Args:
        confidence (`array-like` of shape `[N]`):
            In [0, 1].
        correct (`array-like` of shape `[N]`):
            0 / 1.
        method (`str`, *optional*, defaults to `"isotonic"`):
            `"isotonic"` (any rising map) or `"sigmoid"` (logistic in the log-odds of the confidence: two parameters).

    Raises:
        `ValueError`: for confidences outside [0, 1], outcomes other than 0 and 1, or only one kind of outcome.
    """
    if method not in ("isotonic", "sigmoid"):
        raise ValueError(f"`method` must be 'isotonic' or 'sigmoid', got {method!r}.")
    c, y = _confidence(confidence), as_numbers(correct, "`correct`")[0]
    same_order(confidence, correct, "`confidence` and `correct`")
    if y.shape != c.shape or not np.isin(y, (0, 1)).all():
        raise ValueError(f"`correct` must be 0 or 1 for each of the {len(c)} confidences.")
    if len(np.unique(y)) < 2:
        raise ValueError("All answers are right, or all are wrong: there is nothing to calibrate against.")
    if method == "isotonic":
        return ConfidenceCalibrator(method, IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(c, y))
    return ConfidenceCalibrator(method, LogisticRegression(C=np.inf).fit(_log_odds(c), y))


def _confidence(confidence: Any) -> np.ndarray:
    c = as_numbers(confidence, "`confidence`")[0].astype(np.float64)
    if c.ndim != 1 or c.size == 0:
        raise ValueError(f"`confidence` must be a non-empty list of numbers, got the shape {c.shape}.")
    bad = np.flatnonzero(~((c >= 0.0) & (c <= 1.0)))
    if bad.size:
        raise ValueError(f"Confidence {bad[0]} is {c[bad[0]]}, outside [0, 1].")
    return c


def _log_odds(c: np.ndarray) -> np.ndarray:
    # A confidence of exactly 0 or 1 has infinite log-odds; double precision ends at about 36.
    inside = np.clip(c, 1e-15, 1.0 - 1e-15)
    return (np.log(inside) - np.log1p(-inside))[:, None]
