"""The capture through its public path: values against a dense float64 softmax, alignment, ties, bad input, repeats."""

import copy
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import Gemma2Config, Gemma2ForCausalLM

from first_trl import add_teacher_topk, load_teacher_cache, verify_teacher_cache
from first_trl.teacher.backends import TransformersBackend
from tests.support.tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_rows, tiny_tokenizer


@pytest.fixture(autouse=True)
def _one_thread(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    # Caches without an output folder go into the datasets cache
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def softcapped(seed=0):
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.5, sliding_window=64,
        final_logit_softcapping=3.0, attn_logit_softcapping=5.0, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def dense(model, row, k):
    """Top-k and tail of one row from the float64 softmax over the whole vocabulary, one prefix at a time."""
    model = copy.deepcopy(model).double()
    entries = []
    for t in range(1, len(row["input_ids"])):
        if row["labels"][t] == -100:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"][:t]])).logits[0, -1]
        logprobs = logits.log_softmax(-1).numpy()
        order = np.argsort(-logprobs, kind="stable")
        tail = np.log(np.exp(logprobs[order[k:]]).sum()) if k < len(logprobs) else -np.inf
        entries.append((order[:k], logprobs[order[:k]], tail))
    return [np.array(column) for column in zip(*entries, strict=True)]


class CountingBackend(TransformersBackend):
    rows_scored = 0

    def score(self, rows, *args, **kwargs):
        self.rows_scored += len(rows)
        return super().score(rows, *args, **kwargs)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, softcapped])
@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_equals_a_dense_softmax_of_each_prefix(make, k):
    model, rows = make(), tiny_rows(9)
    cache = add_teacher_topk(
        Dataset.from_list(rows), model, tiny_tokenizer(), k=k, logprob_dtype="float32", shard_size=4
    )
    assert len(cache) == len(rows)
    for row, cached in zip(rows, cache, strict=True):
        ids, logprobs, tail = dense(model, row, k)
        assert cached["input_ids"] == row["input_ids"] and cached["labels"] == row["labels"]
        np.testing.assert_array_equal(cached["teacher_topk_ids"], ids)
        np.testing.assert_allclose(cached["teacher_topk_logprobs"], logprobs, atol=1e-5)
        if k == VOCAB:
            assert np.isneginf(cached["teacher_tail_logprob"]).all()
        else:
            np.testing.assert_allclose(cached["teacher_tail_logprob"], tail, atol=1e-5)
    verify_teacher_cache(cache, tiny_tokenizer(), head_size=VOCAB)


def test_float16_rounds_and_nothing_else():
    rows, model = Dataset.from_list(tiny_rows(20)), tiny_llama()
    half, single = (
        add_teacher_topk(rows, model, tiny_tokenizer(), logprob_dtype=dtype) for dtype in ("float16", "float32")
    )
    assert half.features["teacher_topk_logprobs"].feature.feature.dtype == "float16"
    assert half["teacher_topk_ids"][:] == single["teacher_topk_ids"][:]
    assert half["teacher_tail_logprob"][:] == single["teacher_tail_logprob"][:]
    for a, b in zip(half, single, strict=True):
        exact = np.array(b["teacher_topk_logprobs"])
        # Half a unit in the last of 11 bits
        assert (np.abs(np.array(a["teacher_topk_logprobs"]) - exact) <= 2**-11 * np.abs(exact) + 1e-7).all()
    assert half[0]["teacher_cache"] != single[0]["teacher_cache"]


def test_equal_logits_are_ordered_by_id():
    model = tiny_gpt2()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    cache = add_teacher_topk(Dataset.from_list(tiny_rows(3)), model, tiny_tokenizer(), k=4, logprob_dtype="float32")
    for row in cache:
        assert row["teacher_topk_ids"] == [[0, 1, 2, 3]] * len(row["teacher_topk_ids"])
        np.testing.assert_allclose(row["teacher_topk_logprobs"], -np.log(VOCAB), atol=1e-6)
        np.testing.assert_allclose(row["teacher_tail_logprob"], np.log((VOCAB - 4) / VOCAB), atol=1e-6)


def test_batches_do_not_change_the_cache(tmp_path):
    rows, model = Dataset.from_list(tiny_rows(30, longest=20)), tiny_llama()
    caches = [
        add_teacher_topk(
            rows,
            model,
            tiny_tokenizer(),
            logprob_dtype="float32",
            num_draws=6,
            output_dir=tmp_path / str(i),
            **options,
        )
        for i, options in enumerate(
            [
                {"max_rows_per_batch": 1},
                {"max_tokens_per_batch": 50, "shard_size": 7},
                {"max_tokens_per_batch": 10_000, "shard_size": 11},
            ]
        )
    ]
    for other in caches[1:]:
        for a, b in zip(caches[0], other, strict=True):
            assert {name: a[name] for name in ("input_ids", "labels", "teacher_topk_ids", "teacher_cache")} == {
                name: b[name] for name in ("input_ids", "labels", "teacher_topk_ids", "teacher_cache")
            }
            assert a["teacher_draw_ids"] == b["teacher_draw_ids"]
            np.testing.assert_allclose(a["teacher_topk_logprobs"], b["teacher_topk_logprobs"], atol=1e-5)
            np.testing.assert_allclose(a["teacher_tail_logprob"], b["teacher_tail_logprob"], atol=1e-5)


def test_other_columns_travel_and_the_model_keeps_its_mode():
    rows = [{**row, "id": f"q{i}", "choices": ["é", "漢字"]} for i, row in enumerate(tiny_rows(5))]
    model = tiny_llama().train()
    cache = add_teacher_topk(Dataset.from_list(rows), model, tiny_tokenizer())
    assert model.training
    assert cache["id"][:] == [f"q{i}" for i in range(5)] and cache["choices"][0] == ["é", "漢字"]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_left_out_rows_are_counted_and_reported():
    rows = [
        {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
        {"input_ids": [3], "labels": [3]},
        {"input_ids": [], "labels": []},
        {"input_ids": [3, 4], "labels": [-100, -100]},
        {"input_ids": [3, 4], "labels": [3, -100]},
        {"input_ids": [5] * 65, "labels": [5] * 65},
        {"input_ids": [6, 7], "labels": [-100, 7]},
    ]
    with pytest.warns(UserWarning, match="5 of 7 rows are left out.* 4 without a supervised position, 1 longer"):
        cache = add_teacher_topk(Dataset.from_list(rows), tiny_llama(), tiny_tokenizer())
    assert cache["input_ids"][:] == [[3, 4, 5], [6, 7]]
    from first_trl.cache.manifest import read_manifest

    counts = read_manifest(cache).counts
    assert counts["rows"] == 2 and counts["positions"] == 3 and counts["tokens"] == 5
    assert counts["dropped_without_supervised_position"] == 4 and counts["dropped_longer_than_context"] == 1


def test_text_rows_are_tokenised_like_the_trainer_and_cut_rows_are_counted():
    rows = [
        {"prompt": "w3 w4 ", "completion": "w5 w6"},
        {"prompt": "w3 w4 ", "completion": ""},
        {"prompt": "naïve 漢字 🙂 ", "completion": "w7"},
        {"prompt": "w3 w4 w5 w6 w7 w8 ", "completion": "w9"},
    ]
    with pytest.warns(UserWarning, match="1 of 4 rows are cut to 5 tokens .*; 1 rows without"):
        cache = add_teacher_topk(Dataset.from_list(rows), tiny_llama(), tiny_tokenizer(), max_length=5)
    assert cache["input_ids"][:] == [[3, 4, 5, 6, 1], [3, 4, 1], [2, 2, 2, 7, 1]]
    assert cache["labels"][:] == [[-100, -100, 5, 6, 1], [-100, -100, 1], [-100, -100, -100, 7, 1]]
    from first_trl.cache.manifest import read_manifest

    counts = read_manifest(cache).counts
    assert counts["truncated"] == 1 and counts["dropped_by_truncation"] == 1


ROW = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([ROW], {"k": 0}, "k must be at least 1"),
        ([ROW], {"k": -3}, "k must be at least 1"),
        ([ROW], {"k": 5.0}, "k must be a whole number, got 5.0"),
        ([ROW], {"k": True}, "k must be a whole number, got True"),
        ([ROW], {"k": VOCAB + 1}, f"k={VOCAB + 1} exceeds the vocabulary of {VOCAB} tokens"),
        ([ROW], {"logprob_dtype": "int8"}, "logprob_dtype must be one of"),
        ([ROW], {"shard_size": 0}, "shard_size must be at least 1"),
        ([ROW], {"max_rows_per_batch": 0}, "max_rows_per_batch must be at least 1"),
        ([ROW], {"num_draws": -1}, "num_draws must be between 0"),
        ([ROW], {"max_length": 1}, "max_length must be at least 2"),
        ([], {}, "The dataset is empty"),
        ([{"input_ids": [3, 4], "labels": [-100, -100]}], {}, "1 rows have all labels masked"),
        ([{"input_ids": [3, 4], "labels": [3, -100]}], {}, "No row has a supervised position"),
        ([{"input_ids": [3] * 70, "labels": [3] * 70}], {}, "within the teacher's context of 64 tokens"),
        ([{"question": "w3"}], {}, "Cannot tokenise a dataset with columns"),
        ([ROW, {"input_ids": [3, 99], "labels": [-100, 99]}], {}, "Row 1 of the dataset: an input id is outside"),
        ([ROW, {"input_ids": [3, -1], "labels": [-100, -1]}], {}, "Row 1 of the dataset: an input id is outside"),
        ([ROW, {"input_ids": [3, 4], "labels": [4, -100]}], {}, "Row 1 of the dataset: a label differs"),
        ([ROW, {"input_ids": [3, 4], "labels": [4]}], {}, "Row 1 of the dataset: `input_ids` and `labels` differ"),
        ([ROW, {"input_ids": None, "labels": [4]}], {}, "Row 1 of the dataset: `input_ids` is null"),
        ([{"input_ids": [0.5, 4.0], "labels": [-100, 4]}], {}, "must be a list of integers"),
    ],
)
def test_bad_input_says_what_and_where(rows, options, message):
    dataset = Dataset.from_list(rows) if rows else Dataset.from_dict({"input_ids": [], "labels": []})
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("ignore")
        add_teacher_topk(dataset, tiny_llama(), tiny_tokenizer(), **options)


def test_splits_and_streams_are_refused_with_the_mend():
    dataset = Dataset.from_list([ROW])
    for wrong in (DatasetDict(train=dataset), dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"Expected a `datasets.Dataset`"):
            add_teacher_topk(wrong, tiny_llama(), tiny_tokenizer())
    with pytest.raises(ValueError, match="tokenizer"):
        add_teacher_topk(dataset, tiny_llama(), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(value, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        add_teacher_topk(Dataset.from_list(tiny_rows(3)), model, tiny_tokenizer(), output_dir=tmp_path)
    with pytest.raises(ValueError, match="No teacher cache of split"):
        load_teacher_cache(tmp_path)


# --- the same call again, and other calls on the same folder -----------------------------------------------------------


def test_the_same_call_again_runs_nothing(tmp_path):
    rows, backend = Dataset.from_list(tiny_rows(10)), CountingBackend(tiny_llama())
    first = add_teacher_topk(rows, backend, tiny_tokenizer(), output_dir=tmp_path, shard_size=3)
    assert backend.rows_scored == 10
    files = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    again = add_teacher_topk(rows, backend, tiny_tokenizer(), output_dir=tmp_path, max_rows_per_batch=2)
    assert backend.rows_scored == 10 and again.to_dict() == first.to_dict()
    assert files == {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()}


def test_without_a_folder_the_result_is_found_again():
    rows, backend = Dataset.from_list(tiny_rows(5)), CountingBackend(tiny_llama())
    for _ in range(2):
        cache = add_teacher_topk(rows, backend, tiny_tokenizer())
    assert backend.rows_scored == 5 and len(cache) == 5


def other_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def grown():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    return tokenizer


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": tiny_llama(seed=1)}, "teacher:"),
        ({"dataset": Dataset.from_list(tiny_rows(10, seed=1))}, "source:"),
        ({"dataset": Dataset.from_list([{**row, "id": 1} for row in tiny_rows(10)])}, "source:"),
        ({"k": 4}, "k: 5 there, 4 now"),
        ({"logprob_dtype": "float32"}, "logprob_dtype"),
        ({"num_draws": 3}, "num_draws"),
        ({"processing_class": other_template()}, "tokenizer:"),
        ({"processing_class": grown()}, "tokenizer:"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_inputs_are_refused(change, named, finished, tmp_path):
    call = {
        "dataset": Dataset.from_list(tiny_rows(10)),
        "teacher": tiny_llama(),
        "processing_class": tiny_tokenizer(),
        "output_dir": tmp_path,
        "shard_size": 3,
    }

    class Interrupted(CountingBackend):
        def score(self, rows, *args, **kwargs):
            if self.rows_scored > 3:
                raise KeyboardInterrupt
            return super().score(rows, *args, **kwargs)

    if finished:
        add_teacher_topk(**call)
    else:
        with pytest.raises(KeyboardInterrupt):
            add_teacher_topk(**{**call, "teacher": Interrupted(tiny_llama())})
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.parquet"))}
    assert before
    with pytest.raises(ValueError, match=f"holds a capture of other inputs.*{named}"):
        add_teacher_topk(**{**call, **change})
    assert before == {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.parquet"))}
    # The original call still finishes
    assert len(add_teacher_topk(**call)) == 10


def test_two_splits_share_a_folder(tmp_path):
    for split, seed in (("train", 0), ("validation", 1)):
        add_teacher_topk(
            Dataset.from_list(tiny_rows(4, seed=seed)),
            tiny_llama(),
            tiny_tokenizer(),
            output_dir=tmp_path,
            split=split,
        )
    assert load_teacher_cache(tmp_path, "train")["input_ids"][0] == tiny_rows(4, seed=0)[0]["input_ids"]
    assert load_teacher_cache(tmp_path, "validation")["input_ids"][0] == tiny_rows(4, seed=1)[0]["input_ids"]
    with pytest.raises(ValueError, match=r"splits there: \['train', 'validation'\]"):
        load_teacher_cache(tmp_path, "test")


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_follow_the_full_softmax():
    row = {"input_ids": [3, 4, 5], "labels": [-100, 4, -100]}
    draws, copies = 50, 400
    cache = add_teacher_topk(Dataset.from_list([row] * copies), tiny_llama(), tiny_tokenizer(), num_draws=draws)
    counts = np.zeros(VOCAB)
    for cached in cache:
        (ids,), (number,) = cached["teacher_draw_ids"], cached["teacher_draw_counts"]
        assert sum(number) == draws and len(set(ids)) == len(ids)
        assert list(zip(ids, number, strict=True)) == sorted(
            zip(ids, number, strict=True), key=lambda pair: (-pair[1], pair[0])
        )
        counts[ids] += number
    with torch.no_grad():
        expected = tiny_llama().double()(torch.tensor([[3]])).logits[0, -1].softmax(-1).numpy() * draws * copies
    from scipy.stats import chisquare

    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    if expected[-1] < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected).pvalue > 1e-3
    # Equal rows get different draws
    assert cache[0]["teacher_draw_counts"] != cache[1]["teacher_draw_counts"]
    verify_teacher_cache(cache)


def test_draws_depend_on_the_seed_alone(tmp_path):
    rows = Dataset.from_list(tiny_rows(6))
    make = lambda seed: add_teacher_topk(rows, tiny_llama(), tiny_tokenizer(), num_draws=20, draw_seed=seed)  # noqa: E731
    assert make(0)["teacher_draw_ids"][:] == make(0)["teacher_draw_ids"][:] != make(1)["teacher_draw_ids"][:]
