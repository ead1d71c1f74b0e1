"""The diabetes table as text: real patients, honest splits, levels from the training rows alone."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LogisticRegression

from first_trl.tasks import answer_token_ids_of_rows, get_task, tokenize_rows
from first_trl.tasks.diabetes import SIZES, make_levels


@pytest.fixture(scope="module")
def task():
    return get_task("diabetes")


def test_splits_are_disjoint_and_cover_all_patients(task):
    splits = {split: task.load(split).dataset for split in task.splits}
    assert {split: len(rows) for split, rows in splits.items()} == {**SIZES, "ood": 122}
    assert sum(SIZES.values()) == len(load_diabetes().target) == 442
    # Quarters of the training rows, so about a quarter each there
    counts = np.bincount(splits["train"]["gold"])
    assert counts.tolist() == pytest.approx([60] * 4, abs=3)


def test_levels_are_the_quantiles_of_the_training_rows():
    values, target = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(0).permutation(442)
    levels, quarters = make_levels(0)["test"]
    test, train = order[320:], order[:240]
    bmi = 2
    expected = [(values[train, bmi] < v).mean() * 8 for v in values[test, bmi]]
    # A cut lies between two training rows, which makes one level of difference at most
    assert np.abs(levels[:, bmi] - np.array(expected)).max() <= 1.1
    assert (levels.min(), levels.max()) == (0, 7)
    above = [(target[train] < t).mean() * 4 for t in target[test]]
    assert np.abs(quarters - np.array(above)).max() <= 1.05
    # Two sexes, two levels, and every other measurement uses all eight
    used = [len(np.unique(make_levels(0)["train"][0][:, i])) for i in range(10)]
    assert used[1] == 2 and used[0] == 8 and used[2] == 8


def test_noise_moves_levels_and_no_answer(task):
    test, ood = (task.load(split).dataset for split in ("test", "ood"))
    assert test["gold"][:] == ood["gold"][:]
    moved = make_levels(0)["test"][0] != make_levels(0)["ood"][0]
    assert 0.6 < moved[:, [0, 2, 3]].mean() < 0.95
    assert test["prompt"][:] != ood["prompt"][:]


def test_a_row_is_the_documented_text_with_one_token_an_answer(task):
    train, tokenizer = task.load("train").dataset, task.tokenizer()
    assert len(tokenizer) == 89
    row = train[0]
    words = row["prompt"].split()
    assert " ".join(word.split("=")[0] for word in words[:-2]) == "age sex bmi bp s1 s2 s3 s4 s5 s6"
    assert words[-2:] == ["progression", ":"] and row["completion"] == f" quarter-{row['gold'] + 1}"
    assert tokenize_rows(train, tokenizer).dataset["labels"][0][:-1] == [-100] * 13
    expected = tokenizer.convert_tokens_to_ids([f"quarter-{i}" for i in range(1, 5)])
    assert answer_token_ids_of_rows(tokenizer, train)[0] == expected


def test_seeds_split_differently_and_repeat(task):
    first = task.load("test", seed=1).dataset["prompt"][:]
    assert first == task.load("test", seed=1).dataset["prompt"][:]
    assert first != task.load("test", seed=2).dataset["prompt"][:]
    with pytest.raises(ValueError, match="is generated, so `path` has no meaning"):
        task.load("train", path="somewhere")


def test_the_answer_can_be_learnt_better_than_chance_and_noise_hurts():
    splits = make_levels(0)
    model = LogisticRegression(C=0.02, max_iter=1000).fit(*splits["train"])
    assert model.score(*splits["test"]) > 0.35
    assert model.score(*splits["ood"]) < model.score(*splits["test"])
