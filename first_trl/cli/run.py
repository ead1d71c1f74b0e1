"""`first-trl run`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from ..experiments.recipe import load_recipe
from ..vocabulary import STAGES
from .jobs import run_seeds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl run` to a parser."""
    parser.description = (
        "Run a recipe from teacher to report. Finished work is kept, interrupted work is continued; of a recipe with "
        "seeds or a grid, the missing runs are made and all reports merged. On several processes: accelerate launch "
        "-m first_trl run RECIPE."
    )
    parser.add_argument("recipe", help="YAML file, or the name of a recipe that travels with the package")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change recipe keys, values as in YAML")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage; the ones before it must be finished")
    parser.add_argument("--seed", type=int, help="seed of generated data, models and training; only this one is run")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="run N seeds side by side, each on an equal share of the cores",
    )
    parser.add_argument(
        "--output-dir",
        help="folder of the run (default: outputs/<recipe>/seed-<seed>), of all runs of a recipe with seeds, cases or a grid",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and stop: stages, models, memory, tokens, size of the cache, steps, what is finished "
        "and what would be pushed; reads configurations, loads no weights",
    )
    parser.add_argument("--json", action="store_true", help="dry run: print the plan as JSON")
    parser.add_argument("--processes", type=int, help="dry run: GPUs to plan for (default: the processes launched)")
    parser.add_argument("--sharding", choices=("none", "fsdp2", "zero3"), help="dry run: how weights are divided")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        help="dry run: warn of what does not fit onto GPUs of this size (default: that of the GPU here, if any)",
    )
    parser.add_argument("--configs", help="dry run: folder of <org>--<name>/config.json to read before the Hub")
    parser.add_argument(
        "--probe", action="store_true", help="dry run: time a few steps here, and estimate the minutes"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="run every stage and arm on the CPU in under a minute, with tiny random models of the same kind and a "
        "few rows of our own; the numbers mean nothing (default folder: outputs/smoke/<recipe>)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the recipe."""
    if not args.dry_run and (
        args.json or args.processes or args.sharding or args.configs or args.probe or args.gpu_memory
    ):
        raise ValueError("--json, --processes, --sharding, --gpu-memory, --configs and --probe belong to --dry-run.")
    if args.gpu_memory is not None and not args.gpu_memory > 0:
        raise ValueError(f"--gpu-memory takes the size of a GPU in GB, for example 80, got {args.gpu_memory:g}.")
    if args.jobs < 1 or (args.jobs > 1 and (args.dry_run or args.smoke or args.seed is not None)):
        raise ValueError("--jobs takes a number from 1, and not together with --seed, --dry-run or --smoke.")
    # Read and checked before torch is imported: a typo is answered at once
    recipe = load_recipe(args.recipe, args.overrides, seed=args.seed, output_dir=args.output_dir)
    if args.smoke:
        from ..experiments.smoke import smoke_recipe

        recipe = smoke_recipe(recipe, Path(args.output_dir or Path("outputs", "smoke", recipe.name)))
    if args.dry_run:
        from ..experiments.plan import format_plan, plan_recipe
        from ..utils.processes import gpu_memory, process_state

        plan = plan_recipe(
            recipe, processes=args.processes, sharding=args.sharding, configs=args.configs, probe=args.probe
        )
        if process_state().is_main_process:
            print(json.dumps(dataclasses.asdict(plan), indent=2) if args.json else format_plan(plan))
            memory = args.gpu_memory * 1e9 if args.gpu_memory is not None else gpu_memory()
            for excess in plan.too_large_for(memory) if memory is not None else []:
                print(f"first-trl: warning: {excess}", file=sys.stderr)
            for problem in plan.problems:
                print(f"first-trl: {problem}", file=sys.stderr)
        return 2 if plan.problems else 0
    if args.jobs > 1:
        _side_by_side(args, recipe.seeds)
    from ..experiments.stages.run import run_recipe

    run_recipe(recipe, args.stage)
    return 0


def _side_by_side(args: argparse.Namespace, seeds: list[int]) -> None:
    """All seeds, of which the run that follows merges the reports."""
    if len(seeds) < 2:
        raise ValueError("--jobs runs seeds side by side, and this recipe names fewer than two: give seeds=[0,1,2].")
    options = {"--stage": args.stage, "--output-dir": args.output_dir}
    given = [word for name, value in options.items() if value is not None for word in (name, value)]
    failed = run_seeds([args.recipe, *args.overrides, *given], seeds, args.jobs)
    if failed:
        raise ValueError(
            f"Of the seeds {', '.join(map(str, seeds))}, {', '.join(map(str, failed))} did not finish; the reason stands in "
            "the lines of its log above. Run the same command again: what is finished is kept."
        )
