"""Text -> input_ids and labels: boundaries, masks, special tokens, overflow, and that every row is accounted for."""

import pytest
from datasets import Dataset, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from first_trl.experiments.smoke.rows import DATA as SMOKE_DATA
from first_trl.tasks import encode_prompts, get_task, tokenize_rows
from first_trl.tasks.word_tokenizer import word_tokenizer
from tests.conftest import DATA
from tests.support.families import family_tokenizer


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the tokenizers are not at {DATA}")
TOKENIZERS = ["gpt2_tokenizer", "tiny_llama/stories260K"]


def words() -> object:
    return word_tokenizer([f"w{i}" for i in range(20)])


def rows(*pairs: tuple[str, str | None]) -> Dataset:
    return Dataset.from_list(
        [{"id": f"r{i}", "group": f"g{i}", "prompt": p, "completion": c} for i, (p, c) in enumerate(pairs)]
    )


def text(n: int, start: int = 0) -> str:
    return " ".join(f"w{start + i}" for i in range(n))


def test_columns_masks_and_eos():
    tokenizer = words()
    result = tokenize_rows(rows((text(2), " w5 w6")), tokenizer, append_eos=True)
    assert result.dataset[0] == {
        "id": "r0",
        "group": "g0",
        "input_ids": [1, 3, 4, 8, 9, 2],
        "labels": [-100, -100, -100, 8, 9, 2],
    }
    assert result.dataset.features["input_ids"] == List(Value("int32"))
    assert result.dataset.features["labels"] == List(Value("int32"))
    assert (result.n_in, result.n_out, result.n_dropped, result.n_truncated, result.reasons) == (1, 1, 0, 0, {})
    everything = tokenize_rows(rows((text(2), " w5 w6")), tokenizer, supervise="all").dataset[0]
    assert everything["labels"] == everything["input_ids"] == [1, 3, 4, 8, 9]


def test_bos_is_never_doubled():
    tokenizer = words()
    assert encode_prompts(tokenizer, ["<bos> w0", "w0"]) == [[1, 3], [1, 3]]
    result = tokenize_rows(rows(("<bos> w0", " w1")), tokenizer).dataset[0]
    assert result["input_ids"] == [1, 3, 4]


@pytest.mark.parametrize(
    ("on_overflow", "kept", "n_truncated", "reasons"),
    [
        # Lengths with <bos>: r0 4+1 = 5 fits exactly; r1 5+1; r2 2+6 (completion and <bos> alone: 7); r3 7+1.
        ("drop", {"r0": [1, 3, 4, 5, 13]}, 0, {"longer than max_length": 3}),
        (
            "truncate_prompt_left",
            {"r0": [1, 3, 4, 5, 13], "r1": [1, 4, 5, 6, 13], "r3": [1, 6, 7, 8, 13]},
            2,
            {"longer than max_length": 1},
        ),
        (
            "truncate_right",
            {"r0": [1, 3, 4, 5, 13], "r2": [1, 3, 13, 14, 15]},
            1,
            {"no completion token left within max_length": 2},
        ),
    ],
)
def test_overflow(on_overflow, kept, n_truncated, reasons):
    data = rows((text(3), " w10"), (text(4), " w10"), (text(1), " " + text(6, 10)), (text(6), " w10"))
    result = tokenize_rows(data, words(), max_length=5, on_overflow=on_overflow)
    assert {row["id"]: row["input_ids"] for row in result.dataset} == kept
    assert (result.n_truncated, result.reasons) == (n_truncated, reasons)
    assert result.n_in == result.n_out + result.n_dropped == 4
    for row in result.dataset:
        assert len(row["labels"]) == len(row["input_ids"]) <= 5
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        assert any(label != -100 for label in row["labels"][1:])


@pytest.mark.parametrize("lead", ["", " ", "\n", "\n\n"])
def test_a_begin_token_behind_white_space_is_not_doubled(lead):
    tokenizer = family_tokenizer(front=True)
    (ids,) = encode_prompts(tokenizer, [f"{lead}<|begin|>Which river?"])
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(ids) == f"{lead}<|begin|>Which river?"
    assert encode_prompts(tokenizer, [f"{lead}Which river?"])[0][0] == tokenizer.bos_token_id
    # Letters that only look like it are text
    tokenizer.split_special_tokens = True
    assert encode_prompts(tokenizer, ["<|begin|>Which river?"])[0].count(tokenizer.bos_token_id) == 1


def test_answer_position_needs_no_completion():
    tokenizer = words()
    data = rows((text(2), None), ("<bos> w3", " w9"))
    result = tokenize_rows(data, tokenizer, supervise="answer_position", append_eos=True)
    eos = tokenizer.eos_token_id
    assert result.dataset.to_list() == [
        {"id": "r0", "group": "g0", "input_ids": [1, 3, 4, eos], "labels": [-100] * 3 + [eos], "has_gold": False},
        {"id": "r1", "group": "g1", "input_ids": [1, 6, eos], "labels": [-100] * 2 + [eos], "has_gold": False},
    ]
    assert result.dataset.features["has_gold"] == Value("bool")
    assert (result.n_in, result.n_out, result.n_retokenized, result.reasons) == (2, 2, 0, {})
    # The answer of a labelled row stands where the filler stands
    labelled = tokenize_rows(rows((text(2), " w9")), tokenizer).dataset[0]
    assert labelled["input_ids"][:-1] == encode_prompts(tokenizer, [text(2)])[0] == [1, 3, 4]
    assert labelled["labels"][:-1] == [-100] * 3 and "has_gold" not in labelled
    no_column = data.remove_columns("completion")
    assert tokenize_rows(no_column, tokenizer, supervise="answer_position").dataset.to_list() == (
        result.dataset.to_list()
    )
    tokenizer.eos_token = None
    filled = tokenize_rows(no_column, tokenizer, supervise="answer_position", append_eos=True).dataset
    assert filled["input_ids"][0] == [1, 3, 4, tokenizer.pad_token_id]
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither an `eos_token` nor a `pad_token`"):
        tokenize_rows(no_column, tokenizer, supervise="answer_position")
    with pytest.raises(ValueError, match="r1: the prompt is empty"):
        tokenize_rows(rows((text(2), None), ("", None)), words(), supervise="answer_position")


@pytest.mark.parametrize(
    ("on_overflow", "kept", "reason"),
    [
        ("drop", [[1, 3, 4, 2]], "longer than max_length"),
        ("truncate_prompt_left", [[1, 3, 4, 2], [1, 5, 6, 2]], None),
        ("truncate_right", [[1, 3, 4, 2]], "no completion token left within max_length"),
    ],
)
def test_a_prompt_too_long_for_its_answer_position(on_overflow, kept, reason):
    data = rows((text(2), None), (text(4), None))
    result = tokenize_rows(data, words(), max_length=4, supervise="answer_position", on_overflow=on_overflow)
    assert result.dataset["input_ids"][:] == kept
    assert result.reasons == ({reason: 1} if reason else {}) and result.n_truncated == len(kept) - 1


def test_left_truncation_keeps_a_token_to_predict_from():
    # Behind <bos> alone a completion of 4 fits in 5 tokens; one of 5 would leave nothing that predicts its first token.
    data = rows((text(1), " " + text(4, 10)), (text(1), " " + text(5, 10)))
    result = tokenize_rows(data, words(), max_length=5, on_overflow="truncate_prompt_left")
    assert [(row["id"], row["input_ids"]) for row in result.dataset] == [("r0", [1, 13, 14, 15, 16])]
    assert (result.n_truncated, result.reasons) == (1, {"longer than max_length": 1})


def test_overflow_as_an_error_names_the_row():
    with pytest.raises(ValueError, match="r1: 6 tokens, `max_length` is 5"):
        tokenize_rows(rows((text(3), " w10"), (text(4), " w10")), words(), max_length=5, on_overflow="error")


def test_bad_input():
    tokenizer = words()
    good = rows((text(2), " w5"))
    with pytest.raises(ValueError, match=r"r1: the completion is missing.*labelled split"):
        tokenize_rows(rows((text(2), " w5"), (text(2), None)), tokenizer)
    with pytest.raises(ValueError, match="r0: the completion is empty"):
        tokenize_rows(rows((text(2), "")), tokenizer)
    with pytest.raises(ValueError, match="r0: the completion '  ' has no tokens"):
        tokenize_rows(rows((text(2), "  ")), tokenizer)
    with pytest.raises(ValueError, match="The dataset is empty"):
        tokenize_rows(good.select([]), tokenizer)
    with pytest.raises(ValueError, match="no column 'completion'"):
        tokenize_rows(good.remove_columns("completion"), tokenizer)
    with pytest.raises(ValueError, match="`supervise` must be one of"):
        tokenize_rows(good, tokenizer, supervise="answers")
    with pytest.raises(ValueError, match="`on_overflow` must be one of"):
        tokenize_rows(good, tokenizer, on_overflow="cut")
    with pytest.raises(ValueError, match="`max_length` must be at least 2"):
        tokenize_rows(good, tokenizer, max_length=1)
    with pytest.raises(ValueError, match=r"All 1 rows were dropped.*Raise `max_length`"):
        tokenize_rows(good, tokenizer, max_length=3)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs a tokenizer with an `eos_token`"):
        tokenize_rows(good, tokenizer, append_eos=True)


def test_unlabelled_benchmark_rows_cannot_be_trained_on():
    test = get_task("commonsense_qa").load("test", path=str(SMOKE_DATA / "commonsense_qa")).dataset
    with pytest.raises(ValueError, match=r"own-csqa-20: the completion is missing.*supervise='answer_position'"):
        tokenize_rows(test, words())


@needs_data
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_keeps_the_tokens_it_has_alone(name):
    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    data = get_task("commonsense_qa").load("validation", path=str(DATA / "commonsense_qa"), limit=100).dataset
    tokenized = tokenize_rows(data, tokenizer)
    assert tokenized.n_retokenized == 0
    for source, row in zip(data, tokenized.dataset, strict=True):
        prompt = tokenizer(source["prompt"])["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt)
        assert row["input_ids"] == tokenizer(source["prompt"] + source["completion"])["input_ids"]


@needs_data
def test_completion_that_merges_with_the_prompt_is_split_and_counted():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2_tokenizer")
    result = tokenize_rows(rows(("Say: ", "hello"), ("Say:", " hello")), tokenizer)
    assert result.n_retokenized == 1
    first = result.dataset[0]
    # [Say][:][ ] + [hello]: the prompt as the model will read it, not [Say][:][ hello].
    assert first["input_ids"] == tokenizer("Say: ")["input_ids"] + tokenizer("hello")["input_ids"]
    assert first["labels"][:3] == [-100] * 3 and first["labels"][3:] == first["input_ids"][3:]


PAIR = st.tuples(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))


@needs_data
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=8, deadline=None)
@given(pairs=st.lists(PAIR, min_size=20, max_size=60))
def test_any_text_comes_back(name, pairs):
    tokenizer = _tokenizer(name)
    pairs = [(p, c) for p, c in pairs if not any(token in p + c for token in tokenizer.all_special_tokens)]
    result = tokenize_rows(rows(*pairs), tokenizer)
    n_retokenized = 0
    for (prompt, completion), row in zip(pairs, result.dataset, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        n = len(prompt_ids)
        assert row["input_ids"][:n] == prompt_ids
        assert row["labels"] == [-100] * n + row["input_ids"][n:]
        assert len(row["labels"]) > n
        n_retokenized += row["input_ids"] != tokenizer(prompt + completion)["input_ids"]
        if name == "gpt2_tokenizer":  # byte-level: lossless even where a row was split
            assert tokenizer.decode(row["input_ids"]) == prompt + completion
    assert result.n_retokenized == n_retokenized


_LOADED: dict[str, object] = {}


def _tokenizer(name):
    if name not in _LOADED:
        _LOADED[name] = AutoTokenizer.from_pretrained(DATA / name)
    return _LOADED[name]


@needs_data
def test_alpaca_rows_are_all_accounted_for():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2_tokenizer")
    data = get_task("alpaca").load("train", path=str(DATA / "alpaca_5000" / "alpaca_5000.json.gz"), limit=600).dataset
    cut = tokenize_rows(data, tokenizer, max_length=128, on_overflow="truncate_right", append_eos=True)
    assert cut.n_in == 600 == cut.n_out + cut.n_dropped
    assert cut.n_truncated > 0
    lengths = [len(ids) for ids in cut.dataset["input_ids"]]
    ends = [ids[-1] == tokenizer.eos_token_id for ids in cut.dataset["input_ids"]]
    # A row that was cut has lost its end; every other one ends with the end-of-sequence token.
    assert max(lengths) == 128
    assert ends.count(False) == cut.n_truncated


def test_a_second_call_reads_the_cache(tmp_path):
    rows((text(2), " w5"), (text(3), " w6")).save_to_disk(tmp_path / "rows")
    first, second = (tokenize_rows(Dataset.load_from_disk(str(tmp_path / "rows")), words()).dataset for _ in range(2))
    assert first.cache_files and first.cache_files == second.cache_files
    other = tokenize_rows(Dataset.load_from_disk(str(tmp_path / "rows")), words(), append_eos=True).dataset
    assert other.cache_files != first.cache_files
