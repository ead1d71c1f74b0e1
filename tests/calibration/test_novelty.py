"""Temperature by novelty: planted coefficients are found, and without use of the feature one temperature stays."""

import json

import numpy as np
import pytest

from first_trl.calibration.novelty import (
    NoveltyTemperature,
    fit_novelty_temperature,
    logits_partition,
    mean_nll,
    scalar_temperature,
)
from first_trl.calibration.partition import LOG_BETAS, PartitionTable
from first_trl.calibration.temperature import fit_temperature


def rows(rng: np.random.Generator, n: int, a: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are `exp(a + b d)` times too sharp, answers drawn from the truth, and `d`."""
    z, d = rng.normal(size=(n, 6)) * 1.5, rng.normal(size=n)
    cumulative = np.exp(z).cumsum(1) / np.exp(z).sum(1, keepdims=True)
    return np.exp(a + b * d)[:, None] * z, (cumulative > rng.random((n, 1))).argmax(1), d


def table_of(z: np.ndarray) -> PartitionTable:
    scaled = (z - z.max(1, keepdims=True))[:, None, :] * np.exp(LOG_BETAS)[:, None]
    values = np.logaddexp.reduce(scaled, axis=2)
    return PartitionTable(values, (np.exp(scaled - values[..., None]) * scaled).sum(2))


def test_planted_coefficients_are_found():
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a, b = rng.uniform(0.0, 0.8), rng.uniform(0.15, 0.6)
        z, gold, d = rows(rng, 2000, a, b)
        fit = fit_novelty_temperature(*logits_partition(z, gold), d)
        found.append(abs(fit.intercept - a) < 0.1 and abs(fit.slopes[0] - b) < 0.1)
    assert np.mean(found) >= 0.9


def test_a_feature_without_use_leaves_temperature_scaling():
    flat, loss = [], []
    for seed in range(60):
        rng = np.random.default_rng(100 + seed)
        z, gold, _ = rows(rng, 1000, 0.5, 0.0)
        fresh_z, fresh_gold, _ = rows(rng, 4000, 0.5, 0.0)
        d, fresh_d = rng.normal(size=1000), rng.normal(size=4000)
        fit = fit_novelty_temperature(*logits_partition(z, gold), d)
        scalar = fit_temperature(z, gold).temperature
        assert fit.scalar == pytest.approx(scalar, rel=1e-4)
        flat.append(fit.slopes == (0.0,))
        if flat[-1]:
            assert fit.temperature(d) == pytest.approx(scalar, rel=1e-4) and "test at 5 %" in fit.reason
        partition, right = logits_partition(fresh_z, fresh_gold)
        loss.append(mean_nll(partition, right, fit.temperature(fresh_d)) - mean_nll(partition, right, scalar))
    assert np.mean(flat) >= 0.9
    assert np.mean(loss) < 0.001 and np.median(loss) == pytest.approx(0.0, abs=1e-6)


def test_a_feature_that_says_the_opposite_is_not_used():
    z, gold, d = rows(np.random.default_rng(1), 2000, 0.5, 0.4)
    fit = fit_novelty_temperature(*logits_partition(z, gold), -d)
    assert fit.slopes == (0.0,) and fit.gain == pytest.approx(0.0, abs=1e-9)


def test_no_temperature_below_the_scalar_one():
    z, gold, d = rows(np.random.default_rng(2), 3000, 0.3, 0.5)
    free = fit_novelty_temperature(*logits_partition(z, gold), d)
    bound = fit_novelty_temperature(*logits_partition(z, gold), d, at_least_scalar=True)
    assert free.temperature(d).min() < free.scalar
    assert bound.temperature(d).min() == pytest.approx(bound.scalar) and bound.temperature(d).max() > bound.scalar
    assert 0.0 < bound.gain < free.gain


def test_known_slopes_leave_the_intercept_to_fit():
    z, gold, d = rows(np.random.default_rng(3), 3000, 0.3, 0.5)
    fit = fit_novelty_temperature(*logits_partition(z, gold), d, slopes=[0.5])
    assert fit.slopes == (0.5,) and fit.intercept == pytest.approx(0.3, abs=0.08)


def test_two_features_of_which_one_counts():
    rng = np.random.default_rng(4)
    z, gold, d = rows(rng, 4000, 0.3, 0.4)
    fit = fit_novelty_temperature(*logits_partition(z, gold), np.column_stack([rng.normal(size=4000), d]))
    assert fit.slopes[0] < 0.08 and fit.slopes[1] == pytest.approx(0.4, abs=0.1)


def test_the_table_over_the_temperature_gives_the_same_fit():
    z, gold, d = rows(np.random.default_rng(5), 1500, 0.3, 0.4)
    partition, right = logits_partition(z, gold)
    exact, tabled = (fit_novelty_temperature(source, right, d) for source in (partition, table_of(z)))
    assert tabled.intercept == pytest.approx(exact.intercept, abs=1e-3)
    assert tabled.slopes[0] == pytest.approx(exact.slopes[0], abs=1e-3)
    beta = np.exp(np.random.default_rng(6).uniform(-2.0, 2.0, size=1500))
    table = table_of(z)
    step = 1e-5
    numeric = (table.at(beta * np.exp(step)) - table.at(beta * np.exp(-step))) / (2 * step * beta)
    assert table.at(beta) == pytest.approx(partition(beta)[0], abs=2e-3)
    assert table.with_slope(beta)[1] == pytest.approx(numeric, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("n", [1, 10, 49])
def test_few_rows_have_one_temperature(n):
    z, gold, d = rows(np.random.default_rng(7), n, 0.3, 0.6)
    fit = fit_novelty_temperature(*logits_partition(z, gold), d)
    assert fit.slopes == (0.0,) and f"{n} rows" in fit.reason
    assert fit.temperature(d) == pytest.approx(fit.scalar)


def test_a_constant_feature_has_one_temperature():
    z, gold, d = rows(np.random.default_rng(8), 500, 0.3, 0.6)
    fit = fit_novelty_temperature(*logits_partition(z, gold), np.full_like(d, 3.0))
    assert fit.slopes == (0.0,) and "constant" in fit.reason


def test_temperatures_stay_within_bounds_and_files_keep_them():
    fit = NoveltyTemperature(0.2, (0.5,), 1.3, False, 100, 0.01)
    assert fit.temperature([-1e6, 1e6]).tolist() == pytest.approx([0.125, 16.0])
    assert NoveltyTemperature.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit


def test_wrong_input_is_refused():
    z, gold, d = rows(np.random.default_rng(9), 60, 0.3, 0.6)
    partition, right = logits_partition(z, gold)
    with pytest.raises(ValueError, match=r"row 3 is .*NaN"):
        fit_novelty_temperature(partition, right, np.where(np.arange(60) == 3, np.nan, d))
    with pytest.raises(ValueError, match="one row for each of the 60"):
        fit_novelty_temperature(partition, right, d[:5])
    with pytest.raises(ValueError, match="no row"):
        fit_novelty_temperature(partition, right[:0], d[:0])
    with pytest.raises(ValueError, match="fitted on 1 features, got 2"):
        NoveltyTemperature(0.0, (0.1,), 1.0, False, 9, 0.0).temperature(np.zeros((3, 2)))
    assert scalar_temperature(partition, right) > 0
