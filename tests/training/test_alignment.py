"""Teacher entries stay on their tokens through truncation and packing."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from first_trl.cache.schema import cache_features
from first_trl.tasks import tokenize_rows
from first_trl.teacher import progress
from first_trl.teacher.conversations import writable_columns
from first_trl.teacher.padding import remove_padding
from first_trl.teacher.prepare import prepare_rows
from first_trl.teacher.text_cells import text_columns
from first_trl.training.alignment import align, count_cuts, entry_columns
from first_trl.utils import versions
from first_trl.utils.versions import code_version
from tests.support.tiny import tiny_rows, tiny_tokenizer


TOPK = entry_columns("topk")
DRAWS = entry_columns("sampled")


def row_of(tokens, supervised, k=3):
    """A row whose entries name their own token: entry of token x holds ids x*10.., logprob -x, tail -x/2, x draws."""
    labels = [token if flag else -100 for token, flag in zip(tokens, supervised, strict=True)]
    marked = [token for token, flag in zip(tokens[1:], supervised[1:], strict=True) if flag]
    return {
        "input_ids": tokens,
        "labels": labels,
        "teacher_topk_ids": [[10 * token + rank for rank in range(k)] for token in marked],
        "teacher_topk_logprobs": [[-float(token) - rank for rank in range(k)] for token in marked],
        "teacher_tail_logprob": [-token / 2 for token in marked],
        "teacher_cache": "a:b",
        "teacher_row_digest": 0,
        "teacher_draw_ids": [[10 * token + draw for draw in range(1 + token % 3)] for token in marked],
        "teacher_draw_counts": [[token] * (1 + token % 3) for token in marked],
    }


def random_rows(count, seed, longest=14):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens = rng.integers(1, 500, rng.integers(1, longest)).tolist()
        rows.append(row_of(tokens, (rng.random(len(tokens)) < 0.6).tolist()))
    return rows


def dataset_of(rows):
    return Dataset.from_list(rows, features=cache_features("float16", draws=True))


def check_row(row, columns):
    """Every supervised token is followed by its own entry, and by no other."""
    marked = [label for label in row["labels"] if label != -100]
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    starts = np.cumsum([0, *row["seq_lengths"][:-1]]) if "seq_lengths" in row else [0]
    assert all(row["labels"][start] == -100 for start in starts)
    if columns is TOPK:
        assert row["teacher_topk_ids"] == [10 * token + rank for token in marked for rank in range(3)]
        assert row["teacher_topk_logprobs"] == [-float(token) - rank for token in marked for rank in range(3)]
        assert row["teacher_tail_logprob"] == [-token / 2 for token in marked]
    else:
        assert row["teacher_draw_lengths"] == [1 + token % 3 for token in marked]
        assert row["teacher_draw_ids"] == [10 * token + draw for token in marked for draw in range(1 + token % 3)]
        assert row["teacher_draw_counts"] == [token for token in marked for _ in range(1 + token % 3)]


def scored(tokens, flags):
    return [token for token, flag in zip(tokens[1:], flags[1:], strict=True) if flag]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("columns", [TOPK, DRAWS], ids=["topk", "draws"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1, 2, 5, 9, 100])
def test_truncation(max_length, mode, columns, streaming):
    rows = random_rows(40, seed=3)
    dataset = dataset_of(rows)
    cut, dropped = count_cuts(dataset, max_length, mode)
    source = dataset.to_iterable_dataset() if streaming else dataset
    aligned = list(align(source, columns, max_length=max_length, truncation_mode=mode))
    expected = []
    for row in rows:
        window = (
            slice(None)
            if max_length is None
            else slice(max_length)
            if mode == "keep_start"
            else slice(-max_length, None)
        )
        tokens, labels = row["input_ids"][window], row["labels"][window]
        if any(label != -100 for label in labels[1:]):
            expected.append((tokens, [-100, *labels[1:]]))
    assert [(row["input_ids"], row["labels"]) for row in aligned] == expected
    for row in aligned:
        check_row(row, columns)
    assert cut == sum(max_length is not None and len(row["input_ids"]) > max_length for row in rows)
    assert dropped == len(rows) - len(expected)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("columns", [TOPK, DRAWS], ids=["topk", "draws"])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packing(strategy, columns, streaming):
    rows = random_rows(60, seed=5)
    dataset = dataset_of(rows)
    source = dataset.to_iterable_dataset() if streaming else dataset
    packed = list(align(source, columns, max_length=10, packing_strategy=strategy, shuffle_seed=1))
    assert len(packed) < len(rows)
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 10
        check_row(row, columns)
    limit = 10 if strategy == "bfd" else None
    kept = sorted(
        token
        for row in rows
        if any(label != -100 for label in row["labels"][1:limit])
        for token in row["input_ids"][:limit]
    )
    assert sorted(token for row in packed for token in row["input_ids"]) == kept


def test_stored_types_survive():
    aligned = align(dataset_of(random_rows(5, seed=0)), TOPK, max_length=4)
    types = {name: str(feature.feature.dtype) for name, feature in aligned.features.items()}
    assert types == {
        "input_ids": "int32",
        "labels": "int32",
        "teacher_topk_ids": "int32",
        "teacher_topk_logprobs": "float16",
        "teacher_tail_logprob": "float32",
    }


def test_rows_that_are_slices_of_a_larger_table():
    rows = random_rows(30, seed=9)
    expected = list(align(dataset_of(rows[7:19]), TOPK, max_length=6))
    assert list(align(dataset_of(rows).select(range(7, 19)), TOPK, max_length=6)) == expected
    assert list(align(dataset_of(rows).select(list(range(18, 6, -1))), TOPK, max_length=6)) == expected[::-1]


def test_packing_needs_a_length():
    with pytest.raises(ValueError, match="Packing needs `max_length`"):
        align(dataset_of(random_rows(3, seed=0)), TOPK, packing_strategy="bfd")


def test_rows_that_another_version_of_the_code_aligned_are_aligned_again(tmp_path, monkeypatch):
    """datasets keeps what was aligned, under a name that must change with the code."""
    Dataset.from_list(tiny_rows()).save_to_disk(tmp_path / "rows")

    def names():
        rows = load_from_disk(tmp_path / "rows")
        return {align(rows, ())._fingerprint, align(rows, (), packing_strategy="bfd", max_length=16)._fingerprint}

    before = names()
    assert len(before) == 2 and names() == before
    monkeypatch.setattr(versions, "code_version", lambda modules: "another")
    assert not names() & before


ANSWERED = {"prompt": "w1 w2 ?", "completion": " w3"}
MADE_OF = {
    "tokenised": (lambda rows: tokenize_rows(rows, tiny_tokenizer()).dataset, ANSWERED),
    "tokenised for a capture": (lambda rows: prepare_rows(rows, tiny_tokenizer()), ANSWERED),
    "prompts alone": (lambda rows: prepare_rows(rows, tiny_tokenizer()), {"prompt": "w1 w2 ?"}),
    "numbers": (lambda rows: text_columns(rows, ["completion"], []), {"completion": 4}),
    "tools": (lambda rows: writable_columns(rows, None), {"tools": [{"name": "a"}]}),
    "padded": (
        lambda rows: remove_padding(rows, None), {"input_ids": [0, 5], "labels": [-100, 5], "attention_mask": [0, 1]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE_OF)
def test_rows_that_another_version_of_the_code_made_are_made_again(kind, tmp_path, monkeypatch):
    """Whatever is stored on disk between the user's rows and the teacher."""
    make, row = MADE_OF[kind]
    Dataset.from_list([row]).save_to_disk(tmp_path / "rows")
    before = make(load_from_disk(tmp_path / "rows"))
    assert make(load_from_disk(tmp_path / "rows"))._fingerprint == before._fingerprint
    monkeypatch.setattr(versions, "code_version", lambda modules: "another")
    after = make(load_from_disk(tmp_path / "rows"))
    assert after._fingerprint != before._fingerprint and after[:] == before[:]


def test_the_version_of_code_is_its_text(tmp_path, monkeypatch):
    (tmp_path / "some_code.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = code_version(["some_code"])
    assert before == code_version(["some_code"])
    (tmp_path / "some_code.py").write_text("x = 2\n")
    assert code_version(["some_code"]) != before


def test_a_capture_by_another_version_of_the_code_is_not_taken_up(monkeypatch):
    manifest = SimpleNamespace(id="0123")
    before = progress.default_folder(manifest)
    assert before.name.startswith("0123-") and before == progress.default_folder(manifest)
    monkeypatch.setattr(progress, "code_version", lambda modules: "another")
    assert progress.default_folder(manifest) != before
