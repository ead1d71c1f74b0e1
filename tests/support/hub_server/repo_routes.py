"""Hub routes about repositories: creation, information, listings, refs and history."""

from typing import Any
from urllib.parse import quote

from .accounts import Account, whoami
from .storage import Commit, Entry, Repo, git_blob_oid
from .wire import Call, HttpError, Reply, Route, json_reply, route


TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
GIT_ATTRIBUTES = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def account_of(call: Call) -> Account | None:
    return call.hub.accounts.authenticate(call.headers.get("Authorization"))


def find_repo(call: Call, write: bool = False) -> Repo:
    """The repository a call is about, if its account may see it (and write to it)."""
    account = account_of(call)
    type = TYPES[call.params.get("type", "models")]
    repo = call.hub.repos.repos.get((type, f"{call.params['namespace']}/{call.params['name']}"))
    owner = account is not None and repo is not None and account.owns(call.params["namespace"])
    if repo is None or (repo.private and not owner):
        # Without a token the Hub does not say whether a repository is missing or private.
        raise HttpError(404 if account else 401, "Repository not found", "RepoNotFound")
    if write and account is None:
        raise HttpError(401, "Invalid username or password.")
    if write and (not owner or account is None or account.role != "write"):
        raise HttpError(403, "Forbidden: your token does not have write access to this repository")
    return repo


def find_commit(call: Call, repo: Repo) -> Commit:
    return repo.commit(repo.resolve(call.params.get("revision", "main")))


def get_whoami(call: Call) -> Reply:
    account = account_of(call)
    if account is None:
        raise HttpError(401, "Invalid username or password.")
    return json_reply(whoami(account))


def create_repo(call: Call) -> Reply:
    account, wanted = account_of(call), call.json()
    if account is None:
        raise HttpError(401, "Invalid username or password.")
    namespace, type = wanted.get("organization") or account.user, wanted.get("type") or "model"
    id = f"{namespace}/{wanted['name']}"
    prefix = "" if type == "model" else f"{type}s/"
    url = f"{call.hub.endpoint}/{prefix}{id}"
    if not account.owns(namespace):
        raise HttpError(403, f'You don\'t have the rights to create a {type} under the namespace "{namespace}"')
    if account.role != "write":
        raise HttpError(403, "You don't have the rights: your token has the role read")
    if type == "space" and not wanted.get("sdk"):
        raise HttpError(400, "sdk is required for a Space")
    with call.hub.repos.lock:
        if (type, id) in call.hub.repos.repos:
            return json_reply({"error": "You already created this repo", "url": url}, 409)
        attributes = call.hub.store_regular(GIT_ATTRIBUTES)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        files = {".gitattributes": attributes}
        call.hub.repos.create(type, id, private, account.user, wanted.get("sdk"), files)
    return json_reply({"url": url, "name": id})


def delete_repo(call: Call) -> Reply:
    wanted = call.json()
    account = account_of(call)
    call.params.update(type=(wanted.get("type") or "model") + "s", name=wanted["name"])
    call.params["namespace"] = wanted.get("organization") or (account.user if account else "")
    with call.hub.repos.lock:
        call.hub.repos.delete(find_repo(call, write=True))
    return Reply()


def entry_json(hub: Any, path: str, entry: Entry) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.lfs:
        value["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 135}
        file = hub.xet.by_sha256(entry.sha256)
        if file:
            value["xetHash"] = file.hash
    return value


def repo_info(call: Call) -> Reply:
    repo = find_repo(call)
    commit = find_commit(call, repo)
    siblings = []
    for path, entry in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in call.query:
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.lfs:
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 135}
        siblings.append(sibling)
    info: dict[str, Any] = {
        "_id": git_blob_oid(repo.id.encode())[:24],
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.oid,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }
    if repo.sdk:
        info["sdk"] = repo.sdk
    return json_reply(info)


def tree(call: Call) -> Reply:
    repo = find_repo(call)
    commit = find_commit(call, repo)
    folder = call.params.get("path", "").strip("/")
    prefix = f"{folder}/" if folder else ""
    if folder and not any(path.startswith(prefix) for path in commit.files):
        raise HttpError(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound", X_Repo_Commit=commit.oid)
    rows: dict[str, dict[str, Any]] = {}
    for path, entry in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            parent = prefix + "/".join(parts[:depth])
            rows.setdefault(parent, {"type": "directory", "path": parent, "size": 0, "oid": commit.oid})
            if not _flag(call, "recursive"):
                break
        else:
            rows[path] = entry_json(call.hub, path, entry)
    if _flag(call, "expand"):
        last = {"id": commit.oid, "title": commit.title, "date": commit.date}
        for row in rows.values():
            row["lastCommit"] = last
    start = int(call.query.get("cursor", 0))
    stop = start + min(int(call.query.get("limit", call.hub.page_size)), call.hub.page_size)
    page = list(rows.values())
    headers = {}
    if stop < len(page):
        query = "&".join(f"{name}={quote(value)}" for name, value in {**call.query, "cursor": str(stop)}.items())
        headers["Link"] = f'<{call.hub.endpoint}{call.path}?{query}>; rel="next"'
    return json_reply(page[start:stop], headers=headers)


def _flag(call: Call, name: str) -> bool:
    return call.query.get(name, "").lower() in ("1", "true")


def paths_info(call: Call) -> Reply:
    repo = find_repo(call)
    commit = find_commit(call, repo)
    wanted = call.form()["paths"]
    rows = []
    for path in [wanted] if isinstance(wanted, str) else wanted:
        if path in commit.files:
            rows.append(entry_json(call.hub, path, commit.files[path]))
        elif any(other.startswith(f"{path.strip('/')}/") for other in commit.files):
            rows.append({"type": "directory", "path": path.strip("/"), "size": 0, "oid": commit.oid})
    return json_reply(rows)


def refs(call: Call) -> Reply:
    repo = find_repo(call)

    def rows(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

    return json_reply(
        {"branches": rows("heads", repo.branches), "tags": rows("tags", repo.tags), "converts": [], "pullRequests": []}
    )


def commits(call: Call) -> Reply:
    repo = find_repo(call)
    rows = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.description,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in repo.history(call.params["revision"])
    ]
    return json_reply(rows)


def create_branch(call: Call) -> Reply:
    with call.hub.repos.lock:
        repo, name = find_repo(call, write=True), call.params["ref"]
        if name in repo.branches:
            raise HttpError(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.resolve(call.json().get("startingPoint") or "main")
        repo.save()
    return Reply(body=b"OK")


def create_tag(call: Call) -> Reply:
    with call.hub.repos.lock:
        repo, name = find_repo(call, write=True), call.json()["tag"]
        if name in repo.tags:
            raise HttpError(409, f"Tag already exists: {name}")
        repo.tags[name] = repo.resolve(call.params["ref"])
        repo.save()
    return Reply(body=b"OK")


def delete_ref(call: Call) -> Reply:
    with call.hub.repos.lock:
        repo = find_repo(call, write=True)
        names = repo.branches if call.params["kind"] == "branch" else repo.tags
        if names.pop(call.params["ref"], None) is None or "main" not in repo.branches:
            raise HttpError(404, f"No such {call.params['kind']}", "RevisionNotFound")
        repo.save()
    return Reply(body=b"OK")


REPO = r"/api/(?P<type>models|datasets|spaces)/{namespace}/{name}"

ROUTES: list[Route] = [
    route("GET", r"/api/whoami-v2", get_whoami),
    route("POST", r"/api/repos/create", create_repo),
    route("DELETE", r"/api/repos/delete", delete_repo),
    route("GET", REPO, repo_info),
    route("GET", REPO + r"/revision/{revision}", repo_info),
    route("GET", REPO + r"/tree/{revision}(?:/{path*})?", tree),
    route("POST", REPO + r"/paths-info/{revision}", paths_info),
    route("GET", REPO + r"/refs", refs),
    route("GET", REPO + r"/commits/{revision}", commits),
    route("POST", REPO + r"/branch/{ref}", create_branch),
    route("POST", REPO + r"/tag/{ref}", create_tag),
    route("DELETE", REPO + r"/(?P<kind>branch|tag)/{ref}", delete_ref),
]
