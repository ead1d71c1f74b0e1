"""How new an input is to a model: the distance of its hidden state at the answer position to those of training rows."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


METRICS = ("cosine", "pca", "mahalanobis")
# What is stored beside a student stays below this, by default
MAX_BYTES = 5_000_000
# Similarities held at a time
_MAX_SIMILARITIES = 2**24
_QUANTILES = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class NoveltyReference:
    """
    Training rows of a model by their hidden state in one layer, and the distance of other inputs to them.

    The distance of an input is the mean over its `k` nearest rows of the cosine distance (`cosine`), of half the squared
    distance of the states' first principal components (`pca`), or half the squared Mahalanobis distance to the mean of the
    rows (`mahalanobis`, in the same components; there is no neighbour). States are brought to one length first. The feature
    is its logarithm, standardised on the reference rows, each of which is compared with all others but itself.

    Attributes:
        rows (`torch.Tensor` of shape `[N, D]`, float16): Reference rows; the mean alone for `mahalanobis`.
        layer (`int`): Transformer block behind which the states are read, from 1.
        metric (`str`), k (`int`): See above.
        basis (`torch.Tensor` of shape `[H, D]`, float32, *optional*), center (`torch.Tensor` of shape `[H]`, *optional*):
            Of the components.
        floor (`float`): Added to each distance, so that copies of training rows have a logarithm: a thousandth of the
            reference rows' median distance.
        mean, sd (`float`): Of the logarithm, over the reference rows.
        quantiles (`np.ndarray` of shape `(101,)`): Of the feature, over the reference rows.
    """

    rows: torch.Tensor
    layer: int
    metric: str
    k: int
    basis: torch.Tensor | None
    center: torch.Tensor | None
    floor: float
    mean: float
    sd: float
    quantiles: np.ndarray

    @property
    def width(self) -> int:
        """Size of the hidden states."""
        return int(self.rows.shape[1] if self.basis is None else self.basis.shape[0])

    def feature(self, states: Any) -> np.ndarray:
        """
        The standardised log distance of hidden states, float64 `(B,)`. One row gives the same in any batch.

        Args:
            states (`torch.Tensor` or array of shape `[B, H]`): Hidden states of `layer`.

        Raises:
            `ValueError`: Another width, or states that are zero or not finite.
        """
        points = self._project(_unit(states, self.width))
        place = str(points.device)
        if place not in self._placed:
            self._placed[place] = self._ready(self.rows.to(points.device))
        return self._standard(self._distance(points, *self._placed[place]))

    @cached_property
    def _placed(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What [`_ready`] has made, by device."""
        return {}

    def _ready(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows as they are computed with, and half their squared length."""
        rows = rows.float()
        if self.metric == "cosine":
            # Rounding to 16 bits took their length a little from 1
            rows = rows / rows.norm(dim=-1, keepdim=True)
        return rows, 0.5 * rows.square().sum(-1)

    def percentile(self, feature: np.ndarray) -> np.ndarray:
        """Share of the reference rows that are no farther than this from the others, 0 to 1."""
        return np.interp(feature, self.quantiles, _QUANTILES, left=0.0, right=1.0)

    def _standard(self, distance: np.ndarray) -> np.ndarray:
        if self.sd == 0.0:
            return np.zeros(len(distance))
        return (np.log(distance + self.floor) - self.mean) / self.sd

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        if self.basis is None or self.center is None:
            return states
        return (states - self.center.to(states.device)) @ self.basis.to(states.device)

    def _distance(
        self, points: torch.Tensor, rows: torch.Tensor, half_square: torch.Tensor, *, leave_one_out: bool = False
    ) -> np.ndarray:
        if self.metric == "mahalanobis":
            return 0.5 * (points.cpu().double() - rows.cpu().double()).square().sum(-1).numpy()
        k = min(self.k, len(rows) - leave_one_out)
        found = []
        size = max(1, _MAX_SIMILARITIES // len(rows))
        for start in range(0, len(points), size):
            part = points[start : start + size]
            near = part @ rows.T - half_square
            if leave_one_out:
                own = torch.arange(len(part), device=part.device)
                near[own, start + own] = -torch.inf
            index = near.topk(k, dim=-1).indices
            # Again, in double precision, which not every accelerator has: similarities of near rows differ in their last digits
            gaps = part.cpu().double()[:, None] - rows[index].cpu().double()
            found.append(0.5 * gaps.square().sum(-1).mean(-1).numpy())
        return np.concatenate(found) if found else np.zeros(0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What [`save`] writes, by name."""
        parts = {"rows": self.rows, "quantiles": torch.from_numpy(self.quantiles)}
        if self.basis is not None and self.center is not None:
            parts |= {"basis": self.basis, "center": self.center}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}

    def settings(self) -> dict[str, Any]:
        """All but the tensors, for JSON."""
        return {name: getattr(self, name) for name in ("layer", "metric", "k", "floor", "mean", "sd")}

    def save(self, path: Path, **metadata: Any) -> str:
        """
        Write a safetensors file.

        Args:
            path (`Path`): The file.
            metadata: Further values for JSON, kept in it.

        Returns:
            `str`: SHA-256 of the file.
        """
        # One entry: safetensors does not keep the order of several, and the digest should be one
        text = json.dumps({**self.settings(), **metadata}, sort_keys=True)
        save_file(self.tensors(), path, metadata={"novelty": text})
        return file_digest(path)

    @classmethod
    def load(cls, path: Path, digest: str | None = None) -> tuple["NoveltyReference", dict[str, Any]]:
        """
        The inverse of [`save`].

        Args:
            path (`Path`): The file.
            digest (`str`, *optional*): SHA-256 that it must have.

        Returns:
            `tuple`: the reference, and the further values.

        Raises:
            `ValueError`: The file is another one, or no such file.
        """
        if digest is not None and file_digest(path) != digest:
            raise ValueError(
                f"{path} is not the file that was saved with this model: its SHA-256 differs. Export again."
            )
        try:
            with safe_open(path, framework="pt") as file:
                values = json.loads((file.metadata() or {})["novelty"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = {name: values.pop(name) for name in ("layer", "metric", "k", "floor", "mean", "sd")}
            quantiles = tensors["quantiles"].numpy()
            rows, basis, center = tensors["rows"], tensors.get("basis"), tensors.get("center")
        except Exception as error:
            raise ValueError(
                f"{path} holds no reference rows ({type(error).__name__}: {error}). Export again."
            ) from error
        return cls(rows, basis=basis, center=center, quantiles=quantiles, **settings), values


def fit_reference(
    states: Any,
    *,
    layer: int,
    metric: str = "cosine",
    k: int = 10,
    components: int = 16,
    max_rows: int = 4000,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
) -> NoveltyReference:
    """
    The reference rows of a model.

    Args:
        states (`torch.Tensor` or array of shape `[N, H]`):
            Hidden states of training rows.
        layer (`int`):
            Where they were read.
        metric (`str`, *optional*, defaults to `"cosine"`):
            `cosine`, `pca` or `mahalanobis`, see [`NoveltyReference`].
        k (`int`, *optional*, defaults to 10):
            Neighbours; all other rows where there are fewer.
        components (`int`, *optional*, defaults to 16):
            Principal components of `pca` and `mahalanobis`; at most as many as the states have, and a quarter of the rows.
        max_rows (`int`, *optional*, defaults to 4000), max_bytes (`int`, *optional*, defaults to 5 MB):
            More rows than these allow are thinned out at random, without replacement.
        seed (`int`, *optional*, defaults to 0):
            Of that draw.

    Returns:
        [`NoveltyReference`]

    Raises:
        `ValueError`: Fewer than two rows, an unknown metric, numbers below 1, or states that are zero or not finite.
    """
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(METRICS)}; got {metric!r}.")
    for name, value in (("k", k), ("components", components), ("max_rows", max_rows)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    given = torch.as_tensor(states)
    if given.ndim != 2 or len(given) < 2:
        raise ValueError(
            f"At least two training rows of hidden states are needed, shape [N, H]; got the shape {list(given.shape)}."
        )
    width = given.shape[1]
    stored_width = width if metric == "cosine" else min(components, width)
    kept = max(2, min(max_rows, (max_bytes - 4 * 1024) // (2 * stored_width)))
    units = _unit(given, width)
    basis = center = None
    points = units
    if metric != "cosine":
        basis, center = _components(units, components, whiten=metric == "mahalanobis")
        points = (units - center.to(units.device)) @ basis.to(units.device)
    if len(points) > kept:
        order = np.random.default_rng(seed).permutation(len(points))[:kept]
        points = points[torch.from_numpy(np.sort(order)).to(points.device)]
    rows = (points if metric != "mahalanobis" else points.mean(0, keepdim=True)).half()
    blank = NoveltyReference(rows, layer, metric, k, basis, center, 0.0, 0.0, 1.0, np.zeros(len(_QUANTILES)))
    distance = blank._distance(points, *blank._ready(rows), leave_one_out=metric != "mahalanobis")
    floor = max(1e-3 * float(np.median(distance)), 1e-9)
    logs = np.log(distance + floor)
    # Copies of one row have no spread beyond rounding
    sd = float(logs.std()) if np.ptp(logs) > 1e-6 else 0.0
    mean = float(logs.mean())
    feature = np.zeros(len(logs)) if sd == 0.0 else (logs - mean) / sd
    return NoveltyReference(
        rows.cpu(), layer, metric, k, None if basis is None else basis.cpu(), None if center is None else center.cpu(),
        floor, mean, sd, np.quantile(feature, _QUANTILES),
    )  # fmt: skip


def principal_components(states: Any, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Basis `[H, D]` and center `[H]` on which hidden states of one length have uncorrelated coordinates of variance 1.

    Args:
        states (`torch.Tensor` or array of shape `[N, H]`): Hidden states of training rows.
        components (`int`): As in [`fit_reference`].
    """
    return _components(_unit(states), components, whiten=True)


def project(states: Any, basis: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Coordinates `[B, D]` of hidden states on [`principal_components`]."""
    return (_unit(states).cpu() - center) @ basis


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unit(states: Any, width: int | None = None) -> torch.Tensor:
    """Hidden states as float32 of length 1."""
    given = torch.as_tensor(states)
    if given.ndim != 2 or (width is not None and given.shape[1] != width):
        raise ValueError(
            f"Hidden states of the shape [B, {width or 'H'}] are needed, got {list(given.shape)}: they are of another model "
            "or layer."
        )
    length = given.float().norm(dim=-1, keepdim=True)
    bad = ((length[:, 0] == 0.0) | ~length[:, 0].isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"The hidden state of row {int(bad[0])} is zero or not finite. Load the model in bfloat16 or float32, and check "
            "its weights."
        )
    return given.float() / length


def _components(units: torch.Tensor, components: int, *, whiten: bool) -> tuple[torch.Tensor, torch.Tensor]:
    center = units.cpu().double().mean(0)
    centered = units.cpu().double() - center
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(units))
    n = max(1, min(components, units.shape[1], len(units) // 4))
    values, vectors = values.flip(0)[:n].clamp_min(0.0), vectors.flip(1)[:, :n]
    if whiten:
        # Directions without spread would be blown up to rounding noise
        vectors = vectors / values.clamp_min(max(float(values[0]) * 1e-6, 1e-12)).sqrt()
    return vectors.float(), center.float()
