"""A capture killed at any moment and started again: equal bit for bit, nothing done twice but what was under way."""

import hashlib
import json
import multiprocessing
import random
import time

import pytest

from first_trl import load_teacher_cache, verify_teacher_cache
from first_trl.cache.verify_folder import verify_cache_folder
from first_trl.teacher.backends import Scores
from first_trl.teacher.journal import ShardJournal
from tests.support.capture_process import BATCH, ROWS, SHARD_SIZE, free_port, run_capture


# A server that has imported everything once: its children start in milliseconds
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.support.capture_process"])


def start(folder, log, world, **options):
    port = free_port()
    children = [
        processes.Process(target=run_capture, args=(folder, log, rank, world, port), kwargs=options)
        for rank in range(world)
    ]
    for child in children:
        child.start()
    return children


def finish(children):
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * len(children)


def shard_sums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("data/*"))}


def facts(folder):
    data = json.loads((folder / "manifest" / "train.json").read_text())
    return {name: value for name, value in data.items() if name not in ("timing", "digest")}


def rows_scored(log):
    return sum(int(line) for path in log.parent.glob(f"{log.stem}.*") for line in path.read_text().split())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(start(folder / "cache", folder / "log.txt", 1, seconds=0.0))
    assert rows_scored(folder / "log.txt") == ROWS
    return folder / "cache"


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_files(uninterrupted, tmp_path, world):
    finish(start(tmp_path / "cache", tmp_path / "log.txt", world, seconds=0.0))
    assert shard_sums(tmp_path / "cache") == shard_sums(uninterrupted)
    assert facts(tmp_path / "cache") == facts(uninterrupted)
    assert rows_scored(tmp_path / "log.txt") == ROWS
    verify_teacher_cache(load_teacher_cache(tmp_path / "cache"))


KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments(uninterrupted, tmp_path, world, record_property):
    rng = random.Random(world)
    expected_sums, expected_facts = shard_sums(uninterrupted), facts(uninterrupted)
    recomputed, states = [], set()
    for kill in range(KILLS):
        folder, log = tmp_path / f"{kill}" / "cache", tmp_path / f"{kill}" / "log.txt"
        folder.parent.mkdir()
        children = start(folder, log, world)
        # From the first sign of life: a random point of the time that the whole capture takes, and past its end
        while not folder.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, ROWS / BATCH * 0.016 / world * 1.1))
        for child in children:
            child.kill()
        for child in children:
            child.join(30)
        left = {path.suffix for path in folder.rglob("*") if path.is_file()}
        states.add(tuple(sorted(left)))
        finish(start(folder, log, world, seconds=0.0))
        assert shard_sums(folder) == expected_sums, f"kill {kill}, found {left}"
        assert facts(folder) == expected_facts
        assert [path.name for path in folder.rglob(".*")] == [".train.lock"]
        verify_cache_folder(folder)
        recomputed.append(rows_scored(log) - ROWS)
    record_property("recomputed rows a kill", recomputed)
    print(f"{world} processes, rows computed again by kill: {recomputed}; kinds of folders found: {len(states)}")
    assert min(recomputed) >= 0 and max(recomputed) <= SHARD_SIZE


def test_the_journal_replays_whole_batches_and_survives_a_torn_end(tmp_path):
    import numpy as np

    shard = tmp_path / "train-00000-of-00001.parquet"
    score = Scores(np.array([[1, 2]], np.int32), np.array([[-0.5, -1.5]], np.float32), np.array([-2.0], np.float32))
    journal = ShardJournal(shard, "id:fingerprint")
    assert journal.read() == {}
    for rows in ([4, 2], [0], [1]):
        journal.append(rows, [score] * len(rows))
    journal.path.write_bytes(journal.path.read_bytes()[:-7])
    again = ShardJournal(shard, "id:fingerprint")
    found = again.read()
    assert set(found) == {(4, 2), (0,)}
    assert found[4, 2][1].ids.tolist() == [[1, 2]] and found[0,][0].tail_logprob.tolist() == [-2.0]
    again.append([3], [score])
    assert set(ShardJournal(shard, "id:fingerprint").read()) == {(4, 2), (0,), (3,)}
    # Another capture's journal counts for nothing
    assert ShardJournal(shard, "other:fingerprint").read() == {}


def test_what_a_killed_process_left_is_removed(uninterrupted, tmp_path):
    folder = tmp_path / "cache"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / ".train-00000-of-00010.parquet.123.tmp").write_bytes(b"half")
    (folder / "data" / ".validation-00000-of-00010.parquet.123.tmp").write_bytes(b"another split's")
    finish(start(folder, tmp_path / "log.txt", 1, seconds=0.0))
    assert not list(folder.glob("data/.train*"))
    assert len(list(folder.glob("data/.validation*"))) == 1
    for path in folder.glob("data/.validation*"):
        path.unlink()
    assert shard_sums(folder) == shard_sums(uninterrupted)


def test_two_captures_of_one_folder_at_once_are_refused(tmp_path):
    children = start(tmp_path / "cache", tmp_path / "log.txt", 1, seconds=0.05)
    while not list((tmp_path / "cache").glob("data/*.parquet")):
        time.sleep(0.001)
    from filelock import FileLock, Timeout

    with pytest.raises(Timeout):
        FileLock(tmp_path / "cache" / "manifest" / ".train.lock").acquire(timeout=0)
    with pytest.raises(ValueError, match="Another capture is writing"):
        run_capture(tmp_path / "cache", tmp_path / "other.txt")
    finish(children)
    assert verify_cache_folder(tmp_path / "cache")["train"].counts["rows"] == ROWS
