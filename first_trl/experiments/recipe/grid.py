"""The runs a recipe stands for: its seeds, cases and the grid of its keys."""

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

from ...utils.names import nearest
from .models import Recipe
from .parse import parse
from .rules import check_recipe


def cells(recipe: Recipe) -> list[Recipe]:
    """
    One recipe a run, in the order they are run: every seed of every case and combination of the grid. Grid keys of arms
    are expanded inside each of them, into arms called `NAME@KEY=value`.

    Raises:
        `ValueError`: A grid key that does not exist, or a value that the recipe cannot have.
    """
    of_runs = {key: values for key, values in recipe.grid.items() if not key.startswith("arms.")}
    of_arms = {key: values for key, values in recipe.grid.items() if key.startswith("arms.")}
    for key, values in recipe.grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{recipe.name}: grid.{key} must be a list of values, got {values!r}.")
    for name, changes in recipe.cases.items():
        if not isinstance(changes, dict):
            raise ValueError(f"{recipe.name}: cases.{name} must map dotted keys to values, got {changes!r}.")
    found = []
    for case in recipe.cases or [None]:
        changes = recipe.cases[case] if case is not None else {}
        for combination in itertools.product(*of_runs.values()):
            values = dict(zip(of_runs, combination, strict=True))
            for seed in recipe.seeds or [recipe.seed]:
                data = dataclasses.asdict(recipe) | {"seeds": [], "grid": {}, "cases": {}, "seed": seed}
                for key, value in (copy.deepcopy(changes) | values).items():
                    _set(data, key, value, f"{recipe.name}: {'grid' if key in values else f'cases.{case}'}")
                data["arms"] = {name: arm for name, arm in data["arms"].items() if arm is not None}
                data["cell"] = ({"case": case} if case is not None else {}) | values
                data["output_dir"] = str(_folder(recipe, data["cell"], seed))
                found.append(_finish(data, of_arms, recipe.name))
    folders = [run.output_dir for run in found]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"{recipe.name}: two runs have the folder {twice}. Give each seed and value once.")
    return found


def merged_folder(recipe: Recipe) -> Path | None:
    """Folder that holds all runs of a recipe and their merged report; `None` for a recipe of one run."""
    if not recipe.seeds and not recipe.cases and all(key.startswith("arms.") for key in recipe.grid):
        return None
    return Path(recipe.output_dir) if recipe.output_dir else Path("outputs") / recipe.name


def _folder(recipe: Recipe, cell: dict[str, Any], seed: int) -> Path:
    root = merged_folder(recipe)
    if root is None:
        return recipe.folder
    return root / _suffix(cell) / f"seed-{seed}" if cell else root / f"seed-{seed}"


def _suffix(values: dict[str, Any]) -> str:
    # The name of a case says enough by itself
    return ",".join(_text(value) if key == "case" else f"{key}={_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return "".join(character if character.isalnum() or character in "._+-" else "_" for character in text)


def _set(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    target = data
    for parent in parents:
        if parent not in target:
            raise ValueError(f"{where}.{key}: there is no {parent!r} to change.{nearest(parent, target)}")
        if not isinstance(target[parent], dict):
            raise ValueError(
                f"{where}.{key}: {parent!r} is {target[parent]!r}, which has no keys: give the whole of it a value."
            )
        target = target[parent]
    target[last] = value


def _finish(data: dict[str, Any], of_arms: dict[str, list[Any]], where: str) -> Recipe:
    """The recipe of one run, its arms expanded and checked like one that was read."""
    # Values that came from `cases` may use the short forms of a file
    data["arms"] = _expand_arms(dataclasses.asdict(parse(data, where))["arms"], of_arms, where)
    recipe = parse(data, where)
    check_recipe(recipe, where)
    return recipe


def _expand_arms(arms: dict[str, Any], grid: dict[str, list[Any]], where: str) -> dict[str, Any]:
    by_arm: dict[str, dict[str, list[Any]]] = {}
    for key, values in grid.items():
        _, name, *rest = key.split(".")
        if name not in arms or not rest:
            raise ValueError(f"{where}: grid.{key} must read arms.NAME.KEY.{nearest(name, arms)}")
        by_arm.setdefault(name, {})[".".join(rest)] = values
    expanded: dict[str, Any] = {}
    for name, arm in arms.items():
        # A temperature behind an arm follows it
        follows = arm["of"] in by_arm
        keys = by_arm[arm["of"]] if follows else by_arm.get(name, {})
        for combination in itertools.product(*keys.values()):
            swept = dict(zip(keys, combination, strict=True))
            copied = {key: dict(value) if isinstance(value, dict) else value for key, value in arm.items()}
            if follows:
                copied["of"] = f"{arm['of']}@{_suffix(swept)}"
            else:
                for key, value in swept.items():
                    _set(copied, key, value, f"{where}: grid.arms.{name}")
            copied["swept"] = swept
            if swept:
                copied["label"] = _label(arm["label"] or name, swept)
            made = f"{name}@{_suffix(swept)}" if swept else name
            if made in expanded:
                raise ValueError(f"{where}: the grid makes the arm {made!r} twice. Give each value once.")
            expanded[made] = copied
    return expanded


def _label(template: str, swept: dict[str, Any]) -> str:
    """The label with the values filled in where it names their keys, else behind it."""
    filled = template
    for key, value in swept.items():
        filled = filled.replace("{" + key + "}", _text(value))
    return filled if filled != template else f"{template}, " + ", ".join(f"{k} = {_text(v)}" for k, v in swept.items())
