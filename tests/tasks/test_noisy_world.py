"""The generated world: what is held out, what is known, and that text and tokens say the same."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from first_trl.tasks import answer_token_ids_of_rows, get_task, tokenize_rows
from first_trl.tasks.noisy_world import JOBS, NAMES, PLACES, SENTENCES, TOOLS, WEATHERS, make_world


QA_SPLITS = {"train": 2400, "validation": 1200, "test": 3000, "ood": 3000}


@pytest.fixture(scope="module")
def task():
    return get_task("noisy_world")


@pytest.fixture(scope="module")
def splits(task):
    return {split: task.load(split).dataset for split in task.splits}


def test_sizes_and_words(task, splits):
    assert {split: len(rows) for split, rows in splits.items()} == {
        **QA_SPLITS, "pretrain": 8000, "unlabelled": 8 * QA_SPLITS["train"],
    }  # fmt: skip
    assert [len(words) for words in (JOBS, PLACES, WEATHERS, TOOLS, NAMES)] == [12, 8, 6, 12, 200]
    # A word with two meanings would be one token with two meanings.
    words = [*JOBS, *PLACES, *WEATHERS, *TOOLS, *NAMES]
    assert len(set(words)) == len(words)
    assert len(task.tokenizer()) == 253


@pytest.mark.parametrize("seed", range(5))
def test_no_held_out_pair_is_seen_outside_ood(task, seed):
    pairs = {split: set(task.load(split, seed=seed).dataset["group"]) for split in QA_SPLITS}
    assert len(pairs["ood"]) == 19
    for split in ("train", "validation", "test"):
        assert not pairs[split] & pairs["ood"]
    assert len(pairs["train"] | pairs["ood"]) == len(JOBS) * len(PLACES)
    # The group is what the prompt says.
    row = task.load("ood", seed=seed).dataset[0]
    job, place = row["group"].split("|")
    assert f" the {job} at {place} in " in row["prompt"]


def test_unlabelled_prompts_ask_what_train_asks_and_hold_no_answer(splits):
    rows = splits["unlabelled"]
    assert set(rows["completion"]) == {None} and set(rows["gold"]) == {-1}
    assert set(rows["group"]) == set(splits["train"]["group"])
    words = np.array([prompt.split() for prompt in rows["prompt"]])
    assert words[0, [4, 6]].tolist() == rows["group"][0].split("|")
    # Uniform over the pairs of train, kinds of weather and names: no count is further off than chance
    for values, number in ((rows["group"][:], 77), (words[:, 8], len(WEATHERS)), (words[:, 2], len(NAMES))):
        _, counts = np.unique(values, return_counts=True)
        expected = len(rows) / number
        assert len(counts) == number and np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    posterior = np.array(rows["posterior"])
    np.testing.assert_allclose(posterior.sum(axis=1), 1.0, atol=1e-12)


@pytest.mark.parametrize(
    ("seed", "digest"),
    [
        (0, "6f6ee04ccf0095ac2f383f3577a0be088500b4ca57cbefd6cf4cb4ecc62d353e"),
        (1, "64ebb9fb299af2c24f75d6605ee84b7492519b14efa8d507815d9f012157f269"),
        (7, "a3d3c15490788fcfbb392b9740b8c41c5b11059a3dde3a00946dbab4a681a638"),
    ],
)
def test_worlds_stay_what_they_were(seed, digest):
    """Results are compared across versions: a new split must not move the others."""
    world = make_world(seed)
    found = hashlib.sha256(world.held_out.astype("<i8").tobytes())
    for split in (*QA_SPLITS, "pretrain"):
        found.update(world.samples[split].astype("<i8").tobytes())
    assert found.hexdigest() == digest


def test_pretraining_text_never_joins_a_job_with_a_place(splits):
    templates = Counter()
    for row in splits["pretrain"].to_list():
        words = set(row["completion"].split())
        said = (len(words & set(JOBS)), len(words & set(PLACES)), len(words & set(WEATHERS)), len(words & set(TOOLS)))
        templates[said] += 1
        assert (row["prompt"], row["choices"], row["gold"]) == ("", [], -1)
    assert set(templates) == {(1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (0, 1, 1, 1)}
    assert min(templates.values()) > 1800


def test_posterior_is_the_documented_formula(splits):
    rng = np.random.default_rng(0)
    u, s = rng.standard_normal((12, 12)), rng.standard_normal((8, 12))
    r, i = rng.standard_normal((6, 12)), rng.standard_normal((12, 8, 12))
    row = splits["test"][0]
    words = row["prompt"].split()
    j, p, w = JOBS.index(words[4]), PLACES.index(words[6]), WEATHERS.index(words[8])
    scores = np.exp(2.5 * (u[j] + 0.8 * s[p] + 0.4 * r[w] + 0.5 * i[j, p]))
    np.testing.assert_allclose(row["posterior"], scores / scores.sum(), rtol=1e-10)


def test_samples_follow_the_posterior(splits):
    for split in QA_SPLITS:
        posterior = np.array(splits[split]["posterior"])
        gold = np.array(splits[split]["gold"])
        np.testing.assert_allclose(posterior.sum(axis=1), 1.0, atol=1e-12)
        # The drawn tool's probability has the mean of sum p^2; counts per tool have the mean of sum p.
        drawn = posterior[np.arange(len(gold)), gold]
        expected = (posterior**2).sum(axis=1)
        assert abs(drawn.mean() - expected.mean()) < 4 * drawn.std() / np.sqrt(len(gold))
        counts = np.bincount(gold, minlength=12)
        spread = np.sqrt((posterior * (1 - posterior)).sum(axis=0))
        assert np.all(np.abs(counts - posterior.sum(axis=0)) < 4.5 * spread)


def test_pretraining_text_follows_the_marginal_posterior():
    world = make_world(0)
    sample = world.samples["pretrain"]
    sentence = SENTENCES.index("the {job} often carries {tool} .")
    for job in range(12):
        rows = sample[(sample[:, 3] == sentence) & (sample[:, 0] == job)]
        marginal = world.posterior[job].mean(axis=(0, 1))
        counts = np.bincount(rows[:, 4], minlength=12)
        spread = np.sqrt(len(rows) * marginal * (1 - marginal)) + 1.0
        assert np.all(np.abs(counts - len(rows) * marginal) < 4.5 * spread)


def test_bayes_accuracy_is_known_and_imperfect(task):
    accuracies = []
    for seed in range(10):
        rows = task.load("test", seed=seed).dataset
        best = np.array(rows["posterior"]).argmax(axis=1)
        accuracies.append(float((best == np.array(rows["gold"])).mean()))
    assert np.mean(accuracies) == pytest.approx(0.695, abs=0.015)
    assert all(0.64 < accuracy < 0.75 for accuracy in accuracies)


def test_seed_decides_the_world(task, splits):
    again = get_task("noisy_world")
    make_world.cache_clear()
    for split, rows in splits.items():
        assert again.load(split).dataset.to_list() == rows.to_list()
    assert task.load("test", seed=1).dataset["posterior"][0] != splits["test"]["posterior"][0]
    # The tokenizer is the same for all worlds: models of different seeds stay comparable.
    assert task.tokenizer().get_vocab() == again.tokenizer().get_vocab()
    with pytest.raises(ValueError, match="generated, so `path`"):
        task.load("test", path="x.jsonl")


def test_text_and_tokens_agree(task, splits, tmp_path):
    tokenizer = task.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for split in (*QA_SPLITS, "unlabelled"):
        rows = splits[split]
        prompts = tokenizer(rows["prompt"][:])["input_ids"]
        assert {len(ids) for ids in prompts} == {15}
        assert all(ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1 for ids in prompts)
        assert tokenizer.batch_decode(prompts, skip_special_tokens=True) == rows["prompt"][:]
        assert reloaded(rows["prompt"][:])["input_ids"] == prompts
    answers = answer_token_ids_of_rows(tokenizer, splits["test"])
    assert {tuple(ids) for ids in answers} == {tuple(tokenizer.convert_tokens_to_ids(list(TOOLS)))}
    tokenized = tokenize_rows(splits["train"], tokenizer)
    assert (tokenized.n_out, tokenized.n_dropped, tokenized.n_retokenized) == (2400, 0, 0)
    for row, gold, ids in zip(tokenized.dataset, splits["train"]["gold"], splits["train"]["choices"], strict=True):
        assert len(row["input_ids"]) == 16
        assert row["labels"] == [-100] * 15 + [tokenizer.convert_tokens_to_ids(ids[gold].strip())]


def test_pretraining_rows_have_at_most_nine_tokens(task, splits):
    tokenized = tokenize_rows(splits["pretrain"], task.tokenizer(), supervise="all").dataset
    assert {len(ids) for ids in tokenized["input_ids"]} == {7, 8, 9}
    assert tokenized["labels"][:] == tokenized["input_ids"][:]
    assert all(ids[0] == task.tokenizer().bos_token_id for ids in tokenized["input_ids"])


def test_closed_vocabulary_refuses_other_words(task):
    with pytest.raises(Exception, match="UNK"):
        task.tokenizer()("question : who carries the piano ?")
