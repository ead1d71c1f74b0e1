"""`first-trl push`: share a finished run."""

import argparse

from .share import push_run, write_student_cards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl push` to a parser."""
    parser.description = (
        "Share a finished run on the Hub: the teacher cache and every student, each with a card that holds its "
        "evaluation. Pushing again makes commits only where something changed."
    )
    parser.add_argument("run", help="folder of the run, such as outputs/quickstart/seed-0")
    parser.add_argument("--namespace", help="user or organisation on the Hub")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="what to share (default: every student)")
    parser.add_argument("--private", action="store_true", default=None, help="create the repositories as private")
    parser.add_argument("--no-cache", dest="cache", action="store_false", help="keep the teacher cache to yourself")
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
    if args.namespace is None:
        raise ValueError("Give --namespace, the user or organisation to push to, or --cards-only to send nothing.")
    shared = push_run(
        args.run,
        args.namespace,
        arms=args.arms,
        cache=args.cache,
        private=args.private,
        prefix=args.prefix,
        license=args.license,
        tag=args.tag,
    )
    for name, place in shared.items():
        print(f"{name}: {place['repo_id']} at {place['commit']}")
    return 0
