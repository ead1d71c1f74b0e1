"""The `first-trl` command."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="first-trl", description="Trustworthy distillation: cache a teacher once, calibrate it, distil it."
    )
    parser.add_argument("--version", action="version", version=f"first_trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a recipe",
        description="Run a recipe from teacher to report. Finished work is kept, interrupted work continued. "
        "The same as `accelerate launch -m first_trl run ...` on one process.",
    )
    run.add_argument("recipe", help="YAML file, or the name of a recipe that travels with the package")
    run.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="change recipe keys, values in YAML notation"
    )
    run.add_argument("--stage", help="run only this stage; the ones before it must be finished")
    run.add_argument("--seed", type=int, help="seed of generated data, models and training")
    run.add_argument("--output-dir", help="folder of the run (default: outputs/<recipe>/seed-<seed>)")

    recipes = commands.add_parser("recipes", help="list or check recipes")
    recipes.add_argument("action", choices=("list", "check"))
    recipes.add_argument("files", nargs="*", help="recipes to check (default: all that travel with the package)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `first-trl`; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "run":
            return _run(args)
        return _recipes(args)
    except ValueError as error:
        print(f"first-trl: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    from .recipe import load_recipe

    # Read and checked before torch is imported: a typo is answered at once
    recipe = load_recipe(args.recipe, args.overrides, seed=args.seed, output_dir=args.output_dir)
    from .pipeline import run_recipe

    run_recipe(recipe, args.stage)
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from .recipe import load_recipe
    from .resources import recipe_names

    if args.action == "list":
        for name in recipe_names():
            recipe = load_recipe(name)
            print(f"{name:28s} {' '.join(recipe.description.split())[:90]}")
        return 0
    for name in args.files or recipe_names():
        load_recipe(str(name))
        print(f"{name}: valid")
    return 0
