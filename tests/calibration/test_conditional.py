"""Temperatures by type and number of options: planted values are found, and few rows stay with one temperature."""

import json

import numpy as np
import pytest

from first_trl.calibration.conditional import OptionTemperature, fit_log_temperature, fit_option_temperature
from first_trl.calibration.temperature import fit_temperature


def questions(rng: np.random.Generator, n: int, options: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too sharp, and answers drawn from the true distribution."""
    z = rng.normal(size=(n, options)) * 1.5
    cumulative = np.exp(z).cumsum(1) / np.exp(z).sum(1, keepdims=True)
    return temperature * z, (cumulative > rng.random((n, 1))).argmax(1)


def padded(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[list[np.ndarray], np.ndarray]:
    return [row for z, _ in parts for row in z], np.concatenate([gold for _, gold in parts])


def test_one_type_of_one_size_is_temperature_scaling():
    z, gold = questions(np.random.default_rng(0), 5000, 4, 1.8)
    (log_t,) = fit_log_temperature(z, gold, np.ones((5000, 1)), prior_mean=[0.0], prior_sd=[np.inf])
    assert np.exp(log_t) == pytest.approx(fit_temperature(z, gold).temperature, rel=1e-5)


def test_a_planted_dependence_on_the_number_of_options_is_found():
    rng = np.random.default_rng(1)
    a, b = 0.2, 0.35
    parts = [questions(rng, 2500, n, float(np.exp(a + b * np.log(n)))) for n in (2, 3, 5, 10)]
    fitted = fit_option_temperature(*padded(parts))
    for n in (2, 3, 5, 10):
        assert fitted.temperature("choice", n) == pytest.approx(np.exp(a + b * np.log(n)), rel=0.06)
    assert fitted.depends_on_options


def test_types_are_told_apart():
    rng = np.random.default_rng(2)
    parts = [questions(rng, 3000, 2, 1.2), questions(rng, 3000, 4, 2.5)]
    kinds = ["noul"] * 3000 + ["choice"] * 3000
    fitted = fit_option_temperature(*padded(parts), kinds)
    assert fitted.scalars() == {
        "noul": pytest.approx(1.2, rel=0.06),
        "choice": pytest.approx(2.5, rel=0.06),
    }
    assert not fitted.depends_on_options and 1.2 < fitted.common < 2.5
    assert fitted.temperature("score", 7) == fitted.common


def test_few_rows_stay_near_the_common_temperature():
    rng = np.random.default_rng(3)
    distance = []
    for _ in range(50):
        parts = [questions(rng, 2000, 4, 1.5), questions(rng, 8, 3, 1.5)]
        fitted = fit_option_temperature(*padded(parts), ["choice"] * 2000 + ["score"] * 8)
        distance.append(abs(np.log(fitted.temperature("score", 3) / fitted.common)))
    # Eight rows alone would spread the log temperature by more than .5
    assert np.median(distance) < 0.12 and max(distance) < 0.4


def test_rows_that_know_nothing_of_the_feature_give_no_slope():
    rng = np.random.default_rng(4)
    slopes = []
    for _ in range(20):
        parts = [questions(rng, 400, n, 1.5) for n in (2, 4, 8)]
        slopes.append(fit_option_temperature(*padded(parts)).kinds["choice"].slope)
    assert abs(np.mean(slopes)) < 0.04 and np.max(np.abs(slopes)) < 0.25


def test_a_bound_is_kept():
    rng = np.random.default_rng(5)
    z, gold = questions(rng, 3000, 4, 1.0)
    x = np.stack([np.ones(3000), rng.normal(size=3000)], 1)
    z = z * np.exp(-0.5 * x[:, 1:])
    free = fit_log_temperature(z, gold, x, prior_mean=[0, 0], prior_sd=[np.inf, np.inf])
    held = fit_log_temperature(z, gold, x, prior_mean=[0, 0], prior_sd=[np.inf, np.inf], low=[-np.inf, 0.0])
    assert free[1] == pytest.approx(-0.5, abs=0.06) and held[1] == 0.0


def test_saved_and_read_again():
    rng = np.random.default_rng(6)
    fitted = fit_option_temperature(*padded([questions(rng, 200, n, 1.5) for n in (2, 4)]))
    assert OptionTemperature.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


@pytest.mark.parametrize(
    ("logprobs", "gold", "message"),
    [
        ([], [], "no question"),
        ([[0.0, np.nan]], [0], "row 0 is .*NaN"),
        ([[0.0, 0.0], [0.0, 0.0]], [0, 2], "row 1 is 2"),
        ([[0.0, 0.0], [0.0]], [0, 1], "Row 1 gives its right option"),
        ([[0.0, 0.0]], [0.5], "must be 1 integers"),
        (np.ma.masked_array([[0.0, 9.0]], [[False, True]]), [0], "row 0 is masked"),
        ([[[0.0, 0.0]]], [0], r"row 0 has the shape \(1, 2\)"),
    ],
)
def test_bad_input(logprobs, gold, message):
    with pytest.raises(ValueError, match=message):
        fit_option_temperature(logprobs, np.array(gold, dtype=float if gold == [0.5] else int))


def test_tables_and_tensors_are_read():
    pandas, torch = pytest.importorskip("pandas"), pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    z, gold = rng.normal(size=(40, 3)), rng.integers(3, size=40)
    found = fit_option_temperature(z, gold)
    for same in (pandas.DataFrame(z), torch.tensor(z, requires_grad=True), list(torch.tensor(z, requires_grad=True))):
        assert fit_option_temperature(same, gold) == found
    with pytest.raises(ValueError, match="row 0 is a boolean"):
        fit_option_temperature(z, [True, *gold[1:].tolist()])
