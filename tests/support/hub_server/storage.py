"""What the server keeps on disk: content-addressed objects, and repositories with their commits and refs.

Every file is written under a temporary name and renamed, so that a server killed at any moment leaves a readable store
and a second server started on the same folder sees everything that was acknowledged.
"""

import hashlib
import json
import os
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .wire import HttpError


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def git_blob_oid(content: bytes) -> str:
    """The object id git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class ObjectStore:
    """Immutable bytes under a name that is derived from them: `kind/ab/abcdef...`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, key: str) -> Path:
        if not key.isalnum():
            raise HttpError(400, f"Malformed object name {key!r}")
        return self.root / kind / key[:2] / key

    def put(self, kind: str, key: str, content: bytes) -> bool:
        """Store and say whether it was new."""
        path = self.path(kind, key)
        if path.exists():
            return False
        write_atomically(path, content)
        return True

    def get(self, kind: str, key: str) -> bytes | None:
        try:
            return self.path(kind, key).read_bytes()
        except FileNotFoundError:
            return None

    def has(self, kind: str, key: str) -> bool:
        return self.path(kind, key).exists()

    def keys(self, kind: str) -> list[str]:
        return sorted(path.name for path in (self.root / kind).glob("*/*") if not path.name.startswith("."))


@dataclass(frozen=True)
class Entry:
    """A file of a commit. `oid` is git's blob id (of the pointer for an LFS file); `lfs` its sha256, if it is one."""

    size: int
    oid: str
    sha256: str
    lfs: bool

    @property
    def comparable_oid(self) -> str:
        """What the clients compare a local file with to skip unchanged ones."""
        return self.sha256 if self.lfs else self.oid


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, Entry]


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


@dataclass
class Repo:
    """A repository: its refs live in `repo.json`, each commit with its complete file list in `commits/<oid>.json`."""

    folder: Path
    type: str
    id: str
    private: bool
    created: str
    sdk: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def save(self) -> None:
        state = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_atomically(self.folder / "repo.json", json.dumps(state).encode())

    def commit(self, oid: str) -> Commit:
        state = json.loads((self.folder / "commits" / f"{oid}.json").read_bytes())
        state["files"] = {path: Entry(**entry) for path, entry in state["files"].items()}
        return Commit(**state)

    def resolve(self, revision: str) -> str:
        """The commit oid of a branch, tag or (prefix of a) commit oid."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if name in self.branches or name in self.tags:
            return self.branches.get(name) or self.tags[name]
        if len(revision) >= 7 and revision.isalnum():
            for path in (self.folder / "commits").glob(f"{revision}*.json"):
                return path.stem
        raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits = []
        oid: str | None = self.resolve(revision)
        while oid:
            commits.append(self.commit(oid))
            oid = commits[-1].parent
        return commits

    def add_commit(
        self, branch: str, files: dict[str, Entry], title: str, description: str, author: str, parent: str | None
    ) -> Commit:
        # Like the Hub, an unchanged tree is a commit all the same: a client that commits twice is seen to do so.
        draft = Commit("", parent, title, description, author, timestamp(), files)
        state = json.dumps(asdict(draft), sort_keys=True) + uuid.uuid4().hex
        draft.oid = hashlib.sha1(state.encode()).hexdigest()
        write_atomically(self.folder / "commits" / f"{draft.oid}.json", json.dumps(asdict(draft)).encode())
        self.branches[branch] = draft.oid
        self.save()
        return draft


class RepoStore:
    """All repositories. `lock` makes read-modify-write of refs atomic across the server's threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        for path in root.glob("*/*/*/repo.json"):
            state: dict[str, Any] = json.loads(path.read_bytes())
            repo = Repo(folder=path.parent, **state)
            self.repos[repo.type, repo.id] = repo

    def create(self, type: str, id: str, private: bool, author: str, sdk: str | None, files: dict[str, Entry]) -> Repo:
        repo = Repo(self.root / type / id, type, id, private, timestamp(), sdk)
        repo.add_commit("main", files, "initial commit", "", author, None)
        self.repos[type, id] = repo
        return repo

    def delete(self, repo: Repo) -> None:
        # The folder is kept under another name: content-addressed objects may be shared and nothing here is scarce.
        del self.repos[repo.type, repo.id]
        os.replace(repo.folder, repo.folder.with_name(f".deleted-{uuid.uuid4().hex}"))
