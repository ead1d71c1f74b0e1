"""Damaged and exchanged shards: loading names the file, the same capture again computes it, and nothing else."""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from first_trl import add_teacher_topk, load_teacher_cache
from first_trl.cache.folder import sha256
from first_trl.cache.manifest import Manifest
from first_trl.cache.shards import ShardRows, whole_shard
from first_trl.cache.verify_folder import verify_cache_folder
from first_trl.teacher.backends import TransformersBackend
from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer


class CountingBackend(TransformersBackend):
    """Notes how many rows it scored."""

    rows_scored = 0

    def score(self, rows, *args, **kwargs):
        self.rows_scored += len(rows)
        return super().score(rows, *args, **kwargs)


def source():
    # Equal tokens in all shards but the last: only the carried columns tell these apart
    rows = [tiny_rows(3, seed=1)[i % 3] for i in range(9)] + tiny_rows(2, seed=2)
    return Dataset.from_list([{**row, "text": f"prompt {i}", "score": float("nan")} for i, row in enumerate(rows)])


def capture(folder, backend=None):
    backend = backend or CountingBackend(tiny_llama())
    cache = add_teacher_topk(source(), backend, tiny_tokenizer(), output_dir=folder, shard_size=3, disable_tqdm=True)
    return cache, backend


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sound") / "cache"
    capture(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "cache"))


def shard(folder, index):
    return folder / "data" / f"train-{index:05d}-of-00004.parquet"


def sums(folder):
    return {path.name: sha256(path) for path in sorted(folder.glob("data/*.parquet"))}


def cut(folder):
    shard(folder, 1).write_bytes(shard(folder, 1).read_bytes()[:-100])
    return [1]


def empty(folder):
    shard(folder, 1).write_bytes(b"")
    return [1]


def flip(folder):
    data = bytearray(shard(folder, 1).read_bytes())
    data[random.Random(0).randrange(4, len(data) - 8)] ^= 1
    shard(folder, 1).write_bytes(data)
    return [1]


def overwrite(folder):
    shutil.copy(shard(folder, 0), shard(folder, 1))
    return [1]


def swap(folder):
    first, second = shard(folder, 0).read_bytes(), shard(folder, 2).read_bytes()
    shard(folder, 0).write_bytes(second)
    shard(folder, 2).write_bytes(first)
    return [0, 2]


def edit_carried(folder):
    table = pq.read_table(shard(folder, 1))
    index = table.column_names.index("text")
    pq.write_table(table.set_column(index, "text", pa.array(["forged"] * len(table))), shard(folder, 1))
    return [1]


def reorder(folder):
    table = pq.read_table(shard(folder, 1))
    pq.write_table(table.take([2, 1, 0]), shard(folder, 1))
    return [1]


def drop_carried(folder):
    pq.write_table(pq.read_table(shard(folder, 1)).drop_columns("text"), shard(folder, 1))
    return [1]


KINDS = [cut, empty, flip, overwrite, swap, edit_carried, reorder, drop_carried]


@pytest.mark.parametrize("damage", KINDS)
def test_loading_names_the_shard_and_the_same_capture_computes_it_again(sound, folder, damage):
    damaged = damage(folder)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"is damaged.*Run the capture again") as caught:
            load_teacher_cache(folder, streaming=streaming)
        assert str(shard(folder, damaged[0])) in str(caught.value)
    cache, backend = capture(folder)
    assert backend.rows_scored == 3 * len(damaged)
    assert sums(folder) == sums(sound) and cache["text"][:] == source()["text"][:]
    verify_cache_folder(folder)


# A flipped bit may lie where no value is read, and no manifest states the bytes of an interrupted capture yet
@pytest.mark.parametrize("damage", [kind for kind in KINDS if kind is not flip])
def test_an_interrupted_capture_keeps_only_shards_with_the_rows_they_must_hold(sound, folder, damage):
    manifest = Manifest.from_json((folder / "manifest" / "train.json").read_text())
    record = {"identity": manifest.identity, "teacher": manifest.teacher, "shard_size": 3, "recalibration": {}}
    (folder / "manifest" / ".train.in-progress.json").write_text(json.dumps(record))
    (folder / "manifest" / "train.json").unlink()
    damaged = damage(folder)
    _, backend = capture(folder)
    assert backend.rows_scored == 3 * len(damaged)
    assert sums(folder) == sums(sound)


def test_a_flipped_bit_of_an_interrupted_capture_changes_no_row(sound, tmp_path):
    expected, size = pq.read_table(shard(sound, 1)), shard(sound, 1).stat().st_size
    manifest = Manifest.from_json((sound / "manifest" / "train.json").read_text())
    rows = ShardRows.read(source(), 3, 6)
    kept = 0
    for place in range(0, size, 37):
        data = bytearray(shard(sound, 1).read_bytes())
        data[place] ^= 1 << (place % 8)
        path = tmp_path / "shard.parquet"
        path.write_bytes(data)
        if whole_shard(path, rows, manifest):
            kept += 1
            assert repr(pq.read_table(path).to_pylist()) == repr(expected.to_pylist())
    assert 0 < kept < size // 37


def test_a_repair_leaves_the_manifest_until_its_own_is_written(folder):
    shard(folder, 3).unlink()
    stated = (folder / "manifest" / "train.json").read_text()

    class Interrupted(CountingBackend):
        def score(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(folder, Interrupted(tiny_llama()))
    assert (folder / "manifest" / "train.json").read_text() == stated
    with pytest.raises(ValueError, match=r"missing .*train-00003-of-00004"):
        load_teacher_cache(folder)
    _, backend = capture(folder)
    assert backend.rows_scored == 2
    verify_cache_folder(folder)


def test_surplus_and_renamed_files_are_named(folder):
    shutil.copy(shard(folder, 0), folder / "data" / "train-00004-of-00005.parquet")
    for load in (load_teacher_cache, lambda path: capture(path)):
        with pytest.raises(ValueError, match=r"not of this capture .*train-00004-of-00005"):
            load(folder)
    (folder / "data" / "train-00004-of-00005.parquet").unlink()
    # All shards and the manifest under another split's name
    for path in folder.glob("data/*.parquet"):
        path.rename(path.with_name(path.name.replace("train", "test")))
    (folder / "manifest" / "train.json").rename(folder / "manifest" / "test.json")
    with pytest.raises(ValueError, match="is the manifest of split 'train'"):
        load_teacher_cache(folder, "test")


def test_the_journal_of_another_shard_counts_for_nothing(sound, folder):
    """Its rows have the same numbers, so that its scores would be taken for those of this one's."""

    class Interrupted(CountingBackend):
        def score(self, *args, **kwargs):
            if self.rows_scored == 10:
                raise KeyboardInterrupt
            return super().score(*args, **kwargs)

    shutil.rmtree(folder)
    with pytest.raises(KeyboardInterrupt):
        add_teacher_topk(
            source(), Interrupted(tiny_llama()), tiny_tokenizer(), output_dir=folder, shard_size=3,
            max_rows_per_batch=1, disable_tqdm=True,
        )  # fmt: skip
    (journal,) = folder.glob("data/.*.journal")
    assert "train-00003" in journal.name
    shard(folder, 2).unlink()
    journal.rename(folder / "data" / ".train-00002-of-00004.parquet.journal")
    add_teacher_topk(
        source(),
        CountingBackend(tiny_llama()),
        tiny_tokenizer(),
        output_dir=folder,
        shard_size=3,
        max_rows_per_batch=1,
    )
    assert load_teacher_cache(folder)["teacher_topk_ids"][:] == load_teacher_cache(sound)["teacher_topk_ids"][:]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": {}}'])
def test_a_damaged_record_of_an_interrupted_capture_is_named(folder, text):
    (folder / "manifest" / "train.json").unlink()
    (folder / "manifest" / ".train.in-progress.json").write_text(text)
    with pytest.raises(ValueError, match=r"\.train\.in-progress\.json is damaged"):
        capture(folder)
