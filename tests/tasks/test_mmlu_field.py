"""MMLU questions by field as raw text: the splits of `mmlu_category`, and a prompt for a pretrained model."""

from collections import Counter

import pytest

from first_trl.tasks import get_task
from first_trl.tasks.mmlu_field import ANSWERS
from tests.tasks.test_mmlu_category import CATEGORY, path  # noqa: F401  (the fixture with made-up questions)


@pytest.fixture(scope="module")
def splits(path):  # noqa: F811
    task = get_task("mmlu_field")
    return {split: task.load(split, path=path, seed=3).dataset for split in task.splits}


def test_prompts_are_raw_text_cut_to_whole_words(path):  # noqa: F811
    cut = 0
    for row in get_task("mmlu_field", max_words=20).load("test", path=path, seed=3).dataset.select(range(200)):
        assert row["question"].lower().startswith(f"about {row['group'].replace('_', ' ')}, what is #")
        assert row["prompt"] == f"Question: {row['question']}\nField:"
        assert len(row["question"].split()) <= 20
        cut += len(row["question"].split()) == 20
    assert cut > 50


def test_answers_name_the_field_of_the_subject(splits):
    for split in ("train", "validation", "test", "ood"):
        for row in splits[split].select(range(50)):
            assert row["choices"] == list(ANSWERS)
            assert row["gold"] == CATEGORY[row["group"]]
            assert row["completion"] == ANSWERS[row["gold"]]
    assert set(splits["unlabelled"]["gold"]) == {-1}


def test_subjects_and_rows_are_held_out(splits):
    held_out = set(splits["ood"]["group"])
    assert Counter(CATEGORY[subject] for subject in held_out) == {0: 4, 1: 3, 2: 3, 3: 4}
    texts = [text for split in splits.values() for text in split["question"]]
    assert len(texts) == len(set(texts))
    for split in ("train", "validation", "test", "unlabelled"):
        assert not held_out & set(splits[split]["group"])


def test_the_subjects_held_out_are_those_of_mmlu_category(path, splits):  # noqa: F811
    other = get_task("mmlu_category").load("ood", path=path, seed=3).dataset
    assert set(other["group"]) == set(splits["ood"]["group"])


def test_bad_option():
    with pytest.raises(ValueError, match="`max_words` must be at least 1, got 0"):
        get_task("mmlu_field", max_words=0)
