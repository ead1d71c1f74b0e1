"""Scores against soft gold: equal to a few lines of numpy, and what they mean."""

import numpy as np
import pytest

from first_trl.calibration.distribution import votes_to_distribution
from first_trl.evaluation.distributions import (
    OptionPredictions,
    baselines,
    check_distribution,
    distribution_scores,
)


def made(n: int = 60, seed: int = 0) -> OptionPredictions:
    rng = np.random.default_rng(seed)
    kinds = [("choice", "score", "noul")[i % 3] for i in range(n)]
    sizes = [2 if kind == "noul" else int(rng.integers(3, 6)) for kind in kinds]
    p = [rng.dirichlet(np.ones(size)) for size in sizes]
    q = [rng.dirichlet(np.ones(size)) if i % 2 else np.eye(size)[i % size] for i, size in enumerate(sizes)]
    return OptionPredictions([str(i) for i in range(n)], kinds, p, q)


def test_scores_equal_plain_numpy():
    data = made()
    n, bins = len(data.ids), 10
    kl = brier = nll = 0.0
    rps, confidence, right, drawn = [], [], [], []
    for kind, p, q in zip(data.kinds, data.probabilities, data.gold, strict=True):
        nll -= sum(b * np.log(a) for a, b in zip(p, q, strict=True) if b > 0) / n
        kl += sum(b * np.log(b / a) for a, b in zip(p, q, strict=True) if b > 0) / n
        brier += sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / n
        if kind == "score":
            rps.append(sum((p[:k].sum() - q[:k].sum()) ** 2 for k in range(1, len(p))) / (len(p) - 1))
        confidence.append(max(p))
        right.append(float(np.argmax(p) == np.argmax(q)))
        drawn.append(q[np.argmax(p)])
    index = np.ceil(np.array(confidence) * bins).astype(int) - 1

    def ece(outcome):
        gaps = [abs((np.array(confidence) - outcome)[index == b].sum()) for b in range(bins)]
        return sum(gaps) / n

    scores = distribution_scores(data)
    expected = {
        "kl": kl, "nll": nll, "brier": brier, "rps": np.mean(rps), "accuracy": np.mean(right),
        "accuracy_drawn": np.mean(drawn), "ece_argmax": ece(np.array(right)), "ece_drawn": ece(np.array(drawn)),
    }  # fmt: skip
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name


def test_matching_unsure_gold_is_calibrated_for_drawn_labels_only():
    rng = np.random.default_rng(1)
    gold = [rng.dirichlet(np.ones(3)) for _ in range(2000)]
    scores = distribution_scores(OptionPredictions([str(i) for i in range(2000)], ["choice"] * 2000, gold, gold))
    assert scores["kl"] == pytest.approx(0) and scores["brier"] == pytest.approx(0)
    assert scores["ece_drawn"] == pytest.approx(0, abs=1e-12)
    assert scores["accuracy"] == 1.0 and scores["ece_argmax"] > 0.3


def test_drawn_ece_is_the_mean_over_draws():
    data = made(3000, seed=2)
    rng = np.random.default_rng(3)
    values = []
    for _ in range(30):
        labels = [np.eye(len(q))[rng.choice(len(q), p=q)] for q in data.gold]
        one_hot = OptionPredictions(data.ids, data.kinds, data.probabilities, labels)
        values.append(distribution_scores(one_hot)["ece_argmax"])
    # A draw adds noise, which an absolute value turns upwards
    assert distribution_scores(data)["ece_drawn"] <= np.mean(values) + 0.003
    assert distribution_scores(data)["ece_drawn"] == pytest.approx(np.mean(values), abs=0.01)


def test_baselines():
    data = made(300)
    found = baselines(data)
    uniform, prior = distribution_scores(found["uniform"]), distribution_scores(found["prior"])
    assert prior["nll"] <= uniform["nll"]
    assert uniform["mean_confidence"] == pytest.approx(np.mean([1 / len(q) for q in data.gold]))
    assert distribution_scores(baselines(data)["prior"])["kl"] > 0


def test_the_prior_of_a_question_of_its_own_is_not_its_answer():
    gold = [np.eye(3)[i % 3 if i < 25 else 0] for i in range(40)]
    options = [(f"a{i}", f"b{i}", f"c{i}") for i in range(25)] + [("yes", "no", "unknown")] * 15
    data = OptionPredictions([str(i) for i in range(40)], ["choice"] * 40, gold, gold, options)
    prior = baselines(data)["prior"].probabilities
    np.testing.assert_allclose(prior[:25], [[9 / 25, 8 / 25, 8 / 25]] * 25)
    np.testing.assert_allclose(prior[25:], [[1, 0, 0]] * 15)


@pytest.mark.parametrize(
    ("values", "message"),
    [([0.5, np.nan], "nan"), ([1.2, -0.2], "negative"), ([0.5, 0.4], "adds up to 0.9"), ([], "shape"), ([3, 1], "4")],
)
def test_bad_distributions(values, message):
    with pytest.raises(ValueError, match=message):
        check_distribution(values, "The gold")


def test_the_question_is_named():
    with pytest.raises(ValueError, match="Question 'q7': the gold adds up to"):
        OptionPredictions(["q7"], ["choice"], [np.array([0.5, 0.5])], [np.array([0.5, 0.1])])
    with pytest.raises(ValueError, match="Question 'q7': 2 predicted probabilities for 3"):
        OptionPredictions(["q7"], ["choice"], [np.array([0.5, 0.5])], [np.ones(3) / 3])


def test_votes():
    assert votes_to_distribution([3, 1, 0]).tolist() == [0.75, 0.25, 0.0]
    for bad in ([0, 0], [1, -1], [0.5, 0.5], [np.nan, 1]):
        with pytest.raises(ValueError, match=r"Votes are counts|No annotator"):
            votes_to_distribution(bad)
