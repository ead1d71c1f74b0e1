"""Rescale of the cached top-k and its fit."""

import json
import math
import warnings

import numpy as np
import pytest
from datasets import Dataset

from first_trl import Recalibration, fit_recalibration
from first_trl.plugins import RECALIBRATIONS
from first_trl.recalibration import RecalibrationFit
from first_trl.recalibration.rescale import rescaled_estimators
from tests.benchmarks.recalibration_recovery import recover


VALUES = {
    "none": None,
    "probability_temperature": 0.28,
    "logit_temperature": 1.7,
    "label_smoothing": 0.1,
    "log_label_smoothing": 0.1,
}


def topk(logits, k):
    """Sorted top-k of full logits: logprobs, ids, tail log-mass."""
    lp = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    order = np.argsort(-lp, axis=1, kind="stable")
    ids = order[:, :k]
    rest = np.take_along_axis(lp, order[:, k:], 1)
    tail = np.logaddexp.reduce(rest, axis=1) if rest.shape[1] else np.full(len(lp), -np.inf)
    return np.take_along_axis(lp, ids, 1), ids, tail


def simulate(n, *, temperature=1.0, k=5, vocab=12, seed=0):
    """A teacher whose logits are `temperature` times those that drew the labels: dividing by it is exact."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, vocab)) * 1.5
    p = np.exp(z - np.logaddexp.reduce(z, axis=1)[:, None])
    labels = (p.cumsum(1) > rng.random((n, 1))).argmax(1)
    logprobs, ids, tail = topk(z * temperature, k)
    return {"logprobs": logprobs, "ids": ids, "labels": labels, "tail_logprob": tail}


@pytest.fixture
def rows():
    return topk(np.random.default_rng(0).normal(size=(50, 30)) * 3, 8)


# --- the rescale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RECALIBRATIONS.builtin)
@pytest.mark.parametrize("estimator", rescaled_estimators())
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_target_is_a_distribution(rows, method, estimator, top_k, dtype):
    logprobs, _, tail = rows
    head, bucket = Recalibration(method, VALUES[method]).apply(
        logprobs.astype(dtype), tail.astype(np.float32), estimator=estimator, top_k=top_k
    )
    assert head.dtype == np.float64 and head.shape == (50, top_k or 8)
    total = np.exp(head).sum(1)
    if estimator == "bucket":
        assert bucket is not None
        total = total + np.exp(bucket)
    else:
        assert bucket is None
    np.testing.assert_allclose(total, 1.0, atol=1e-12)


def test_probability_temperature_is_a_softmax_of_raw_probabilities():
    q = np.array([[0.7, 0.1, 0.05, 0.05, 0.02]])
    head, _ = Recalibration("probability_temperature", 0.28).apply(np.log(q))
    expected = np.exp(q / 0.28) / np.exp(q / 0.28).sum()
    np.testing.assert_allclose(np.exp(head), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("c", "ceiling"),
    [(0.1, 0.9998), (0.2, 0.974), (0.25, 0.932), (0.28, 0.899), (0.3, 0.875), (0.5, 0.649), (1.0, 0.405)],
)
def test_probability_temperature_caps_a_sure_token(c, ceiling):
    sure = np.array([[0.0, -np.inf, -np.inf, -np.inf, -np.inf]])
    head, _ = Recalibration("probability_temperature", c).apply(sure)
    assert np.exp(head[0, 0]) == pytest.approx(ceiling, abs=6e-4)
    np.testing.assert_allclose(np.exp(head[0, 1:]), 1.0 / (math.exp(1 / c) + 4), rtol=1e-12)


def test_logit_temperature_equals_temperature_on_the_kept_logits():
    logits = np.random.default_rng(1).normal(size=(20, 9)) * 2
    logprobs, ids, _ = topk(logits, 4)
    head, _ = Recalibration("logit_temperature", 2.5).apply(logprobs)
    kept = np.take_along_axis(logits, ids, 1) / 2.5
    np.testing.assert_allclose(head, kept - np.logaddexp.reduce(kept, axis=1)[:, None], atol=1e-12)
    sure, _ = Recalibration("logit_temperature", 2.5).apply([[0.0, -np.inf]])
    assert sure.tolist() == [[0.0, -np.inf]]


def test_label_smoothing_acts_on_normalised_probabilities():
    q = np.array([[0.6, 0.2]])
    head, _ = Recalibration("label_smoothing", 0.1).apply(np.log(q))
    np.testing.assert_allclose(np.exp(head), [[0.65, 0.35]], rtol=1e-12)
    flat, _ = Recalibration("label_smoothing", 0.5).apply(np.log(np.full((1, 4), 0.25)))
    np.testing.assert_allclose(np.exp(flat), [[0.0, 1 / 3, 1 / 3, 1 / 3]], atol=1e-12)


def test_log_label_smoothing_moves_delta_between_log_probabilities():
    q = np.array([[0.95, 0.0125, 0.0125, 0.0125, 0.0125], [0.45, 0.15, 0.15, 0.1, 0.05]])
    head, _ = Recalibration("log_label_smoothing", 0.1).apply(np.log(q))
    # .95 e^-.1 = .85960 and .05 e^.025 = .05127; .5 e^-.1 = .45242 and .5 e^.025 = .51266
    np.testing.assert_allclose(np.exp(head[:, 0]), [0.94371, 0.46879], atol=1e-5)
    np.testing.assert_allclose(np.exp(head[1, 1:]), 0.53121 * np.array([3, 3, 2, 1]) / 9, atol=1e-5)
    # Before it is normalised each rank moves by exactly its share of delta.
    np.testing.assert_allclose(head[0, 0] - head[0, 1], np.log(0.95 / 0.0125) - 0.1 - 0.025, atol=1e-12)
    sure, _ = Recalibration("log_label_smoothing", 0.1).apply([[0.0, -np.inf]])
    assert sure.tolist() == [[0.0, -np.inf]]


def test_log_label_smoothing_on_fewer_ranks_and_beside_a_bucket():
    q, tail = np.log([[0.6, 0.2, 0.1]]), np.log([0.1])
    head, bucket = Recalibration("log_label_smoothing", 1.0).apply(q, tail, estimator="bucket", top_k=2)
    # (.75, .25) -> (.75 / e, .25 e) = (.27591, .67957), times .8
    np.testing.assert_allclose(np.exp(head), [[0.8 * 0.28877, 0.8 * 0.71123]], atol=1e-5)
    np.testing.assert_allclose(np.exp(bucket), [0.2], rtol=1e-12)


IDENTITIES = [("none", None), ("logit_temperature", 1.0), ("label_smoothing", 0.0), ("log_label_smoothing", 0.0)]


@pytest.mark.parametrize(("method", "value"), IDENTITIES)
@pytest.mark.parametrize("estimator", rescaled_estimators())
def test_identities(rows, method, value, estimator):
    logprobs, _, tail = rows
    head, bucket = Recalibration(method, value).apply(logprobs, tail, estimator=estimator)
    expected = logprobs if estimator == "bucket" else logprobs - np.logaddexp.reduce(logprobs, axis=1)[:, None]
    np.testing.assert_allclose(head, expected, atol=1e-12)
    if estimator == "bucket":
        np.testing.assert_allclose(bucket, tail, atol=1e-12)


@pytest.mark.parametrize("method", RECALIBRATIONS.builtin)
def test_fewer_ranks_move_into_the_tail(method):
    logits = np.random.default_rng(2).normal(size=(40, 15)) * 2
    logprobs8, _, tail8 = topk(logits, 8)
    logprobs3, _, tail3 = topk(logits, 3)
    recalibration = Recalibration(method, VALUES[method])
    head, bucket = recalibration.apply(logprobs8, tail8, estimator="bucket", top_k=3)
    expected_head, expected_bucket = recalibration.apply(logprobs3, tail3, estimator="bucket")
    np.testing.assert_allclose(head, expected_head, atol=1e-9)
    np.testing.assert_allclose(bucket, expected_bucket, atol=1e-9)
    np.testing.assert_allclose(bucket, np.logaddexp(tail8, np.logaddexp.reduce(logprobs8[:, 3:], axis=1)), atol=1e-9)


def test_full_vocabulary_has_an_empty_bucket():
    logprobs, _, tail = topk(np.random.default_rng(3).normal(size=(4, 6)), 6)
    head, bucket = Recalibration().apply(logprobs, tail, estimator="bucket")
    np.testing.assert_allclose(head, logprobs, atol=1e-12)
    assert bucket.tolist() == [-np.inf] * 4


@pytest.mark.parametrize(
    ("method", "value", "match"),
    [
        ("temperature", 1.0, "Unknown recalibration method 'temperature'"),
        ("none", 0.3, "takes no value"),
        ("probability_temperature", None, "needs a value"),
        ("probability_temperature", 0.0, "above 0"),
        ("logit_temperature", -1.0, "above 0"),
        ("logit_temperature", math.nan, "above 0"),
        ("logit_temperature", math.inf, "above 0"),
        ("label_smoothing", 1.0, "0 <= delta < 1"),
        ("label_smoothing", -0.1, "0 <= delta < 1"),
        ("label_smoothing", math.nan, "0 <= delta < 1"),
        ("log_label_smoothing", -0.1, "finite delta >= 0"),
        ("log_label_smoothing", math.inf, "finite delta >= 0"),
        ("log_label_smoothing", math.nan, "finite delta >= 0"),
        ("label_smoothing", "0.1", "must be a number"),
        ("label_smoothing", True, "must be a number"),
    ],
)
def test_bad_values_are_refused(method, value, match):
    with pytest.raises(ValueError, match=match):
        Recalibration(method, value)


def test_tensors_of_any_precision_and_with_a_gradient():
    torch = pytest.importorskip("torch")
    lp = torch.tensor([[-0.1, -3.0]], requires_grad=True)
    want = Recalibration("logit_temperature", 2.0).apply(lp.detach().numpy())[0]
    assert (Recalibration("logit_temperature", 2.0).apply(lp)[0] == want).all()
    low = Recalibration("logit_temperature", 2.0).apply(lp.bfloat16())[0]
    np.testing.assert_allclose(low, want, atol=0.02)


@pytest.mark.parametrize(
    ("logprobs", "tail", "kwargs", "match"),
    [
        ([[-0.1, -3.0], [-0.2, math.nan]], None, {}, "row 1, column 1 is nan"),
        ([[-0.1, -3.0], [0.5, -2.0]], None, {}, "row 1, column 0 is 0.5"),
        ([[-3.0, -0.1]], None, {}, "row 0 rises from column 0"),
        ([[-0.1, -0.1]], None, {}, "row 0 holds a probability mass of 1.8"),
        ([[-np.inf, -np.inf]], None, {}, "row 0 holds a probability mass of 0"),
        ([-0.1, -3.0], None, {}, r"shape \[positions, k\]"),
        ([[-0.1, -3.0]], None, {"estimator": "bucket"}, "needs `tail_logprob`"),
        ([[-0.1, -3.0]], [0.2], {"estimator": "bucket"}, "row 0 is 0.2"),
        ([[-0.1, -3.0]], [math.nan], {"estimator": "bucket"}, "row 0 is nan"),
        ([[-0.1, -3.0]], [-0.5], {"estimator": "bucket"}, "Row 0: the kept mass plus the tail"),
        ([[-0.1, -3.0]], [-3.0, -3.0], {"estimator": "bucket"}, r"shape \[1\]"),
        ([[-0.1, -3.0]], None, {"estimator": "sampled"}, "Unknown estimator 'sampled'"),
        (np.ma.masked_array([[-0.1, -3.0]], [[False, True]]), None, {}, "row 0 is masked"),
        ([[-0.1, -3.0]], None, {"top_k": 3}, "from 1 to the 2 tokens"),
        ([[-0.1, -3.0]], None, {"top_k": 0}, "from 1 to the 2 tokens"),
    ],
)
def test_bad_arrays_are_refused(logprobs, tail, kwargs, match):
    with pytest.raises(ValueError, match=match):
        Recalibration().apply(logprobs, tail, **kwargs)


@pytest.mark.parametrize("method", ["label_smoothing", "log_label_smoothing"])
def test_label_smoothing_needs_two_tokens(method):
    with pytest.raises(ValueError, match="at least two kept tokens"):
        Recalibration(method, 0.1).apply([[-0.1, -3.0]], top_k=1)
    assert Recalibration(method, 0.0).apply([[-0.1, -3.0]], top_k=1)[0].tolist() == [[0.0]]


@pytest.mark.parametrize("method", RECALIBRATIONS.builtin)
def test_recalibration_round_trips_through_json(method):
    recalibration = Recalibration(method, VALUES[method])
    assert Recalibration.from_dict(json.loads(json.dumps(recalibration.to_dict()))) == recalibration
    with pytest.raises(ValueError, match="got the keys"):
        Recalibration.from_dict({**recalibration.to_dict(), "c": 1.0})


# --- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", rescaled_estimators())
@pytest.mark.parametrize("objective", ["ece", "nll"])
def test_fit_recovers_a_known_temperature_when_everything_is_kept(estimator, objective):
    cache = simulate(4000, temperature=2.0, k=12)
    fit = fit_recalibration(
        cache, method="logit_temperature", objective=objective, estimator=estimator, n_bootstrap=100
    )
    assert fit.recalibration.value == pytest.approx(2.0, abs=0.2)
    assert fit.bootstrap["low"] <= 2.0 <= fit.bootstrap["high"]
    assert fit.chosen.ece < fit.raw.ece
    assert fit.n == fit.n_rows == 4000 and fit.gold_coverage == 1.0
    assert not fit.at_boundary and fit.messages == []


def test_curve_holds_both_stages_of_the_paper():
    fit = fit_recalibration(simulate(2000, temperature=2.0), n_bootstrap=0)
    coarse = [p.value for p in fit.curve if p.stage == "coarse"]
    fine = [p.value for p in fit.curve if p.stage == "fine"]
    assert coarse == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    best = min((p for p in fit.curve if p.stage == "coarse"), key=lambda p: p.ece).value
    np.testing.assert_allclose(fine, best + np.arange(-5, 6) * 0.02, atol=1e-9)
    assert fit.chosen.ece == min(p.ece for p in fit.curve)
    assert fit.bootstrap is None


def test_fine_stage_never_reaches_zero():
    # Labels that always are rank 1 of a flat teacher: the sharpest c is best.
    flat = np.log(np.tile([0.3, 0.2, 0.2, 0.15, 0.15], (1500, 1)))
    cache = {"logprobs": flat, "ids": np.tile(np.arange(5), (1500, 1)), "labels": np.zeros(1500, dtype=int)}
    with pytest.warns(UserWarning, match="edge of the values tried"):
        fit = fit_recalibration(cache)
    assert min(p.value for p in fit.curve) == 0.02
    assert fit.recalibration.value == 0.02 and fit.at_boundary


@pytest.mark.parametrize("estimator", rescaled_estimators())
@pytest.mark.parametrize("method", RECALIBRATIONS.builtin[1:])
def test_curve_agrees_with_a_direct_computation(method, estimator):
    cache = simulate(1200, temperature=1.6, seed=5)
    fit = fit_recalibration(cache, method=method, estimator=estimator, n_bootstrap=0)
    head, bucket = fit.recalibration.apply(cache["logprobs"], cache["tail_logprob"], estimator=estimator)
    hit = cache["ids"] == cache["labels"][:, None]
    best = head.argmax(1)
    confidence = np.exp(head.max(1))
    correct = hit[np.arange(1200), best]
    ece = 0.0
    for b in range(10):
        inside = (confidence > b / 10) & (confidence <= (b + 1) / 10)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert fit.chosen.ece == pytest.approx(ece, abs=1e-12)
    target, gold = np.exp(head), hit.astype(float)
    if estimator == "bucket":
        target = np.c_[target, np.exp(bucket)]
        gold = np.c_[gold, ~hit.any(1)]
    kept = gold.any(1)
    if fit.chosen.nll is not None:
        nll = -np.log((target * gold).sum(1)[kept]).mean()
        assert fit.chosen.nll == pytest.approx(nll, abs=1e-12)
    brier = np.where(kept, np.square(target - gold).sum(1), np.square(target).sum(1) + 1.0).mean()
    assert fit.chosen.brier == pytest.approx(brier, abs=1e-12)


def test_the_temperatures_tried_include_no_rescale():
    cache = simulate(1500, temperature=2.0)
    fit = fit_recalibration(cache, method="logit_temperature", estimator="bucket", objective="nll", n_bootstrap=0)
    [unscaled] = [point for point in fit.curve if point.value == 1.0]
    assert (unscaled.ece, unscaled.nll) == pytest.approx((fit.raw.ece, fit.raw.nll), abs=1e-12)


def test_min_value_allows_softer_targets_only():
    # Labels sharper than the teacher: the best T lies below 1.
    cache = simulate(2000, temperature=0.7, k=12)
    options = {"method": "logit_temperature", "objective": "nll", "n_bootstrap": 50}
    assert fit_recalibration(cache, **options).recalibration.value < 0.9
    with pytest.warns(UserWarning, match="does not improve") as caught:
        fit = fit_recalibration(cache, min_value=1, **options)
    assert len(caught) == 1  # a choice at the bound that was asked for is no edge of the search
    assert fit.recalibration.value == 1.0 and not fit.at_boundary and fit.min_value == 1.0
    assert [p.value for p in fit.curve if p.stage == "coarse"][:3] == [1.0, 1.1, 1.2]
    assert [p.value for p in fit.curve if p.stage == "fine"] == [1.0, 1.02, 1.04, 1.06, 1.08, 1.1]
    assert fit.bootstrap["low"] == fit.bootstrap["high"] == 1.0


def test_min_value_off_the_grid_is_tried_and_changes_nothing_above_it():
    cache = simulate(2000, temperature=2.0, k=12)
    options = {"method": "logit_temperature", "objective": "nll", "n_bootstrap": 50}
    free, bounded = fit_recalibration(cache, **options), fit_recalibration(cache, min_value=1.05, **options)
    assert [p.value for p in bounded.curve if p.stage == "coarse"][:3] == [1.05, 1.1, 1.2]
    assert [p for p in bounded.curve if p.stage == "fine"] == [p for p in free.curve if p.stage == "fine"]
    assert bounded.recalibration == free.recalibration and bounded.bootstrap == free.bootstrap
    # The bound lies between two fine values, and is itself the best.
    with pytest.warns(UserWarning, match="does not improve"):
        fit = fit_recalibration(simulate(2000, temperature=0.7, k=12), min_value=1.05, **options)
    assert [p.value for p in fit.curve if p.stage == "fine"] == [1.05, 1.07, 1.09, 1.11, 1.13, 1.15]
    assert fit.recalibration.value == 1.05 and not fit.at_boundary


def test_log_label_smoothing_is_fitted():
    cache = simulate(3000, temperature=2.0)
    fit = fit_recalibration(cache, method="log_label_smoothing", n_bootstrap=20)
    assert fit.chosen.ece < 0.7 * fit.raw.ece
    assert [p.value for p in fit.curve if p.stage == "coarse"][::10] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_ties_go_to_the_value_nearest_to_no_rescale():
    # Every teacher row is certain, so T changes nothing and every value has the same score.
    n = 1500
    sure = np.tile([0.0, -np.inf], (n, 1))
    cache = {"logprobs": sure, "ids": np.tile([3, 4], (n, 1)), "labels": np.full(n, 3)}
    with pytest.warns(UserWarning, match="does not improve"):
        fit = fit_recalibration(cache, method="logit_temperature")
    assert fit.recalibration.value == 1.0 and not fit.at_boundary


def test_bucket_is_fitted_on_the_bucket():
    # 40 % of the labels lie outside the k: the bucket's NLL must pay for them, the topk NLL cannot.
    cache = simulate(3000, k=2)
    covered = (cache["ids"] == cache["labels"][:, None]).any(1).mean()
    bucket = fit_recalibration(cache, method="none", estimator="bucket")
    topk_fit = fit_recalibration(cache, method="none", estimator="topk")
    assert bucket.gold_coverage == topk_fit.gold_coverage == pytest.approx(covered)
    assert bucket.raw.nll > topk_fit.raw.nll
    # The teacher is exact here, so the bucket target is calibrated and the renormalised one is over-confident.
    assert bucket.raw.ece < 0.04 < topk_fit.raw.ece


def test_rows_are_resampled_whole():
    base = simulate(1500, temperature=2.0, seed=7)
    repeated = {name: np.repeat(value, 4, axis=0) for name, value in base.items()}
    first = np.tile([True, False, False, False], 1500)
    options = {"method": "logit_temperature", "objective": "nll", "n_bootstrap": 200}
    single = fit_recalibration(base, **options)
    rows = fit_recalibration({**repeated, "first": first}, **options)
    naive = fit_recalibration(repeated, **options)
    assert rows.recalibration == single.recalibration == naive.recalibration
    assert rows.n == 6000 and rows.n_rows == 1500
    assert rows.bootstrap["sd"] == pytest.approx(single.bootstrap["sd"], rel=0.3)
    assert naive.bootstrap["sd"] < 0.7 * rows.bootstrap["sd"]


def test_first_positions_only():
    one, other = simulate(1500, temperature=2.0, seed=8), simulate(1500, temperature=0.5, seed=9)
    mixed = {name: np.stack([one[name], other[name]], 1).reshape(-1, *one[name].shape[1:]) for name in one}
    mixed["first"] = np.tile([True, False], 1500)
    fit = fit_recalibration(mixed, method="logit_temperature", positions="first", n_bootstrap=0)
    assert fit.n == 1500 and fit.positions == "first"
    assert fit.recalibration == fit_recalibration(one, method="logit_temperature", n_bootstrap=0).recalibration
    del mixed["first"]
    with pytest.raises(ValueError, match="where a row starts"):
        fit_recalibration(mixed, positions="first")


def test_many_rows_are_grouped_for_resampling():
    fit = fit_recalibration(
        simulate(9000, temperature=2.0, k=12), method="logit_temperature", objective="nll", n_bootstrap=100
    )
    assert fit.n_rows == 9000
    assert 0.01 < fit.bootstrap["sd"] < 0.06


def test_warnings_of_the_fit():
    for objective, advised in (("ece", True), ("nll", False)):
        with pytest.warns(UserWarning, match="Only 300 positions") as caught:
            fit_recalibration(simulate(300, temperature=2.0), objective=objective, n_bootstrap=0)
        assert any("objective='nll'" in str(warning.message) for warning in caught) is advised
    with pytest.warns(UserWarning, match="does not improve the validation ECE"):
        # A calibrated teacher with everything kept: no c is the identity.
        fit = fit_recalibration(simulate(5000, k=12))
    assert fit.chosen.ece >= fit.raw.ece and len(fit.messages) == 1
    with pytest.warns(UserWarning, match="edge of the values tried"):
        fit = fit_recalibration(simulate(3000, temperature=9.0), method="logit_temperature", objective="nll")
    assert fit.at_boundary and fit.recalibration.value == pytest.approx(5.1)


def test_a_good_fit_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_recalibration(simulate(3000, temperature=2.0), n_bootstrap=20)


@pytest.mark.parametrize("method", RECALIBRATIONS.builtin)
@pytest.mark.filterwarnings("ignore")
def test_fit_round_trips_through_json(method):
    fit = fit_recalibration(simulate(300, temperature=2.0), method=method, n_bootstrap=20)
    text = json.dumps(fit.to_dict(), allow_nan=False)
    assert RecalibrationFit.from_dict(json.loads(text)) == fit
    before_bounds = {name: value for name, value in json.loads(text).items() if name != "min_value"}
    assert RecalibrationFit.from_dict(before_bounds) == fit


def test_fit_is_deterministic_and_takes_float16():
    cache = simulate(1500, temperature=2.0)
    half = {**cache, "logprobs": cache["logprobs"].astype(np.float16)}
    one, two = (fit_recalibration(c, n_bootstrap=50, seed=3) for c in (cache, cache))
    assert one == two
    assert fit_recalibration(half, n_bootstrap=0).recalibration.value == pytest.approx(
        one.recalibration.value, abs=0.03
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"labels": np.zeros(0, dtype=int), "ids": np.zeros((0, 5), dtype=int), "logprobs": np.zeros((0, 5))},
            "nothing to fit",
        ),
        ({"labels": np.zeros(3, dtype=int)}, "do not fit together"),
        ({"labels": np.full(300, -100)}, "Label 0 of the cache is -100"),
        ({"labels": np.zeros(300)}, "integer token ids"),
        ({"ids": None}, r"lacks \['ids'\]"),
        ({"first": np.zeros(300, dtype=bool)}, "first supervised one"),
    ],
)
def test_bad_caches_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        fit_recalibration({**simulate(300), **change})


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"method": "platt"}, "`method` must be one of"),
        ({"objective": "brier"}, "`objective` must be one of"),
        ({"estimator": "sampled"}, "`estimator` must be one of"),
        ({"positions": "last"}, "`positions` must be one of"),
        ({"top_k": 9}, "from 1 to the 5 tokens"),
        ({"n_bins": 0}, "`n_bins` must be >= 1"),
        ({"min_value": 0.0}, "finite temperature above 0"),
        ({"min_value": 1.2}, "leaves no probability_temperature to try: the search ends at 1.0"),
        ({"method": "log_label_smoothing", "min_value": -0.1}, "finite delta >= 0"),
        ({"method": "none", "min_value": 1.0}, "has no effect with method='none'"),
        ({"estimator": "bucket", "drop_tail": True}, "needs `tail_logprob`"),
    ],
)
def test_bad_options_are_refused(kwargs, match):
    cache = simulate(300)
    if kwargs.pop("drop_tail", False):
        del cache["tail_logprob"]
    with pytest.raises(ValueError, match=match):
        fit_recalibration(cache, **kwargs)


def cache_dataset(arrays, lengths):
    """Rows of a cache: a prompt of two tokens, then `lengths[i]` supervised ones."""
    rows, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        labels = arrays["labels"][part].tolist()
        rows.append(
            {
                "input_ids": [1, 2, *labels],
                "labels": [-100, -100, *labels],
                "teacher_topk_ids": arrays["ids"][part].tolist(),
                "teacher_topk_logprobs": arrays["logprobs"][part].tolist(),
                "teacher_tail_logprob": arrays["tail_logprob"][part].tolist(),
                "teacher_cache": "test",
                # Checked by `verify_teacher_cache`, not by the fit.
                "teacher_row_digest": 0,
            }
        )
        start += length
    return Dataset.from_list(rows)


@pytest.mark.parametrize("estimator", ["topk", "bucket"])
def test_a_cache_dataset_gives_the_same_fit_as_its_arrays(estimator):
    arrays = simulate(1200, temperature=2.0)
    lengths = [1, 2, 3] * 200
    dataset = cache_dataset(arrays, lengths)
    first = np.zeros(1200, dtype=bool)
    first[np.cumsum([0, *lengths[:-1]])] = True
    options = {"method": "logit_temperature", "estimator": estimator, "n_bootstrap": 30}
    fit = fit_recalibration(dataset, **options)
    assert fit == fit_recalibration({**arrays, "first": first}, **options)
    assert fit.n == 1200 and fit.n_rows == 600
    with pytest.warns(UserWarning, match="Only 600 positions"):
        assert fit_recalibration(dataset, positions="first", **options).n == 600


def test_a_gold_outside_the_kept_tokens_counts_as_the_bucket():
    arrays = {
        "ids": np.array([[4, 5], [6, 4], [5, 6]]),
        "logprobs": np.log([[0.6, 0.2], [0.5, 0.25], [0.9, 0.05]]),
        "tail_logprob": np.log([0.2, 0.25, 0.05]),
        "labels": np.array([4, 4, 9]),  # rank 1, rank 2, and a token the cache did not keep
    }
    dataset = cache_dataset(arrays, [1, 2])
    with pytest.warns(UserWarning, match="Only 3 positions"):
        fit = fit_recalibration(
            dataset, method="logit_temperature", estimator="bucket", objective="nll", min_value=1.0, n_bootstrap=0
        )
    nll = {point.value: point.nll for point in fit.curve}
    assert fit.gold_coverage == pytest.approx(2 / 3)
    assert fit.raw.nll == nll[1.0] == pytest.approx(-(math.log(0.6) + math.log(0.25) + math.log(0.05)) / 3)
    # T = 2: .8 * sqrt(.6) / (sqrt(.6) + sqrt(.2)) = .50718 and .75 * sqrt(.25) / (sqrt(.5) + sqrt(.25)) = .31066; no T
    # moves the bucket.
    assert nll[2.0] == pytest.approx(-(math.log(0.50718) + math.log(0.31066) + math.log(0.05)) / 3, abs=1e-4)
    assert fit.chosen.nll == min(nll.values())


def test_an_empty_validation_split_is_refused():
    dataset = cache_dataset(simulate(10), [10])
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_recalibration(dataset.select([]))
    masked = dataset.map(
        lambda row: {
            "labels": [-100] * 12,
            "teacher_topk_ids": [],
            "teacher_topk_logprobs": [],
            "teacher_tail_logprob": [],
        }
    )
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_recalibration(masked)
    with pytest.raises(ValueError, match="teacher_topk_ids"):
        fit_recalibration(dataset.remove_columns("teacher_topk_ids"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ece", "nll"])
@pytest.mark.parametrize(("method", "value"), [("probability_temperature", 0.36), ("logit_temperature", 1.5)])
def test_known_values_lie_inside_the_bootstrap_interval(method, value, objective):
    result = recover(method, value, objective, n=2000, runs=40, n_bootstrap=200, seed=1000)
    assert result["coverage"] >= 0.9
    assert result["mean"] == pytest.approx(value, rel=0.05)
