"""Calibration of a stream: constant memory, mergeable, all-reducible."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import as_numbers, round_to
from .bins import BinTable, assign, width_edges
from .config import CalibrationConfig, EdgeDtype, Edges, Input, Norm
from .errors import bin_error, debiased_l2
from .examples import check_references, prepare
from .scores import brier_score, negative_log_likelihood


_FORMATS = ("float64", "float32", "float16", "bfloat16")
_COLUMNS = 4  # count, sum of confidence, sum of outcomes, sum of p (1 - p)


class CalibrationAccumulator:
    """
    Collects equal-width bins batch by batch; the result equals [`calibration_report`] on all batches at once.

    Args:
        n_bins (`int`, defaults to `10`):
            Number of equal-width bins.
        norm (`str`, defaults to `"l1"`):
            `"l1"`, `"l2"` or `"max"`.
        bin_edges (`str`, defaults to `"right"`):
            `"right"` for bins `(a, b]`, `"left"` for `[a, b)`.
        input (`str`, defaults to `"probs"`):
            `"probs"`, `"logits"` or `"logprobs"`.
        temperature (`float`, defaults to `1.0`):
            Divide logits by this first.
        ignore_index (`int`, *optional*):
            Leave out rows with this reference.
        edge_dtype (`str`, defaults to `"auto"`):
            Precision to which edges are rounded; `"auto"` decides at the end, from all batches.

    Example:

    ```python
    >>> from first_trl.calibration import CalibrationAccumulator
    >>> first, second = CalibrationAccumulator(n_bins=2), CalibrationAccumulator(n_bins=2)
    >>> first.add_batch([0.25, 0.25, 0.55], [0, 0, 1])
    >>> second.add_batch([0.75, 0.75], [1, 1])
    >>> round(first.merge(second).result()["ece"], 12)
    0.29

    ```

    Across processes sum the state, which is a flat float64 array (no file locks, 4 numbers per cell):

    ```python
    state = torch.from_numpy(accumulator.state)
    torch.distributed.all_reduce(state)
    accumulator.load_state(state.numpy())
    ```
    """

    def __init__(
        self,
        n_bins: int = 10,
        *,
        norm: Norm = "l1",
        bin_edges: Edges = "right",
        input: Input = "probs",
        temperature: float = 1.0,
        ignore_index: int | None = None,
        edge_dtype: EdgeDtype = "auto",
    ) -> None:
        self.config = CalibrationConfig(
            n_bins=n_bins,
            norm=norm,
            bin_edges=bin_edges,
            input=input,
            temperature=temperature,
            ignore_index=ignore_index,
            edge_dtype=edge_dtype,
        )
        # The precision of the stream is known only at its end, so cells are cut at the edges of every precision and
        # put together then.
        formats = _FORMATS if edge_dtype == "auto" else (edge_dtype,)
        nominal = width_edges(n_bins)
        self._edges = np.unique(np.concatenate([round_to(nominal, name) for name in formats]))
        self._cells = np.zeros((len(self._edges) - 1, _COLUMNS))
        # Rows by stored precision, rows with full probabilities, ties, sum of Brier scores, sum of -ln p(label).
        self._totals = np.zeros(len(_FORMATS) + 4)

    def __len__(self) -> int:
        return int(self._totals[: len(_FORMATS)].sum())

    def add_batch(self, predictions: Any, references: Any) -> None:
        """
        Add a batch; the arguments are those of [`calibration_report`].

        Raises:
            `ValueError`: for invalid input; the accumulator is then unchanged.
        """
        refs, _ = as_numbers(references, "references")
        if refs.ndim == 1 and (refs.size == 0 or (refs == self.config.ignore_index).all()):
            check_references(references, np.ndim(predictions))
            if len(predictions) != len(refs):
                raise ValueError(f"predictions have {len(predictions)} rows but references have {len(refs)}.")
            return  # a last batch of padding only is no error in a stream
        examples = prepare(predictions, references, self.config)
        full = examples.probabilities is not None
        if len(self) and full != bool(self._totals[-4]):
            raise ValueError(
                "This batch has " + ("(N, C) rows" if full else "(N,) confidences") + " but earlier batches did not: "
                "keep one accumulator for each kind."
            )
        values = examples.confidence.astype(np.float64, copy=False)
        cell = assign(values, self._edges, self.config.bin_edges)
        for column, weights in enumerate((None, values, examples.correct, values * (1 - values))):
            self._cells[:, column] += np.bincount(cell, weights=weights, minlength=len(self._cells))
        n = len(examples)
        self._totals[_FORMATS.index(examples.edge_dtype)] += n
        self._totals[-4:] += (
            n * full,
            examples.ties,
            brier_score(examples) * n,
            (negative_log_likelihood(examples) or 0) * n,
        )

    def merge(self, other: "CalibrationAccumulator") -> "CalibrationAccumulator":
        """
        Add what another accumulator has seen; returns `self`.

        Raises:
            `ValueError`: if the two were made with different options.
        """
        if not isinstance(other, CalibrationAccumulator):
            raise ValueError(f"Can merge a CalibrationAccumulator only, got {type(other).__name__}.")
        if other.config != self.config:
            raise ValueError(f"Accumulators differ in their options: {self.config} and {other.config}.")
        return self.load_state(self.state + other.state)

    @property
    def state(self) -> npt.NDArray[np.float64]:
        """All sums as one flat float64 array; states of equal options add."""
        return np.concatenate([self._cells.ravel(), self._totals])

    def load_state(self, state: npt.NDArray[np.float64]) -> "CalibrationAccumulator":
        """
        Replace the sums by `state`; returns `self`.

        Raises:
            `ValueError`: if the array does not have the length, precision or content of a state.
        """
        state = np.asarray(state)
        expected = self._cells.size + self._totals.size
        if state.shape != (expected,) or state.dtype != np.float64:
            raise ValueError(
                f"A state with these options is a float64 array of shape ({expected},), got {state.dtype} {state.shape}."
            )
        if np.isnan(state).any() or (state[:-1] < 0).any():
            raise ValueError("A state holds counts and sums: it cannot contain NaN or negative numbers.")
        cells, totals = state[: self._cells.size].reshape(self._cells.shape), state[self._cells.size :]
        n = totals[: len(_FORMATS)].sum()
        if totals[-4] not in (0, n):
            raise ValueError("The state mixes (N, C) rows and (N,) confidences: keep one accumulator for each kind.")
        self._cells, self._totals = cells.copy(), totals.copy()
        return self

    def result(self) -> dict[str, Any]:
        """
        The part of [`calibration_report`] that needs no raw values, under the same keys.

        Raises:
            `ValueError`: if nothing was added.
        """
        n = len(self)
        if n == 0:
            raise ValueError("Nothing was added yet: a calibration error needs at least one example.")
        edge_dtype = self._precision()
        table = self._table(edge_dtype)
        ece = float(bin_error(table.gap_sum, table.weight, self.config.norm))
        accuracy, confidence = float(table.correct_sum.sum() / n), float(table.confidence_sum.sum() / n)
        full, ties, brier, nll = self._totals[-4:]
        return {
            "ece": ece,
            "mce": float(bin_error(table.gap_sum, table.weight, "max")),
            "rmsce": float(bin_error(table.gap_sum, table.weight, "l2")),
            "ece_debiased": debiased_l2(table)[0],
            "accuracy": accuracy,
            "mean_confidence": confidence,
            "signed_gap": confidence - accuracy,
            "trust": accuracy - ece,
            "brier": float(brier / n),
            "nll": float(nll / n) if full else None,
            "n": n,
            "ties": int(ties),
            "bins": table.to_dict(),
            "config": self.config.to_dict() | {"edge_dtype": edge_dtype},
        }

    def _precision(self) -> str:
        if self.config.edge_dtype != "auto":
            return self.config.edge_dtype
        seen = {name for name, rows in zip(_FORMATS, self._totals, strict=False) if rows}
        if len(seen) == 1:
            return seen.pop()
        return "float64" if "float64" in seen else "float32"

    def _table(self, edge_dtype: str) -> BinTable:
        nominal = width_edges(self.config.n_bins)
        edges = round_to(nominal, edge_dtype)
        # A cell starts at or after the lower edge of the bin it belongs to.
        owner = np.searchsorted(edges[1:-1], self._edges[:-1], side="right")
        sums = np.zeros((self.config.n_bins, _COLUMNS))
        np.add.at(sums, owner, self._cells)
        return BinTable(
            lower=nominal[:-1],
            upper=nominal[1:],
            count=sums[:, 0].astype(np.int64),
            weight=sums[:, 0].copy(),
            confidence_sum=sums[:, 1].copy(),
            correct_sum=sums[:, 2].copy(),
            variance_sum=sums[:, 3].copy(),
        )
