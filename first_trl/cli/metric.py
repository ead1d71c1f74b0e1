"""`first-trl metric`: publish the calibration metric as a Space."""

import argparse
import tempfile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl metric` to a parser."""
    parser.add_argument("action", choices=("push",), help="publish the ECE metric as a Space that needs numpy only")
    parser.add_argument("repo_id", help="Space to create or update, e.g. my-name/ece")
    parser.add_argument("--private", action="store_true", help="create the Space as private")
    parser.add_argument("--token", help="Hub token; default is the one of `hf auth login` or HF_TOKEN")


def main(args: argparse.Namespace) -> int:
    """Push the metric; prints how to load it."""
    from ..hub import push_folder
    from ..metrics.ece.publish import build_space_folder

    with tempfile.TemporaryDirectory() as folder:
        space = build_space_folder(folder + "/space", repo_id=args.repo_id)
        commit = push_folder(
            space,
            args.repo_id,
            repo_type="space",
            space_sdk="gradio",
            private=args.private or None,
            token=args.token,
            commit_message="Expected calibration error",
        )
    print(f"Pushed {args.repo_id} at {commit}.\nLoad it with: evaluate.load({args.repo_id!r}, revision={commit!r})")
    return 0
