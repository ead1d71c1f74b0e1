"""The steps of a push: repository and branch, content, one commit, tag. Each may be repeated at any point."""

import re
import uuid
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from .session import HubSession


# Written by the Hub: which files are stored apart from git
_KEPT = {".gitattributes"}

Tree = dict[str, RepoFile]


def open_repo(session: HubSession, private: bool | None, revision: str | None, space_sdk: str | None = None) -> str:
    """Make sure that the repository and the branch exist; returns the branch."""
    api, repo_id, repo_type = session.api, session.repo_id, session.repo_type

    def find() -> Any:
        try:
            return api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            return None

    info = session.call("Looking for the repository", find)
    if info is None:
        if repo_type == "space" and space_sdk is None:
            raise ValueError(f"The Space {repo_id} does not exist; to create it pass space_sdk, e.g. 'gradio'.")
        session.call(
            "Creating the repository",
            lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk),
        )
    elif private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, and private=True was asked for. Nothing was sent: make it private in its "
            "settings, push to another name, or pass private=None to publish."
        )
    branch = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", branch):
        raise ValueError("revision is a commit; a push goes to a branch. Name one, e.g. revision='main'.")
    if branch != "main" and not branch.startswith("refs/"):
        session.call(
            "Creating the branch",
            lambda: api.create_branch(repo_id, branch=branch, repo_type=repo_type, exist_ok=True),
        )
    return branch


def upload_content(session: HubSession, branch: str, additions: list[CommitOperationAdd]) -> None:
    """Send the content of large files; small ones travel inside the commit. Finished files are skipped on a retry."""
    session.call(
        "Uploading",
        lambda: session.api.preupload_lfs_files(
            session.repo_id, additions, repo_type=session.repo_type, revision=branch, free_memory=False
        ),
    )


def commit_once(session: HubSession, branch: str, message: str, additions: list[CommitOperationAdd]) -> str:
    """Make the current head hold the additions and nothing else, exactly once.

    Each try names the head it was prepared for as its parent, so the Hub refuses it when another commit came in
    between, be it somebody else's or our own whose answer was lost. Our own is recognised by a mark in its description.
    """
    pushed = {addition.path_in_repo for addition in additions}
    mark = f"first_trl push {uuid.uuid4().hex}"
    known: list[str] = []  # heads of earlier tries: commits up to them are older than this push

    def attempt() -> str:
        head = _sha(session, branch)
        if known and head not in known:
            for commit in session.api.list_repo_commits(session.repo_id, repo_type=session.repo_type, revision=branch):
                if mark in commit.message:
                    return commit.commit_id
                if commit.commit_id in known:
                    break
        known.append(head)
        tree = list_files(session, head)
        for addition in additions:
            # The client leaves out files that it found unchanged while uploading. Another writer may have changed them
            # since: compare with this head.
            file = tree.get(addition.path_in_repo)
            addition._remote_oid = None if file is None else file.lfs.sha256 if file.lfs else file.blob_id
        # Of this head too: what another writer added since is not part of the folder
        deletions = [CommitOperationDelete(path) for path in sorted(set(tree) - pushed - _KEPT)]
        done = session.api.create_commit(
            session.repo_id,
            [*additions, *deletions],
            commit_message=message,
            commit_description=mark,
            repo_type=session.repo_type,
            revision=branch,
            parent_commit=head,
        )
        return str(done.oid)

    return session.call("Committing", attempt, retry_conflicts=True)


def tag_commit(session: HubSession, tag: str, commit: str, paths: set[str]) -> None:
    """Tag the commit. A tag that exists is fine when the pushed files are the same there."""

    def attempt() -> None:
        try:
            session.api.create_tag(session.repo_id, tag=tag, revision=commit, repo_type=session.repo_type)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            there, here = list_files(session, tag), list_files(session, commit)
            if any(path not in there or there[path].blob_id != here[path].blob_id for path in paths):
                raise ValueError(
                    f"The tag {tag!r} of {session.repo_id} exists and holds other data. The push itself is done "
                    f"(commit {commit}): choose another tag, or delete that one first."
                ) from None

    session.call("Tagging", attempt)


def find_commit(session: HubSession, revision: str | None) -> str:
    return session.call("Looking up the revision", lambda: _sha(session, revision or "main"))


def _sha(session: HubSession, revision: str) -> str:
    return str(session.api.repo_info(session.repo_id, repo_type=session.repo_type, revision=revision).sha)


def list_files(session: HubSession, revision: str) -> Tree:
    entries = session.api.list_repo_tree(
        session.repo_id, recursive=True, revision=revision, repo_type=session.repo_type
    )
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
