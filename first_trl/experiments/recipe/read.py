"""From a YAML file to a checked [`Recipe`]."""

import re
from pathlib import Path
from typing import Any

import yaml

from ...plugins import load_plugins
from ...utils.names import nearest
from ...utils.resources import recipe_path
from .models import Recipe
from .parse import parse
from .rules import check_recipe


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.1 reads `1e-3` as text; learning rates are written that way."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Parse YAML with numbers such as `1e-3` as numbers. Raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)


def load_recipe(
    name: str, overrides: list[str] | None = None, *, seed: int | None = None, output_dir: str | None = None
) -> Recipe:
    """
    Read and check a recipe.

    Args:
        name (`str`):
            File, or name of a recipe that travels with the package.
        overrides (`list[str]`, *optional*):
            `"key.sub=value"`, values in YAML notation.
        seed (`int`, *optional*), output_dir (`str`, *optional*):
            Take the place of the recipe's own.

    Raises:
        `ValueError`: No such recipe, a key nobody knows (with the nearest known one), a value of the wrong type, or a
            combination without a meaning.
    """
    path = recipe_path(name)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of keys, got {type(data).__name__}.")
    data = _unshare(data)
    for override in overrides or []:
        apply_override(data, override)
    if seed is not None:
        data["seed"] = seed
        # A seed that is asked for is the only one; its folder stays the one it has among the others
        if data.get("seeds"):
            data["seeds"] = [seed]
            data["merge"] = False
    if output_dir is not None:
        data["output_dir"] = output_dir
    _load_plugins(data.get("plugins"), path)
    recipe = parse(data, str(path))
    check_recipe(recipe, str(path))
    _resolve_paths(recipe)
    return recipe


def _load_plugins(modules: Any, path: Path) -> None:
    """The modules that a recipe names, before it is checked: the names they register are then known."""
    # What is no list of names is refused with the rest of the recipe
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        return
    try:
        load_plugins(modules, [path.parent])
    except ValueError as error:
        raise ValueError(f"{path}: plugins: {error}") from error


def _resolve_paths(recipe: Recipe) -> None:
    """
    Local files and folders by their whole path: a run is continued, reported and shared from other working folders too,
    where a relative name would be taken for a repository on the Hub.
    """
    recipe.task.path = _absolute(recipe.task.path)
    for split in recipe.task.splits.values():
        split.path = _absolute(split.path)
    for model in (recipe.teacher, recipe.student):
        model.name_or_path = _absolute(model.name_or_path)
    recipe.tokenizer = _absolute(recipe.tokenizer)


def _absolute(name: str | None) -> str | None:
    path = None if name is None else Path(name).expanduser()
    return name if path is None or not path.exists() else str(path.resolve())


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in nested mappings; whether the key exists is checked with the recipe."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"Override {override!r} must read key.sub=value, e.g. training.num_train_epochs=3.")
    if not text.strip():
        raise ValueError(
            f'Override {override!r} has no value. Write {key}=null to leave the key out, {key}="" for no text.'
        )
    if key.startswith("grid."):
        inner = key.removeprefix("grid.")
        raise ValueError(
            f"Override {override!r}: a grid maps whole dotted keys to lists. Write 'grid={{{inner}: [...]}}'."
        )
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of override {override!r} is not valid YAML: {error}") from None
    target = data
    parents = key.split(".")
    if parents[0] == "cases" and len(parents) > 2:
        target, parents = _case_target(data, override, parents)
    *parents, last = parents
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ValueError(
                f"Override {override!r}: {parent!r} holds a value, not a mapping. Give the whole of it a mapping with "
                f"{last!r} in it."
            )
    target[last] = value


def _case_target(data: dict[str, Any], override: str, parents: list[str]) -> tuple[dict[str, Any], list[str]]:
    """
    Where an override of a case goes. A case maps dotted keys to values: the override is put into the value of the longest
    of them that leads to it, else it is a dotted key of its own.
    """
    _, name, *rest = parents
    case = (data.get("cases") or {}).get(name)
    if not isinstance(case, dict):
        raise ValueError(f"Override {override!r}: there is no case {name!r}.{nearest(name, data.get('cases') or {})}")
    for count in range(len(rest) - 1, 0, -1):
        value = case.get(".".join(rest[:count]))
        if isinstance(value, dict):
            return value, rest[count:]
    return case, [".".join(rest)]


def _unshare(value: Any) -> Any:
    """A copy in which nothing is the same object twice: YAML aliases are, and an override of one must leave the others."""
    if isinstance(value, dict):
        return {key: _unshare(item) for key, item in value.items()}
    return [_unshare(item) for item in value] if isinstance(value, list) else value
