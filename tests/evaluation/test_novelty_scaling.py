"""Temperatures by novelty from states: layer, features and slope from held-out groups, against planted truths."""

import numpy as np
import pytest

from first_trl.calibration.partition import LOG_BETAS
from first_trl.evaluation.answer_states import AnswerStates
from first_trl.evaluation.cross_group import cluster_groups, cross_group_slopes
from first_trl.evaluation.novelty_scaling import FEATURES, fit_novelty_scaling


WIDTH = 12


def answers(logits: np.ndarray, gold: np.ndarray, states: dict[int, np.ndarray]) -> AnswerStates:
    """States as a forward would give them, of a vocabulary that is the choices."""
    n, choices = logits.shape
    z = logits - logits.max(1, keepdims=True)
    scaled = z[:, None, :] * np.exp(LOG_BETAS)[:, None]
    values = np.logaddexp.reduce(scaled, axis=2)
    slopes = (np.exp(scaled - values[..., None]) * scaled).sum(2)
    return AnswerStates(
        gold, np.full(n, choices), np.tile(np.arange(choices), (n, 1)), z.astype(np.float32), z.argmax(1),
        -np.sort(-z, axis=1)[:, :5].astype(np.float32), values.astype(np.float32), slopes.astype(np.float32),
        np.zeros(n, bool), {layer: state.astype(np.float16) for layer, state in states.items()},
    )  # fmt: skip


def world(rng: np.random.Generator, n: int, spread: float) -> AnswerStates:
    """Rows whose layer 2 leaves the region of the training rows in proportion to how over-confident they are."""
    far = np.abs(rng.normal(size=n)) * spread
    state = np.concatenate([np.ones((n, 2)), rng.normal(size=(n, WIDTH - 2)) * (0.1 + far[:, None] * 0.3)], axis=1)
    z = rng.normal(size=(n, 5)) * 1.5
    cumulative = np.exp(z).cumsum(1) / np.exp(z).sum(1, keepdims=True)
    gold = (cumulative > rng.random((n, 1))).argmax(1)
    return answers(np.exp(0.2 + 0.8 * far)[:, None] * z, gold, {1: rng.normal(size=(n, WIDTH)), 2: state})


def test_the_layer_that_tells_is_chosen_and_confidence_falls_where_it_is_new():
    rng = np.random.default_rng(0)
    train, validation, new = world(rng, 800, 0.5), world(rng, 1500, 0.5), world(rng, 1500, 1.5)
    fitted = fit_novelty_scaling(train, validation)
    assert fitted.reference is not None and fitted.reference.layer == 2
    assert fitted.choice["layers"]["2"]["nll"] < fitted.choice["layers"]["1"]["nll"] - 0.005
    inside, outside = fitted.of(validation), fitted.of(new)
    assert outside.mean() > 1.2 * inside.mean()
    ids = np.arange(len(new)).astype(str)
    scores = {
        name: new.result(ids, given).report["full_vocab"]
        for name, given in (("one", fitted.temperature.scalar), ("x", outside))
    }
    assert scores["x"]["nll"] < scores["one"]["nll"] and scores["x"]["ece"] < scores["one"]["ece"]
    assert scores["x"]["accuracy"] == scores["one"]["accuracy"]
    only = fit_novelty_scaling(train, validation, layers=[1])
    assert only.temperature.slopes == (0.0,) and only.of(new) == pytest.approx(only.temperature.scalar)


def test_the_steepest_slope_that_validation_bears():
    rng = np.random.default_rng(0)
    train, validation = world(rng, 800, 0.5), world(rng, 1500, 0.5)
    best, free, paid = (
        fit_novelty_scaling(train, validation, layers=[2], **options).temperature
        for options in ({}, {"steepest": True}, {"steepest": True, "max_nll_increase": 0.01})
    )
    assert 1.5 * best.slopes[0] < free.slopes[0] < paid.slopes[0]
    assert 0.0 <= free.gain < 0.003 and -0.01 <= paid.gain < -0.004
    # Nothing is taken of a feature without use
    assert fit_novelty_scaling(train, validation, layers=[1], steepest=True).temperature.slopes == (0.0,)
    with pytest.raises(ValueError, match="single feature"):
        fit_novelty_scaling(train, validation, at_least_scalar=True, steepest=True)
    with pytest.raises(ValueError, match="single feature"):
        fit_novelty_scaling(train, validation, feature="hidden_state", steepest=True)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_gives_a_temperature_of_each_row_alone(feature):
    rng = np.random.default_rng(1)
    train, validation = world(rng, 300, 0.5), world(rng, 400, 0.5)
    told = rng.gamma(1.0, 0.1, len(train)) if feature == "disagreement" else None
    fitted = fit_novelty_scaling(train, validation, feature=feature, components=4, disagreement=told)
    given = fitted.of(validation)
    assert np.isfinite(given).all() and (given > 0).all() and fitted.temperature.gain >= -1e-9
    some = np.array([5, 3, 99])
    assert fitted.of(validation.rows(some)) == pytest.approx(given[some], rel=1e-6)


def test_what_the_states_tell_of_a_disagreement_lowers_confidence_there():
    """Teachers disagree along one direction of the states, in which the student is over-confident."""
    rng = np.random.default_rng(3)

    def rows(n):
        state = rng.normal(size=(n, WIDTH))
        z = rng.normal(size=(n, 5)) * 1.5
        cumulative = np.exp(z).cumsum(1) / np.exp(z).sum(1, keepdims=True)
        gold = (cumulative > rng.random((n, 1))).argmax(1)
        apart = state / np.linalg.norm(state, axis=1, keepdims=True) @ np.eye(WIDTH)[0] * np.sqrt(WIDTH)
        return answers(np.exp(0.5 + 0.4 * apart)[:, None] * z, gold, {1: state}), apart

    (train, apart), (validation, unseen) = rows(1500), rows(2000)
    told = np.exp(-3.0 + apart + 0.5 * rng.normal(size=len(apart)))
    told[::10] = np.nan  # rows that the committee was not asked about
    fitted = fit_novelty_scaling(train, validation, feature="disagreement", disagreement=told)
    assert np.corrcoef(fitted.features(validation.states)[:, 0], unseen)[0, 1] > 0.97
    assert fitted.temperature.slopes[0] == pytest.approx(0.4, abs=0.1)
    shuffled = fit_novelty_scaling(train, validation, feature="disagreement", disagreement=rng.permutation(told))
    assert shuffled.temperature.slopes[0] < 0.2
    same = fit_novelty_scaling(train, validation, feature="disagreement", disagreement=np.zeros(len(train)))
    assert same.temperature.slopes == (0.0,)


@pytest.mark.parametrize("given", [None, np.zeros(3), np.full(50, -0.1), np.full(50, np.inf), np.full(50, np.nan)])
def test_a_disagreement_that_is_none(given):
    rng = np.random.default_rng(4)
    with pytest.raises(ValueError, match="disagreement"):
        fit_novelty_scaling(world(rng, 50, 0.5), world(rng, 60, 0.5), feature="disagreement", disagreement=given)


def test_equal_layers_give_the_first():
    rng = np.random.default_rng(2)
    rows = [world(rng, n, 0.5) for n in (300, 500)]
    train, validation = (
        AnswerStates(**{**vars(each), "states": {4: each.states[2], 3: each.states[2]}}) for each in rows
    )
    fitted = fit_novelty_scaling(train, validation)
    assert fitted.reference is not None and fitted.reference.layer == 3


def groups_world(rng: np.random.Generator, effect: float) -> tuple[AnswerStates, list[str]]:
    """Groups lie at places of their own; a direction tells the answer, and less so the farther a group lies out."""
    n_groups, size = 24, 60
    places = rng.normal(size=(n_groups, WIDTH)) * 2.0
    places[:, :3] = 0.0
    of_row = np.repeat(np.arange(n_groups), size)
    meaning = rng.integers(3, size=len(of_row))
    known = np.eye(3)[meaning] * 2.0
    turned = rng.random(len(of_row)) < effect * (np.arange(len(of_row)) % 2)
    gold = np.where(turned, (meaning + 1) % 3, meaning)
    state = places[of_row] + 0.3 * rng.normal(size=(len(of_row), WIDTH))
    state[:, :3] += known
    logits = 4.0 * np.eye(3)[meaning] + 0.1 * rng.normal(size=(len(of_row), 3))
    return answers(logits, gold, {1: state}), [f"g{group}" for group in of_row]


def test_the_slope_of_groups_is_found_where_new_groups_are_answered_worse():
    rng = np.random.default_rng(3)
    rows, names = groups_world(rng, 0.0)
    # Each group has a code of its own for its answers: a head that has not seen a group is sure and wrong
    shift = {name: int(rng.integers(3)) for name in dict.fromkeys(names)}
    gold = (rows.gold + np.array([shift[name] for name in names])) % 3
    new = AnswerStates(**{**vars(rows), "gold": gold})
    found = cross_group_slopes(new, names)[1]
    assert found["slopes"][0] > 0.1 and found["gain"] > 0.01 and found["n"] > 1300
    assert all(fold["accuracy_new"] < fold["accuracy_known"] for fold in found["folds"])
    assert all(fold["feature_new"][0] > fold["feature_known"][0] for fold in found["folds"])
    same = cross_group_slopes(rows, names)[1]
    assert same["slopes"][0] < found["slopes"][0] / 2
    # These are as often right however far they lie: the whole slope costs something there
    validation = groups_world(np.random.default_rng(3), 0.5)[0]
    whole, part = (
        fit_novelty_scaling(new, validation, slopes={1: found}, max_nll_increase=most) for most in (np.inf, 0.001)
    )
    assert whole.temperature.slopes == tuple(found["slopes"])
    assert whole.temperature.gain < -0.001 <= part.temperature.gain
    assert 0 <= part.temperature.slopes[0] < 0.9 * whole.temperature.slopes[0]
    with pytest.raises(ValueError, match=r"`heads` has 60 rows"):
        cross_group_slopes(new, names, new.rows(np.arange(60)))
    control = cross_group_slopes(new, names, feature="max_probability")
    assert set(control) == {0} and len(control[0]["slopes"]) == 1


def same_partition(a, b) -> bool:
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


def test_rows_without_groups_are_clustered():
    rng = np.random.default_rng(5)
    truth = rng.integers(12, size=600)
    places = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    state = places[truth] * rng.uniform(1, 9, size=(600, 1)) + 0.02 * rng.normal(size=(600, WIDTH))
    noise = rng.normal(size=(600, WIDTH))
    # Of layers 1, 2 and 5 the middle one counts, and the length of a state does not
    rows = answers(rng.normal(size=(600, 3)), rng.integers(3, size=600), {1: noise, 2: state, 5: noise})
    found = cluster_groups(rows, 12)
    assert same_partition(found, truth.tolist())
    assert found == cluster_groups(rows, 12) and len(set(cluster_groups(rows, 30, seed=1))) == 30
    # The groups that were found serve as those that were given do
    given, clustered = (cross_group_slopes(rows, names, layers=[2])[2] for names in (truth.tolist(), found))
    assert clustered["n"] == given["n"] and len(clustered["folds"]) == 4 and clustered["groups"] == 12
    copies = rows.rows(np.repeat([0, 1, 2], 50))
    assert len(set(cluster_groups(copies, 10))) == 3
    for wrong in (1, 601):
        with pytest.raises(ValueError, match="`clusters` must be from 2 to the 600 rows"):
            cluster_groups(rows, wrong)
    rows.states[2][7] = 0
    with pytest.raises(ValueError, match="zero or not finite"):
        cluster_groups(rows, 12)


def test_groups_that_do_not_serve_are_refused():
    rows, names = groups_world(np.random.default_rng(4), 0.3)
    with pytest.raises(ValueError, match="have 1 groups, and 4 folds"):
        cross_group_slopes(rows, ["same"] * len(rows))
    with pytest.raises(ValueError, match="have 0 groups"):
        cross_group_slopes(rows, [""] * len(rows))
    with pytest.raises(ValueError, match="2 entries for 1440"):
        cross_group_slopes(rows, names[:2])
    with pytest.raises(ValueError, match="too few"):
        cross_group_slopes(rows.rows(np.array([0, 60, 120, 180])), ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=r"layers \[7\] were read"):
        fit_novelty_scaling(rows, rows, layers=[7])
    with pytest.raises(ValueError, match="`feature` must be one of"):
        fit_novelty_scaling(rows, rows, feature="distances")
