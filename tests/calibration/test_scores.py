"""Scores beside the calibration error, against scikit-learn."""

import numpy as np
import pytest

from first_trl.calibration import calibration_report


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")
metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")


def test_binary_scores() -> None:
    rng = np.random.default_rng(0)
    confidence = np.round(rng.beta(2, 2, 500), 2)  # many ties
    correct = (rng.random(500) < confidence).astype(int)
    report = calibration_report(confidence, correct)
    assert report["auroc"] == pytest.approx(metrics.roc_auc_score(correct, confidence), abs=1e-12)
    assert report["brier"] == pytest.approx(metrics.brier_score_loss(correct, confidence), abs=1e-12)
    assert report["nll"] is None
    assert report["signed_gap"] == pytest.approx(confidence.mean() - correct.mean(), abs=1e-12)


def test_multiclass_scores() -> None:
    rng = np.random.default_rng(1)
    rows, labels = rng.dirichlet([1, 1, 1, 1], 400), rng.integers(0, 4, 400)
    weight = rng.random(400)
    for given in (None, weight):
        report = calibration_report(rows, labels, sample_weight=given)
        assert report["nll"] == pytest.approx(metrics.log_loss(labels, rows, sample_weight=given), abs=1e-12)
        squares = ((rows - np.eye(4)[labels]) ** 2).sum(1)
        assert report["brier"] == pytest.approx(np.average(squares, weights=given), abs=1e-12)
        accuracy = metrics.accuracy_score(labels, rows.argmax(1), sample_weight=given)
        assert report["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    correct = rows.argmax(1) == labels
    assert report["auroc"] == pytest.approx(metrics.roc_auc_score(correct, rows.max(1)), abs=1e-12)


def test_nll_survives_underflow() -> None:
    report = calibration_report([[0.0, -2000.0], [0.0, -1.0]], [1, 0], input="logits")
    assert report["nll"] == pytest.approx((2000 + np.log1p(np.exp(-1))) / 2, rel=1e-12)


def test_auroc_is_none_without_both_outcomes() -> None:
    assert calibration_report([0.4, 0.6], [1, 1])["auroc"] is None
    assert calibration_report([0.4, 0.6], [0, 0])["auroc"] is None
    assert calibration_report([0.4, 0.6], [0, 1])["auroc"] == 1.0
    assert calibration_report([0.4, 0.6], [1, 0])["auroc"] == 0.0
    assert calibration_report([0.5, 0.5], [1, 0])["auroc"] == 0.5


def test_selective_risk_by_hand() -> None:
    # Most confident first: right, wrong, right, wrong. Risks 0, 1/2, 1/3, 1/2.
    report = calibration_report([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0])
    assert report["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4, abs=1e-12)
    assert report["selective_risk"]["coverage"] == [0.5, 0.75, 1.0, 1.0, 1.0]
    assert report["selective_risk"]["risk"] == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 2, 1 / 2])
    assert report["selective_risk"]["threshold"] == [0.8, 0.7, 0.6, 0.6, 0.6]
    # -0.0 sorts with 0.0.
    assert calibration_report([-0.0, 0.0, 0.5], [1, 0, 1])["auroc"] == pytest.approx(0.75)
