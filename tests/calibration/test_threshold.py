"""The threshold's promise: kept in simulations of three laws, refused where it cannot be made, noticed when it breaks."""

import numpy as np
import pytest

from first_trl.calibration.threshold import ConfidenceThreshold, check_threshold, fit_threshold


def calibrated(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = rng.beta(5, 1, n)
    return confidence, confidence


def overconfident(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    # Confidences in steps of .05: many ties
    confidence = np.round(rng.beta(8, 1, n) * 20) / 20
    return confidence, np.clip(confidence - 0.1 * (confidence < 0.97), 0, 1)


def not_monotone(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    # The most confident answers are the worst
    confidence = rng.uniform(0, 1, n)
    return confidence, np.where(confidence > 0.9, 0.85, np.where(confidence > 0.4, 0.985, 0.3))


LAWS = (calibrated, overconfident, not_monotone)


@pytest.mark.parametrize("n", [100, 500, 5000])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_promise_is_kept(law, n):
    max_error, delta, runs = 0.1, 0.1, 1000
    rng = np.random.default_rng(n)
    population, chance = law(rng, 200_000)
    order = np.argsort(-population)
    falling = population[order]
    risk = np.cumsum(1 - chance[order]) / np.arange(1, len(order) + 1)
    broken = found = 0
    for _ in range(runs):
        confidence, p = law(rng, n)
        result = fit_threshold(confidence, rng.random(n) < p, max_error, delta)
        if result.threshold is None:
            continue
        found += 1
        answered = int(np.searchsorted(-falling, -result.threshold, side="right"))
        broken += bool(answered and risk[answered - 1] > max_error + 0.002)
    assert broken / runs <= delta + 3 * np.sqrt(delta * (1 - delta) / runs)
    assert found > 0.9 * runs or n == 100 or law is not_monotone


def test_a_hundred_sure_rows_are_not_enough_for_one_percent():
    result = fit_threshold([0.99] * 100, [1] * 100, max_error=0.01)
    assert result.threshold is None and result.coverage == 0.0 and result.refused == 1.0
    assert "299 would be needed" in result.reason


def test_no_candidate_qualifies():
    rng = np.random.default_rng(0)
    result = fit_threshold(rng.uniform(size=2000), rng.random(2000) < 0.5, max_error=0.1)
    assert result.threshold is None and "No threshold" in result.reason and len(result.candidates) == 20


def test_all_right_answers_everything():
    result = fit_threshold(np.linspace(0.2, 0.9, 1000), np.ones(1000), max_error=0.05)
    assert result.threshold == 0.0 and result.coverage == 1.0 and result.error == 0.0
    # 1 - (delta / 20) ** (1 / n)
    assert result.error_bound == pytest.approx(1 - (0.05 / len(result.candidates)) ** (1 / 1000), abs=1e-12)


def test_ties_are_answered_or_refused_together():
    confidence = np.repeat([0.9, 0.6], [600, 400])
    correct = np.concatenate([np.ones(600), np.tile([1, 0], 200)])
    result = fit_threshold(confidence, correct, max_error=0.05)
    assert 0.6 < result.threshold <= 0.9 and result.coverage == 0.6
    assert (confidence >= result.threshold).sum() == 600


def test_the_check_fails_after_a_shift():
    rng = np.random.default_rng(1)
    confidence, p = calibrated(rng, 5000)
    fitted = fit_threshold(confidence, rng.random(5000) < p, max_error=0.05)
    fresh, p = calibrated(rng, 2000)
    assert check_threshold(fitted, fresh, rng.random(2000) < p).holds
    broken = check_threshold(fitted, fresh, rng.random(2000) < p - 0.15)
    assert not broken.holds and broken.error_low > 0.05 and broken.p_value < 1e-6


def test_the_check_fails_seldom_at_the_promised_rate():
    rng = np.random.default_rng(2)
    failures = sum(
        not check_threshold(0.5, np.full(300, 0.9), rng.random(300) > 0.05, max_error=0.05).holds for _ in range(2000)
    )
    assert failures / 2000 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_nothing_answered_is_said():
    with pytest.warns(UserWarning, match="nothing was checked"):
        result = check_threshold(0.9, [0.1, 0.2], [1, 0], max_error=0.05)
    assert result.holds and result.error is None and (result.error_low, result.error_high) == (0.0, 1.0)


def test_saved_and_read_again():
    import json

    rng = np.random.default_rng(3)
    confidence, p = calibrated(rng, 1000)
    result = fit_threshold(confidence, rng.random(1000) < p)
    assert ConfidenceThreshold.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize(
    ("confidence", "correct", "options", "message"),
    [
        ([0.5, np.nan], [1, 0], {}, "confidence row 1 is nan"),
        ([0.5, 1.2], [1, 0], {}, "confidence row 1 is 1.2"),
        ([0.5, 0.6], [1, 2], {}, "correct row 1 is 2"),
        ([0.5], [1, 0], {}, "one length"),
        ([], [], {}, "no rows"),
        ([0.5], [1], {"max_error": 0.0}, "`max_error` must lie"),
        ([0.5], [1], {"delta": 1.0}, "`delta` must lie"),
    ],
)
def test_bad_input(confidence, correct, options, message):
    with pytest.raises(ValueError, match=message):
        fit_threshold(confidence, correct, **options)


def test_real_confidences(data_folder):
    import csv
    import gzip

    for path in sorted((data_folder / "llm_confidence").glob("*.csv.gz")):
        with gzip.open(path, "rt") as file:
            rows = list(csv.DictReader(file))
        confidence = np.array([float(row["confidence"]) for row in rows])
        correct = np.array([row["grade"] == "Correct" for row in rows])
        result = fit_threshold(confidence, correct, max_error=0.1)
        print(f"{path.name.removesuffix('.csv.gz')}: coverage at 10 % error {result.coverage:.1%}")
        answered = confidence >= (2 if result.threshold is None else result.threshold)
        assert result.threshold is None or (~correct[answered]).mean() <= 0.1
