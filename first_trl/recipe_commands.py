"""`first-trl recipes`."""

import argparse

from .recipe import load_recipe
from .resources import recipe_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl recipes` to a parser."""
    parser.add_argument("action", choices=("list", "check"))
    parser.add_argument("files", nargs="*", help="recipes to check (default: all that travel with the package)")


def main(args: argparse.Namespace) -> int:
    """List the recipes, or check them without running anything."""
    for name in args.files or recipe_names():
        recipe = load_recipe(str(name))
        print(f"{name:28s} {' '.join(recipe.description.split())}" if args.action == "list" else f"{name}: valid")
    return 0
