"""Rows of a cache: what is damaged is refused with the row, what is sound passes whatever subset or order it is in."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk

from first_trl import add_teacher_topk, load_teacher_cache, verify_teacher_cache
from first_trl.cache.folder import forget_recalibrations, load_manifest, store_recalibration
from first_trl.cache.manifest import Manifest, attach_manifest, read_manifest
from first_trl.cache.schema import REQUIRED_COLUMNS, flatten_cache, iterate_batches
from tests.support.tiny import VOCAB, tiny_cache, tiny_llama, tiny_rows, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache")
    rows = Dataset.from_list([{**row, "id": i} for i, row in enumerate(tiny_rows(40))])
    add_teacher_topk(rows, tiny_llama(), tiny_tokenizer(), output_dir=folder, shard_size=9, num_draws=4)
    return folder


@pytest.fixture(scope="module")
def cache(folder):
    return load_teacher_cache(folder)


# --- no false alarm --------------------------------------------------------------------------------------------------


def views(cache, tmp_path):
    cache.save_to_disk(tmp_path / "saved")
    cache.to_parquet(tmp_path / "file.parquet")
    yield "as loaded", cache
    yield "save_to_disk", load_from_disk(tmp_path / "saved")
    yield "parquet", load_dataset("parquet", data_files=str(tmp_path / "file.parquet"), split="train")
    yield "shuffle", cache.shuffle(seed=1)
    yield "select", cache.select([7, 3, 3, 20])
    yield "filter", cache.filter(lambda row: row["id"] % 2)
    yield "sort", cache.sort("id", reverse=True)
    yield "flatten_indices", cache.shuffle(seed=2).flatten_indices()
    yield "train_test_split", cache.train_test_split(0.3, seed=0)["test"]
    yield "concatenate", concatenate_datasets([cache.select(range(5)), cache.select(range(5, 20)), cache])
    yield "remove and rename other columns", cache.rename_column("id", "number").remove_columns("number")
    yield "map", cache.map(lambda row: {"twice": 2 * row["id"]})
    yield "shard", cache.shard(4, 1)
    yield "from dicts", Dataset.from_list(cache.to_list(), features=cache.features)
    yield "formatted", cache.with_format("torch")


def test_sound_rows_pass_in_any_subset_and_order(cache, tmp_path):
    for name, view in views(cache, tmp_path):
        try:
            verify_teacher_cache(view, tiny_tokenizer(), head_size=VOCAB, batch_size=7)
        except ValueError as error:
            pytest.fail(f"{name}: {error}")


def test_pickled_and_grown_tokenizers_of_the_same_vocabulary_pass(cache, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    tokenizer.chat_template = "{{ messages }}"
    tokenizer("w3 w4", truncation=True, max_length=1, padding="max_length")
    verify_teacher_cache(cache, tokenizer)


def test_the_manifest_travels_and_the_original_is_left_alone(cache):
    assert read_manifest(cache.shuffle(seed=0).select(range(3))).k == 5
    plain = Dataset.from_list([{"a": 1}])
    attach_manifest(plain, read_manifest(cache))
    assert read_manifest(plain) is None


# --- damage ----------------------------------------------------------------------------------------------------------


def edited(cache, row, edit):
    rows = cache.to_list()
    edit(rows[row])
    return attach_manifest(Dataset.from_list(rows, features=cache.features), read_manifest(cache))


def first_entry(name, value):
    def edit(row):
        row[name][0] = value if name == "teacher_tail_logprob" else [value, *row[name][0][1:]]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (first_entry("teacher_topk_logprobs", float("nan")), "holds NaN"),
        (first_entry("teacher_topk_logprobs", 0.25), "holds a positive value"),
        (first_entry("teacher_topk_logprobs", -30.0), "not sorted"),
        (first_entry("teacher_tail_logprob", float("nan")), "`teacher_tail_logprob` is NaN"),
        (first_entry("teacher_tail_logprob", 0.5), "is positive"),
        (first_entry("teacher_tail_logprob", -0.01), "add up to"),
        (first_entry("teacher_topk_ids", -1), "a negative id"),
        (lambda row: row["teacher_topk_ids"].__setitem__(0, [3, 3, 4, 5, 6]), "repeats an id"),
        (lambda row: row["teacher_topk_ids"].__setitem__(0, row["teacher_topk_ids"][0][::-1]), "digest mismatch"),
        (lambda row: row["teacher_topk_ids"][0].pop(), "another number of entries than 5"),
        (lambda row: row["teacher_topk_ids"].pop(), "`teacher_topk_ids` has . entries for . supervised positions"),
        (lambda row: row["teacher_tail_logprob"].append(-1.0), "`teacher_tail_logprob` has"),
        (lambda row: row["labels"].__setitem__(-1, -100), "entries for . supervised positions"),
        (lambda row: row["labels"].__setitem__(-1, 9), "a label differs from the token"),
        (lambda row: row["labels"].pop(), "differ in length"),
        (lambda row: row.update(input_ids=[9, *row["input_ids"][1:]]), "digest mismatch"),
        (lambda row: row.update(teacher_row_digest=row["teacher_row_digest"] ^ 1), "digest mismatch"),
        (lambda row: row.update(teacher_cache=""), "is empty"),
        (lambda row: row.update(teacher_cache="abc"), "must read"),
        (lambda row: row.update(teacher_cache="x" + row["teacher_cache"][1:]), "it belongs to cache x"),
        (lambda row: row.update(teacher_cache=row["teacher_cache"][:-1] + "g"), "captured with tokenizer"),
        (lambda row: row["teacher_draw_counts"][0].__setitem__(0, 9), "do not add up to 4"),
        (lambda row: row["teacher_draw_ids"].pop(), "differ in length"),
        (lambda row: row["teacher_draw_ids"][0].__setitem__(0, 22), "digest mismatch|repeats an id"),
    ],
)
def test_a_damaged_row_is_refused_with_its_number(cache, edit, message):
    # A row whose label on the first token is masked, so that popping entries cannot be legitimate
    row = next(i for i in range(13, 40) if cache[i]["labels"][0] == -100 and len(cache[i]["teacher_topk_ids"]) > 1)
    damaged = edited(cache, row, edit)
    with pytest.raises(ValueError, match=message) as caught:
        verify_teacher_cache(damaged, tiny_tokenizer(), batch_size=8)
    if "teacher_cache` must read" not in str(caught.value) and "draw_counts` differ" not in str(caught.value):
        assert f"Row {row} of" in str(caught.value)


def test_exchanged_teacher_columns_are_refused(cache):
    rows = cache.to_list()
    by_length = {}
    for i, row in enumerate(rows):
        other = by_length.setdefault(len(row["teacher_tail_logprob"]), i)
        if other != i:
            break
    for name in REQUIRED_COLUMNS[2:]:
        rows[i][name], rows[other][name] = rows[other][name], rows[i][name]
    with pytest.raises(ValueError, match=f"Row {other} .*digest mismatch"):
        verify_teacher_cache(Dataset.from_list(rows, features=cache.features))


@pytest.mark.parametrize("name", REQUIRED_COLUMNS)
def test_missing_columns_are_named(cache, name):
    with pytest.raises(ValueError, match=f"Missing teacher cache columns \\['{name}'\\]"):
        verify_teacher_cache(cache.remove_columns(name))


def test_missing_draws_are_named(cache):
    with pytest.raises(ValueError, match="`teacher_draw_ids` is gone"):
        verify_teacher_cache(cache.remove_columns(["teacher_draw_ids", "teacher_draw_counts"]))


def test_nothing_to_train_on_is_refused(cache):
    with pytest.raises(ValueError, match="is empty"):
        verify_teacher_cache(cache.select([]))
    masked = tiny_cache(tiny_llama(), tiny_tokenizer(), [{"input_ids": [3, 4], "labels": [-100, -100]}], k=3)
    with pytest.raises(ValueError, match="All labels are masked"):
        verify_teacher_cache(masked)


def test_another_tokenizer_is_refused(cache):
    with pytest.raises(ValueError, match=r"Row 0 .*the student's tokenizer is"):
        verify_teacher_cache(cache, tiny_tokenizer(prefix="v"))
    grown = tiny_tokenizer()
    grown.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"Row 0 .*the student's tokenizer is"):
        verify_teacher_cache(cache, grown)


def test_two_values_of_k_are_refused():
    model, tokenizer, rows = tiny_llama(), tiny_tokenizer(), tiny_rows(4)
    mixed = concatenate_datasets([tiny_cache(model, tokenizer, rows, k=k) for k in (3, 4)])
    with pytest.raises(ValueError, match=r"Row 4 .*another number of entries than 3"):
        verify_teacher_cache(mixed)


def test_rows_of_two_teachers_are_refused_where_a_manifest_tells(cache, tmp_path):
    other = add_teacher_topk(
        Dataset.from_list([{**row, "id": i} for i, row in enumerate(tiny_rows(5))]),
        tiny_llama(seed=3), tiny_tokenizer(), output_dir=tmp_path, num_draws=4,
    )  # fmt: skip
    other.info.description = ""
    with pytest.raises(ValueError, match=r"Row 40 .*it belongs to cache"):
        verify_teacher_cache(concatenate_datasets([cache, other]))


# --- the student's vocabulary ----------------------------------------------------------------------------------------


def test_a_padded_head_keeps_no_padded_id(tmp_path):
    """Qwen's case: more rows in the head than tokens in the tokenizer; here the padded rows are the likeliest."""
    model = tiny_llama(vocab_size=VOCAB + 8)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = model.lm_head.weight[3:11] * 2
    rows = tiny_rows(12)
    cache = add_teacher_topk(
        Dataset.from_list(rows), model, tiny_tokenizer(), k=6, logprob_dtype="float32", num_draws=30
    )
    arrays = flatten_cache(cache)
    assert arrays.ids.max() < VOCAB
    assert max(i for row in cache["teacher_draw_ids"] for entry in row for i in entry) < VOCAB
    with torch.no_grad():
        logits = torch.cat(
            [
                model(torch.tensor([row["input_ids"]])).logits[
                    0, [t - 1 for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
                ]
                for row in rows
            ]
        ).double()
    logprobs = logits.log_softmax(-1)
    kept = logprobs[:, :VOCAB].topk(6)
    np.testing.assert_array_equal(arrays.ids, kept.indices)
    np.testing.assert_allclose(arrays.logprobs, kept.values, atol=1e-5)
    # The padded rows' mass is in the tail
    np.testing.assert_allclose(np.exp(arrays.tail_logprob), 1 - kept.values.exp().sum(-1), atol=1e-5)
    assert np.exp(arrays.tail_logprob).max() > 0.5
    verify_teacher_cache(cache, tiny_tokenizer())


def test_k_is_bounded_by_the_tokenizer_of_a_padded_head():
    rows, model = Dataset.from_list(tiny_rows(2)), tiny_llama(vocab_size=VOCAB + 8)
    cache = add_teacher_topk(rows, model, tiny_tokenizer(), k=VOCAB)
    assert np.isfinite(flatten_cache(cache).tail_logprob).all()
    with pytest.raises(ValueError, match=f"k={VOCAB + 1} exceeds the vocabulary of {VOCAB}"):
        add_teacher_topk(rows, model, tiny_tokenizer(), k=VOCAB + 1)


def test_students_with_fewer_or_more_rows(cache):
    ids = flatten_cache(cache).ids
    verify_teacher_cache(cache, head_size=VOCAB + 100)
    verify_teacher_cache(cache, head_size=int(ids.max()) + 1)
    with pytest.raises(
        ValueError, match=rf"cached ids \[{ids.max()}\] do not exist in the student's head of {ids.max()} rows"
    ):
        verify_teacher_cache(cache, head_size=int(ids.max()))


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(k=4), "contents give"),
        (lambda data: data["tokenizer"].update(fingerprint="0" * 16), "contents give"),
        (lambda data: data["tokenizer"].update(chat_template="0" * 16), "contents give"),
        (lambda data: data["teacher"].update(weights_digest="0" * 16), "contents give"),
        (lambda data: data["teacher"].update(name="another"), "its digest does not match"),
        (lambda data: data["kept_mass"].__setitem__(0, 0.5), "its digest does not match"),
        (lambda data: data.update(format_version=99), "format version 99"),
        (lambda data: data.update(extra=1), "Not a teacher-cache manifest"),
        (lambda data: data.pop("k"), "Not a teacher-cache manifest"),
    ],
)
def test_an_edited_manifest_is_refused(folder, cache, edit, message):
    text = (folder / "manifest" / "train.json").read_text()
    data = json.loads(text)
    assert Manifest.from_json(text).id == data["id"]
    edit(data)
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(json.dumps(data))
    altered = cache.select(range(3))
    altered.info.description = json.dumps({"first_trl_manifest": data})
    with pytest.raises(ValueError, match=message):
        verify_teacher_cache(altered)
    assert read_manifest(cache).id == json.loads(text)["id"]


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "{}", "null", '{"format_version": 1}'])
def test_what_is_no_manifest_says_so(text):
    with pytest.raises(ValueError, match="Not a teacher-cache manifest"):
        Manifest.from_json(text)


def test_a_column_widened_after_the_capture_is_as_exact_as_what_was_stored():
    """`cast` to float32 must not call float16's rounding a wrong softmax."""
    from datasets import List, Value

    rows = Dataset.from_list(tiny_rows(40, seed=3))
    cache = add_teacher_topk(rows, tiny_llama(), tiny_tokenizer(), k=VOCAB)
    for dtype in ("float32", "float64"):
        features = cache.features.copy()
        features["teacher_topk_logprobs"] = List(List(Value(dtype)))
        wide = cache.cast(features)
        batch = next(iterate_batches(wide, len(wide)))
        masses = np.exp(batch.logprobs.astype(np.float64)).reshape(-1, VOCAB).sum(1) + np.exp(batch.tail_logprob)
        assert np.abs(masses - 1).max() > 1e-4
        verify_teacher_cache(wide)
        edited = wide.map(
            lambda row: {
                "teacher_topk_logprobs": [[v - 1e-6 for v in entry] for entry in row["teacher_topk_logprobs"]]
            }
        )
        with pytest.raises(ValueError, match="Row 0 of the teacher cache"):
            verify_teacher_cache(edited)


def test_concatenated_caches_of_different_k_name_the_mend():
    rows = Dataset.from_list(tiny_rows(4))
    caches = [add_teacher_topk(rows, tiny_llama(), tiny_tokenizer(), k=k) for k in (4, 6)]
    with pytest.raises(ValueError, match=r"Row 4 .*number of entries than 4: 6.*`top_k`"):
        verify_teacher_cache(concatenate_datasets(caches))


def test_fits_of_methods_that_are_no_longer_wanted_leave_the_manifest(tmp_path):
    add_teacher_topk(Dataset.from_list(tiny_rows(4)), tiny_llama(), tiny_tokenizer(), output_dir=tmp_path)
    for method in ("temperature", "probability_temperature"):
        store_recalibration(tmp_path, "train", method, {"value": 1.0})
    forget_recalibrations(tmp_path, "train", ["temperature"])
    assert set(load_manifest(tmp_path, "train").recalibration) == {"temperature"}
