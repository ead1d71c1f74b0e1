"""`first-trl recipes`."""

import argparse
from pathlib import Path

from ..experiments.recipe import cells, load_recipe
from ..utils.files import write_atomically
from ..utils.resources import recipe_names, recipe_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl recipes` to a parser."""
    parser.add_argument("action", choices=("list", "check", "schema"))
    parser.add_argument(
        "files", nargs="*", help="recipes to list or check (default: all that travel with the package)"
    )
    parser.add_argument(
        "--output", help="file for the JSON schema that editors check recipes with (default: print it)"
    )


def main(args: argparse.Namespace) -> int:
    """List the recipes with what they stand for, check them, grids included, or write the schema of their keys."""
    if args.output is not None and args.action != "schema":
        raise ValueError("--output belongs to `first-trl recipes schema`.")
    if args.action == "schema":
        if args.files:
            raise ValueError("`first-trl recipes schema` takes no recipes: one schema is for all of them.")
        from ..experiments.recipe.schema import schema_text

        if args.output is None:
            print(schema_text(), end="")
        else:
            write_atomically(Path(args.output), schema_text())
        return 0
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
