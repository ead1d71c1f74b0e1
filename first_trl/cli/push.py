"""`first-trl push`: share a finished run."""

import argparse

from ..experiments.share.push import push_run, write_student_cards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl push` to a parser."""
    parser.description = (
        "Share a finished run on the Hub: the teacher cache and every student, each with a card that holds its "
        "evaluation. Pushing again makes commits only where something changed."
    )
    parser.add_argument("run", help="folder of the run, such as outputs/quickstart/seed-0")
    parser.add_argument("--namespace", help="user or organisation on the Hub (default: the recipe's `hub`)")
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="what to share (default: the recipe's `hub`, else every student that is no point of a sweep)",
    )
    for name, text in (
        ("private", "create the repositories as private (default: the recipe's `hub`)"),
        ("cache", "share the teacher cache too (default: the recipe's `hub`, else yes)"),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)
    parser.add_argument(
        "--base",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="upload the base of adapters where it is on this machine alone",
    )
    parser.add_argument("--prefix", help="name of the repositories, before the arm (default: the recipe's name)")
    parser.add_argument(
        "--license", help="licence of models that inherit none, as the Hub writes it (e.g. apache-2.0)"
    )
    parser.add_argument("--tag", help="tag to set on every commit")
    parser.add_argument(
        "--cards-only", action="store_true", help="write the cards into the run's folder, send nothing"
    )


def main(args: argparse.Namespace) -> int:
    """Share the run."""
    if args.cards_only:
        for path in write_student_cards(args.run, arms=args.arms, license=args.license).values():
            print(path)
        return 0
    shared = push_run(
        args.run,
        args.namespace,
        arms=args.arms,
        cache=args.cache,
        base=args.base,
        private=args.private,
        prefix=args.prefix,
        license=args.license,
        tag=args.tag,
    )
    for name, place in shared.items():
        print(f"{name}: {place['repo_id']} at {place['commit']}")
    return 0
