"""Adapters to the calibrators of scikit-learn."""

import numpy as np
import pytest
import sklearn
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from first_trl import expected_calibration_error
from first_trl.calibration.temperature import fit_temperature
from first_trl.evaluation.sklearn_calibrators import (
    LogprobClassifier,
    fit_confidence_calibrator,
    fit_sklearn_calibrator,
)


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")


def simulate(n, classes=4, temperature=2.0, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, classes)) * 1.5
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return z * temperature, (p.cumsum(1) > rng.random((n, 1))).argmax(1)


def ece(probabilities, labels):
    return expected_calibration_error(probabilities, labels, n_bins=15)


@pytest.mark.parametrize("method", ["isotonic", "sigmoid"])
@pytest.mark.parametrize("classes", [2, 4])
def test_calibrates_held_out_rows(method, classes):
    z, y = simulate(6000, classes)
    z_test, y_test = simulate(6000, classes, seed=1)
    calibrator = fit_sklearn_calibrator(z, y, method=method)
    before = LogprobClassifier(classes).predict_proba(z_test)
    after = calibrator.predict_proba(z_test)
    np.testing.assert_allclose(after.sum(1), 1.0)
    assert ece(before, y_test) > 0.08
    assert ece(after, y_test) < 0.4 * ece(before, y_test)


def test_shifted_logits_give_the_same_calibrator():
    z, y = simulate(3000)
    shift = np.random.default_rng(2).normal(size=(3000, 1)) * 10
    one = fit_sklearn_calibrator(z, y, method="sigmoid").predict_proba(z)
    two = fit_sklearn_calibrator(z + shift, y, method="sigmoid").predict_proba(z + shift)
    np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.skipif(
    tuple(int(v) for v in sklearn.__version__.split(".")[:2]) < (1, 8),
    reason="scikit-learn has no temperature scaling",
)
def test_our_temperature_is_that_of_scikit_learn():
    z, y = simulate(4000)
    theirs = CalibratedClassifierCV(FrozenEstimator(LogprobClassifier(4)), method="temperature").fit(z, y)
    beta = theirs.calibrated_classifiers_[0].calibrators[0].beta_
    assert fit_temperature(z, y).temperature == pytest.approx(1.0 / beta, rel=1e-3)


@pytest.mark.parametrize("method", ["isotonic", "sigmoid"])
def test_confidence_calibrator(method):
    rng = np.random.default_rng(0)
    confidence = rng.beta(4, 1, size=8000)
    correct = rng.random(8000) < confidence**2
    fitted = fit_confidence_calibrator(confidence[:4000], correct[:4000], method=method)
    held_out, outcome = confidence[4000:], correct[4000:].astype(int)
    assert ece(held_out, outcome) > 0.1
    assert ece(fitted(held_out), outcome) < 0.04
    assert (np.diff(fitted(np.linspace(0, 1, 50))) >= 0).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: fit_sklearn_calibrator(np.zeros((4, 3)), [0, 1, 0, 1]), r"Classes without an example: \[2\]"),
        (lambda: fit_sklearn_calibrator(np.zeros((2, 2)), [0, 2]), r"outside the 2 columns: \[2\]"),
        (lambda: fit_sklearn_calibrator(np.zeros((2, 2)), [0.0, 1.0]), "integer class ids"),
        (lambda: fit_sklearn_calibrator(np.zeros(4), [0, 1, 0, 1]), "shapes"),
        (lambda: LogprobClassifier(3).decision_function(np.zeros((2, 2))), "Expected 3 columns"),
        (lambda: fit_confidence_calibrator([0.5, 1.5], [0, 1]), "Confidence 1 is 1.5"),
        (lambda: fit_confidence_calibrator([0.5, np.nan], [0, 1]), "Confidence 1 is nan"),
        (lambda: fit_confidence_calibrator([0.5, 0.5], [0, 2]), "must be 0 or 1"),
        (lambda: fit_confidence_calibrator([0.5, 0.5], [1, 1]), "nothing to calibrate against"),
        (lambda: fit_confidence_calibrator([0.5, 0.6], [1, 0], method="beta"), "`method`"),
        (lambda: fit_confidence_calibrator([], []), "non-empty"),
        (lambda: fit_confidence_calibrator(np.ma.masked_array([0.5, 0.6], [0, 1]), [1, 0]), "row 1 is masked"),
        (lambda: fit_sklearn_calibrator(np.ma.masked_array(np.eye(2), np.eye(2)), [0, 1]), "row 0 is masked"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
