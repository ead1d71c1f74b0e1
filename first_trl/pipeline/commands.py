"""`first-trl run`."""

import argparse

from ..recipe import STAGES, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl run` to a parser."""
    parser.description = (
        "Run a recipe from teacher to report. Finished work is kept, interrupted work is continued. "
        "On several processes: accelerate launch -m first_trl run RECIPE."
    )
    parser.add_argument("recipe", help="YAML file, or the name of a recipe that travels with the package")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change recipe keys, values as in YAML")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage; the ones before it must be finished")
    parser.add_argument("--seed", type=int, help="seed of generated data, models and training")
    parser.add_argument("--output-dir", help="folder of the run (default: outputs/<recipe>/seed-<seed>)")


def main(args: argparse.Namespace) -> int:
    """Run the recipe."""
    # Read and checked before torch is imported: a typo is answered at once
    recipe = load_recipe(args.recipe, args.overrides, seed=args.seed, output_dir=args.output_dir)
    from .stages import run_recipe

    run_recipe(recipe, args.stage)
    return 0
