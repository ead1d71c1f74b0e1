"""Pushing and pulling: what ends up in the repository, concurrent writers, interruptions."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_server import Client, HubServer, start_session


MODES = {"xet": {}, "lfs": {"HF_HUB_DISABLE_XET": "1"}}

PRELUDE = """
import numpy as np
import tempfile
from datasets import Dataset, load_dataset
from pathlib import Path
from first_trl.hub import RetryPolicy, pull_folder, push_folder

fast = RetryPolicy(base_seconds=0.05)

def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return Dataset.from_dict({"ids": rng.integers(0, 50000, (n, 5)).astype("int32"),
                              "logprobs": rng.normal(size=(n, 5)).astype("float16")})

def push(data, repo, shards=1, split="train", extra_files=None, **options):
    # The rows as Parquet shards of a split, and further small files
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for index in range(shards):
            shard = data.shard(shards, index, contiguous=True)
            shard.to_parquet(folder / "data" / f"{split}-{index:05d}-of-{shards:05d}.parquet")
        for name, content in (extra_files or {}).items():
            (folder / name).write_bytes(content)
        return push_folder(folder, repo, repo_type="dataset", retry_policy=fast, **options)

def same(data, repo, *arguments, **options):
    loaded = load_dataset(repo, *arguments, **options)
    return loaded.features == data.features and loaded[:] == data[:]
"""


# Xet is what users run; the LFS leg of everything is for CI.
@pytest.fixture(scope="module", params=["xet", pytest.param("lfs", marks=pytest.mark.slow)])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server
        assert server.internal_errors == []
        assert server.foreign_requests == []
        assert not [
            request for request in server.requests if request.port == "store" and request.authorization == "hub"
        ]


@pytest.fixture(scope="module")
def client(hub: HubServer, mode: str) -> Iterator[Client]:
    with start_session(PRELUDE, hub, env=MODES[mode]) as session:
        yield session


_numbers = itertools.count()


@pytest.fixture
def repo(hub: HubServer) -> str:
    hub.faults.clear()
    return f"alice/repo-{next(_numbers)}"


def test_unchanged_folder_makes_no_commit_and_sends_no_data(hub: HubServer, client: Client, repo: str) -> None:
    push = f"push(rows(900), {repo!r}, shards=3, tag='v1', extra_files={{'m.json': b'1'}})"
    first = client.result(push)
    before = len(hub.requests)
    assert client.result(push) == first
    new = hub.requests[before:]
    assert not [request for request in new if "/commit/" in request.path or "/xorbs/" in request.path]
    # Another push moves the head; the tag stays where it is, and the first push again is still fine with that.
    client.result(f"push(rows(3), {repo!r}, split='other')")
    again = client.result(push)
    assert again != first and hub.files(repo, revision=again) == hub.files(repo, revision=first)
    assert hub.repo(repo).tags == {"v1": first}
    answer = client.ask(f"push(rows(4), {repo!r}, shards=3, tag='v1')")
    assert "ValueError: The tag 'v1'" in answer["error"] and "choose another tag" in answer["error"]


def test_loads_stay_at_the_returned_commit(client: Client, repo: str) -> None:
    first = client.result(f"push(rows(5), {repo!r}, revision='capture-1')")
    second = client.result(f"push(rows(6), {repo!r}, revision='capture-1')")
    assert first != second
    assert client.result(f"same(rows(5), {repo!r}, split='train', revision={first!r})")
    assert client.result(f"same(rows(6), {repo!r}, split='train', revision='capture-1')")
    assert client.result(f"pull_folder({repo!r}, revision='capture-1').commit") == second
    assert client.result(f"pull_folder({repo!r}, revision={first!r}).commit") == first


def test_pull_folder_returns_the_files(client: Client, hub: HubServer, repo: str) -> None:
    client.result(
        "Path('tree/deep').mkdir(parents=True, exist_ok=True) or Path('tree/deep/w.bin').write_bytes(bytes(70_000)) "
        "and Path('tree/a.txt').write_text('Grüße')"
    )
    commit = client.result(f"push_folder('tree', {repo!r}, repo_type='model', tag='v1', private=True)")
    path, resolved = client.result(f"pull_folder({repo!r}, repo_type='model', revision='v1')")
    assert resolved == commit
    assert Path(path, "a.txt").read_text() == "Grüße" and Path(path, "deep/w.bin").read_bytes() == bytes(70_000)
    only, _ = client.result(f"pull_folder({repo!r}, repo_type='model', allow_patterns=['*.txt'], cache_dir='c')")
    assert [file.name for file in Path(client.home, only).rglob("*") if file.is_file()] == ["a.txt"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("push(rows(1), 'x')", "'namespace/name'"),
        ("push(rows(1), 'alice/x', revision='a' * 40)", "a push goes to a branch"),
        ("push_folder('no-such-folder', 'alice/x')", "nothing to push"),
        ("push_folder('.', 'alice/space', repo_type='space')", "pass space_sdk"),
        ("push_folder('.', 'alice/x', repo_type='thing')", "use 'model', 'dataset' or 'space'"),
    ],
)
def test_bad_arguments(client: Client, call: str, message: str) -> None:
    error = client.ask(call)["error"]
    assert "ValueError: " in error and message in error


def test_private_data_do_not_go_to_a_public_repository(hub: HubServer, client: Client, repo: str) -> None:
    client.result(f"push(rows(3), {repo!r})")
    before = len(hub.requests)
    error = client.ask(f"push(rows(4), {repo!r}, private=True)")["error"]
    assert "ValueError: " in error and "is public" in error
    assert [request.method for request in hub.requests[before:]] == ["GET"]


def test_repository_equals_the_folder(hub: HubServer, client: Client, repo: str) -> None:
    client.result(f"push(rows(900), {repo!r}, shards=6, extra_files={{'old.json': b'1', 'README.md': b'# One'}})")
    commit = client.result(f"push(rows(20, seed=1), {repo!r}, shards=2, extra_files={{'README.md': b'# Two'}})")
    shards = {f"data/train-0000{index}-of-00002.parquet" for index in range(2)}
    assert set(hub.files(repo)) == {".gitattributes", "README.md", *shards}
    assert client.result(f"same(rows(20, seed=1), {repo!r}, split='train')")
    # One commit, not a deletion and an upload
    history = hub.repo(repo).history("main")
    assert history[0].oid == commit and len(history) == 3
    # Deleting alone is a change too
    client.result(f"push(rows(20, seed=1), {repo!r}, shards=2)")
    assert set(hub.files(repo)) == {".gitattributes", *shards}


def test_conflicting_commit_is_replaced(hub: HubServer, client: Client, mode: str, repo: str) -> None:
    """Another client's whole push of another split happens while our commit is on its way: no mixture comes out."""
    client.result(f"push(rows(3), {repo!r}, split='zero', commit_message='zero')")
    with start_session(PRELUDE, hub, env=MODES[mode]) as other:
        hub.before(
            rf"POST /api/datasets/{repo}/commit/",
            lambda: other.result(f"push(rows(5, seed=1), {repo!r}, split='theirs', commit_message='theirs')"),
        )
        client.result(f"push(rows(4), {repo!r}, split='ours', commit_message='ours')")
    assert hub.faults.pending == 0
    assert hub.count(rf"POST /api/datasets/{repo}/commit/", status=412) == 1
    history = hub.repo(repo).history("main")
    assert [commit.title for commit in history][:-1] == ["ours", "theirs", "zero"]
    splits = {"zero": "rows(3)", "theirs": "rows(5, seed=1)", "ours": "rows(4)"}
    for (name, rows), commit in zip(splits.items(), reversed(history[:-1]), strict=True):
        files = {path for path in hub.files(repo, revision=commit.oid) if path.endswith(".parquet")}
        assert files == {f"data/{name}-00000-of-00001.parquet"}
        assert client.result(f"same({rows}, {repo!r}, split={name!r}, revision={commit.oid!r})")


def test_same_split_is_not_mixed_with_a_concurrent_writer(
    hub: HubServer, client: Client, mode: str, repo: str
) -> None:
    """The head has our very shards while we upload, somebody else's when we commit: ours must be committed again."""
    push = f"push(rows(900), {repo!r}, shards=3)"
    client.result(push)
    with start_session(PRELUDE, hub, env=MODES[mode]) as other:
        hub.before(
            rf"GET /api/datasets/{repo}/tree/",
            lambda: other.result(f"push(rows(900, seed=1), {repo!r}, shards=3)"),
        )
        client.result(f"push(rows(900), {repo!r}, shards=3, extra_files={{'m.json': b'1'}})")
    assert client.result(f"same(rows(900), {repo!r}, split='train')")


def test_three_concurrent_writers_all_land(hub: HubServer, mode: str, repo: str) -> None:
    names = ("a", "b", "c")
    sessions = [start_session(PRELUDE, hub, env=MODES[mode]) for _ in names]
    try:
        for session in sessions:
            session.result("1")
        for name, session in zip(names, sessions, strict=True):
            code = f"result = push(rows(50, seed={ord(name)}), {repo!r}, split={name!r})"
            session.send(code)
        commits = [session.receive()["result"] for session in sessions]
        history = hub.repo(repo).history("main")
        assert {commit.oid for commit in history[:-1]} == set(commits) and len(history) == 4
        for name, commit in zip(names, commits, strict=True):
            same = f"same(rows(50, seed={ord(name)}), {repo!r}, split={name!r}, revision={commit!r})"
            assert sessions[0].result(same)
    finally:
        for session in sessions:
            session.kill()


def test_offline_pull_returns_the_cached_copy(hub: HubServer, client: Client, mode: str, repo: str) -> None:
    commit = client.result(f"push(rows(5), {repo!r})")
    pulled = client.result(f"pull_folder({repo!r})")
    before = len(hub.requests)
    with start_session(PRELUDE, hub, env={"HF_HUB_OFFLINE": "1"}, home=client.home) as offline:
        assert offline.result(f"pull_folder({repo!r}, revision={commit!r})") == pulled
    assert len(hub.requests) == before


PUSH_SIX = "push(rows(900), {repo!r}, shards=6, tag='v1')"
# Where a push of several shards is killed: in the middle of the data, before the commit is handled, after it. Xet packs
# them into one object, whose registration is stopped.
KILL_POINTS = {
    "xet": {"data": (r"POST /v1/shards", 0), "commit": (r"POST .*/commit/", 0), "tag": (r"POST .*/tag/", 0)},
    "lfs": {"data": (r"PUT /objects/", 2), "commit": (r"POST .*/commit/", 0), "tag": (r"POST .*/tag/", 0)},
}
# Objects that a whole push sends
OBJECTS = {"xet": 1, "lfs": 6}


@pytest.mark.parametrize(
    "point", ["data", pytest.param("commit", marks=pytest.mark.slow), pytest.param("tag", marks=pytest.mark.slow)]
)
def test_killed_push_goes_on(mode: str, point: str, tmp_path: Path) -> None:
    with HubServer(tmp_path) as hub:
        route, skip = KILL_POINTS[mode][point]
        hub.fail(route, "stall", skip=skip)
        session = start_session(PRELUDE, hub, env=MODES[mode])
        session.send("result = " + PUSH_SIX.format(repo="alice/d"))
        assert hub.faults.stalled.wait(60)
        session.kill()
        data = r"POST /v1/xorbs/|PUT /objects/"
        finished = [request.path for request in hub.matching(data) if request.status == 200]
        assert len(finished) >= KILL_POINTS[mode]["data"][1]
        assert point == "data" or len(finished) == OBJECTS[mode]
        assert len(hub.repo("alice/d").history("main")) == (2 if point == "tag" else 1)

        with start_session(PRELUDE, hub, env=MODES[mode], home=session.home) as again:
            commit = again.result(PUSH_SIX.format(repo="alice/d"))
            assert again.result(f"same(rows(900), 'alice/d', split='train', revision={commit!r})")
        sent = [request.path for request in hub.matching(data) if request.status == 200]
        # Xet packs files as they come, and knows an object again only once it was registered
        if (mode, point) != ("xet", "data"):
            assert len(sent) == len(set(sent)) == OBJECTS[mode], "a finished object was sent again"
        assert len(hub.repo("alice/d").history("main")) == 2
        assert hub.repo("alice/d").tags == {"v1": commit}
        assert hub.internal_errors == []


@pytest.mark.slow
def test_killed_at_any_request(mode: str, tmp_path: Path) -> None:
    """An uninterrupted push is counted, then pushes are killed at a sample of its requests and run again."""
    with HubServer(tmp_path / "whole") as hub, start_session(PRELUDE, hub, env=MODES[mode]) as session:
        session.result(PUSH_SIX.format(repo="alice/d"))
        total = len(hub.requests)
        expected = hub.files("alice/d")
    for skip in random.Random(0).sample(range(total), 10):
        with HubServer(tmp_path / str(skip)) as hub:
            hub.fail(r".*", "stall", skip=skip)
            session = start_session(PRELUDE, hub, env=MODES[mode])
            session.send("result = " + PUSH_SIX.format(repo="alice/d"))
            assert hub.faults.stalled.wait(60)
            session.kill()
            with start_session(PRELUDE, hub, env=MODES[mode], home=session.home) as again:
                commit = again.result(PUSH_SIX.format(repo="alice/d"))
            assert hub.files("alice/d", revision=commit) == expected
            assert len(hub.repo("alice/d").history("main")) == 2
            sent = [request.path for request in hub.matching(r"PUT /objects/") if request.status == 200]
            assert len(sent) == len(set(sent))
            assert hub.internal_errors == []
