"""Caches of prompts without an answer: captured, verified, put together with labelled ones, trained on, and refused."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from first_trl import (
    FirstDistillTrainer,
    add_teacher_topk,
    fit_recalibration,
    load_teacher_cache,
    verify_teacher_cache,
)
from first_trl.cache.folder import store_recalibration
from first_trl.cache.manifest import read_manifest, read_manifests
from first_trl.cache.verify_folder import verify_cache_folder
from first_trl.cli import main
from first_trl.tasks import encode_prompts, get_task, tokenize_rows
from first_trl.teacher.prepare import prepare_rows
from tests.support.tiny import VOCAB, run, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)
EOS = 1
PROMPTS = ["w3 w4 w5", "w6", "w7 w8", "w9 w10 w11 w12", "w4 w13"]
OPTIONS = {"logprob_dtype": "float32", "disable_tqdm": True}


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama()


def prompts(**columns):
    return Dataset.from_dict({"prompt": PROMPTS, "group": [f"g{i % 2}" for i in range(len(PROMPTS))], **columns})


def labelled_rows():
    return Dataset.from_list([{**row, "group": f"g{i}"} for i, row in enumerate(tiny_rows(6))])


def answer_position(teacher, tokenizer, prompt, k):
    """Ids, log-probabilities and tail of the token behind a prompt, from the prompt alone."""
    with torch.no_grad():
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        logprobs = copy.deepcopy(teacher).double()(ids).logits[0, -1].log_softmax(-1).numpy()
    order = np.argsort(-logprobs, kind="stable")
    return order[:k], logprobs[order[:k]], np.log(np.exp(logprobs[order[k:]]).sum())


# --- capture -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [{}, {"completion": [None] * 5}], ids=["no column", "null"])
def test_the_distribution_behind_the_prompt_is_cached(columns, teacher, tokenizer):
    cache = add_teacher_topk(prompts(**columns), teacher, tokenizer, k=4, **OPTIONS)
    assert cache["group"][:] == ["g0", "g1", "g0", "g1", "g0"]
    for row, prompt in zip(cache, PROMPTS, strict=True):
        tokens = tokenizer(prompt)["input_ids"]
        assert row["input_ids"] == [*tokens, EOS] and row["labels"] == [-100] * len(tokens) + [EOS]
        assert row["teacher_has_gold"] is False
        ids, logprobs, tail = answer_position(teacher, tokenizer, prompt, 4)
        assert row["teacher_topk_ids"] == [ids.tolist()]
        np.testing.assert_allclose(row["teacher_topk_logprobs"], [logprobs], atol=1e-5)
        np.testing.assert_allclose(row["teacher_tail_logprob"], [tail], atol=1e-5)
    counts = read_manifest(cache).counts
    assert (counts["rows"], counts["rows_without_gold"], counts["positions_without_gold"]) == (5, 5, 5)
    verify_teacher_cache(cache, tokenizer, head_size=VOCAB)


def test_text_and_tokenised_prompts_give_the_same_rows(teacher, tokenizer):
    tokens = tokenize_rows(prompts(), tokenizer, supervise="answer_position").dataset
    assert tokens.column_names == ["group", "input_ids", "labels", "has_gold"]
    from_text, from_tokens = (add_teacher_topk(rows, teacher, tokenizer, **OPTIONS) for rows in (prompts(), tokens))
    assert "has_gold" not in from_tokens.column_names
    same = ["input_ids", "labels", "teacher_has_gold", "teacher_topk_ids", "teacher_topk_logprobs", "group"]
    assert from_text.select_columns(same).to_list() == from_tokens.select_columns(same).to_list()


def test_the_filler_has_no_influence(teacher, tokenizer):
    """Whatever stands at the answer position, and whichever tokenizer names it."""
    caches = []
    for filler in (EOS, 0, 7):
        tokens = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        rows = Dataset.from_dict(
            {
                "input_ids": [[*ids, filler] for ids in tokens],
                "labels": [[-100] * len(ids) + [filler] for ids in tokens],
                "teacher_has_gold": [False] * len(tokens),
            }
        )
        caches.append(add_teacher_topk(rows, teacher, tokenizer, **OPTIONS))
    for other in caches[1:]:
        assert other["teacher_topk_logprobs"][:] == caches[0]["teacher_topk_logprobs"][:]
        assert other["teacher_cache"][0] != caches[0]["teacher_cache"][0]


def test_a_labelled_row_has_its_answer_where_the_filler_stands(teacher, tokenizer):
    """The first entry of a labelled row is that of its prompt alone."""
    answered = Dataset.from_dict({"prompt": PROMPTS, "completion": [" w5 w6"] * 5})
    for rows in (answered, tokenize_rows(answered, tokenizer).dataset):
        cache = add_teacher_topk(rows, teacher, tokenizer, **OPTIONS)
        alone = add_teacher_topk(prompts(), teacher, tokenizer, **OPTIONS)
        assert "teacher_has_gold" not in cache.column_names
        for a, b in zip(cache, alone, strict=True):
            length = len(b["input_ids"]) - 1
            assert a["input_ids"][:length] == b["input_ids"][:length]
            assert a["teacher_topk_ids"][0] == b["teacher_topk_ids"][0]
            np.testing.assert_allclose(a["teacher_topk_logprobs"][0], b["teacher_topk_logprobs"][0], atol=1e-5)


def test_mixed_rows_keep_their_order_and_are_counted(teacher, tokenizer):
    completions = [" w5 w6", None, " w7", None, None]
    rows = prompts(completion=completions)
    cache = add_teacher_topk(rows, teacher, tokenizer, **OPTIONS)
    assert [row["teacher_has_gold"] is not False for row in cache] == [c is not None for c in completions]
    assert cache["input_ids"][:] == [
        [3, 4, 5, 5, 6, EOS],
        [6, EOS],
        [7, 8, 7, EOS],
        [9, 10, 11, 12, EOS],
        [4, 13, EOS],
    ]
    assert [sum(label != -100 for label in row) for row in cache["labels"]] == [3, 1, 2, 1, 1]
    assert cache["group"][:] == rows["group"][:]
    counts = read_manifest(cache).counts
    assert (counts["rows"], counts["positions"]) == (5, 8)
    assert (counts["rows_without_gold"], counts["positions_without_gold"]) == (3, 3)
    verify_teacher_cache(cache, tokenizer)


def test_labelled_captures_are_what_they_were(teacher, tokenizer):
    """The identity, the columns and the digests of a cache in which every row has an answer know of no gold."""
    rows = labelled_rows()
    plain = add_teacher_topk(rows, teacher, tokenizer, **OPTIONS)
    marked = add_teacher_topk(
        rows.add_column("teacher_has_gold", [True, None, True, True, None, True]), teacher, tokenizer, **OPTIONS
    )
    assert "teacher_has_gold" not in plain.column_names
    assert plain.to_dict() == marked.to_dict() and read_manifest(plain).id == read_manifest(marked).id
    assert read_manifest(plain).counts["rows_without_gold"] == 0
    unmarked = add_teacher_topk(
        rows.add_column("has_gold", [True] * 5 + [False]), teacher, tokenizer, **OPTIONS
    )  # fmt: skip
    assert read_manifest(unmarked).id != read_manifest(plain).id


def test_cut_and_dropped_prompts_are_counted(teacher, tokenizer):
    rows = prompts()
    with pytest.warns(UserWarning, match="2 of 5 rows are cut to 3 tokens .*; 2 rows without"):
        start = add_teacher_topk(rows, teacher, tokenizer, max_length=3, **OPTIONS)
    assert start["input_ids"][:] == [[6, EOS], [7, 8, EOS], [4, 13, EOS]]
    with pytest.warns(UserWarning, match="2 of 5 rows are cut to 3 tokens .*; 0 rows without"):
        end = add_teacher_topk(rows, teacher, tokenizer, max_length=3, truncation_mode="keep_end", **OPTIONS)
    assert end["input_ids"][:] == [[4, 5, EOS], [6, EOS], [7, 8, EOS], [11, 12, EOS], [4, 13, EOS]]
    assert read_manifest(end).counts["rows_without_gold"] == 5
    cut = prepare_rows(rows, tokenizer, max_length=3, truncation_mode="keep_end")
    assert cut["input_ids"][:] == end["input_ids"][:]


def test_conversational_prompts_end_with_the_generation_prompt(teacher):
    chat = tiny_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}w20 {{ m.content }} {% else %}w21 {{ m.content }} <eos> "
        "{% endif %}{% endfor %}{% if add_generation_prompt %}w21 {% endif %}"
    )
    question = [{"role": "user", "content": "w3 w4"}]
    answer = [{"role": "assistant", "content": "w5"}]
    rows = Dataset.from_list([{"prompt": question, "completion": answer}, {"prompt": question, "completion": None}])
    cache = add_teacher_topk(rows, teacher, chat, **OPTIONS)
    assert cache["input_ids"][:] == [[20, 3, 4, 21, 5, EOS], [20, 3, 4, 21, EOS]]
    assert cache["labels"][1] == [-100] * 4 + [EOS]
    assert cache["teacher_topk_ids"][0][0] == cache["teacher_topk_ids"][1][0]
    only = add_teacher_topk(Dataset.from_list([{"prompt": question}]), teacher, chat, **OPTIONS)
    assert only["input_ids"][0] == [20, 3, 4, 21, EOS]


def test_special_tokens_are_those_a_model_reads_at_evaluation():
    """`<bos>` once, and no end-of-sequence token between the prompt and its answer."""
    task = get_task("noisy_world")
    tokenizer = task.tokenizer()
    rows = task.load("unlabelled", limit=20, seed=3).dataset
    prepared = prepare_rows(rows, tokenizer)
    read = encode_prompts(tokenizer, rows["prompt"])
    assert prepared["input_ids"][:] == [[*ids, tokenizer.eos_token_id] for ids in read]
    assert (
        tokenize_rows(rows, tokenizer, supervise="answer_position").dataset["input_ids"][:]
        == (prepared["input_ids"][:])
    )
    labelled = tokenize_rows(task.load("train", limit=20, seed=3).dataset, tokenizer).dataset
    assert {len(row) for row in labelled["input_ids"]} == {len(row) for row in prepared["input_ids"]} == {16}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": ["w3", ""]}, "Row 1 of the dataset: the prompt is empty"),
        ({"prompt": ["w3", None], "completion": ["w4", None]}, "Row 1 of the dataset: the prompt is missing"),
        ({"prompt": ["w3"], "text": ["w3 w4"]}, r"`prompt` without `completion`, and \['text'\]"),
        ({"input_ids": [[3, 4]], "labels": [[-100, 4]], "has_gold": ["no"]}, "has type string instead of bool"),
    ],
)
def test_bad_prompts_are_refused(rows, message, teacher, tokenizer):
    with pytest.raises(ValueError, match=message):
        add_teacher_topk(Dataset.from_dict(rows), teacher, tokenizer, **OPTIONS)


def test_a_prompt_needs_a_filler(teacher):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    cache = add_teacher_topk(prompts(), teacher, tokenizer, **OPTIONS)
    assert cache["input_ids"][1] == [6, tokenizer.pad_token_id]
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="neither an `eos_token` nor a `pad_token`"):
        add_teacher_topk(prompts(), teacher, tokenizer, **OPTIONS)


# --- the stored cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(teacher, tokenizer, tmp_path):
    add_teacher_topk(labelled_rows(), teacher, tokenizer, output_dir=tmp_path / "cache", **OPTIONS)
    add_teacher_topk(
        prompts(completion=[None, " w5", None, None, None]), teacher, tokenizer, output_dir=tmp_path / "cache",
        split="unlabelled", shard_size=2, **OPTIONS,
    )  # fmt: skip
    return tmp_path / "cache"


def test_folder_commands_count_prompts(folder, tokenizer, capsys):
    assert main(["cache", "verify", str(folder)]) == 0
    train, unlabelled = capsys.readouterr().out.splitlines()
    assert train.startswith("train: sound, 6 rows, ")
    assert unlabelled.startswith("unlabelled: sound, 5 rows (4 without an answer), 6 positions, ")
    # The second shard holds no labelled row, the first one both
    loaded = load_teacher_cache(folder, "unlabelled")
    assert [value is not False for value in loaded["teacher_has_gold"]] == [False, True, False, False, False]
    verify_teacher_cache(loaded, tokenizer)
    stream = load_teacher_cache(folder, "unlabelled", streaming=True)
    assert [row["input_ids"] for row in stream] == loaded["input_ids"][:]


@pytest.mark.parametrize("edit", ["answered", "unanswered", "null", "column"])
def test_whether_a_row_has_an_answer_is_bound_by_its_digest(edit, folder, tokenizer):
    cache = load_teacher_cache(folder, "unlabelled")
    if edit == "column":
        edited, row = cache.remove_columns("teacher_has_gold"), 0
    else:
        row = 1 if edit == "unanswered" else 2
        value = {"answered": True, "unanswered": False, "null": None}[edit]
        flags = [value if i == row else flag for i, flag in enumerate(cache["teacher_has_gold"])]
        edited = cache.remove_columns("teacher_has_gold").add_column("teacher_has_gold", flags)
    with pytest.raises(ValueError, match=rf"Row {row} of the teacher cache: .*digest mismatch.*`teacher_has_gold`"):
        verify_teacher_cache(edited, tokenizer)


def test_a_manifest_that_counts_wrongly_is_refused(folder):
    path = folder / "manifest" / "unlabelled.json"
    data = json.loads(path.read_text())
    del data["id"], data["digest"]
    from first_trl.cache.manifest import Manifest

    manifest = Manifest(**data)
    manifest.counts["rows_without_gold"] = 3
    path.write_text(manifest.to_json())
    with pytest.raises(ValueError, match="holds 4 rows without gold, its manifest says 3"):
        verify_cache_folder(folder, "unlabelled")


# --- training ----------------------------------------------------------------------------------------------------------


BATCHES = {
    "padded": {"per_device_train_batch_size": 16},
    "packed": {"packing": True, "max_length": 24, "per_device_train_batch_size": 16},
    "padding free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 16},
    "worker": {"per_device_train_batch_size": 16, "dataloader_num_workers": 1},
}
HARD = ("cross_entropy", "mean_token_accuracy")


@pytest.fixture
def both(folder):
    return [load_teacher_cache(folder, split) for split in ("train", "unlabelled")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("batches", BATCHES)
def test_labelled_and_unlabelled_rows_train_together(batches, streaming, teacher, tokenizer, tmp_path):
    """Student = teacher and k = vocabulary: every row's loss and gradient vanish, so all entries are on their tokens."""
    rows, options = labelled_rows(), {**OPTIONS, "k": VOCAB}
    mixed = concatenate_datasets(
        [
            add_teacher_topk(rows, teacher, tokenizer, **options),
            add_teacher_topk(prompts(), teacher, tokenizer, **options),
        ]
    )
    assert mixed["teacher_has_gold"][:] == [None] * 6 + [False] * 5
    verify_teacher_cache(mixed, tokenizer, head_size=VOCAB)
    data = mixed.to_iterable_dataset() if streaming else mixed
    _, recorded = run(copy.deepcopy(teacher), tiny_config(tmp_path, **BATCHES[batches]), data, tokenizer)
    assert abs(recorded.logs[0]["loss"]) < 1e-6
    assert max(float(g.abs().max()) for g in recorded.gradients[0].values()) < 1e-6
    # Labels that are no answer must not pass for one
    assert not set(HARD) & set(recorded.logs[0]) and "kl" in recorded.logs[0]
    _, labelled = run(
        tiny_llama(seed=1), tiny_config(tmp_path, **BATCHES[batches]), mixed.select(range(6)), tokenizer
    )  # fmt: skip
    assert set(HARD) < set(labelled.logs[0])


@pytest.mark.parametrize("batches", BATCHES)
def test_every_position_knows_whether_its_label_is_an_answer(batches, both, tokenizer, tmp_path):
    args = tiny_config(tmp_path, **BATCHES[batches])
    trainer = FirstDistillTrainer(tiny_llama(1), args, concatenate_datasets(both), processing_class=tokenizer)
    [batch] = trainer.get_train_dataloader()
    labels = batch["labels"][:, 1:]
    labels = labels[labels != -100]
    # Of the end-of-sequence tokens, one ends an answer and four are fillers
    assert len(batch["teacher_has_gold"]) == len(labels) == len(batch["teacher_ids"])
    assert (labels[~batch["teacher_has_gold"]] == EOS).all()
    assert int((~batch["teacher_has_gold"]).sum()) == 4 and int((labels == EOS).sum()) == 5


def test_the_loss_of_mixed_rows_is_the_mean_over_all_positions(both, tokenizer, tmp_path):
    student = tiny_llama(seed=1)
    args = tiny_config(tmp_path, per_device_train_batch_size=16)
    losses = [
        run(copy.deepcopy(student), args, data, tokenizer)[1].logs[0]["loss"]
        for data in (*both, concatenate_datasets(both))
    ]
    counts = [sum(len(row) for row in data["teacher_tail_logprob"]) for data in both]
    assert losses[2] == pytest.approx(np.average(losses[:2], weights=counts), rel=1e-5)


def test_draws_of_prompts(teacher, tokenizer, tmp_path):
    cache = add_teacher_topk(prompts(), teacher, tokenizer, num_draws=20, **OPTIONS)
    _, recorded = run(tiny_llama(seed=1), tiny_config(tmp_path, estimator="sampled"), cache, tokenizer)
    assert math.isfinite(recorded.logs[0]["loss"]) and not set(HARD) & set(recorded.logs[0])


def test_evaluation_leaves_out_what_compares_with_a_filler(both, tokenizer, tmp_path):
    labelled, unlabelled = both
    trainer = FirstDistillTrainer(
        tiny_llama(seed=1), tiny_config(tmp_path), labelled,
        eval_dataset={"labelled": labelled, "mixed": concatenate_datasets(both)}, processing_class=tokenizer,
    )  # fmt: skip
    for _ in range(2):  # the order of evaluations leaves no trace
        metrics = trainer.evaluate()
        for name in HARD:
            assert f"eval_labelled_{name}" in metrics and f"eval_mixed_{name}" not in metrics
        assert metrics["eval_mixed_kl"] > 0
    assert not any(f"eval_{name}" in trainer.evaluate(unlabelled) for name in HARD)
    assert all(f"eval_{name}" in trainer.evaluate(labelled) for name in HARD)


def test_hard_labels_are_refused_with_the_count(both, tokenizer, tmp_path):
    mixed = concatenate_datasets(both)

    def build(dataset, **options):
        return FirstDistillTrainer(
            tiny_llama(seed=1), tiny_config(tmp_path, ce_weight=0.2), dataset, processing_class=tokenizer, **options
        )

    with pytest.raises(ValueError, match=r"`ce_weight=0.2` needs an answer.*4 of 11 rows of the train.*`ce_weight=0`"):
        build(mixed)
    with pytest.raises(ValueError, match="4 of 5 rows of the eval dataset have none"):
        build(both[0], eval_dataset=both[1])
    with pytest.raises(ValueError, match="some rows of the train dataset have none"):
        build(mixed.to_iterable_dataset())
    # The rows with an answer are free to train on it
    kept = mixed.filter(lambda has_gold: has_gold is not False, input_columns=["teacher_has_gold"])
    trainer = build(kept)
    trainer.train()
    assert set(HARD) < set(trainer.state.log_history[0])


def test_nothing_is_fitted_to_fillers(both):
    with pytest.raises(ValueError, match=r"4 of 11 rows of the teacher cache have no answer.*filter"):
        fit_recalibration(concatenate_datasets(both))
    kept = both[1].filter(lambda has_gold: has_gold is not False, input_columns=["teacher_has_gold"])
    with pytest.warns(UserWarning, match="Only 2 positions"):
        assert fit_recalibration(kept, n_bootstrap=0).n_rows == 1


def test_a_fit_stored_behind_the_back_of_a_loaded_cache_is_asked_for(folder, tokenizer, tmp_path):
    """The rows in hand keep the manifest that they were loaded with: the error says what to do, and that is enough."""
    held = load_teacher_cache(folder, "train")
    fit = {"recalibration": {"method": "logit_temperature", "value": 1.5}}
    store_recalibration(folder, "train", "logit_temperature", fit)

    def build(cache):
        args = tiny_config(tmp_path, recalibration="logit_temperature")
        return FirstDistillTrainer(tiny_llama(1), args, cache, processing_class=tokenizer)

    with pytest.raises(ValueError, match=r"carries no fitted one.*load the cache again with `load_teacher_cache`"):
        build(held)
    assert build(load_teacher_cache(folder, "train")).data_collator.recalibration.value == 1.5


@pytest.mark.filterwarnings("ignore:Only:UserWarning", "ignore:The chosen:UserWarning")
def test_a_fit_is_stored_under_its_own_method(folder, tokenizer, tmp_path):
    """A student that asks for the one method would train on the other."""
    fit = fit_recalibration(load_teacher_cache(folder, "train"), n_bootstrap=0)
    with pytest.raises(ValueError, match="fit of 'probability_temperature' cannot be stored as 'logit_temperature'"):
        store_recalibration(folder, "train", "logit_temperature", fit.to_dict())
    store_recalibration(folder, "train", "probability_temperature", fit.to_dict())
    args = tiny_config(tmp_path, recalibration="probability_temperature")
    cache = load_teacher_cache(folder, "train")
    trainer = FirstDistillTrainer(tiny_llama(1), args, cache, processing_class=tokenizer)
    assert trainer.data_collator.recalibration == fit.recalibration


def test_the_fit_of_the_labelled_rows_holds_for_the_prompts_of_the_same_teacher(folder, tokenizer, tmp_path):
    fit = {"recalibration": {"method": "logit_temperature", "value": 1.5}}
    store_recalibration(folder, "train", "logit_temperature", fit)
    caches = [load_teacher_cache(folder, split) for split in ("train", "unlabelled")]
    mixed = concatenate_datasets(caches)
    assert [manifest.split for manifest in read_manifests(mixed)] == ["train", "unlabelled"]
    assert read_manifest(mixed) is None

    def collator(dataset):
        args = tiny_config(tmp_path, recalibration="logit_temperature")
        return FirstDistillTrainer(tiny_llama(1), args, dataset, processing_class=tokenizer).data_collator

    assert collator(mixed).recalibration.value == 1.5
    with pytest.raises(ValueError, match="carries no fitted"):
        collator(caches[1])
    store_recalibration(
        folder, "unlabelled", "logit_temperature", {"recalibration": {**fit["recalibration"], "value": 2}}
    )
    with pytest.raises(ValueError, match="different fits of 'logit_temperature'"):
        collator(concatenate_datasets([caches[0], load_teacher_cache(folder, "unlabelled")]))
    stranger = add_teacher_topk(prompts(), tiny_llama(seed=5), tokenizer, **OPTIONS)
    with pytest.raises(ValueError, match="another teacher and none"):
        collator(concatenate_datasets([caches[0], stranger]))
