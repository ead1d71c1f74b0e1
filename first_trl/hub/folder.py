"""Folders of a Hub repository: up in one commit, down pinned to one."""

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from ..utils.retry import RetryPolicy
from .commit import commit_once, find_commit, list_files, open_repo, tag_commit, upload_content
from .session import DEFAULT_RETRY_POLICY, HubSession, RepoType, is_offline


class PulledFolder(NamedTuple):
    """A downloaded repository: the folder (read-only, in the client's cache) and the commit it is a copy of."""

    path: str
    commit: str


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: RepoType = "model",
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    space_sdk: str | None = None,
    token: str | None = None,
    retry_policy: RetryPolicy = DEFAULT_RETRY_POLICY,
) -> str:
    """Make a repository equal to a folder, in one commit.

    Files of an earlier push that the folder does not have are deleted: shards of a larger cache, weights in another
    format. Only `.gitattributes`, which the Hub writes, stays. Every deleted file remains in the earlier commit.

    Args:
        folder (`str` or `Path`):
            Local folder; what is below `.git` and `.cache/huggingface` is left out.
        repo_id (`str`):
            `"namespace/name"`; created if it does not exist.
        repo_type (`str`, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`.
        private (`bool`, *optional*):
            Visibility of a repository that is created. `True` for a repository that exists and is public is an error.
        revision (`str`, *optional*):
            Branch to push to, created from `main` if it does not exist.
        tag (`str`, *optional*):
            Tag to set on the commit.
        commit_message (`str`, *optional*):
            First line of the commit.
        space_sdk (`str`, *optional*):
            `"gradio"`, `"docker"` or `"static"`; needed when a Space has to be created.
        token (`str`, *optional*):
            Hub token; defaults to the one of `hf auth login` or `HF_TOKEN`.
        retry_policy ([`RetryPolicy`], *optional*):
            Bounds of the retries of each step.

    Returns:
        `str`: The commit that holds the folder.

    Raises:
        `ValueError`: Something the caller can mend: folder, token, permissions, names.
        `RuntimeError`: The Hub did not manage within the bounds.
    """
    folder = Path(folder)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = list(filter_repo_objects(paths, ignore_patterns=[*DEFAULT_IGNORE_PATTERNS, "**/__pycache__/**", "*.pyc"]))
    if not paths:
        raise ValueError(f"There is nothing to push: {str(folder)!r} is no folder or has no files.")
    session = HubSession(repo_id, repo_type, token, retry_policy, write=True)
    branch = open_repo(session, private, revision, space_sdk)
    additions = [CommitOperationAdd(path, folder / path) for path in paths]
    upload_content(session, branch, additions)
    commit = commit_once(session, branch, commit_message or "Upload folder", additions)
    if tag:
        tag_commit(session, tag, commit, set(paths))
    return commit


def pull_folder(
    repo_id: str,
    *,
    repo_type: RepoType = "dataset",
    revision: str | None = None,
    allow_patterns: list[str] | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    retry_policy: RetryPolicy = DEFAULT_RETRY_POLICY,
) -> PulledFolder:
    """Download a repository, or the files of it that match `allow_patterns`, as of one commit.

    With `HF_HUB_OFFLINE=1` the copy in the client's cache is returned if there is one.

    Returns:
        [`PulledFolder`]: The local folder and the commit it is a copy of.

    Raises:
        `ValueError`: Repository or revision do not exist or may not be seen.
        `RuntimeError`: The Hub did not manage within the bounds.
    """
    session = HubSession(repo_id, repo_type, token, retry_policy)
    arguments: dict[str, Any] = {"repo_type": repo_type, "allow_patterns": allow_patterns, "cache_dir": cache_dir}
    if is_offline():
        path = session.api.snapshot_download(repo_id, revision=revision, local_files_only=True, **arguments)
        return PulledFolder(path, Path(path).name)
    commit = find_commit(session, revision)
    tree = session.call("Listing the files", lambda: list_files(session, commit))
    wanted = list(filter_repo_objects(tree, allow_patterns=allow_patterns))

    def download() -> str:
        path = session.api.snapshot_download(repo_id, revision=commit, **arguments)
        # When the Hub fails in between, the client may return what it has so far instead of raising.
        missing = [name for name in wanted if not _is_complete(Path(path) / name, tree[name].size)]
        if missing:
            raise ConnectionError(f"incomplete download, {len(missing)} files missing, e.g. {missing[0]}")
        return str(path)

    return PulledFolder(session.call("Downloading", download), commit)


def _is_complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
