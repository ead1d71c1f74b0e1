"""Every step of a push and of a pull under every fault: it succeeds, makes one commit, and the data are equal."""

from collections.abc import Iterator

import pytest

from tests.support.hub_server import Client, HubServer, start_session


FAULTS = ("500", "503", "429", "reset", "lost", "truncate")
MODES = {"xet": {}, "lfs": {"HF_HUB_DISABLE_XET": "1"}}

# Every repository gets data of its own: stores and caches on both sides would skip what they have seen before.
PRELUDE = """
import logging
import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from first_trl.hub import RetryPolicy, pull_folder, push_folder
from pathlib import Path

logging.basicConfig(level=logging.DEBUG)
policy = RetryPolicy(base_seconds=0.05)

def rows(n, seed):
    rng = np.random.default_rng(seed)
    return Dataset.from_dict({"ids": rng.integers(0, 50000, (n, 40)).astype("int32"), "x": rng.normal(size=n)})

def data(seed):
    return DatasetDict({"train": rows(2000, seed), "validation": rows(50, seed + 1000)})

def push(repo, seed):
    folder = Path(f"cache-{seed}")
    for name, part in data(seed).items():
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    (folder / "manifest.json").write_bytes(b'{"k": 5}')
    (folder / "README.md").write_bytes(b"---\\nlicense: mit\\n---\\n# A cache\\n")
    return push_folder(folder, repo, repo_type="dataset", private=True, tag="v1", revision="captures",
                       retry_policy=policy)

def load(repo, seed, commit):
    loaded = load_dataset(repo, revision=commit)
    return all(loaded[name][:] == part[:] for name, part in data(seed).items())

def pull(repo, commit):
    path, resolved = pull_folder(repo, revision="v1", retry_policy=policy)
    return resolved == commit and Path(path, "manifest.json").read_bytes() == b'{"k": 5}'

def push_files(repo, seed):
    folder = Path(f"folder-{seed}")
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(np.random.default_rng(seed).bytes(300_000))
    (folder / "config.json").write_text("{}")
    return push_folder(folder, repo, retry_policy=policy)
"""

PUSH_STEPS = {
    "look": r"GET /api/datasets/alice/[^/]+$",
    "create": r"POST /api/repos/create",
    "branch": r"POST /api/datasets/.*/branch/",
    "preupload": r"POST /api/datasets/.*/preupload/",
    "head": r"GET /api/datasets/.*/revision/captures",
    "tree": r"GET /api/datasets/.*/tree/",
    "yaml": r"POST /api/validate-yaml",
    "commit": r"POST /api/datasets/.*/commit/captures",
    "tag": r"POST /api/datasets/.*/tag/",
}
DATA_STEPS = {
    "xet": {
        "token": r"GET /api/datasets/.*/xet-write-token/",
        "xorb": r"POST /v1/xorbs/",
        "shard": r"POST /v1/shards",
    },
    "lfs": {
        "batch": r"POST /datasets/.*/info/lfs/objects/batch",
        "put": r"PUT /objects/",
        "verify": r"POST /datasets/.*/info/lfs/objects/verify",
    },
}
PULL_STEPS = {
    "revision": r"GET /api/datasets/.*/revision/v1",
    "tree": r"GET /api/datasets/.*/tree/",
    "metadata": r"HEAD /datasets/.*/resolve/",
    "small": r"GET /datasets/.*/resolve/.*\.json",
}
PULL_DATA_STEPS = {
    "xet": {
        "token": r"GET /api/datasets/.*/xet-read-token/",
        "reconstruction": r"GET /v1/reconstructions/",
        "xorb": r"GET /xorbs/",
    },
    "lfs": {"get": r"GET /objects/"},
}


class Driven:
    """A server and one client process that pushes to and pulls from it."""

    def __init__(self, hub: HubServer, client: Client) -> None:
        self.hub, self.client = hub, client
        self.seed = 0

    def fresh_repo(self) -> str:
        self.hub.faults.clear()
        self.seed += 1
        return f"alice/repo-{self.seed}"

    def push(self, repo: str) -> str:
        return str(self.client.result(f"push({repo!r}, {self.seed})"))

    def loads_equal(self, repo: str, commit: str) -> bool:
        return bool(self.client.result(f"load({repo!r}, {self.seed}, {commit!r})"))


# Xet is what users run; the LFS leg of everything is for CI.
@pytest.fixture(scope="module", params=["xet", pytest.param("lfs", marks=pytest.mark.slow)])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def driven(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    with (
        HubServer(tmp_path_factory.mktemp(mode)) as hub,
        start_session(PRELUDE, hub, env=MODES[mode]) as client,
    ):
        yield Driven(hub, client)
        assert hub.internal_errors == []
        assert hub.foreign_requests == []


def check_push(driven: Driven, route: str, kind: str) -> None:
    repo = driven.fresh_repo()
    driven.hub.fail(route, kind, retry_after="1" if kind == "429" else None)
    commit = driven.push(repo)
    assert driven.hub.faults.pending == 0, "the fault never happened: this test would prove nothing"
    state = driven.hub.repo(repo)
    assert [found.title for found in state.history("captures")] == ["Upload folder", "initial commit"]
    assert state.branches["captures"] == commit == state.tags["v1"]
    assert state.private
    assert driven.loads_equal(repo, commit)


@pytest.mark.parametrize("kind", FAULTS)
def test_commit_survives(driven: Driven, kind: str) -> None:
    check_push(driven, PUSH_STEPS["commit"], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("step", [step for step in PUSH_STEPS if step != "commit"])
def test_push_survives(driven: Driven, step: str, kind: str) -> None:
    check_push(driven, PUSH_STEPS[step], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("step", range(3))
def test_push_data_survives(driven: Driven, mode: str, step: int, kind: str) -> None:
    check_push(driven, list(DATA_STEPS[mode].values())[step], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("step", range(len(PULL_STEPS) + 3))
def test_pull_survives(driven: Driven, mode: str, step: int, kind: str) -> None:
    routes = [*PULL_STEPS.values(), *PULL_DATA_STEPS[mode].values()]
    if step >= len(routes):
        pytest.skip("this mode has fewer steps")
    repo = driven.fresh_repo()
    commit = driven.push(repo)
    driven.hub.fail(routes[step], kind, retry_after="1" if kind == "429" else None)
    assert driven.client.result(f"pull({repo!r}, {commit!r})")
    assert driven.hub.faults.pending == 0
    assert driven.loads_equal(repo, commit)


@pytest.mark.parametrize("kind", ["503", "lost"])
def test_folder_commit_survives(driven: Driven, kind: str) -> None:
    repo = driven.fresh_repo()
    driven.hub.fail(r"POST /api/models/.*/commit/", kind)
    push = f"push_files({repo!r}, {driven.seed})"
    commit = driven.client.result(push)
    assert driven.hub.faults.pending == 0
    assert [found.oid for found in driven.hub.repo(repo, "model").history("main")][:-1] == [commit]
    assert set(driven.hub.files(repo, "model")) == {".gitattributes", "config.json", "weights.bin"}
    # Again, unchanged: no commit, no data.
    before = len(driven.hub.requests)
    assert driven.client.result(push) == commit
    new = driven.hub.requests[before:]
    assert not [request for request in new if "/commit/" in request.path or request.method == "PUT"]


def test_retry_after_is_honoured(driven: Driven) -> None:
    repo = driven.fresh_repo()
    driven.hub.fail(r"POST /api/datasets/.*/commit/", "429", retry_after="3")
    driven.push(repo)
    first, second = driven.hub.matching(rf"POST /api/datasets/{repo}/commit/")
    assert 3.0 <= second.time - first.time < 6.0


def test_gives_up_within_bounds(driven: Driven) -> None:
    repo = driven.fresh_repo()
    driven.hub.fail(r"POST /api/repos/create", "503", times=100)
    error = driven.client.ask(f"push({repo!r}, 0)")["error"]
    assert "RuntimeError: Creating the repository failed" in error
    assert "gave up at try 8 of 8" in error and "503" in error


def test_does_not_wait_for_an_hour(driven: Driven) -> None:
    repo = driven.fresh_repo()
    driven.hub.fail(r"POST /api/repos/create", "429", retry_after="3600")
    error = driven.client.ask(f"push({repo!r}, 0)")["error"]
    assert "gave up at try 1 of 8" in error and "429" in error
