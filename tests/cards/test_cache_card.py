"""The generated dataset card: true figures, a header the Hub reads, honesty about what is not known."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset

from first_trl import add_teacher_topk
from first_trl.cache.folder import cache_size, load_manifest, store_recalibration
from first_trl.cache.schema import flatten_cache
from first_trl.cards import teacher_cache_card
from tests.support.tiny import VOCAB, tiny_llama, tiny_rows, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache")
    for split, seed in (("validation", 1), ("train", 0)):
        rows = [*tiny_rows(20, seed=seed), {"input_ids": [3], "labels": [3]}]
        add_teacher_topk(
            Dataset.from_list(rows), tiny_llama(vocab_size=VOCAB + 8), tiny_tokenizer(), k=7, output_dir=folder,
            split=split, num_draws=3, max_length=10,
        )  # fmt: skip
    store_recalibration(folder, "validation", "probability_temperature", {"value": 0.28, "ece": 0.0123, "curve": [1]})
    return folder


def test_the_header_serves_the_viewer(folder):
    card = teacher_cache_card(folder, license="cc-by-4.0")
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc-by-4.0" and "first_trl" in header["tags"]
    files = {entry["split"]: entry["path"] for entry in header["configs"][0]["data_files"]}
    assert list(files) == ["train", "validation"]
    for split, pattern in files.items():
        rows = load_dataset("parquet", data_files=str(folder / pattern), split="train")
        assert len(rows) == load_manifest(folder, split).counts["rows"]
    assert "license" not in yaml.safe_load(teacher_cache_card(folder).split("---")[1])


def test_the_figures_are_those_of_the_cache(folder):
    card, manifest = teacher_cache_card(folder, repo_id="me/cache"), load_manifest(folder, "train")
    assert 'load_teacher_cache("me/cache", split="train")' in card
    assert 'recalibration="probability_temperature", recalibration_value=0.28' in card
    assert "| probability_temperature | 0.28 | – | – | – | – → 1.2 |" in card
    for text in (manifest.teacher["weights_digest"], manifest.tokenizer["fingerprint"], manifest.id):
        assert f"`{text}`" in card
    assert f"{VOCAB + 8} rows; the 8 beyond the tokenizer are never kept" in card
    assert "3 per position with replacement" in card
    size, positions = cache_size(folder, "train"), manifest.counts["positions"]
    assert f"| train | {size['teacher_bytes'] / positions:.1f} | {size['bytes'] / positions:.1f} |" in card
    counts = manifest.counts
    dropped = counts["dropped_without_supervised_position"] + counts["dropped_by_truncation"]
    assert dropped >= 1 and counts["truncated"] > 0
    assert f"| {counts['rows']} | {positions} | {dropped} | {counts['truncated']} |" in card
    rows = load_dataset("parquet", data_files=str(folder / "data" / "train-*.parquet"), split="train")
    mass = np.exp(flatten_cache(rows).logprobs).cumsum(1).mean(0)
    shown = [f"{mass[i]:.4f}" for i in (0, 1, 2, 3, 4, 6)]
    assert f"| train | {' | '.join(shown)} |" in card


def test_tables_are_whole(folder):
    lines = teacher_cache_card(folder).splitlines()
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert above.count("|") == below.count("|"), (above, below)
    assert not re.search(r"\{\{|\{%|None", "\n".join(lines))


def test_a_fit_is_told_in_a_row(folder, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(folder, copy)
    fit = {"recalibration": {"method": "logit_temperature", "value": 1.283}, "objective": "nll", "estimator": "topk",
           "top_k": 7, "positions": "first", "n": 1200, "raw": {"ece": 0.2, "nll": 1.5},
           "chosen": {"ece": 0.104, "nll": 1.2}, "curve": []}  # fmt: skip
    for split in ("train", "validation"):
        store_recalibration(copy, split, "logit_temperature", fit)
    card = teacher_cache_card(copy)
    row = "| logit_temperature | 1.283 | NLL | `topk`, 7 entries | 1,200 | 20.0 → 10.4 |"
    assert card.count(row) == 1 and "positions first" not in card


def test_names_can_be_given(folder):
    """A run knows what its folders `model` and rows in memory are."""
    card = teacher_cache_card(folder, teacher_name="llama made from scratch", sources={"train": "task `noisy_world`"})
    assert "# Teacher cache: llama made from scratch, top 7" in card and "| Teacher | llama made from scratch" in card
    assert "| train | task `noisy_world` |" in card
    assert f"| validation | {load_manifest(folder, 'validation').source['name']} |" in card


def test_headings_stand_alone(folder, tmp_path):
    copy = tmp_path / "cache"
    shutil.copytree(folder, copy)
    manifest = load_manifest(copy, "train")
    manifest.notes = ["A note.", "Another."]
    (copy / "manifest" / "train.json").write_text(manifest.to_json())
    for text in (teacher_cache_card(folder), teacher_cache_card(copy)):
        lines = text.split("```")[2].splitlines()
        for above, line in itertools.pairwise(lines):
            assert not line.startswith(("#", ">")) or above == "", (above, line)
    assert "> A note." in text and "> Another." in text


def test_what_is_not_known_is_said(folder):
    card = teacher_cache_card(folder)
    assert "Licence of the source data | not stated" in card
    assert "Licence of the source data | cc-by-nc-4.0" in teacher_cache_card(folder, source_license="cc-by-nc-4.0")
    json.dumps(card)


def test_the_example_is_valid_python(folder):
    code = re.search(r"```python\n(.*?)```", teacher_cache_card(folder), re.S)[1]
    compile(code, "card", "exec")
    assert len(code.strip().splitlines()) <= 10


def test_no_cache_no_card(tmp_path):
    with pytest.raises(ValueError, match="No teacher cache"):
        teacher_cache_card(tmp_path)
