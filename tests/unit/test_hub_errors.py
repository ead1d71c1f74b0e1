"""Clear errors for what users get wrong, and secrets that stay secret."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer, run_client


PUSH = """
import logging, os
logging.basicConfig(level=logging.DEBUG)
from datasets import Dataset
from first_trl.hub import push_dataset
push_dataset(Dataset.from_dict({"a": [1, 2]}), os.environ["REPO"], token=os.environ.get("EXPLICIT_TOKEN"))
"""
PULL = """
import logging, os
logging.basicConfig(level=logging.DEBUG)
from first_trl.hub import pull_folder
pull_folder(os.environ["REPO"], revision=os.environ.get("REVISION"))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path) as server:
        yield server
        assert server.internal_errors == []
        assert server.foreign_requests == []


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def fail(hub: HubServer, code: str, **env: str) -> str:
    """Run a client that must fail with an error of ours; returns the error. No token may be left anywhere."""
    result = run_client(code, hub, env={"HF_DEBUG": "1", **env}, check=False)
    assert result.returncode == 1
    tokens = [*hub.accounts.tokens, *(value.strip() for name, value in env.items() if name.endswith("TOKEN"))]
    for token in filter(None, tokens):
        assert token not in result.output
        assert files_with(token, hub.objects.root.parent) == []
    assert result.contacted_hosts <= {"127.0.0.1"}
    # No chain of errors: the client's own ones name neither the cause nor the mend, and quote requests.
    assert "During handling of the above" not in result.stderr and "direct cause" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("ValueError: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def test_wrong_token(hub: HubServer) -> None:
    error = fail(hub, PUSH, REPO="alice/d", HF_TOKEN="hf_thisTokenWasRevokedLongAgo")
    assert "does not know the token" in error and "hf auth login" in error


def test_no_token(hub: HubServer) -> None:
    error = fail(hub, PUSH, REPO="alice/d", HF_TOKEN="")
    assert "needs a Hub token and there is none" in error and "hf auth login" in error
    assert hub.requests == []


def test_read_only_token_on_a_new_repository(hub: HubServer) -> None:
    error = fail(hub, PUSH, REPO="alice/d", HF_TOKEN=hub.read_token)
    assert "the token is read-only" in error and "'write'" in error


def test_read_only_token_on_an_existing_repository(hub: HubServer) -> None:
    run_client("from huggingface_hub import create_repo; create_repo('alice/d', repo_type='dataset')", hub)
    error = fail(hub, PUSH, REPO="alice/d", HF_TOKEN=hub.read_token)
    assert "the token is read-only" in error


@pytest.mark.parametrize("private", [True, False])
def test_foreign_namespace(hub: HubServer, private: bool) -> None:
    code = f"from huggingface_hub import create_repo; create_repo('bob/d', repo_type='dataset', private={private})"
    run_client(code, hub, env={"HF_TOKEN": hub.other_token})
    error = fail(hub, PUSH, REPO="bob/d")
    assert "'alice' may not write to the namespace 'bob'" in error and "alice, team" in error and "'alice/d'" in error


def test_missing_repository(hub: HubServer) -> None:
    error = fail(hub, PULL, REPO="alice/nothing")
    assert "does not exist, or is private and the account 'alice' may not see it" in error


def test_missing_or_private_repository_without_token(hub: HubServer) -> None:
    error = fail(hub, PULL, REPO="alice/nothing", HF_TOKEN="")
    assert "does not exist, or is private and there is no token" in error


def test_missing_revision_names_those_that_exist(hub: HubServer) -> None:
    run_client(PUSH, hub, env={"REPO": "team/d"})
    error = fail(hub, PULL, REPO="team/d", REVISION="v9")
    assert "no such revision" in error and "branches and tags: main" in error


@pytest.mark.parametrize("token", ["hf_withLineBreak\n ", "hf_with space", "hf_mit_ü"])
def test_malformed_token_is_not_quoted(hub: HubServer, token: str) -> None:
    # The client strips what it reads from the environment; an argument goes straight into the header.
    error = fail(hub, PUSH, REPO="alice/d", EXPLICIT_TOKEN=token)
    assert "spaces, line breaks or non-ASCII" in error
    assert hub.requests == []


def test_successful_push_leaves_no_token_and_contacts_no_other_host(hub: HubServer) -> None:
    load = "\nfrom datasets import load_dataset\nprint(load_dataset(os.environ['REPO'])['train'][:])"
    for kind in ("503", "reset", "lost"):
        hub.fail(r"POST .*/commit/", kind)
    result = run_client(PUSH + load, hub, env={"REPO": "alice/d", "HF_DEBUG": "1"})
    assert "{'a': [1, 2]}" in result.stdout
    assert "Try 3 of 8 failed" in result.stderr, "the retries are logged, so the log was worth searching"
    assert hub.token not in result.output
    assert files_with(hub.token, hub.objects.root.parent) == []
    assert result.contacted_hosts <= {"127.0.0.1", "datasets-server.127.0.0.1"}
    assert not [request for request in hub.requests if request.port == "store" and request.authorization == "hub"]
