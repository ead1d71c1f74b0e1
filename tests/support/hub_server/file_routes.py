"""Hub routes about files: what to do with each before an upload, LFS batches, Xet tokens, commits and downloads."""

import base64
import json
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from .repo_routes import REPO, account_of, find_commit, find_repo
from .storage import Entry, git_blob_oid
from .wire import Call, HttpError, Reply, Route, bytes_reply, json_reply, route


# As in the Hub's default .gitattributes, shortened to what the tests push.
LFS_SUFFIXES = {".parquet", ".safetensors", ".bin", ".pt", ".pth", ".arrow", ".npy", ".npz", ".h5", ".gz", ".zip"}
LFS_SIZE = 10_000_000


def validate_yaml(call: Call) -> Reply:
    return json_reply({"errors": [], "warnings": []})


def preupload(call: Call) -> Reply:
    repo = find_repo(call, write=True)
    files = find_commit(call, repo).files
    rows: list[dict[str, Any]] = []
    wanted = call.json()["files"]
    if len(wanted) > 256:
        raise HttpError(413, "too many files")
    for file in wanted:
        large = PurePosixPath(file["path"]).suffix in LFS_SUFFIXES or file["size"] >= LFS_SIZE
        row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if file["path"] in files:
            row["oid"] = files[file["path"]].comparable_oid
        rows.append(row)
    return json_reply({"files": rows, "commitOid": repo.resolve(call.params["revision"])})


def lfs_batch(call: Call) -> Reply:
    repo = find_repo(call, write=True)
    hub, wanted = call.hub, call.json()
    prefix = "" if repo.type == "model" else f"{repo.type}s/"
    rows: list[dict[str, Any]] = []
    multipart = False
    for item in wanted["objects"]:
        row = {"oid": item["oid"], "size": item["size"]}
        if not hub.holds(item["oid"]):
            href = f"{hub.store_endpoint}/objects/{item['oid']}"
            upload: dict[str, Any] = {"href": href}
            if item["size"] > hub.lfs_part_size and "multipart" in wanted.get("transfers", ()):
                multipart = True
                parts = -(-item["size"] // hub.lfs_part_size)
                urls = {f"{part:05d}": f"{href}/parts/{part}" for part in range(1, parts + 1)}
                upload = {"href": f"{href}/complete", "header": {"chunk_size": str(hub.lfs_part_size), **urls}}
            verify = f"{hub.endpoint}/{prefix}{repo.id}.git/info/lfs/objects/verify"
            row["actions"] = {"upload": upload, "verify": {"href": verify}}
        rows.append(row)
    return json_reply({"transfer": "multipart" if multipart else "basic", "objects": rows})


def lfs_verify(call: Call) -> Reply:
    find_repo(call, write=True)
    if not call.hub.holds(call.json()["oid"]):
        raise HttpError(404, "object not found", "EntryNotFound")
    return json_reply({"message": "verified"})


def xet_token(call: Call) -> Reply:
    scope = call.params["scope"]
    find_repo(call, write=scope == "write")
    token, expires = call.hub.issue_xet_token(scope)
    headers = {
        "X-Xet-Cas-Url": call.hub.store_endpoint,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return json_reply({"casUrl": call.hub.store_endpoint, "accessToken": token, "exp": expires}, headers=headers)


def commit(call: Call) -> Reply:
    hub, branch = call.hub, call.params["revision"]
    header: dict[str, Any] = {}
    with hub.repos.lock:
        repo, account = find_repo(call, write=True), account_of(call)
        assert account is not None
        if branch not in repo.branches:
            raise HttpError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo.resolve(branch)
        files = dict(repo.commit(head).files)
        for line in call.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
                if header.get("parentCommit", head) != head:
                    raise HttpError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = hub.store_regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = _lfs_entry(call, value)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HttpError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {path: entry for path, entry in files.items() if not path.startswith(prefix)}
            else:
                raise HttpError(400, f"Unknown operation {key}")
        done = repo.add_commit(
            branch, files, header["summary"], header.get("description", ""), account.user, parent=head
        )
    prefix = "" if repo.type == "model" else f"{repo.type}s/"
    return json_reply(
        {"success": True, "commitOid": done.oid, "commitUrl": f"{hub.endpoint}/{prefix}{repo.id}/commit/{done.oid}"}
    )


def _lfs_entry(call: Call, value: dict[str, Any]) -> Entry:
    sha256 = value["oid"]
    size = call.hub.size_of(sha256)
    if size is None:
        raise HttpError(400, f"Your push was rejected because an LFS pointer points to a missing object: {sha256}")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Entry(size, git_blob_oid(pointer.encode()), sha256, lfs=True)


def resolve(call: Call) -> Reply:
    repo = find_repo(call)
    found = find_commit(call, repo)
    entry = found.files.get(call.params["path"])
    if entry is None:
        raise HttpError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=found.oid)
    headers = {"X-Repo-Commit": found.oid}
    if not entry.lfs:
        content = call.hub.content(entry.sha256)
        return bytes_reply(content, call.headers.get("Range"), {**headers, "ETag": f'"{entry.oid}"'})
    # On another port, so that clients treat it as a storage host: they then read the metadata off this answer and do
    # not send their token along.
    headers |= {
        "Location": f"{call.hub.store_endpoint}/objects/{entry.sha256}",
        "X-Linked-Etag": f'"{entry.sha256}"',
        "X-Linked-Size": str(entry.size),
    }
    file = call.hub.xet.by_sha256(entry.sha256)
    if file:
        refresh = f"{call.hub.endpoint}/api/{repo.type}s/{quote(repo.id)}/xet-read-token/{found.oid}"
        headers |= {"X-Xet-Hash": file.hash, "Link": f'<{refresh}>; rel="xet-auth"'}
    return Reply(302, b"", headers)


FILES = r"(?:/(?P<type>datasets|spaces))?/{namespace}/{name}"

ROUTES: list[Route] = [
    route("POST", r"/api/validate-yaml", validate_yaml),
    route("POST", REPO + r"/preupload/{revision}", preupload),
    route("POST", FILES + r"\.git/info/lfs/objects/batch", lfs_batch),
    route("POST", FILES + r"\.git/info/lfs/objects/verify", lfs_verify),
    route("GET", REPO + r"/xet-(?P<scope>write|read)-token/{revision}", xet_token),
    route("POST", REPO + r"/commit/{revision}", commit),
    route("GET", FILES + r"/resolve/{revision}/{path*}", resolve),
]
