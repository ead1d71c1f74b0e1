"""
The slope of a temperature by novelty, learnt where novelty occurs: on groups of training rows that were held out.

In-domain validation rows are hardly ever new, so a slope that is fitted on them says little about inputs that are. Where
training rows have groups (subjects, sources, templates), the groups are divided into folds. For each fold:

1. A linear head (multinomial logistic regression with a ridge) learns the answers of the *other* groups from the hidden
   states of the model *before it was fine-tuned*, which stay as they are. A fifth of these groups' rows is kept back: the
   layer, the ridge and the head's own in-domain temperature are chosen on it.
2. The distance `d` of the fold's rows, whose groups the head has not seen, is taken in the *fine-tuned* model, to the rows that
   the head has learnt from.
3. `log T(x) = log(in-domain temperature) + b (d(x) - mean of d on the rows kept back)`.

One slope `b >= 0` is fitted by NLL on the rows of all folds together, with the prior and the test of
[`~first_trl.calibration.novelty.fit_novelty_temperature`]. Nothing else is taken from the heads: they are weaker than the
model, and differently calibrated.

Rows without groups can be clustered into some, see [`cluster_groups`].

This is a cheap stand-in for training the model anew without each fold: one forward of the base. Heads on the fine-tuned
model's own states (`heads=None`) do not serve, since these states have seen the answers of all groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..calibration.conditional import fit_by_partition, partition_of
from ..calibration.novelty import LOG_RANGE, least_gain, logits_partition, mean_nll, scalar_temperature
from .answer_states import AnswerStates
from .novelty import fit_reference, principal_components, project
from .novelty_scaling import PARTS, known_layers, log_unsure, standardiser


_KEPT_BACK = 0.2
_HEAD_COMPONENTS = 128
_ROUNDS = 100
_HEAD_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class _Fold:
    """Rows of groups that a head has not seen (`new`), rows kept back of those that it has, and what it says of both."""

    learnt: np.ndarray
    kept: np.ndarray
    new: np.ndarray
    logits: np.ndarray
    gold: np.ndarray
    temperature: float
    summary: dict[str, float]


def cross_group_slopes(
    train: AnswerStates,
    groups: Sequence[str],
    heads: AnswerStates | None = None,
    *,
    feature: str = "distance",
    metric: str = "cosine",
    k: int = 10,
    components: int = 16,
    layers: Sequence[int] | None = None,
    folds: int = 4,
    seed: int = 0,
) -> dict[int, dict[str, Any]]:
    """
    Slopes from held-out groups.

    Args:
        train (`AnswerStates`):
            Training rows.
        groups (sequence of `N` `str`):
            Group of each; rows without one (`""`) are left out.
        heads (`AnswerStates`, *optional*):
            The same rows, read by the model before it was fine-tuned; by default the heads learn from `train`.
        feature, metric, k, components, layers, seed:
            As in [`~first_trl.evaluation.novelty_scaling.fit_novelty_scaling`].
        folds (`int`, *optional*, defaults to 4):
            Parts of the groups.

    Returns:
        `dict`: Layer (0 where the feature needs none) -> `slopes`, `nll` (a held-out row, at each of `PARTS` of these slopes), `gain` (nats a
        held-out row over the fold's own temperature), `n`, `folds` (a summary of each) and `groups` (their number).

    Raises:
        `ValueError`: No groups, fewer than there are folds, or too few rows.
    """
    names = np.asarray([str(group) for group in groups])
    if len(names) != len(train):
        raise ValueError(f"`groups` has {len(names)} entries for {len(train)} training rows.")
    usable = np.flatnonzero((names != "") & (train.gold >= 0))
    rows, names = train.rows(usable), names[usable]
    if heads is not None and len(heads) != len(train):
        raise ValueError(f"`heads` has {len(heads)} rows, and there are {len(train)} training rows.")
    learner = rows if heads is None else heads.rows(usable)
    distinct = np.unique(names)
    if len(distinct) < folds:
        raise ValueError(
            f"The training rows have {len(distinct)} groups, and {folds} folds are asked for: `cross_group` needs a `group` that "
            "the task fills in, and at least as many as folds. Cluster the rows, or fit on `validation`."
        )
    layer_names = known_layers(rows, layers)
    made = [_fold(learner, held, seed) for held in _held_out(names, folds, seed)]
    found = {}
    for layer in layer_names if feature.startswith("distance") else [0]:
        x = [_features(rows, fold, feature, layer, metric=metric, k=k, components=components) for fold in made]
        found[layer] = _pooled(made, x) | {"groups": len(distinct)}
    return found


def cluster_groups(states: AnswerStates, clusters: int, *, seed: int = 0) -> list[str]:
    """
    Groups of rows that have none: clusters of what a model makes of their prompts, by k-means (k-means++ starts, Lloyd's
    rounds until no row moves) on the hidden states of one length in the middle one of the layers that were read (the lower
    of two). The same states and seed give the same clusters.

    Args:
        states (`AnswerStates`):
            The rows, read by the model before it was fine-tuned, whose states know nothing of their answers.
        clusters (`int`):
            Their number; fewer where there are fewer distinct rows.
        seed (`int`, *optional*, defaults to 0):
            Of the starts.

    Returns:
        `list[str]`: Name of each row's cluster.

    Raises:
        `ValueError`: Fewer than two clusters, more than there are rows, or states that are zero or not finite.
    """
    if not 2 <= clusters <= len(states):
        raise ValueError(f"`clusters` must be from 2 to the {len(states)} rows there are, got {clusters}.")
    layers = sorted(states.states)
    points = torch.as_tensor(states.states[layers[(len(layers) - 1) // 2]]).double()
    length = points.norm(dim=-1, keepdim=True)
    if not (length.isfinite() & (length > 0)).all():
        raise ValueError(
            "A hidden state is zero or not finite, so the rows cannot be clustered. Check the model's weights."
        )
    points = points / length
    rng = np.random.default_rng(seed)
    centers = points[int(rng.integers(len(points)))][None]
    nearest = (points - centers[0]).square().sum(1)
    # Copies of a center are within rounding of it
    while len(centers) < clusters and float(nearest.max()) > 1e-12:
        share = nearest.numpy() / float(nearest.sum())
        centers = torch.cat([centers, points[int(rng.choice(len(points), p=share))][None]])
        nearest = torch.minimum(nearest, (points - centers[-1]).square().sum(1))
    label = torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        distance = centers.square().sum(1) - 2 * points @ centers.T
        found = distance.argmin(1)
        if torch.equal(found, label):
            break
        label = found
        sums = torch.zeros_like(centers).index_add_(0, label, points)
        count = torch.bincount(label, minlength=len(centers))
        # A center that lost all its rows stays where it is
        centers = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], centers)
    return [f"cluster {number}" for number in label.tolist()]


def _held_out(names: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """For each fold which rows it holds out: whole groups, of about the same number of rows in all."""
    distinct, counts = np.unique(names, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(distinct))
    order = order[np.argsort(-counts[order], kind="stable")]
    sizes, member = np.zeros(folds), {}
    for i in order:
        smallest = int(sizes.argmin())
        sizes[smallest] += counts[i]
        member[distinct[i]] = smallest
    of_row = np.array([member[name] for name in names])
    return [of_row == fold for fold in range(folds)]


def _fold(rows: AnswerStates, held: np.ndarray, seed: int) -> _Fold:
    known = np.random.default_rng(seed).permutation(np.flatnonzero(~held))
    kept, learnt = np.split(known, [max(1, round(_KEPT_BACK * len(known)))])
    classes, label = np.unique(rows.right_token, return_inverse=True)
    # An answer that the head never saw has no logit
    seen = np.isin(np.arange(len(classes)), label[learnt])
    kept, new = (part[seen[label[part]]] for part in (kept, np.flatnonzero(held)))
    if min(len(learnt), len(kept), len(new)) < 2 or seen.sum() < 2:
        raise ValueError(
            f"A fold has {len(learnt)} training rows of known groups, {len(kept)} kept back and {len(new)} of new groups: too "
            "few to learn a slope from. Fit on `validation`."
        )
    y = np.cumsum(seen)[label] - 1
    tried: list[tuple[float, np.ndarray]] = []
    for layer in sorted(rows.states):
        basis, center = principal_components(rows.states[layer][learnt], _HEAD_COMPONENTS)
        x = project(rows.states[layer], basis, center).double().numpy()
        weights = np.zeros((x.shape[1] + 1, int(seen.sum())))
        for ridge in sorted(_HEAD_RIDGES, reverse=True):
            weights = _logistic(x[learnt], y[learnt], weights, ridge)
            logits = x @ weights[:-1] + weights[-1]
            tried.append((mean_nll(*logits_partition(logits[kept], y[kept]), 1.0), logits))
    logits = min(tried, key=lambda each: each[0])[1]
    temperature = scalar_temperature(*logits_partition(logits[kept], y[kept]))
    accuracy = {
        name: float((logits[part].argmax(1) == y[part]).mean()) for name, part in (("known", kept), ("new", new))
    }
    summary = {
        "temperature": temperature,
        "temperature_new": scalar_temperature(*logits_partition(logits[new], y[new])),
        "accuracy_known": accuracy["known"],
        "accuracy_new": accuracy["new"],
        "rows_new": float(len(new)),
    }
    return _Fold(learnt, kept, new, logits, y, temperature, summary)


def _logistic(x: np.ndarray, y: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """Multinomial logistic regression with a ridge on all but the biases; weights `[D + 1, C]`."""
    from scipy.optimize import minimize

    shape = start.shape
    one_hot = np.eye(shape[1])[y]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = x @ weights[:-1] + weights[-1]
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        error = (np.exp(logits) - one_hot) / len(x)
        pull = ridge * weights[:-1]
        gradient = np.vstack([x.T @ error + pull, error.sum(0)])
        return float(-(logits * one_hot).sum() / len(x) + 0.5 * (weights[:-1] * pull).sum()), gradient.ravel()

    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return np.asarray(found.x).reshape(shape)


def _features(
    rows: AnswerStates, fold: _Fold, feature: str, layer: int, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Features of the rows kept back and of the new ones, standardised on those that the head has learnt from."""
    columns = []
    if feature.startswith("distance"):
        reference = fit_reference(rows.states[layer][fold.learnt], layer=layer, **options)
        columns.append([reference.feature(rows.states[layer][part]) for part in (fold.kept, fold.new)])
    if feature.endswith("max_probability"):
        log_p = fold.logits - np.logaddexp.reduce(fold.logits, axis=1, keepdims=True)
        unsure = log_unsure(np.exp(log_p.max(1)))
        mean, sd = standardiser(unsure[fold.learnt])
        columns.append([(unsure[part] - mean) / sd for part in (fold.kept, fold.new)])
    kept, new = (np.column_stack(parts) for parts in zip(*columns, strict=True))
    return kept, new


def _pooled(folds: Sequence[_Fold], features: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """One slope for the new rows of all folds."""
    x = np.concatenate([new - kept.mean(0) for kept, new in features])
    offset = np.concatenate([np.full(len(fold.new), math.log(fold.temperature)) for fold in folds])
    width = max(fold.logits.shape[1] for fold in folds)
    logits = np.concatenate(
        [
            np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-np.inf)
            for part in (fold.logits[fold.new] for fold in folds)
        ]
    )
    logits -= logits.max(1, keepdims=True)
    right = logits[np.arange(len(logits)), np.concatenate([fold.gold[fold.new] for fold in folds])]
    partition, flat = partition_of(logits), [0.0] * x.shape[1]
    slopes = fit_by_partition(
        partition, right, x, prior_mean=flat, prior_sd=[0.5] * len(flat), low=[0.0, *[-math.inf] * (len(flat) - 1)],
        offset=offset, range_=LOG_RANGE,
    )  # fmt: skip

    def nll(b: Any) -> float:
        return mean_nll(partition, right, np.exp(np.clip(offset + x @ b, *LOG_RANGE)))

    gain = nll(flat) - nll(slopes)
    if gain * len(right) < least_gain(len(flat)):
        slopes, gain = np.zeros(len(flat)), 0.0
    return {
        "slopes": slopes.tolist(),
        "nll": [nll(part * slopes) for part in PARTS],
        "gain": gain,
        "n": len(right),
        "folds": [
            fold.summary | {"feature_known": kept.mean(0).tolist(), "feature_new": new.mean(0).tolist()}
            for fold, (kept, new) in zip(folds, features, strict=True)
        ],
    }
