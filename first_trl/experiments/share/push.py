"""Sharing a finished run on the Hub: the teacher cache, then every student with its card."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...cache.folder import finished_splits, manifest_path, shard_paths
from ...cache.verify_folder import verify_cache_folder
from ...cards import find_license, teacher_cache_card
from ...cards.render import hub_id
from ...hub import push_folder
from ...utils.files import write_json
from ...vocabulary import POST_HOC
from ..run_folder import MARKER, adapter_config, read_json
from .cards import write_student_cards
from .model import run_model_card
from .run import Run


__all__ = ["push_run", "push_teacher_cache", "write_student_cards"]

# What a training leaves beside the weights: settings with paths of this machine, and what serves resuming
_PRIVATE = re.compile(
    r"training_args\.bin|trainer_state\.json|(optimizer|scheduler|scaler)\.pt|rng_state.*|"
    + re.escape(MARKER)
    + r"|checkpoint-\d+|\..*"
)
_REPO_NAME_LENGTH = 96


def push_run(
    run: str | Path,
    namespace: str | None = None,
    *,
    arms: list[str] | None = None,
    cache: bool | None = None,
    base: bool = True,
    private: bool | None = None,
    prefix: str | None = None,
    license: str | None = None,
    token: str | None = None,
    tag: str | None = None,
) -> dict[str, dict[str, str]]:
    """
    Push the teacher cache and the students of a finished run, with model cards that name each other. What is not given
    is taken from the `hub` of the run's recipe.

    Pushing again makes commits only where something changed. An adapter whose base is on this machine alone is
    pushed with that base, in a repository of its own, and refers to the commit of it: `from_pretrained` with the
    adapter's repository is enough to load it anywhere.

    Args:
        run (`str` or `Path`):
            Folder of a finished run.
        namespace (`str`, *optional*):
            User or organisation on the Hub.
        arms (`list[str]`, *optional*):
            What to push; without a word in the recipe every student that is no point of a sweep. The name of a
            `teacher` arm pushes the fine-tuned teacher.
        cache (`bool`, *optional*):
            Whether to push the teacher cache, and those of further teachers that the students learned from; without a
            word in the recipe it is. Caches made in folds stay with the run.
        base (`bool`, *optional*, defaults to `True`):
            Whether the base of adapters, where it is on this machine alone, is pushed too. Without it the adapters
            name a base that nobody else can load.
        private (`bool`, *optional*):
            Visibility of repositories that are created. `True` for one that exists and is public is an error.
        prefix (`str`, *optional*):
            Repositories are called `<prefix>-<arm>`, `<prefix>-cache` (`<prefix>-cache-<teacher>` of further teachers)
            and `<prefix>-base`. The default is the recipe's name, with the values of a grid and a seed other than 0
            behind it.
        license (`str`, *optional*):
            Licence of models that inherit none, as the Hub writes it.
        token (`str`, *optional*):
            Hub token; defaults to the one of `hf auth login` or `HF_TOKEN`.
        tag (`str`, *optional*):
            Tag to set on every commit.

    Returns:
        `dict`: `"cache"`, `"base"` and arm -> `{"repo_id", "commit"}`, as far as they were pushed; `share.json` in the
        run's folder keeps the same, with what was pushed before.

    Raises:
        `ValueError`: Something the caller can mend: the folder, names, token, permissions.
        `RuntimeError`: The Hub did not manage within the bounds.
    """
    found = Run(run)
    hub = found.recipe.get("hub") or {}
    namespace = namespace or hub.get("namespace")
    if not namespace:
        raise ValueError(
            f"The recipe of {run} has no `hub` that names a user or organisation to push to. Give `namespace` "
            "(--namespace), or --cards-only to send nothing."
        )
    cache = hub.get("cache", True) if cache is None else cache
    private = hub.get("private") if private is None else private
    license = license or hub.get("license")
    names = _arms(found, arms or hub.get("arms") or None)
    students = [name for name in names if name in found.students]
    for arm in students:
        found.student(arm)  # complete, before anything is sent
    recipe = found.recipe
    prefix = prefix or repo_prefix(recipe["name"], recipe.get("cell") or {}, recipe.get("seed") or 0)
    caches = found.caches(students) if cache else {}
    places = [*names, *caches, "base"]
    repo_ids = {name: f"{namespace}/{repo_name(prefix, name)}" for name in places}
    if len(set(repo_ids.values())) < len(places):
        raise ValueError(
            f"Two among {', '.join(places)} would go to one repository. Leave one of them out, or push them with another "
            "prefix."
        )
    options: dict[str, Any] = {"private": private, "token": token, "tag": tag}
    shared: dict[str, dict[str, str]] = {}

    def record(name: str, commit: str) -> None:
        shared[name] = {"repo_id": repo_ids[name], "commit": commit}
        path = found.folder.shared
        before = read_json(path) if path.is_file() else {}
        write_json(path, {**before, **shared})

    teacher = find_license(recipe["teacher"]["name_or_path"], token) if caches else None
    for name, of in caches.items():
        folder = found.cache_folder(of)
        splits = finished_splits(folder)
        commit = push_teacher_cache(
            folder,
            repo_ids[name],
            teacher_license=teacher.id if teacher else None,
            teacher_name=found.teacher_name(of),
            sources={role: found.source_text(role) for role in splits if role in recipe["task"]["splits"]},
            **options,
        )
        record(name, commit)
    adapters = [arm for arm in students if found.student(arm).is_adapter]
    if adapters and found.base_folder is not None and base:
        print(
            f"The base of {', '.join(adapters)} is on this machine alone and is uploaded as {repo_ids['base']} (--no-base "
            "leaves it out).",
            flush=True,
        )
        card = run_model_card(found, None, repo_ids["base"], license, token)
        with _staged(found.base_folder, {"README.md": card}) as folder:
            record("base", push_folder(folder, repo_ids["base"], commit_message="Base of the adapters", **options))
    write_student_cards(
        run,
        arms=students,
        repo_ids=repo_ids,
        caches={name: shared[name] for name in caches},
        base_repo=repo_ids["base"] if "base" in shared else None,
        license=license,
        token=token,
    )
    for arm in names:
        if arm in students:
            model = found.student(arm).model
            files = _adapter_config(model, found.recipe["student"], shared.get("base"))
        else:
            model = found.teacher(arm).model
            files = _adapter_config(model, found.recipe["teacher"], None)
            files["README.md"] = run_model_card(found, arm, repo_ids[arm], license, token)
        with _staged(model, files) as folder:
            record(arm, push_folder(folder, repo_ids[arm], commit_message=f"{found.label(arm)}, {prefix}", **options))
    return shared


def push_teacher_cache(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    license: str | None = None,
    source_license: str | None = None,
    teacher_license: str | None = None,
    teacher_name: str | None = None,
    sources: Mapping[str, str] | None = None,
    token: str | None = None,
) -> str:
    """
    Verify a teacher cache and push it with its card, in one commit.

    Args:
        folder (`str` or `Path`):
            Cache folder with one or more finished splits.
        repo_id (`str`):
            `"namespace/name"`; created if it does not exist.
        license, source_license, teacher_license, teacher_name, sources:
            As in [`~first_trl.cards.teacher_cache_card`].
        private, revision, tag, token:
            As in [`~first_trl.hub.push_folder`].

    Returns:
        `str`: The commit that holds the cache.

    Raises:
        `ValueError`: The cache is damaged or unfinished, or something about the repository that the caller can mend.
        `RuntimeError`: The Hub did not manage within the bounds.
    """
    folder = Path(folder)
    manifests = verify_cache_folder(folder)
    card = teacher_cache_card(
        folder,
        repo_id=repo_id,
        license=license,
        source_license=source_license,
        teacher_license=teacher_license,
        teacher_name=teacher_name,
        sources=sources,
    )
    # The cache and its card, and nothing else that may lie in the folder
    paths = [path for split in manifests for path in (manifest_path(folder, split), *shard_paths(folder, split))]
    files = [path.relative_to(folder).as_posix() for path in paths]
    with _staged(folder, {"README.md": card}, files) as staged:
        return push_folder(
            staged,
            repo_id,
            repo_type="dataset",
            private=private,
            revision=revision,
            tag=tag,
            commit_message=f"Teacher cache {', '.join(manifest.id for manifest in manifests.values())}",
            token=token,
        )


def _arms(run: Run, arms: list[str] | None) -> list[str]:
    if arms is None:
        plain = [name for name in run.students if not run.is_swept(name)]
        if run.students and not plain:
            raise ValueError(
                f"Every student of this run is a point of a sweep. Name those to push in `arms`: {', '.join(run.students)}."
            )
        return plain
    for name in arms:
        kind = run.arms.get(name, {}).get("kind")
        if kind is None or kind in POST_HOC:
            reason = (
                "is no arm of this run" if kind is None else "is another arm with temperatures behind it, and no model"
            )
            raise ValueError(f"{name!r} {reason}. Choose among {', '.join(run.students)}.")
        if kind == "teacher":
            run.teacher(name)  # raises where there is nothing to push
    return list(dict.fromkeys(arms))


def repo_prefix(name: str, cell: Mapping[str, Any], seed: int) -> str:
    """What the repositories of a run begin with: the recipe's name, the values of a grid, and a seed other than 0."""
    parts = [name, *(str(value) if key == "case" else f"{key}-{value}" for key, value in cell.items())]
    return "-".join([*parts, f"seed-{seed}"] if seed else parts)


def repo_name(prefix: str, arm: str) -> str:
    """A name the Hub takes: arms of a grid are called `first@recalibration_value=0.3`."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{prefix}-{arm}")
    name = re.sub(r"--+", "-", re.sub(r"\.\.+", ".", name)).strip("-.")
    if len(name) > _REPO_NAME_LENGTH:
        raise ValueError(f"{name!r} is too long for a repository on the Hub. Give a shorter `prefix`.")
    return name


def _adapter_config(model: Path, spec: Mapping[str, Any], base: Mapping[str, str] | None) -> dict[str, str]:
    """The configuration of an adapter, pointing at a base that others can load; nothing for a whole model."""
    path = adapter_config(model)
    if not path.is_file():
        return {}
    config = read_json(path)
    if base is not None:
        config |= {"base_model_name_or_path": base["repo_id"], "revision": base["commit"]}
    elif hub_id(spec["name_or_path"]):
        revision = (spec.get("init_kwargs") or {}).get("revision")
        config |= {"base_model_name_or_path": spec["name_or_path"], "revision": revision}
    else:
        # Without its base, whose place on this machine is nobody else's business
        config["base_model_name_or_path"] = Path(str(config.get("base_model_name_or_path"))).name
    return {path.name: json.dumps(config, indent=2, sort_keys=True) + "\n"}


@contextmanager
def _staged(folder: Path, texts: Mapping[str, str], files: list[str] | None = None) -> Iterator[Path]:
    """A folder that looks like what the repository will hold: links to the files, and texts in their place."""
    folder = folder.resolve()
    if files is None:
        paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        files = [path.as_posix() for path in paths if not any(_PRIVATE.fullmatch(part) for part in path.parts)]
    with tempfile.TemporaryDirectory(prefix="first_trl-share-") as name:
        staged = Path(name)
        for file in files:
            if file not in texts:
                (staged / file).parent.mkdir(parents=True, exist_ok=True)
                (staged / file).symlink_to(folder / file)
        for file, text in texts.items():
            (staged / file).write_text(text, encoding="utf-8")
        yield staged
