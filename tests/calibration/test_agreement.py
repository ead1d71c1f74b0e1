"""A temperature by agreement with another model: the planted one, untouched by prompts on which the two differ."""

import numpy as np
import pytest

from first_trl.calibration.agreement import fit_agreement_temperature


def models(n: int = 3000, temperature: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """A model `temperature` times too sharp, and one that is not, up to noise."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(n, 4)) * 1.5
    return temperature * base, base


def test_the_planted_temperature_is_found():
    z, base = models()
    found = fit_agreement_temperature(z, base)
    assert found.temperature == pytest.approx(2.5, rel=1e-4)
    assert (found.n, found.agreed, found.at_boundary) == (3000, 3000, False)
    shifted = fit_agreement_temperature(z - 7.0, base + 3.0)
    assert shifted.temperature == pytest.approx(found.temperature, rel=1e-6)


def test_prompts_on_which_the_models_differ_do_not_count():
    z, base = models()
    other = base.copy()
    other[::2] = np.roll(base[::2], 1, axis=1)
    found = fit_agreement_temperature(z, other)
    assert found.temperature == pytest.approx(2.5, rel=1e-4) and found.agreed == 1500


def test_a_model_that_knows_nothing_asks_for_the_hottest():
    z, base = models()
    found = fit_agreement_temperature(z, 1e-6 * base)
    assert found.temperature == pytest.approx(16.0, rel=1e-2) and found.at_boundary


def test_prompts_with_fewer_options():
    z, base = models(200)
    z[:50, 3] = base[:50, 3] = -np.inf
    assert fit_agreement_temperature(z, base).temperature == pytest.approx(2.5, rel=1e-4)


def test_wrong_input_is_refused():
    z, base = models(4)
    with pytest.raises(ValueError, match="On none of 4 prompts"):
        fit_agreement_temperature(z, -base)
    with pytest.raises(ValueError, match=r"shape \(N, C\)"):
        fit_agreement_temperature(z, base[:2])
    with pytest.raises(ValueError, match="Row 1 holds NaN"):
        fit_agreement_temperature(np.where(np.arange(4)[:, None] == 1, np.nan, z), base)
    with pytest.raises(ValueError, match="other row 0 is masked"):
        fit_agreement_temperature(z, np.ma.masked_array(base, np.full(base.shape, True)))
    with pytest.raises(ValueError, match="different options"):
        fit_agreement_temperature(np.where(np.arange(4) == 3, -np.inf, z), base)
