"""The choices behind a calibration number, checked once and echoed with every result."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args


Strategy = Literal["width", "mass", "quantile"]
Norm = Literal["l1", "l2", "max"]
Weighting = Literal["count", "uniform"]
Mode = Literal["top-label", "classwise", "full"]
Edges = Literal["right", "left"]
Input = Literal["probs", "logits", "logprobs"]
EdgeDtype = Literal["auto", "float64", "float32", "float16", "bfloat16"]
IntervalMethod = Literal["inversion", "basic", "bca"]


@dataclass(frozen=True)
class CalibrationConfig:
    """
    Options of [`calibration_report`]; see there for their meaning.

    Raises:
        `ValueError`: for an unknown choice, a value out of range, or two options that exclude each other.
    """

    n_bins: int = 10
    strategy: Strategy = "width"
    norm: Norm = "l1"
    weighting: Weighting = "count"
    mode: Mode = "top-label"
    bin_edges: Edges = "right"
    debias: bool = False
    input: Input = "probs"
    temperature: float = 1.0
    ignore_index: int | None = None
    edge_dtype: EdgeDtype = "auto"
    confidence_interval: float | None = None
    interval_method: IntervalMethod = "inversion"
    null_test: bool = False
    n_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}.")
        _check_integer("n_bins", self.n_bins, minimum=1)
        _check_integer("n_resamples", self.n_resamples, minimum=100)
        _check_integer("seed", self.seed, minimum=0)
        if self.ignore_index is not None:
            _check_integer("ignore_index", self.ignore_index, minimum=None)
        for name in ("debias", "null_test"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        if not _is_real(self.temperature) or not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r} must be a finite number above 0.")
        level = self.confidence_interval
        if level is not None and (not _is_real(level) or not 0.5 <= level < 1):
            raise ValueError(f"confidence_interval={level!r} must be None or a level in [0.5, 1), for example 0.95.")
        if self.debias and (self.norm != "l2" or self.weighting != "count"):
            raise ValueError(
                'debias=True has a closed form for norm="l2" and weighting="count" only: '
                f"got norm={self.norm!r}, weighting={self.weighting!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain Python values."""
        return asdict(self)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "strategy": get_args(Strategy),
    "norm": get_args(Norm),
    "weighting": get_args(Weighting),
    "mode": get_args(Mode),
    "bin_edges": get_args(Edges),
    "input": get_args(Input),
    "edge_dtype": get_args(EdgeDtype),
    "interval_method": get_args(IntervalMethod),
}


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _check_integer(name: str, value: Any, minimum: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an integer.")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}={value!r} must be at least {minimum}.")
