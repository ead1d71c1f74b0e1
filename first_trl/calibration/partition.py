"""Log-partition functions of rows of logits, kept as a table over the temperature instead of the logits themselves."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


# 1/T in quarter octaves from 1/16 to 16. The Brier score at T reads 2/T, one octave up, so T stops at 1/8.
LOG_BETAS = np.arange(-16, 17) * (np.log(2.0) / 4.0)
LOWEST, HIGHEST = 1.0 / 8.0, 16.0


@dataclass(frozen=True)
class PartitionTable:
    """
    `log sum exp(beta z)` of every row at the 33 values of `exp(LOG_BETAS)`, with its derivative by log beta; in between it
    is interpolated (cubic Hermite), to about four digits. The largest logit of a row counts as 0.

    Attributes:
        values, slopes (`np.ndarray` of shape `(N, 33)`): The function and its derivative.
    """

    values: npt.NDArray[np.float64]
    slopes: npt.NDArray[np.float64]

    def at(self, beta: float | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The function at one beta for all rows, or at one a row: `(N,)`."""
        return sum(weight * table for weight, table in self._parts(beta, derivative=False))  # type: ignore[return-value]

    def with_slope(self, beta: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The function at one beta a row and its derivative by beta, as [`fit_by_partition`] asks."""
        slope = sum(weight * table for weight, table in self._parts(beta, derivative=True))
        return self.at(beta), slope / beta

    def rows(self, index: npt.NDArray[np.generic]) -> "PartitionTable":
        """The table of some of the rows."""
        return PartitionTable(self.values[index], self.slopes[index])

    def _parts(
        self, beta: float | npt.NDArray[np.float64], *, derivative: bool
    ) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        x = np.broadcast_to(np.log(beta), len(self.values))
        step = LOG_BETAS[1] - LOG_BETAS[0]
        i = np.clip((x - LOG_BETAS[0]) // step, 0, len(LOG_BETAS) - 2).astype(np.int64)
        t = np.clip((x - LOG_BETAS[i]) / step, 0.0, 1.0)
        if derivative:
            weights = (
                (6 * t**2 - 6 * t) / step,
                3 * t**2 - 4 * t + 1,
                (6 * t - 6 * t**2) / step,
                3 * t**2 - 2 * t,
            )
        else:
            weights = (
                (1 + 2 * t) * (1 - t) ** 2,
                t * (1 - t) ** 2 * step,
                t**2 * (3 - 2 * t),
                t**2 * (t - 1) * step,
            )
        every = np.arange(len(x))
        tables = (self.values[every, i], self.slopes[every, i], self.values[every, i + 1], self.slopes[every, i + 1])
        yield from zip(weights, tables, strict=True)
