"""Clear errors for what users get wrong, and secrets that stay secret."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_server import Client, HubServer, run_client, start_session


# The session's answer to a failure is the traceback as Python would print it; its log goes to stderr.txt.
PRELUDE = """
import logging, os
logging.basicConfig(level=logging.DEBUG)
from datasets import Dataset, load_dataset
from pathlib import Path
from first_trl.hub import pull_folder, push_folder

def push(values, repo, **options):
    Path("rows").mkdir(exist_ok=True)
    Dataset.from_dict({"a": values}).to_parquet("rows/train.parquet")
    return push_folder("rows", repo, repo_type="dataset", **options)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server
        assert server.internal_errors == []
        assert server.foreign_requests == []


@pytest.fixture(scope="module")
def client(hub: HubServer) -> Iterator[Client]:
    with start_session(PRELUDE, hub, env={"HF_DEBUG": "1"}) as session:
        yield session


def assert_nowhere(hub: HubServer, tokens: list[str], text: str) -> None:
    """No token in the text, nor in any file of the client (log, caches, home) or of the server."""
    for token in tokens:
        assert token not in text
        for path in hub.objects.root.parent.rglob("*"):
            assert not path.is_file() or token.encode() not in path.read_bytes(), path


def fail(hub: HubServer, client: Client, call: str, token: str | None = None) -> str:
    """Make a call that must fail with one error of ours, under the token that is set in the environment."""
    used = hub.token if token is None else token
    setting = "os.environ['HF_TOKEN'] = "
    code = f"{setting}{used!r}\ntry:\n    {call}\nfinally:\n    {setting}{hub.token!r}"
    traceback = client.ask(code)["error"]
    assert_nowhere(hub, [*hub.accounts.tokens, *([token] if token else [])], traceback)
    # No chain of errors: the client's own ones do not name the mend, and quote requests.
    assert traceback.count("Traceback (most recent call last)") == 1, traceback
    error = traceback.strip().splitlines()[-1]
    assert error.startswith("ValueError: "), traceback
    return error


def test_wrong_token(hub: HubServer, client: Client) -> None:
    error = fail(hub, client, "push([1, 2], 'alice/new')", "hf_thisTokenWasRevokedLongAgo")
    assert "does not know the token" in error and "hf auth login" in error


def test_no_token(hub: HubServer, client: Client) -> None:
    before = len(hub.requests)
    error = fail(hub, client, "push([1, 2], 'alice/new')", "")
    assert "needs a Hub token and there is none" in error and "hf auth login" in error
    assert len(hub.requests) == before


def test_read_only_token_on_a_new_repository(hub: HubServer, client: Client) -> None:
    error = fail(hub, client, "push([1, 2], 'alice/new')", hub.read_token)
    assert "the token is read-only" in error and "'write'" in error


def test_read_only_token_on_an_existing_repository(hub: HubServer, client: Client) -> None:
    client.result("push([1, 2], 'alice/old')")
    error = fail(hub, client, "push([1], 'alice/old')", hub.read_token)
    assert "the token is read-only" in error


@pytest.mark.parametrize("private", [True, False])
def test_foreign_namespace(hub: HubServer, client: Client, private: bool) -> None:
    client.result(f"push([1, 2], 'bob/d{private}', private={private}, token={hub.other_token!r})")
    error = fail(hub, client, f"push([1], 'bob/d{private}')")
    assert "'alice' may not write to the namespace 'bob'" in error and "alice, team" in error
    assert f"'alice/d{private}'" in error


def test_missing_repository(hub: HubServer, client: Client) -> None:
    error = fail(hub, client, "pull_folder('alice/nothing')")
    assert "does not exist, or is private and the account 'alice' may not see it" in error


def test_missing_or_private_repository_without_token(hub: HubServer, client: Client) -> None:
    error = fail(hub, client, "pull_folder('alice/nothing')", "")
    assert "does not exist, or is private and there is no token" in error


def test_missing_revision_names_those_that_exist(hub: HubServer, client: Client) -> None:
    client.result("push([1, 2], 'team/d', tag='v1')")
    error = fail(hub, client, "pull_folder('team/d', revision='v9')")
    assert "no such revision" in error and "branches and tags: main, v1" in error


@pytest.mark.parametrize("token", ["hf_withLineBreak\n ", "hf_with space", "hf_mit_ü"])
def test_malformed_token_is_not_quoted(hub: HubServer, client: Client, token: str) -> None:
    before = len(hub.requests)
    error = fail(hub, client, f"push([1, 2], 'alice/new', token=''.join({list(token)!r}))")
    assert "spaces, line breaks or non-ASCII" in error and token.strip() not in error
    assert len(hub.requests) == before


def test_successful_push_leaves_no_token_and_contacts_no_other_host(tmp_path: Path) -> None:
    code = PRELUDE + "push([1, 2], 'alice/d')\nprint(load_dataset('alice/d')['train'][:])"
    with HubServer(tmp_path) as hub:
        for kind in ("503", "reset", "lost"):
            hub.fail(r"POST .*/commit/", kind)
        result = run_client(code, hub, env={"HF_DEBUG": "1"})
        assert "{'a': [1, 2]}" in result.stdout
        assert "Try 3 of 8 failed" in result.stderr, "the retries are logged, so the log was worth searching"
        assert_nowhere(hub, [hub.token], result.output)
        # `datasets` derives the viewer's host from the endpoint's; the guard refuses the look-up.
        assert result.contacted_hosts <= {"127.0.0.1", "datasets-server.127.0.0.1"}
        assert hub.foreign_requests == []
        assert not [request for request in hub.requests if request.port == "store" and request.authorization == "hub"]
