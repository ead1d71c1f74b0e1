"""Rows, tokens and cache sizes of a plan, against real rows and real caches."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import first_trl
from first_trl import add_teacher_topk
from first_trl.cache.folder import cache_size
from first_trl.experiments.plan import plan_recipe
from first_trl.experiments.plan.cache_size import cache_bytes
from first_trl.experiments.plan.data import CHARS_PER_TOKEN, find_tokenizer, plan_splits
from first_trl.experiments.recipe import load_recipe
from first_trl.tasks import get_task, tokenize_rows


FIXTURES = Path(__file__).parents[1] / "support" / "fixtures"
ALPACA = [
    "task.name=alpaca",
    "task.splits={train: 'train[:90%]', validation: 'train[90%:]', test: {split: validation, task: commonsense_qa}}",
    "task.append_eos=true",
    "task.max_length=512",
    "task.on_overflow=truncate_right",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def splits(overrides, tokenizer=None):
    return {split.role: split for split in plan_splits(load_recipe("commonsense_qa", overrides), tokenizer)}


@pytest.fixture(scope="module")
def gpt2(data_folder):
    return AutoTokenizer.from_pretrained(data_folder / "gpt2_tokenizer")


def test_published_sizes_take_slices_and_limits():
    found = splits(["task.splits.test={split: validation, limit: 100}", "task.max_length=80"])
    assert {role: split.rows for role, split in found.items()} == {"train": 8767, "validation": 974, "test": 100}
    assert found["train"].longest == 80
    assert any("106 tokens: those over 80 are dropped" in note for note in found["train"].notes)


@pytest.mark.parametrize(
    ("name", "files", "split"),
    [
        ("commonsense_qa", "commonsense_qa", "train"),
        ("commonsense_qa", "commonsense_qa", "validation"),
        ("openbook_qa", "openbook_qa", "train"),
        ("openbook_qa", "openbook_qa", "test"),
        ("arc", "arc_easy", "train"),
        ("arc", "arc_easy", "test"),
        ("mmlu", "mmlu/dev.jsonl.gz", "dev"),
        ("mmlu", "mmlu/test.jsonl.gz", "test"),
    ],
)
def test_published_sizes_are_those_of_the_files(data_folder, gpt2, name, files, split):
    task = get_task(name)
    rows = task.load(split, path=str(data_folder / files)).dataset
    size = task.published.get(split) or task.published[f"ARC-Easy/{split}"]
    assert size.rows == len(rows)
    prompts = rows["prompt"]
    assert size.prompt_chars == pytest.approx(sum(map(len, prompts)) / len(rows), rel=1e-3)
    sample = rows.select(range(0, len(rows), max(1, len(rows) // 500)))
    tokens = [len(row) for row in tokenize_rows(sample, gpt2).dataset["input_ids"]]
    assert size.prompt_tokens + size.completion_tokens == pytest.approx(sum(tokens) / len(tokens), rel=0.05)
    assert size.longest >= max(tokens)


def test_published_size_of_alpaca_and_the_characters_of_a_token(data_folder, gpt2):
    rows = get_task("alpaca").load("train", path=str(data_folder / "alpaca_5000" / "alpaca_5000.json.gz")).dataset
    size = get_task("alpaca").published["train"]
    rows = rows.select(range(2000))
    for column, chars in (("prompt", size.prompt_chars), ("completion", size.completion_chars)):
        assert chars == pytest.approx(sum(map(len, rows[column])) / len(rows), rel=0.05)
    texts = [prompt + completion for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True)]
    ratio = sum(map(len, texts)) / sum(len(ids) for ids in gpt2(texts)["input_ids"])
    # The rule of thumb counts up to a fifth too many tokens in prose ...
    assert pytest.approx(ratio, rel=0.2) == CHARS_PER_TOKEN
    # ... and as many too few in short lettered choices
    letters = get_task("commonsense_qa").published["train"]
    assert letters.prompt_chars / CHARS_PER_TOKEN == pytest.approx(letters.prompt_tokens, rel=0.25)


def test_local_rows_are_counted_and_tokenised(data_folder, gpt2):
    local = [f"task.path={data_folder / 'commonsense_qa'}", f"tokenizer={data_folder / 'gpt2_tokenizer'}"]
    recipe = load_recipe("commonsense_qa", local)
    tokenizer = find_tokenizer(recipe)
    assert len(tokenizer) == len(gpt2)
    found = {split.role: split for split in plan_splits(recipe, tokenizer)}
    published = splits([])
    for role, split in found.items():
        assert split.rows == published[role].rows
        assert split.tokens == pytest.approx(published[role].tokens, rel=0.03)
        assert split.positions == 1.0
        assert "rows tokenised" in split.basis
    # Of the rows with the most characters; the slices of train share its longest row out
    assert max(found[role].longest for role in ("train", "validation")) == pytest.approx(106, rel=0.1)
    ended = splits([*local, "task.append_eos=true"], tokenizer)["train"]
    assert (ended.positions, ended.tokens) == (2.0, pytest.approx(found["train"].tokens + 1))
    # Without a tokenizer, characters tell the length
    guessed = splits(local)["train"]
    assert guessed.tokens == pytest.approx(found["train"].tokens, rel=0.25)
    assert "characters a token" in guessed.basis


def test_generated_rows_are_exact():
    recipe = load_recipe("quickstart")
    found = {split.role: split for split in plan_splits(recipe, find_tokenizer(recipe))}
    assert {role: split.rows for role, split in found.items()} == {
        "pretrain": 8000, "train": 2400, "validation": 1200, "test": 3000, "ood": 3000
    }  # fmt: skip
    assert (found["train"].tokens, found["train"].positions, found["train"].longest) == (16.0, 1.0, 16)
    # Plain text is supervised from its second token on
    assert found["pretrain"].positions == pytest.approx(found["pretrain"].tokens - 1)


def test_options_change_what_is_known():
    plain = splits([])["train"]
    longer = splits(["task.options={template: \"Read the question and answer with one letter.\\n{question}\\nAnswer "
                     "Choices:\\n{choices}\\nAnswer:\"}"])["train"]  # fmt: skip
    assert longer.tokens == pytest.approx(plain.tokens + 46 / 4)
    ended = splits(["task.append_eos=true"])["train"]
    assert (ended.tokens, ended.positions) == (plain.tokens + 1, 2.0)
    boolq = ["task.name=boolq", "task.splits={train: train, validation: validation, test: validation}"]
    assert splits(boolq)["train"].tokens == pytest.approx(157.0)
    bare = splits([*boolq, "task.options={with_passage: false}"])["train"]
    assert (bare.rows, bare.tokens) == (9427, None)
    subject = splits(["task.name=mmlu", "task.options={subject: astronomy}", "task.splits.train=dev",
                      "task.splits.validation=validation"])["train"]  # fmt: skip
    assert subject.rows is None
    assert "'subject' changes which rows there are" in subject.notes[0]


def test_a_split_that_was_not_measured_is_as_long_as_its_relatives():
    found = splits(["task.name=arc", "task.options={subset: challenge}",
                    "task.splits={train: train, validation: validation, test: test}"])  # fmt: skip
    assert [split.rows for split in found.values()] == [1119, 299, 1172]
    assert found["train"].tokens == pytest.approx(65.1)
    assert found["train"].notes == ["lengths of another split of the benchmark"]


def test_missing_files_and_silent_hubs_are_told_apart(monkeypatch):
    assert splits(["task.path=nowhere.csv"])["train"].problem == "there is no file or folder 'nowhere.csv'"
    unknown = splits(["task.path=me/questions"])["train"]
    assert unknown.rows is None
    assert "me/questions cannot be asked" in unknown.notes[0] and unknown.problem is None
    part = SimpleNamespace(num_examples=1000, num_bytes=400_000)
    card = SimpleNamespace(info=SimpleNamespace(splits={"train": part}))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *args, **kwargs: card)
    found = splits(["task.path=me/questions"])
    assert (found["train"].rows, found["train"].tokens, found["train"].basis) == (900, 100.0, "dataset card")
    assert "states no size of split 'validation'" in found["test"].notes[0]


def test_a_folder_without_a_vocabulary_is_no_tokenizer():
    folder = Path(first_trl.__file__).parent / "experiments" / "plan" / "model_configs" / "Qwen--Qwen3-4B"
    assert find_tokenizer(load_recipe("commonsense_qa", [f"teacher.name_or_path={folder}"])) is None


# caches


def sharp_teacher():
    """GPT-2-shaped, its kept ids spread over the whole vocabulary: harder to compress than a trained teacher's."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, bos_token_id=50256, eos_token_id=50256))
    with torch.no_grad():
        model.transformer.wte.weight.normal_()
        model.transformer.wpe.weight.normal_()
        model.transformer.ln_f.weight.fill_(0.55)
    return model


def captured_bytes(rows, tokenizer, folder, **options):
    add_teacher_topk(rows, sharp_teacher(), tokenizer, output_dir=folder, disable_tqdm=True, **options)
    return cache_size(folder, "train")["bytes"]


@pytest.mark.parametrize("local", [False, True])
def test_cache_of_commonsense_qa_is_a_slice_scaled_up(data_folder, gpt2, tmp_path, local):
    torch.set_num_threads(1)
    path = data_folder / "commonsense_qa"
    sliced = get_task("commonsense_qa").load("train", path=str(path), limit=1000).dataset
    measured = captured_bytes(tokenize_rows(sliced, gpt2).dataset, gpt2, tmp_path) * 9741 / 1000
    overrides = [f"task.path={path}", f"tokenizer={data_folder / 'gpt2_tokenizer'}"] if local else []
    [cache] = plan_recipe(load_recipe("commonsense_qa", overrides)).settings[0].caches
    assert (cache.roles, cache.rows, cache.positions) == (["train", "validation"], 9741, 9741)
    assert cache.bytes == pytest.approx(measured, rel=0.2)


# Quick is the test of CommonsenseQA
@pytest.mark.slow
@pytest.mark.parametrize(("k", "dtype"), [(5, "float16"), (10, "float32")])
def test_cache_of_alpaca_is_a_slice_scaled_up(data_folder, gpt2, tmp_path, k, dtype):
    torch.set_num_threads(1)
    path = data_folder / "alpaca_5000" / "alpaca_5000.json.gz"
    sliced = get_task("alpaca").load("train", path=str(path), limit=200).dataset
    rows = tokenize_rows(sliced, gpt2, max_length=512, append_eos=True, on_overflow="truncate_right").dataset
    measured = captured_bytes(rows, gpt2, tmp_path, k=k, logprob_dtype=dtype) * 52002 / 200
    overrides = [*ALPACA, f"capture={{k: {k}, logprob_dtype: {dtype}}}"]
    [cache] = plan_recipe(load_recipe("commonsense_qa", overrides)).settings[0].caches
    assert cache.rows == 52002
    assert cache.bytes == pytest.approx(measured, rel=0.2)


def test_cache_grows_with_what_is_kept():
    options = {"rows": 1000, "tokens": 100_000, "positions": 60_000}
    sizes = [
        cache_bytes(**options, k=k, logprob_dtype=dtype)
        for k, dtype in ((1, "float16"), (5, "float16"), (5, "float32"))
    ]
    assert sizes == sorted(sizes)
    assert cache_bytes(**options, k=5, num_draws=8) > sizes[1]
    assert cache_bytes(**options, k=5, shard_size=10) > sizes[1]
