"""Pushing and pulling: what ends up in the repository, concurrent writers, interruptions."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.hub_server import Client, HubServer, start_session


MODES = {"xet": {}, "lfs": {"HF_HUB_DISABLE_XET": "1"}}

PRELUDE = """
import json
import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from pathlib import Path
from first_trl.hub import RetryPolicy, pull_folder, push_dataset, push_folder, resolve_revision

fast = RetryPolicy(base_seconds=0.05)

def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return Dataset.from_dict({"ids": rng.integers(0, 50000, (n, 5)).astype("int32"),
                              "logprobs": rng.normal(size=(n, 5)).astype("float16")})

def push(data, repo, **options):
    return push_dataset(data, repo, retry_policy=fast, **options)

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


def card(hub: HubServer, repo: str) -> dict:
    text = hub.files(repo)["README.md"].decode()
    return yaml.safe_load(text.split("---\n")[1])


def test_config_and_split_are_added_to_what_is_there(hub: HubServer, client: Client, repo: str) -> None:
    client.result(f"push(rows(30), {repo!r}, private=True, extra_files={{'README.md': b'# Mine\\n'}})")
    client.result(f"push(rows(10, seed=1), {repo!r}, split='validation')")
    client.result(f"push(DatasetDict(train=rows(7, seed=2)), {repo!r}, config_name='other')")
    assert client.result(f"same(rows(30), {repo!r}, split='train')")
    assert client.result(f"same(rows(10, seed=1), {repo!r}, 'default', split='validation')")
    assert client.result(f"same(rows(7, seed=2), {repo!r}, 'other', split='train')")
    assert client.result(
        f"list(load_dataset({repo!r}, 'other', split='train', streaming=True)) == list(rows(7, seed=2))"
    )
    data = card(hub, repo)
    assert data["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*"},
                {"split": "validation", "path": "data/validation-*"},
            ],
        },
        {"config_name": "other", "data_files": [{"split": "train", "path": "other/train-*"}]},
    ]
    default, other = data["dataset_info"]
    assert {split["name"]: split["num_examples"] for split in default["splits"]} == {"train": 30, "validation": 10}
    sizes = {path: len(content) for path, content in hub.files(repo).items() if path.endswith(".parquet")}
    assert default["download_size"] == sum(size for path, size in sizes.items() if path.startswith("data/"))
    assert other["download_size"] == sizes["other/train-00000-of-00001.parquet"]
    assert hub.files(repo)["README.md"].decode().endswith("# Mine\n")
    assert hub.repo(repo).private


def test_whole_config_is_replaced_by_a_dict_and_a_split_by_a_dataset(
    hub: HubServer, client: Client, repo: str
) -> None:
    client.result(f"push(DatasetDict(train=rows(900), test=rows(5)), {repo!r}, max_shard_size=10_000)")
    assert len(hub.files(repo)) > 4
    client.result(f"push(rows(20, seed=1), {repo!r})")
    shards = {path for path in hub.files(repo) if path.endswith(".parquet")}
    assert shards == {"data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"}
    client.result(f"push(DatasetDict(train=rows(20, seed=2)), {repo!r})")
    shards = {path for path in hub.files(repo) if path.endswith(".parquet")}
    assert shards == {"data/train-00000-of-00001.parquet"}
    assert [split["name"] for split in card(hub, repo)["dataset_info"]["splits"]] == ["train"]
    assert client.result(f"same(rows(20, seed=2), {repo!r}, split='train')")
    assert len(hub.repo(repo).history("main")) == 4


def test_unchanged_dataset_makes_no_commit_and_sends_no_data(hub: HubServer, client: Client, repo: str) -> None:
    push = f"push(rows(900), {repo!r}, max_shard_size=10_000, tag='v1', extra_files={{'m.json': b'1'}})"
    first = client.result(push)
    before = len(hub.requests)
    assert client.result(push) == first
    new = hub.requests[before:]
    assert not [request for request in new if "/commit/" in request.path or "/xorbs/" in request.path]
    # Another config moves the head; the tag stays where it is, and the same push is still fine with that.
    head = client.result(f"push(rows(3), {repo!r}, config_name='other')")
    assert client.result(push) == head
    assert hub.repo(repo).tags == {"v1": first}
    answer = client.ask(f"push(rows(4), {repo!r}, tag='v1')")
    assert "ValueError: The tag 'v1'" in answer["error"] and "choose another tag" in answer["error"]


def test_loads_stay_at_the_returned_commit(client: Client, repo: str) -> None:
    first = client.result(f"push(rows(5), {repo!r}, revision='capture-1')")
    second = client.result(f"push(rows(6), {repo!r}, revision='capture-1')")
    assert first != second
    assert client.result(f"same(rows(5), {repo!r}, split='train', revision={first!r})")
    assert client.result(f"same(rows(6), {repo!r}, split='train', revision='capture-1')")
    assert client.result(f"resolve_revision({repo!r}, revision='capture-1')") == second
    assert client.result(f"pull_folder({repo!r}, revision={first!r}).commit") == first


@pytest.mark.parametrize(
    "data",
    [
        "rows(50).shuffle(seed=1)",
        "rows(50).select([7, 3, 3, 49])",
        "rows(50).filter(lambda r: r['ids'][0] % 2)",
    ],
)
def test_views_of_a_dataset_are_pushed_as_they_read(client: Client, repo: str, data: str) -> None:
    client.result(f"push({data}, {repo!r}, max_shard_size=300, parquet_writer_kwargs={{'compression': 'snappy'}})")
    assert client.result(f"same({data}, {repo!r}, split='train')")


def test_only_shards_of_the_config_are_deleted(hub: HubServer, client: Client, repo: str) -> None:
    client.result(f"push(rows(900), {repo!r}, max_shard_size=10_000, extra_files={{'m.json': b'1'}})")
    client.result(
        "Path('more/data/deeper').mkdir(parents=True, exist_ok=True) "
        "or Path('more/data/deeper/x.parquet').write_bytes(b'x')"
    )
    client.result(f"push_folder('more', {repo!r}, repo_type='dataset')")
    client.result(f"push(DatasetDict(train=rows(3)), {repo!r})")
    expected = {".gitattributes", "README.md", "m.json", "data/deeper/x.parquet", "data/train-00000-of-00001.parquet"}
    assert set(hub.files(repo)) == expected


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
        ("push(rows(1), 'alice/x', config_name='data')", "not 'data'"),
        ("push(rows(1), 'alice/x', config_name='../up')", "config_name is '../up'"),
        ("push(rows(1), 'alice/x', split='a-b')", "'a-b' is no name of a split"),
        ("push(DatasetDict(), 'alice/x')", "no splits"),
        ("push(DatasetDict(a=rows(1)), 'alice/x', split='a')", "split only goes with a Dataset"),
        ("push(DatasetDict(a=rows(1), b=Dataset.from_dict({'z': [1]})), 'alice/x')", "same features"),
        ("push([1], 'alice/x')", "Cannot push a list"),
        ("push(DatasetDict(a=rows(1), b=rows(0)), 'alice/x')", "'b' has no rows"),
        ("push(rows(1), 'alice/x', max_shard_size=0)", "max_shard_size is 0"),
        ("push(rows(1), 'x')", "'namespace/name'"),
        ("push(rows(1), 'alice/x', extra_files={'data/a.parquet': b''})", "taken for a shard"),
        ("push(rows(1), 'alice/x', revision='a' * 40)", "a push goes to a branch"),
        ("push_folder('no-such-folder', 'alice/x')", "nothing to push"),
        ("push_folder('.', 'alice/space', repo_type='space')", "pass space_sdk"),
        ("push_folder('.', 'alice/x', repo_type='thing')", "use 'model', 'dataset' or 'space'"),
    ],
)
def test_bad_arguments(client: Client, call: str, message: str) -> None:
    error = client.ask(call)["error"]
    assert "ValueError: " in error and message in error


def test_other_features_do_not_fit_a_split_that_stays(client: Client, repo: str) -> None:
    client.result(f"push(rows(3), {repo!r})")
    error = client.ask(f"push(Dataset.from_dict({{'z': [1]}}), {repo!r}, split='test')")["error"]
    assert "ValueError: " in error and "['train'] with other features" in error
    client.result(f"push(Dataset.from_dict({{'z': [1]}}), {repo!r}, split='train')")


def test_private_data_do_not_go_to_a_public_repository(hub: HubServer, client: Client, repo: str) -> None:
    client.result(f"push(rows(3), {repo!r})")
    before = len(hub.requests)
    error = client.ask(f"push(rows(4), {repo!r}, private=True)")["error"]
    assert "ValueError: " in error and "is public" in error
    assert [request.method for request in hub.requests[before:]] == ["GET"]


def test_conflicting_commit_is_merged(hub: HubServer, client: Client, mode: str, repo: str) -> None:
    """Another client's whole push of another config happens while our commit is on its way."""
    client.result(f"push(rows(3), {repo!r}, config_name='zero')")
    with start_session(PRELUDE, hub, env=MODES[mode]) as other:
        hub.before(
            rf"POST /api/datasets/{repo}/commit/",
            lambda: other.result(f"push(rows(5, seed=1), {repo!r}, config_name='theirs')"),
        )
        client.result(f"push(rows(4), {repo!r}, config_name='ours')")
    assert hub.faults.pending == 0
    assert hub.count(rf"POST /api/datasets/{repo}/commit/", status=412) == 1
    assert [commit.title for commit in hub.repo(repo).history("main")][:-1] == [
        "Upload ours",
        "Upload theirs",
        "Upload zero",
    ]
    assert [config["config_name"] for config in card(hub, repo)["configs"]] == ["ours", "theirs", "zero"]
    for name, rows in {"zero": "rows(3)", "ours": "rows(4)", "theirs": "rows(5, seed=1)"}.items():
        assert client.result(f"same({rows}, {repo!r}, {name!r}, split='train')")


def test_same_config_is_not_mixed_with_a_concurrent_writer(
    hub: HubServer, client: Client, mode: str, repo: str
) -> None:
    """The head has our very shards while we upload, somebody else's when we commit: ours must be committed again."""
    push = f"push(rows(900), {repo!r}, max_shard_size=10_000)"
    client.result(push)
    with start_session(PRELUDE, hub, env=MODES[mode]) as other:
        hub.before(
            rf"GET /api/datasets/{repo}/tree/",
            lambda: other.result(f"push(rows(900, seed=1), {repo!r}, max_shard_size=10_000)"),
        )
        client.result(f"push(rows(900), {repo!r}, max_shard_size=10_000, extra_files={{'m.json': b'1'}})")
    assert client.result(f"same(rows(900), {repo!r}, split='train')")


def test_three_concurrent_writers_all_land(hub: HubServer, mode: str, repo: str) -> None:
    names = ("a", "b", "c")
    sessions = [start_session(PRELUDE, hub, env=MODES[mode]) for _ in names]
    try:
        for session in sessions:
            session.result("1")
        for name, session in zip(names, sessions, strict=True):
            code = f"result = push(rows(50, seed={ord(name)}), {repo!r}, config_name={name!r})"
            session.send(code)
        commits = [session.receive()["result"] for session in sessions]
        history = hub.repo(repo).history("main")
        assert {commit.oid for commit in history[:-1]} == set(commits) and len(history) == 4
        assert [config["config_name"] for config in card(hub, repo)["configs"]] == list(names)
        for name in names:
            assert sessions[0].result(f"same(rows(50, seed={ord(name)}), {repo!r}, {name!r}, split='train')")
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


PUSH_SIX = "push(rows(900), {repo!r}, max_shard_size=5_000, tag='v1')"
# Where a push of several shards is killed: in the middle of the data, before the commit is handled, after it.
KILL_POINTS = {
    "xet": {"data": (r"POST /v1/xorbs/", 2), "commit": (r"POST .*/commit/", 0), "tag": (r"POST .*/tag/", 0)},
    "lfs": {"data": (r"PUT /objects/", 2), "commit": (r"POST .*/commit/", 0), "tag": (r"POST .*/tag/", 0)},
}


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
        assert len(finished) == 2 if point == "data" else len(finished) > 2
        assert len(hub.repo("alice/d").history("main")) == (2 if point == "tag" else 1)

        with start_session(PRELUDE, hub, env=MODES[mode], home=session.home) as again:
            commit = again.result(PUSH_SIX.format(repo="alice/d"))
            assert again.result(f"same(rows(900), 'alice/d', split='train', revision={commit!r})")
        sent = [request.path for request in hub.matching(data) if request.status == 200]
        assert len(sent) == len(set(sent)), "a finished object was sent again"
        assert len(sent) > len(finished) or point != "data"
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
