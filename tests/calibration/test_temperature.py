"""Post-hoc temperature scaling."""

import json
import warnings

import numpy as np
import pytest

from first_trl.calibration.temperature import TemperatureFit, fit_temperature


def simulate(n, *, temperature=2.0, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, classes)) * 1.5
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return z * temperature, (p.cumsum(1) > rng.random((n, 1))).argmax(1)


@pytest.mark.parametrize("objective", ["nll", "ece"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.filterwarnings("ignore:.*does not improve")
def test_recovers_the_temperature(objective, temperature):
    fit = fit_temperature(*simulate(8000, temperature=temperature), objective=objective)
    assert fit.temperature == pytest.approx(temperature, rel=0.08)
    assert fit.n == 8000 and not fit.at_boundary
    assert fit.fitted["ece"] < 0.03


def test_nll_is_at_its_minimum():
    z, y = simulate(3000)
    fit = fit_temperature(z, y)

    def nll(t):
        s = z / t
        return np.mean(np.logaddexp.reduce(s, axis=1) - s[np.arange(len(y)), y])

    assert fit.fitted["nll"] == pytest.approx(nll(fit.temperature), abs=1e-12)
    h = 1e-4
    assert abs(nll(fit.temperature + h) - nll(fit.temperature - h)) / (2 * h) < 1e-6
    assert fit.fitted["nll"] <= min(point["nll"] for point in fit.curve)


def test_logits_and_logprobs_give_the_same_temperature():
    z, y = simulate(2000)
    logprobs = z - np.logaddexp.reduce(z, axis=1)[:, None]
    assert fit_temperature(logprobs, y).temperature == pytest.approx(fit_temperature(z, y).temperature, rel=1e-6)


def test_impossible_classes_do_not_count():
    z, y = simulate(2000)
    padded = np.c_[z, np.full((2000, 3), -np.inf)]
    one, two = fit_temperature(z, y), fit_temperature(padded, y)
    assert one.temperature == pytest.approx(two.temperature, rel=1e-6)
    assert one.fitted == pytest.approx(two.fitted)


def test_low_precision_and_large_logits():
    z, y = simulate(2000)
    full = fit_temperature(z, y).temperature
    assert fit_temperature(z.astype(np.float16), y).temperature == pytest.approx(full, rel=1e-3)
    assert fit_temperature(z + 1e4, y).temperature == pytest.approx(full, rel=1e-6)


def test_tensors_of_any_precision_and_with_a_gradient():
    torch = pytest.importorskip("torch")
    z, y = simulate(2000)
    tensor = torch.tensor(z, requires_grad=True)
    assert fit_temperature(tensor, torch.tensor(y)).temperature == fit_temperature(z, y).temperature
    low = tensor.bfloat16()
    assert fit_temperature(low, y).temperature == fit_temperature(low.detach().float().numpy(), y).temperature


def test_ties_go_to_one():
    # Two equal logits: every temperature gives .5 / .5.
    with pytest.warns(UserWarning, match="does not improve"):
        fit = fit_temperature(np.zeros((2000, 2)), np.arange(2000) % 2, objective="ece")
    assert fit.temperature == 1.0


def test_warnings():
    with pytest.warns(UserWarning, match="Only 100 examples"):
        fit_temperature(*simulate(100))
    z, _ = simulate(1500)
    with pytest.warns(UserWarning, match="end of the range"):
        fit = fit_temperature(z, z.argmax(1))
    assert fit.at_boundary
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_temperature(*simulate(3000))


def test_round_trips_through_json():
    fit = fit_temperature(*simulate(1500))
    assert TemperatureFit.from_dict(json.loads(json.dumps(fit.to_dict(), allow_nan=False))) == fit


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "no example"),
        (np.zeros((2, 1)), [0, 0], "C >= 2"),
        (np.zeros((2, 3)), [0], "shapes"),
        (np.zeros((2, 3)), [0.0, 1.0], "integer class ids"),
        (np.zeros((2, 3)), [True, False], "row 0 is a boolean"),
        (np.zeros((2, 3)), [2, True], "row 1 is a boolean"),
        (np.zeros((2, 3)), [0, 3], "Label 1 is 3, outside 0..2"),
        (np.zeros((2, 3)), [-100, 1], "Label 0 is -100"),
        ([[0.0, np.nan], [0.0, 0.0]], [0, 1], "row 0, column 1 is nan"),
        ([[0.0, np.inf], [0.0, 0.0]], [0, 1], "row 0, column 1 is inf"),
        (np.ma.masked_array([[0.0, 9.0], [0.0, 1.0]], [[0, 1], [0, 0]]), [0, 1], "row 0 is masked"),
        (np.zeros((2, 3)), np.ma.masked_array([0, 1], [0, 1]), "row 1 is masked"),
        ([[0.0, -np.inf], [0.0, 0.0]], [1, 1], "Row 0 gives its label 1 the probability 0"),
    ],
)
def test_bad_input_is_refused(logits, labels, match):
    with pytest.raises(ValueError, match=match):
        fit_temperature(logits, labels)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`objective`"):
        fit_temperature(*simulate(10), objective="brier")
    with pytest.raises(ValueError, match="`n_bins`"):
        fit_temperature(*simulate(10), n_bins=0)
