"""`first-trl cache`: verify, describe, push or pull a teacher cache."""

import argparse
import shutil
from pathlib import Path

from ..cache.folder import cache_size, finished_splits, load_manifest
from ..cache.verify_folder import verify_cache_folder
from ..cards import teacher_cache_card
from ..hub import pull_folder


_USAGE = {
    "verify": "verify FOLDER: check completeness and every byte",
    "info": "info FOLDER: what it is and where it came from",
    "card": "card FOLDER: print the dataset card",
    "push": "push FOLDER REPO: verify, and upload in one commit",
    "pull": "pull REPO FOLDER: fetch and verify",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=_USAGE, help="; ".join(_USAGE.values()))
    parser.add_argument("source", help="cache folder, or the repository to pull")
    parser.add_argument("target", nargs="?", help="repository to push to, or folder to pull into")
    parser.add_argument("--split", help="verify, info: one split (default: all)")
    parser.add_argument("--revision", help="push: branch; pull: branch, tag or commit")
    parser.add_argument("--private", action="store_true", default=None, help="push: create the repository as private")
    parser.add_argument("--tag", help="push: tag the commit, e.g. one per capture")
    parser.add_argument("--license", help="push, card: licence of the cache, as the Hub writes it (e.g. cc-by-4.0)")
    parser.add_argument("--source-license", help="push, card: licence of the source data")
    parser.add_argument("--teacher-license", help="push, card: licence of the teacher")


def main(args: argparse.Namespace) -> int:
    if (args.target is not None) != (args.action in ("push", "pull")):
        raise ValueError(f"Usage: first-trl cache {_USAGE[args.action]}.")
    actions = {"verify": _verify, "info": _info, "card": _card, "push": _push, "pull": _pull}
    return actions[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    for split, manifest in verify_cache_folder(args.source, args.split).items():
        counts = manifest.counts
        prompts = counts.get("rows_without_gold", 0)
        print(
            f"{split}: sound, {counts['rows']} rows"
            + (f" ({prompts} without an answer)" if prompts else "")
            + f", {counts['positions']} positions, {manifest.id}"
        )
    return 0


def _info(args: argparse.Namespace) -> int:
    splits = [args.split] if args.split else finished_splits(args.source)
    for split in splits or ["train"]:
        manifest = load_manifest(args.source, split)
        size = cache_size(args.source, split)
        positions = manifest.counts["positions"]
        print(manifest.to_json())
        print(
            f"# {split}: {size['bytes'] / positions:.1f} bytes a position, {size['teacher_bytes'] / positions:.1f} "
            "of them in the teacher columns"
        )
    return 0


def _render(args: argparse.Namespace, repo_id: str | None) -> str:
    return teacher_cache_card(
        args.source,
        repo_id=repo_id,
        license=args.license,
        source_license=args.source_license,
        teacher_license=args.teacher_license,
    )


def _card(args: argparse.Namespace) -> int:
    print(_render(args, None))
    return 0


def _push(args: argparse.Namespace) -> int:
    from ..experiments.share.push import push_teacher_cache

    commit = push_teacher_cache(
        args.source,
        args.target,
        private=args.private,
        revision=args.revision,
        tag=args.tag,
        license=args.license,
        source_license=args.source_license,
        teacher_license=args.teacher_license,
    )
    print(f"{args.target} at {commit}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    target = Path(args.target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty. Choose a new folder.")
    pulled = pull_folder(args.source, repo_type="dataset", revision=args.revision)
    # The client's cache holds links to shared files; the copy is the user's own
    for name in ("data", "manifest"):
        if not (Path(pulled.path) / name).is_dir():
            raise ValueError(f"{args.source} at {pulled.commit} is no teacher cache: it has no folder {name!r}.")
        shutil.copytree(Path(pulled.path) / name, target / name)
    for split, manifest in verify_cache_folder(target).items():
        print(f"{target}: {split} of {args.source} at {pulled.commit}, {manifest.counts['rows']} rows, sound")
    return 0
