"""What a merged report holds."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from .collect import MERGED_FORMAT


@dataclass(frozen=True)
class MergedCell:
    """
    The runs of one combination of grid values: the same settings, one run a seed.

    Attributes:
        cell (`dict`): Grid key -> value; empty for a recipe without a grid of runs.
        title (`str`): The same in words.
        seeds (`list[int]`), runs (`list[str]`): What was merged, in one order.
        roles (`dict`): Evaluation role -> `n` (`[lowest, highest]` number of scored rows or tokens), one `sample` of
            what does not vary, and `domain` (`in-domain`, `out-of-domain` or `validation`).
        arms (`dict`): Arm -> `label`, `kind`, `recalibration`, `base`, `values` (of a grid), `swept` (point of a
            curve), `reference` (teacher or true posterior: no student), `baseline` (others are compared with it) and
            `missing` (runs without it).
        results (`dict`): Arm -> role -> reading -> metric -> `mean`, `sd`, `n`, `values` (run -> value). Beside the
            readings: `option_mass`, `flip_rate`, and `null_ece` with `within` (seeds in which the ECE is below its 95 % point).
        differences (`list[dict]`): Paired differences `arm` minus `baseline` per `role`, `reading` and `metric`, as
            [`paired_difference`] returns them.
        best (`dict`): Role -> reading -> metric -> `arms` (best mean among the students that have every seed) and
            `level` (those whose paired difference to the best has an interval that holds 0).
        sweeps (`list[dict]`): `key`, `base`, `label`, `method`, the `points` (`value`, `arm`), by value, and the `fit` that
            chooses such a value.
        fits (`dict`): Fit -> `method`, `symbol` and the summaries of `value`, `raw_ece`, `ece`, `raw_nll`, `nll`.
        temperatures (`dict`): Arm -> summary of its post-hoc temperature.
        kept_mass (`list[dict]`): Summary of the teacher's mass in its 1, 2, ... most likely tokens.
        costs (`dict`): Arm -> what it takes -> summary.
        models (`dict`): Role of the model -> what it is; empty when runs differ.
        novelty (`dict`): Arm with temperatures by novelty -> summaries of its `slope`, and per role of its mean `temperature` and
            the `auroc` of feature and largest probability, as `ROLE.temperature`, `ROLE.feature`, `ROLE.max_probability`.
    """

    cell: dict[str, Any]
    title: str
    seeds: list[int]
    runs: list[str]
    roles: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    results: dict[str, dict[str, dict[str, Any]]]
    differences: list[dict[str, Any]]
    best: dict[str, dict[str, dict[str, Any]]]
    sweeps: list[dict[str, Any]]
    fits: dict[str, dict[str, Any]]
    temperatures: dict[str, dict[str, Any]]
    kept_mass: list[dict[str, Any]]
    costs: dict[str, dict[str, Any]]
    models: dict[str, Any]
    novelty: dict[str, dict[str, Any]] = field(default_factory=dict)

    def difference(self, arm: str, baseline: str, role: str, metric: str, reading: str = "full_vocab") -> Any:
        """One entry of `differences`, or `None`."""
        return self._by_key.get((arm, baseline, role, reading, metric))

    @cached_property
    def _by_key(self) -> dict[tuple[str, ...], dict[str, Any]]:
        keys = ("arm", "baseline", "role", "reading", "metric")
        return {tuple(one[key] for key in keys): one for one in self.differences}


@dataclass(frozen=True)
class MergedReport:
    """
    The reports of several runs of one recipe as one.

    Attributes:
        recipe (`str`): Name of the recipe.
        title (`str`), description (`str`), notes (`list[str]`): As the recipe has them.
        n_bins (`int`): Bins of every ECE.
        seeds (`list[int]`): All seeds.
        runs (`list[dict]`): `run` (folder), `seed`, `cell` and `recipe_key` (content hash of its recipe): where every
            number comes from.
        baselines (`list[str]`): Arms that the caller asked for as baselines; empty = those of the recipe, or chosen by
            their settings. What an arm was compared with stands in its cell.
        models (`dict`): What all runs share.
        cells (`list[MergedCell]`): One a combination of grid values.
        figures (`dict[str, str]`): File -> caption, filled in when the report is written.
        highlight (`list[str]`): Arms whose wins and losses against the baselines are summed up over all cells.
    """

    recipe: str
    title: str
    description: str
    notes: list[str]
    n_bins: int
    seeds: list[int]
    runs: list[dict[str, Any]]
    baselines: list[str]
    models: dict[str, Any]
    cells: list[MergedCell]
    figures: dict[str, str]
    highlight: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": MERGED_FORMAT, "version": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MergedReport":
        """
        The report that [`to_dict`] was called on.

        Raises:
            `ValueError`: Not a merged report.
        """
        if data.get("format") != MERGED_FORMAT or data.get("version") != 1:
            raise ValueError(
                f"This is no merged report of version 1 but format {data.get('format')!r}, version "
                f"{data.get('version')!r}: make one with `first-trl report`."
            )
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        return cls(**{**fields, "cells": [MergedCell(**cell) for cell in data["cells"]]})
