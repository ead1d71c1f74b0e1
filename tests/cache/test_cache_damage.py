"""Single corruptions of a stored cache: the folder's verification finds every one, the rows' every one that it is given."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from first_trl import add_teacher_topk, load_teacher_cache, verify_teacher_cache
from first_trl.cache.folder import store_recalibration
from first_trl.cache.verify_folder import verify_cache_folder
from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer


CORRUPTIONS = 300


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sound")
    for split, count in (("train", 40), ("validation", 12)):
        rows = Dataset.from_list([{**row, "id": i} for i, row in enumerate(tiny_rows(count, seed=count))])
        add_teacher_topk(rows, tiny_llama(), tiny_tokenizer(), output_dir=folder, split=split, shard_size=9)
    store_recalibration(folder, "validation", "probability_temperature", {"value": 0.3, "curve": [[0.1, 0.2]]})
    return folder


def shards(folder):
    return sorted((folder / "data").glob("*.parquet"))


def rewrite(path, change, rng):
    """Change rows of a shard and write it as a sound Parquet file."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows, rng)
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path, compression="zstd")


# Each takes a folder and a random source, and returns whether rows that can still be read are touched.


def flip_byte(folder, rng):
    path = rng.choice([*shards(folder), *sorted((folder / "manifest").glob("[!.]*"))])
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return False


def remove_shard(folder, rng):
    rng.choice(shards(folder)).unlink()
    return False


def truncate_shard(folder, rng):
    path = rng.choice(shards(folder))
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return False


def exchange_shards(folder, rng):
    a, b = rng.sample(shards(folder), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return False


def drop_row(folder, rng):
    rewrite(rng.choice(shards(folder)), lambda rows, rng: rows.pop(rng.randrange(len(rows))), rng)
    return False


def double_row(folder, rng):
    rewrite(rng.choice(shards(folder)), lambda rows, rng: rows.insert(rng.randrange(len(rows)), rng.choice(rows)), rng)
    return False


def exchange_rows_teacher(folder, rng):
    def change(rows, rng):
        pairs = [
            (a, b) for i, a in enumerate(rows) for b in rows[:i] if a["teacher_topk_ids"] != b["teacher_topk_ids"]
        ]
        a, b = rng.choice(pairs)
        for name in ("teacher_topk_ids", "teacher_topk_logprobs", "teacher_tail_logprob", "teacher_row_digest"):
            a[name], b[name] = b[name], a[name]

    rewrite(rng.choice(shards(folder)), change, rng)
    return True


def edit_number(folder, rng):
    def change(rows, rng):
        row = rng.choice(rows)
        name = rng.choice(["teacher_topk_ids", "teacher_topk_logprobs", "teacher_tail_logprob", "input_ids"])
        values = row[name]
        i = rng.randrange(len(values))
        if name == "teacher_tail_logprob":
            values[i] -= 0.001
        elif name == "input_ids":
            values[i] = (values[i] + 1) % 24
        else:
            j = rng.randrange(5)
            values[i][j] = (values[i][j] + 1) % 24 if name == "teacher_topk_ids" else values[i][j] * 1.002 - 1e-3

    rewrite(rng.choice(shards(folder)), change, rng)
    return True


def mask_label(folder, rng):
    def change(rows, rng):
        row = rng.choice(rows)
        i = rng.choice([i for i in range(1, len(row["labels"])) if row["labels"][i] != -100])
        row["labels"][i] = -100

    rewrite(rng.choice(shards(folder)), change, rng)
    return True


def edit_other_column(folder, rng):
    def change(rows, rng):
        rng.choice(rows)["id"] += 1

    rewrite(rng.choice(shards(folder)), change, rng)
    return False


def edit_manifest(folder, rng):
    """Another tokenizer, chat template, teacher, k or figure, with or without the id recomputed by the forger."""
    path = rng.choice(sorted((folder / "manifest").glob("[!.]*")))
    data = json.loads(path.read_text())
    keys = rng.choice(
        [
            ("tokenizer", "fingerprint"), ("tokenizer", "chat_template"), ("teacher", "weights_digest"), ("k",),
            ("counts", "rows"), ("counts", "positions"), ("head_size",), ("source", "fingerprint"), ("kept_mass",),
            ("timing", "seconds"), ("split",),
        ]
    )  # fmt: skip
    target = data
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = "0123456789abcdef" if not isinstance(target[keys[-1]], int | float) else 4
    path.write_text(json.dumps(data, indent=2, sort_keys=True))
    return False


def forge_manifest(folder, rng):
    """An edit of what defines the cache, with id and digest made right: only the rows can tell."""
    from first_trl.cache.manifest import Manifest

    path = rng.choice(sorted((folder / "manifest").glob("[!.]*")))
    manifest = Manifest.from_json(path.read_text())
    kind = rng.choice(["fingerprint", "chat_template", "weights_digest", "k"])
    if kind == "k":
        manifest.k = rng.choice([4, 6])
        manifest.kept_mass = [0.5] * manifest.k
    elif kind == "weights_digest":
        manifest.teacher[kind] = f"{rng.getrandbits(64):016x}"
    else:
        manifest.tokenizer[kind] = f"{rng.getrandbits(64):016x}"
    path.write_text(manifest.to_json())
    return True


def remove_manifest(folder, rng):
    rng.choice(sorted((folder / "manifest").glob("[!.]*"))).unlink()
    return False


def surplus_shard(folder, rng):
    path = rng.choice(shards(folder))
    shutil.copy(path, path.with_name(path.name.replace("train", "test").replace("validation", "train")))
    return False


KINDS = [
    flip_byte, flip_byte, flip_byte, remove_shard, truncate_shard, exchange_shards, drop_row, double_row,
    exchange_rows_teacher, edit_number, edit_number, edit_number, mask_label, edit_other_column, edit_manifest,
    forge_manifest, remove_manifest, surplus_shard,
]  # fmt: skip


@pytest.mark.parametrize("block", range(10))
def test_every_single_corruption_is_found(sound, tmp_path, block):
    size = CORRUPTIONS // 10
    for seed in range(block * size, (block + 1) * size):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(sound, folder)
        kind = KINDS[seed % len(KINDS)]
        touches_rows = kind(folder, rng)
        with pytest.raises(ValueError, match=r"\.( |$)") as caught:
            verify_cache_folder(folder)
            pytest.fail(f"{kind.__name__}, seed {seed}: not found")
        assert str(folder) in str(caught.value) or "manifest" in str(caught.value), kind.__name__
        if touches_rows:
            splits = [path.stem for path in (folder / "manifest").glob("[!.]*")]
            with pytest.raises(ValueError):
                for split in splits:
                    verify_teacher_cache(load_teacher_cache(folder, split))
                pytest.fail(f"{kind.__name__}, seed {seed}: its rows were accepted")


def test_the_sound_cache_passes(sound):
    manifests = verify_cache_folder(sound)
    assert set(manifests) == {"train", "validation"} and manifests["train"].counts["rows"] == 40
    assert manifests["validation"].recalibration["probability_temperature"]["value"] == 0.3
    assert set(verify_cache_folder(sound, "validation")) == {"validation"}
    for split in manifests:
        verify_teacher_cache(load_teacher_cache(sound, split), tiny_tokenizer())


def test_a_copy_elsewhere_passes(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "elsewhere")
    verify_cache_folder(tmp_path / "elsewhere")


def test_what_is_no_cache_says_so(sound, tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        verify_cache_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no manifest"):
        verify_cache_folder(tmp_path)
    with pytest.raises(ValueError, match=r"splits there: \['train', 'validation'\]"):
        verify_cache_folder(sound, "test")


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_a_lost_shard_is_computed_again(sound, tmp_path, damage):
    """The mend that the error names: remove the shard, run the capture again."""
    folder = Path(shutil.copytree(sound, tmp_path / "cache"))
    path = folder / "data" / "train-00002-of-00005.parquet"
    intact = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in shards(folder)}
    path.unlink()
    if damage == "damaged":  # a crash in the middle of a capture, the manifest not yet written
        path.write_bytes(b"PAR1")
        (folder / "manifest" / "train.json").rename(tmp_path / "moved.json")
        manifest = json.loads((tmp_path / "moved.json").read_text())
        from first_trl.cache.manifest import Manifest

        record = Manifest.from_json((tmp_path / "moved.json").read_text())
        (folder / "manifest" / ".train.in-progress.json").write_text(
            json.dumps(
                {"identity": record.identity, "teacher": manifest["teacher"], "shard_size": 9, "recalibration": {}}
            )
        )
        with pytest.raises(ValueError, match="unfinished capture"):
            verify_cache_folder(folder)
    rows = Dataset.from_list([{**row, "id": i} for i, row in enumerate(tiny_rows(40, seed=40))])
    add_teacher_topk(rows, tiny_llama(), tiny_tokenizer(), output_dir=folder)
    assert intact == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in shards(folder)}
    assert verify_cache_folder(folder)["train"].timing["shards_of_earlier_runs"] == 4
