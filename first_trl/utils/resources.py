"""Files that travel with the package: recipes and card templates, in the wheel or in a checkout."""

import difflib
from pathlib import Path


_PACKAGE = Path(__file__).parents[1]


def _folder(name: str) -> Path:
    # The wheel carries the folder inside the package; in a checkout it lies beside it
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def recipe_names() -> dict[str, Path]:
    """Name -> file of every recipe that travels with the package, e.g. `"quickstart"` or `"paper/e3"`."""
    folder = _folder("recipes")
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
        if path.parent.name != "accelerate"
    }


def recipe_path(name: str) -> Path:
    """
    File of a recipe given by path, or by the name of one that travels with the package.

    Raises:
        `ValueError`: Neither; the message names the nearest known recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipe_names()
    for candidate in (name, name.removesuffix(".yaml"), name.removesuffix(".yaml").removeprefix("recipes/")):
        if candidate in known:
            return known[candidate]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"There is no recipe file {name!r} and no recipe of that name.{hint} Known: {', '.join(known)}.")


def template_path(name: str) -> Path:
    """File of a card template."""
    path = _folder("model_cards") / name
    if not path.is_file():
        raise ValueError(f"There is no card template {name!r} in {path.parent}.")
    return path


def shipped_config(model: str) -> Path | None:
    """Folder with the published configuration of a model that the package's recipes name, for machines without network."""
    folder = _PACKAGE / "experiments" / "plan" / "model_configs" / model.replace("/", "--")
    return folder if (folder / "config.json").is_file() else None
