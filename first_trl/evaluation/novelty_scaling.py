"""
A temperature by novelty for one model, from the states that [`collect_answer_states`] read: which layer, which feature, and
the fit.

| `feature` | `d(x)` |
| --- | --- |
| `distance` | log distance of the hidden state to those of the training rows, see [`~first_trl.evaluation.novelty`] |
| `max_probability` | log of one minus the largest probability: the control, for what the softmax knows already |
| `distance_and_max_probability` | both; the second may count either way |
| `hidden_state` | principal components of the hidden state: a learnt head, after adaptive temperature scaling (arXiv 2409.19817) |
| `disagreement` | what those components tell of the log disagreement of a committee of teachers: a linear regression on the training rows |

All are standardised on the training rows. Everything is chosen on validation rows, or with `cross_group` on training rows:

- *layer*: the lowest one whose NLL (of the rows that the slope is fitted on) is within 0.0005 nats a row of the best.
- *`hidden_state`*: the ridge is the one of three with the lowest NLL in five-fold cross-validation over the validation rows,
  and one temperature stays where none of them beats it there.
- *`steepest`*: the steepest slope whose NLL on the validation rows is within `max_nll_increase` of the one temperature's (one
  temperature stays where the slope that fits best fails its test). What fits in-domain rows best is too little for new ones,
  and about twice that slope costs nothing in-domain.
- *`cross_group`*: the slope comes from groups that were held out, see [`~first_trl.evaluation.cross_group`], the intercept
  from the validation rows. Of that slope as large a part is taken as leaves the NLL of the validation rows within
  `max_nll_increase` of the one temperature's: what helps with new inputs may cost no more than this with known ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import cached_file

from ..calibration.novelty import (
    NoveltyTemperature,
    fit_novelty_temperature,
    mean_nll,
    scalar_temperature,
)
from ..calibration.partition import PartitionTable
from .answer_states import AnswerStates
from .novelty import NoveltyReference, fit_reference, principal_components, project


FEATURES = ("distance", "max_probability", "distance_and_max_probability", "hidden_state", "disagreement")
# Beside the weights of a model
NOVELTY_NAME = "novelty.safetensors"
_VERSION = 1
# Layers that differ by less than this, in nats a row, are as good as each other
TIE = 0.0005
# Of slopes from held-out groups, and of the steepest one
PARTS = np.linspace(0.0, 1.0, 101)
_STEEPEST = 2.0
_RIDGES = (0.03, 0.1, 0.3)
_CV_FOLDS = 5
# What is added to 1 - p, so that certainty has a logarithm
_UNSURE_FLOOR = 1e-6
# Added to a disagreement in nats, which is 0 where all teachers say the same
_AGREED = 1e-6


@dataclass(frozen=True)
class NoveltyScaling:
    """
    A fitted temperature by novelty, from [`fit_novelty_scaling`].

    Attributes:
        feature (`str`): One of `FEATURES`.
        temperature (`NoveltyTemperature`): The fit.
        reference (`NoveltyReference`, *optional*): Of the distance.
        unsure (`tuple[float, float]`, *optional*): Mean and standard deviation of `log(1 - p)` on the training rows.
        head (`tuple`, *optional*): Layer, basis and center of the components of `hidden_state`, or of the one direction of
            `disagreement`.
        choice (`dict`): How the layer was chosen: for each the NLL and the slopes.
    """

    feature: str
    temperature: NoveltyTemperature
    reference: NoveltyReference | None
    unsure: tuple[float, float] | None
    head: tuple[int, torch.Tensor, torch.Tensor] | None
    choice: dict[str, Any]

    def features(self, states: Mapping[int, Any], max_probability: np.ndarray | None = None) -> np.ndarray:
        """
        The features of rows, `(B, F)`.

        Args:
            states (`Mapping[int, Any]`): Layer -> hidden states `[B, H]`.
            max_probability (`np.ndarray` of shape `(B,)`, *optional*): At T = 1, where the feature needs it.
        """
        columns = []
        if self.reference is not None:
            columns.append(self.reference.feature(states[self.reference.layer]))
        if self.unsure is not None:
            if max_probability is None:
                raise ValueError(f"The feature {self.feature!r} needs the largest probability of each row.")
            columns.append((log_unsure(max_probability) - self.unsure[0]) / self.unsure[1])
        if self.head is not None:
            layer, basis, center = self.head
            columns.extend(project(states[layer], basis, center).double().numpy().T)
        return np.column_stack(columns)

    def of(self, rows: AnswerStates) -> np.ndarray:
        """The temperature of each row."""
        return self.temperature.temperature(self.features(rows.states, rows.max_probability()))

    def of_states(self, states: Mapping[int, torch.Tensor], logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """
        The temperature of each row of a forward, and its novelty: the share of the reference rows that are no newer.

        Args:
            states (`Mapping[int, torch.Tensor]`): Layer -> hidden states `[B, H]` at the answer position.
            logits (`torch.Tensor` of shape `[B, V]`, float32): What they lead to.
        """
        sure = None if self.unsure is None else torch.softmax(logits, -1).amax(-1).cpu().double().numpy()
        x = self.features(states, sure)
        novelty = np.full(len(x), np.nan) if self.reference is None else self.reference.percentile(x[:, 0])
        return self.temperature.temperature(x), novelty

    @property
    def layers(self) -> list[int]:
        """The layers that it reads."""
        return [self.reference.layer] if self.reference is not None else [self.head[0]] if self.head else []

    def save(self, folder: str | Path) -> str:
        """
        Write `novelty.safetensors` beside the weights of the model that it was fitted for: the reference rows and the fit.

        Args:
            folder (`str` or `Path`): Where the model, or its LoRA adapter, was saved.

        Returns:
            `str`: SHA-256 of the file.

        Raises:
            `ValueError`: The feature has no distance in it. The others are for comparison.
        """
        if self.reference is None:
            raise ValueError(
                f"The feature {self.feature!r} says nothing about distance: it is for comparison, not for use."
            )
        fit = {"feature": self.feature, "temperature": self.temperature.to_dict(), "unsure": self.unsure}
        return self.reference.save(Path(folder) / NOVELTY_NAME, version=_VERSION, **fit)

    @classmethod
    def load(
        cls, source: str | Path, *, revision: str | None = None, token: Any = None, digest: str | None = None
    ) -> "NoveltyScaling":
        """
        The inverse of [`save`].

        Args:
            source (`str` or `Path`): Folder or Hub id of the model.
            revision (`str`, *optional*), token (`str` or `bool`, *optional*): As in `from_pretrained`.
            digest (`str`, *optional*): SHA-256 that the file must have.

        Raises:
            `ValueError`: There is no such file, it is damaged, or of a later version of this package.
        """
        path = cached_file(
            str(source), NOVELTY_NAME, revision=revision, token=token, _raise_exceptions_for_missing_entries=False
        )
        if path is None:
            raise ValueError(
                f"{source} brings no {NOVELTY_NAME}: nothing is known of its training rows. Fit a temperature by novelty with "
                "an arm of kind novelty_scaling, or leave `novelty` out."
            )
        reference, values = NoveltyReference.load(Path(path), digest)
        if values.get("version") != _VERSION:
            raise ValueError(
                f"{path} has version {values.get('version')!r}, and this package reads {_VERSION}. Update first_trl, or export "
                "the model again."
            )
        unsure = values["unsure"]
        temperature = NoveltyTemperature.from_dict(values["temperature"])
        return cls(values["feature"], temperature, reference, None if unsure is None else tuple(unsure), None, {})


def log_unsure(max_probability: np.ndarray) -> np.ndarray:
    """`log(1 - p)`, with a floor."""
    return np.log(1.0 - np.minimum(max_probability, 1.0) + _UNSURE_FLOOR)


def standardiser(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation; the latter 1 where there is none."""
    sd = float(values.std())
    return float(values.mean()), sd if sd > 1e-9 else 1.0


def fit_novelty_scaling(
    train: AnswerStates,
    validation: AnswerStates,
    *,
    feature: str = "distance",
    metric: str = "cosine",
    k: int = 10,
    components: int = 16,
    layers: Sequence[int] | None = None,
    at_least_scalar: bool = False,
    reference_rows: int = 4000,
    seed: int = 0,
    slopes: Mapping[int, Mapping[str, Any]] | None = None,
    steepest: bool = False,
    max_nll_increase: float = 0.0,
    disagreement: np.ndarray | None = None,
) -> NoveltyScaling:
    """
    Fit a temperature by novelty.

    Args:
        train (`AnswerStates`):
            Rows that the model was trained on.
        validation (`AnswerStates`):
            Rows with an answer, of which nothing was learnt; rows without one are left out.
        feature (`str`, *optional*, defaults to `"distance"`):
            One of `FEATURES`.
        metric, k, components:
            As in [`~first_trl.evaluation.novelty.fit_reference`].
        layers (`Sequence[int]`, *optional*):
            Layers to choose from; all that the states hold by default.
        at_least_scalar (`bool`, *optional*, defaults to `False`):
            No temperature below the scalar one.
        reference_rows (`int`, *optional*, defaults to 4000):
            Most training rows that are kept.
        seed (`int`, *optional*, defaults to 0):
            Of their draw, and of the folds.
        slopes (`Mapping[int, Mapping[str, Any]]`, *optional*):
            Layer -> `slopes` and `nll` from [`~first_trl.evaluation.cross_group.cross_group_slopes`]: only the intercept is
            fitted on `validation`.
        steepest (`bool`, *optional*, defaults to `False`):
            Take the steepest slope that `validation` bears, instead of the one that fits it best.
        max_nll_increase (`float`, *optional*, defaults to 0):
            Nats a row that `slopes` or the steepest slope may cost on `validation` over one temperature; `inf` takes `slopes`
            whole.
        disagreement (`np.ndarray` of shape `(N,)`, *optional*):
            Of a committee of teachers at the answer of each training row, in nats (`teacher_mutual_information`); NaN where
            the committee was not asked. For the feature `disagreement`, which no other needs.

    Raises:
        `ValueError`: An unknown feature, a layer that was not read, no validation row with an answer, a feature `disagreement`
            without one for each training row.
    """
    if feature not in FEATURES:
        raise ValueError(f"`feature` must be one of {', '.join(FEATURES)}; got {feature!r}.")
    if feature in ("hidden_state", "disagreement") and slopes is not None:
        raise ValueError(f"The slopes of `{feature}` are fitted on validation rows; leave `slopes` out.")
    if feature == "disagreement":
        _check_disagreement(disagreement, len(train))
    if steepest and (slopes is not None or at_least_scalar or feature not in ("distance", "max_probability")):
        # With a lowest temperature the steepest slope is one that no row reaches
        raise ValueError("The steepest slope is one of a single feature, without `slopes` or `at_least_scalar`.")
    rows = validation.labelled()
    table, right = rows.table, rows.right
    if feature == "max_probability":
        candidates: list[int | None] = [None]
    else:
        candidates = list(known_layers(train, layers))
    tried: dict[str, Any] = {}
    fitted = []
    for layer in candidates:
        options: dict[str, Any] = {"metric": metric, "k": k, "components": components, "max_rows": reference_rows}
        blank = _blank(train, feature, layer, disagreement, seed=seed, **options)
        x = blank.features(rows.states, rows.max_probability())
        if feature == "hidden_state":
            temperature, nll = _cross_validated(table, right, x, at_least_scalar, seed)
        else:
            low = None if x.shape[1] == 1 else [0.0, -np.inf]
            if slopes is None:
                temperature = fit_novelty_temperature(table, right, x, low=low, at_least_scalar=at_least_scalar)
                nll = mean_nll(table, right, temperature.temperature(x))
            else:
                given = slopes[layer or 0]
                temperature, part = _within(table, right, x, given["slopes"], max_nll_increase, at_least_scalar)
                nll = float(given["nll"][part])
        tried[str(layer or "-")] = {"nll": nll, "slopes": list(temperature.slopes)}
        fitted.append((nll, blank, temperature))
    best = first_of_the_best([nll for nll, _, _ in fitted])
    _, blank, temperature = fitted[best]
    if steepest and temperature.slopes != (0.0,):
        x = blank.features(rows.states, rows.max_probability())
        temperature, _ = _within(table, right, x, [_STEEPEST], max_nll_increase, at_least_scalar)
    return NoveltyScaling(feature, temperature, blank.reference, blank.unsure, blank.head, {"layers": tried})


def known_layers(train: AnswerStates, layers: Sequence[int] | None) -> list[int]:
    """The layers to choose from, in order. Raises `ValueError` for one that was not read."""
    found = sorted(train.states if layers is None else set(layers))
    missing = [layer for layer in found if layer not in train.states]
    if missing or not found:
        raise ValueError(f"No states of the layers {missing} were read, only of {sorted(train.states)}.")
    return found


def first_of_the_best(losses: Sequence[float]) -> int:
    """The first that is within [`TIE`] of the lowest."""
    return next(i for i, loss in enumerate(losses) if loss <= min(losses) + TIE)


def _check_disagreement(given: np.ndarray | None, n: int) -> None:
    if given is None or np.shape(given) != (n,):
        raise ValueError(
            f"The feature `disagreement` needs the disagreement of a committee at each of the {n} training rows, got "
            f"{'none' if given is None else f'the shape {np.shape(given)}'}. Distil the student from a committee of teachers."
        )
    known = given[~np.isnan(given)]
    if len(known) < 2 or not ((known >= 0.0) & np.isfinite(known)).all():
        raise ValueError("A disagreement is at least 0 and finite, and known of two or more training rows.")


def _disagreement_direction(
    states: np.ndarray, disagreement: np.ndarray, components: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis `[H, 1]` and center `[H]` of what the states tell of the disagreement, of variance 1 on these rows."""
    known = ~np.isnan(disagreement)
    basis, center = principal_components(states[known], components)
    target = np.log(disagreement[known] + _AGREED)
    # Coordinates are uncorrelated and of variance 1: each has its covariance as coefficient
    coordinates = project(states[known], basis, center).double().numpy()
    weight = coordinates.T @ (target - target.mean()) / len(target)
    length = float(np.linalg.norm(weight))
    weight = weight / length if length > 1e-9 else np.zeros_like(weight)
    return basis @ torch.from_numpy(weight).float()[:, None], center


def _blank(
    train: AnswerStates, feature: str, layer: int | None, disagreement: np.ndarray | None = None, **options: Any
) -> NoveltyScaling:
    """The features, before a temperature is fitted on them."""
    reference = unsure = head = None
    if layer is not None and feature.startswith("distance"):
        reference = fit_reference(train.states[layer], layer=layer, **options)
    if feature.endswith("max_probability"):
        unsure = standardiser(log_unsure(train.max_probability()))
    if layer is not None and feature == "hidden_state":
        head = (layer, *principal_components(train.states[layer], options["components"]))
    if layer is not None and feature == "disagreement" and disagreement is not None:
        head = (layer, *_disagreement_direction(train.states[layer], disagreement, options["components"]))
    return NoveltyScaling(feature, NoveltyTemperature(0.0, (), 1.0, False, 0, 0.0), reference, unsure, head, {})


def _within(
    table: PartitionTable,
    right: np.ndarray,
    x: np.ndarray,
    slopes: Sequence[float],
    increase: float,
    at_least_scalar: bool,
) -> tuple[NoveltyTemperature, int]:
    """As large a part of the slopes as costs no more than `increase`, and its place in `PARTS`."""
    for place in reversed(range(len(PARTS))):
        found = fit_novelty_temperature(
            table, right, x, slopes=(PARTS[place] * np.asarray(slopes)).tolist(), at_least_scalar=at_least_scalar
        )
        if found.gain >= -increase - 1e-9:
            break
    return found, place


def _cross_validated(
    table: PartitionTable, right: np.ndarray, x: np.ndarray, at_least_scalar: bool, seed: int
) -> tuple[NoveltyTemperature, float]:
    """The learnt head with the ridge that cross-validation chooses, and its NLL there."""
    options: dict[str, Any] = {"low": [-np.inf] * x.shape[1], "at_least_scalar": at_least_scalar, "test": False}
    fold = np.random.default_rng(seed).permutation(len(right)) % _CV_FOLDS
    sums = dict.fromkeys((0.0, *_RIDGES), 0.0)
    for i in range(_CV_FOLDS if len(right) >= _CV_FOLDS else 0):
        seen, held = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
        for ridge in sums:
            if ridge:
                fit = fit_novelty_temperature(table.rows(seen), right[seen], x[seen], prior_sd=ridge, **options)
                given: Any = fit.temperature(x[held])
            else:
                given = scalar_temperature(table.rows(seen), right[seen])
            sums[ridge] += len(held) * mean_nll(table.rows(held), right[held], given)
    # 0 stands first: of equals, one temperature
    ridge = min(sums, key=lambda each: sums[each])
    if ridge == 0.0:
        flat = fit_novelty_temperature(table, right, x, slopes=[0.0] * x.shape[1], at_least_scalar=at_least_scalar)
        return flat, sums[ridge] / len(right)
    return fit_novelty_temperature(table, right, x, prior_sd=ridge, **options), sums[ridge] / len(right)
