"""`first-trl recipes`."""

import argparse
from pathlib import Path

from ..experiments.recipe import cells, load_recipe
from ..utils.resources import recipe_names, recipe_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl recipes` to a parser."""
    parser.add_argument("action", choices=("list", "check"))
    parser.add_argument(
        "files", nargs="*", help="recipes to list or check (default: all that travel with the package)"
    )


def main(args: argparse.Namespace) -> int:
    """List the recipes with what they stand for, or check them, grids included, without running anything."""
    for name in args.files or recipe_names():
        recipe = load_recipe(str(name))
        if args.action == "check":
            runs = cells(recipe)
            print(f"{name}: valid, {len(runs)} run{'s' * (len(runs) > 1)} of {len(runs[0].arms)} arms")
            continue
        path = recipe_path(str(name)).resolve()
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        stands_for = f"[{', '.join(recipe.reproduces)}] " if recipe.reproduces else ""
        print(f"{name}  ({shown})\n    {stands_for}{' '.join(recipe.description.split())}")
    return 0
