"""Intervals and the test against a calibrated model: do they hold their level?"""

from collections.abc import Callable

import numpy as np
import pytest

from first_trl.calibration import calibration_report
from first_trl.calibration.intervals import clustered_intervals, normal_interval, paired_difference, wilson_interval
from tests.benchmarks.cluster_coverage import LAWS as CLUSTER_LAWS
from tests.benchmarks.cluster_coverage import coverage as cluster_coverage
from tests.benchmarks.interval_coverage import LAWS, coverage


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


# Probability of being right at a given confidence.
SCENARIOS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "temperature 2": lambda c: sigmoid(logit(c) / 2),
    "slightly over-confident": lambda c: np.clip(c - 0.05, 0, 1),
    "over and under": lambda c: np.clip(c + 0.15 * np.sin(6 * c), 0, 1),
}


def draw(rng: np.random.Generator, n: int, curve: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    confidence = rng.beta(5, 1.5, n)
    return confidence, rng.random(n) < curve(confidence)


def true_error(curve: Callable[[np.ndarray], np.ndarray]) -> float:
    """Binned error of the population: 10 equal-width bins, two million confidences, exact conditional accuracy."""
    confidence = np.random.default_rng(99).beta(5, 1.5, 2_000_000)
    index = np.minimum((confidence * 10).astype(int), 9)
    return float(np.abs(np.bincount(index, confidence - curve(confidence))).sum() / len(confidence))


@pytest.mark.slow
@pytest.mark.parametrize("n", [500, 5000])
@pytest.mark.parametrize("name", SCENARIOS)
def test_interval_covers_the_true_error(name: str, n: int) -> None:
    rng, truth = np.random.default_rng(len(name) * n), true_error(SCENARIOS[name])
    covered = 0
    for run in range(500):
        confidence, correct = draw(rng, n, SCENARIOS[name])
        report = calibration_report(
            confidence, correct, confidence_interval=0.95, n_resamples=500, seed=run, return_bins=False
        )
        covered += report["ci_low"] <= truth <= report["ci_high"]
    assert 0.92 <= covered / 500 <= 0.98, covered


@pytest.mark.slow
@pytest.mark.parametrize("n", [500, 5000])
def test_a_calibrated_model_is_flagged_at_the_nominal_rate(n: int) -> None:
    rng = np.random.default_rng(n)
    flagged = 0
    for run in range(500):
        confidence, correct = draw(rng, n, lambda c: c)
        report = calibration_report(confidence, correct, null_test=True, n_resamples=500, seed=run, return_bins=False)
        flagged += report["p_value"] <= 0.05
    assert 0.03 <= flagged / 500 <= 0.07, flagged


def test_noise_floor_of_a_calibrated_model() -> None:
    # About .031 at n = 1000 with 15 bins.
    rng = np.random.default_rng(0)
    reports = [calibration_report(*draw(rng, 1000, lambda c: c), n_bins=15, null_test=True) for _ in range(100)]
    assert np.mean([r["ece"] for r in reports]) == pytest.approx(0.031, abs=0.002)
    assert np.mean([r["null_mean"] for r in reports]) == pytest.approx(0.031, abs=0.002)
    assert all(r["null_mean"] < r["null_high"] < 0.06 for r in reports)


@pytest.mark.parametrize("method", ["inversion", "basic", "bca"])
@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_every_method_and_norm(method: str, norm: str) -> None:
    confidence, correct = draw(np.random.default_rng(3), 2000, SCENARIOS["temperature 2"])
    options = {"norm": norm, "interval_method": method, "null_test": True}
    report = calibration_report(confidence, correct, confidence_interval=0.95, **options)
    assert 0 <= report["ci_low"] < report["ci_high"] <= 1
    if method == "inversion":
        assert report["ci_low"] <= report["ece"] <= report["ci_high"]
    narrow = calibration_report(confidence, correct, confidence_interval=0.5, **options)
    assert narrow["ci_high"] - narrow["ci_low"] < report["ci_high"] - report["ci_low"]
    again = calibration_report(confidence, correct, confidence_interval=0.95, **options)
    assert (again["ci_low"], again["p_value"]) == (report["ci_low"], report["p_value"])
    other = calibration_report(confidence, correct, confidence_interval=0.95, seed=1, **options)
    assert (other["ci_low"], other["ci_high"]) != (report["ci_low"], report["ci_high"])


@pytest.mark.parametrize("mode", ["top-label", "classwise", "full"])
@pytest.mark.parametrize("strategy", ["width", "mass", "quantile"])
def test_class_rows(mode: str, strategy: str) -> None:
    rng = np.random.default_rng(4)
    rows = rng.dirichlet([0.7] * 4, 1500)
    drawn = (rng.random((1500, 1)) > rows.cumsum(1)).sum(1)
    options = {"mode": mode, "strategy": strategy, "null_test": True, "confidence_interval": 0.95, "n_resamples": 200}
    calibrated = calibration_report(rows, np.minimum(drawn, 3), **options)
    assert calibrated["p_value"] > 0.05
    assert calibrated["ci_low"] == pytest.approx(0, abs=0.005)
    random_labels = calibration_report(rows, rng.integers(0, 4, 1500), **options)
    assert random_labels["p_value"] < 0.01
    assert random_labels["ci_low"] > calibrated["null_high"]


def test_the_null_of_certain_predictions_is_exact() -> None:
    report = calibration_report([1.0, 1.0, 0.0], [1, 1, 0], null_test=True, confidence_interval=0.95)
    assert (report["ece"], report["null_mean"], report["p_value"]) == (0.0, 0.0, 1.0)
    # Three right answers prove little
    assert report["ci_low"] == 0.0 and 0.3 < report["ci_high"] < 0.9
    report = calibration_report([1.0, 1.0, 0.0], [1, 0, 0], null_test=True)
    assert report["p_value"] == pytest.approx(1 / 1001)


def test_an_error_inside_the_null_band_is_called_noise() -> None:
    confidence, correct = draw(np.random.default_rng(5), 400, lambda c: c)
    with pytest.warns(UserWarning, match="perfectly calibrated model would score by chance"):
        report = calibration_report(confidence, correct, null_test=True)
    assert report["p_value"] > 0.05


@pytest.mark.parametrize(
    ("confidence", "wrong", "n"), [(0.99, 0, 100), (0.98, 1, 50), (0.999, 0, 20), (0.9, 0, 30), (0.02, 50, 50)]
)
def test_pure_bins_are_not_certain(confidence: float, wrong: int, n: int) -> None:
    correct = np.arange(n) >= wrong
    report = calibration_report([confidence] * n, correct, confidence_interval=0.95, null_test=True)
    assert report["ci_low"] <= report["ece"] <= report["ci_high"]
    assert report["ci_high"] - report["ci_low"] > 1.5 / n
    assert (report["ci_low"] > 0) == (report["p_value"] <= 0.025)


@pytest.mark.parametrize("mode", ["top-label", "classwise"])
def test_an_error_of_zero_is_not_certain(mode: str) -> None:
    """As bins that were fitted on the very rows give it: all hold just as many right answers as they say."""
    if mode == "top-label":
        confidence = np.repeat(np.arange(1, 11) / 10, 10)
        outcome = np.tile(np.arange(10), 10) < np.repeat(np.arange(1, 11), 10)
    else:
        confidence, outcome = np.full((60, 30), 1 / 30), np.tile(np.arange(30), 2)
    report = calibration_report(confidence, outcome.astype(int), mode=mode, confidence_interval=0.95, null_test=True)
    assert report["ece"] == pytest.approx(0, abs=1e-9) and report["ci_low"] == 0
    assert 0.5 * report["null_mean"] < report["ci_high"] < 2 * report["null_high"]


def test_seeds_that_differ_by_the_same_are_not_certain() -> None:
    others = {"seed-0": 0.7, "seed-1": 0.8}
    found = paired_difference({run: value + 0.01 for run, value in others.items()}, others, higher_is_better=True)
    assert found is not None and found["mean"] == pytest.approx(0.01) and found["better"] == 2
    assert (found["low"], found["high"]) == (None, None)
    # Arms that are the same have no difference, whatever the seed
    same = paired_difference(others, others, higher_is_better=True)
    assert same is not None and (same["low"], same["high"]) == (0, 0)


@pytest.mark.parametrize("method", ["basic", "bca"])
def test_other_methods_say_where_they_cannot_hold(method: str) -> None:
    report = calibration_report([0.99] * 100, [1] * 100, confidence_interval=0.95, interval_method=method)
    assert any("only right or only wrong answers" in caution for caution in report["warnings"])
    report = calibration_report([0.7] * 100, [1, 0] * 50, confidence_interval=0.95, interval_method=method)
    assert not any("only right" in caution for caution in report["warnings"])


@pytest.mark.parametrize("seed", range(40))
def test_interval_and_null_test_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, level = int(rng.integers(20, 400)), float(rng.choice([0.8, 0.95, 0.99]))
    confidence = rng.beta(rng.uniform(0.5, 20), 1, n)
    correct = rng.random(n) < np.clip(confidence - rng.choice([0, 0.05, 0.15]), 0, 1)
    report = calibration_report(
        confidence, correct, confidence_interval=level, null_test=True, n_resamples=300, seed=seed
    )
    assert (report["ci_low"] > 0) == (report["p_value"] <= (1 - level) / 2 + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 100, 500])
@pytest.mark.parametrize("law", LAWS)
def test_coverage_with_pure_bins_and_confidences_near_one(law: str, n: int) -> None:
    row = coverage(LAWS[law], n, 300)
    assert row["coverage"] + 2 * row["se"] >= 0.92, row
    assert row["contradictions"] == 0


def test_clusters_whose_answers_are_all_right_are_not_certain() -> None:
    confidence, right = np.full(200, 0.99), np.ones(200)
    alone = clustered_intervals(np.arange(200), confidence, right, {})
    grouped = clustered_intervals(np.repeat(np.arange(20), 10), confidence, right, {})
    for name, value in (("accuracy", 1.0), ("ece", 0.01), ("trust", 0.99)):
        for found in (alone, grouped):
            low, high = found[name]
            assert low <= value <= high and high - low > 0.005, (name, found)
        # Ten tokens of one row are one observation
        widths = [found[name][1] - found[name][0] for found in (alone, grouped)]
        assert widths[1] > 3 * widths[0], (name, widths)
    wrong = clustered_intervals(np.arange(200), np.full(200, 0.05), np.zeros(200), {})
    assert wrong["accuracy"][0] == 0 and 0.005 < wrong["accuracy"][1] < 0.05


def test_rows_that_stand_alone_have_the_intervals_of_single_rows() -> None:
    confidence, correct = draw(np.random.default_rng(0), 400, SCENARIOS["temperature 2"])
    found = clustered_intervals(np.arange(400), confidence, correct.astype(float), {"x": confidence})
    assert found["accuracy"] == pytest.approx(wilson_interval(correct.mean(), 400))
    assert found["x"] == pytest.approx(normal_interval(confidence), abs=2e-4)
    report = calibration_report(confidence, correct, confidence_interval=0.95)
    assert found["ece"] == pytest.approx((report["ci_low"], report["ci_high"]), abs=0.01)


def test_rows_copied_within_their_cluster_tell_nothing_more() -> None:
    confidence, correct = draw(np.random.default_rng(1), 60, SCENARIOS["temperature 2"])
    alone = clustered_intervals(np.arange(60), confidence, correct.astype(float), {})
    copies = clustered_intervals(
        np.repeat(np.arange(60), 20), confidence.repeat(20), correct.astype(float).repeat(20), {}
    )
    for name, (low, high) in alone.items():
        # Student's t for 60 clusters is 2 % wider than the normal distribution's
        assert (copies[name][1] - copies[name][0]) / (high - low) == pytest.approx(1.02, abs=0.08), name


def test_a_single_cluster_has_no_interval_and_few_have_wide_ones() -> None:
    confidence, correct = draw(np.random.default_rng(2), 200, SCENARIOS["temperature 2"])
    assert clustered_intervals(np.zeros(200), confidence, correct.astype(float), {}) == {}
    widths = [
        np.diff(clustered_intervals(np.arange(200) % n, confidence, correct.astype(float), {})["ece"])[0]
        for n in (2, 5, 200)
    ]
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 10])
@pytest.mark.parametrize("clusters", [5, 20])
@pytest.mark.parametrize("law", CLUSTER_LAWS)
def test_coverage_over_clusters(law: str, clusters: int, size: int) -> None:
    found = cluster_coverage(law, clusters, size, 150)["coverage"]
    for name, share in found.items():
        assert share + 2 * np.sqrt(max(share * (1 - share), 1 / 150) / 150) >= 0.92, (name, found)
