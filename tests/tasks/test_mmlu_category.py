"""MMLU questions by category: subjects held out for real, and a vocabulary of the training rows alone."""

import json
from collections import Counter

import pytest

from first_trl.tasks import answer_token_ids_of_rows, get_task, tokenize_rows
from first_trl.tasks.mmlu_category import ANSWERS, SUBJECTS
from first_trl.tasks.overlap import drop_overlap


IN_DOMAIN = ("train", "validation", "test", "unlabelled")
CATEGORY = {subject: i for i, subjects in enumerate(SUBJECTS.values()) for subject in subjects}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Made-up questions in MMLU's layout: 200 of every subject, each with a word of its own."""
    folder = tmp_path_factory.mktemp("mmlu")
    with open(folder / "test.jsonl", "w") as file:
        for subject in CATEGORY:
            for i in range(200):
                question = f"About {subject.replace('_', ' ')}, what is #{i}?" + " and more" * (i % 40)
                row = {"question": question, "choices": list("wxyz"), "answer": i % 4, "subject": subject}
                file.write(json.dumps(row) + "\n")
            # The same text a second time, and in another case
            file.write(json.dumps({**row, "question": row["question"].upper()}) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def task():
    return get_task("mmlu_category")


@pytest.fixture(scope="module")
def splits(task, path):
    return {split: task.load(split, path=path, seed=3).dataset for split in task.splits}


def test_there_are_57_subjects_in_four_categories():
    assert {name: len(subjects) for name, subjects in SUBJECTS.items()} == {
        "STEM": 18,
        "humanities": 13,
        "social-sciences": 12,
        "other": 14,
    }
    assert len(CATEGORY) == 57


def test_ood_subjects_are_in_no_other_split(splits):
    held_out = set(splits["ood"]["group"])
    assert Counter(CATEGORY[subject] for subject in held_out) == {0: 4, 1: 3, 2: 3, 3: 4}
    for split in IN_DOMAIN:
        assert not held_out & set(splits[split]["group"])
    assert drop_overlap(splits["train"], splits["ood"], by="group")[1] == 0


def test_splits_part_the_distinct_questions(splits):
    sizes = {split: len(splits[split]) for split in splits}
    assert sizes == {"train": 3000, "validation": 1000, "test": 2000, "ood": 14 * 200, "unlabelled": 43 * 200 - 6000}
    texts = [text for split in splits for text in splits[split]["question"]]
    assert len(texts) == len(set(texts)) == 57 * 200


def test_a_row_is_the_documented_text(splits):
    for split, rows in splits.items():
        for row in rows.select(range(20)):
            assert row["prompt"] == f"{row['question']} category :"
            assert row["question"] == row["question"].lower() and len(row["question"].split()) <= 40
            assert row["choices"] == [f" {answer}" for answer in ANSWERS]
            if split == "unlabelled":
                assert (row["gold"], row["completion"]) == (-1, None)
            else:
                assert row["gold"] == CATEGORY[row["group"]] and row["completion"] == row["choices"][row["gold"]]
    # Questions of up to 90 words were cut behind 40
    assert max(len(text.split()) for text in splits["train"]["question"]) == 40


def test_the_seed_draws_subjects_and_rows(task, path, splits):
    again = get_task("mmlu_category").load("train", path=path, seed=3).dataset
    assert again["prompt"][:] == splits["train"]["prompt"][:]
    assert set(task.load("ood", path=path, seed=4).dataset["group"]) != set(splits["ood"]["group"])


def test_the_tokenizer_is_made_from_the_training_rows(task, path, splits):
    tokenizer = task.tokenizer(path, seed=3)
    words = {word for prompt in splits["train"]["prompt"] for word in prompt.split()}
    assert set(tokenizer.get_vocab()) == words | {"<pad>", "<bos>", "<eos>", "<unk>", *ANSWERS}
    assert tokenizer.get_vocab() == get_task("mmlu_category").tokenizer(path, seed=3).get_vocab()
    held_out = splits["ood"]["group"][0].split("_")
    unknown = [word for word in held_out if word not in words]
    assert tokenizer(" ".join(unknown), add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id] * len(
        unknown
    )
    answers = answer_token_ids_of_rows(tokenizer, splits["ood"])
    assert answers == [tokenizer.convert_tokens_to_ids(list(ANSWERS))] * len(splits["ood"])
    assert tokenize_rows(splits["train"], tokenizer, max_length=44).n_dropped == 0

    small = get_task("mmlu_category", vocabulary_size=5).tokenizer(path, seed=3)
    counts = Counter(word for text in splits["train"]["question"] for word in text.split())
    assert len(small) == 15
    kept = {word for word in small.get_vocab() if word in counts and word not in ("category", ":")}
    assert len(kept) == 5
    assert min(counts[word] for word in kept) >= max(counts[word] for word in set(counts) - kept)


def test_choices_follow_the_question_where_asked(path):
    task = get_task("mmlu_category", with_choices=True, max_words=60)
    rows = task.load("test", path=path, seed=3).dataset
    assert any(text.endswith("w x y z") for text in rows["question"])


def test_errors(task, tmp_path):
    row = {"question": "q", "choices": list("wxyz"), "answer": 0, "subject": "astronomy"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"different questions .*6000 are needed\. Give the whole test split"):
        task.load("train", path=str(tmp_path))
    (tmp_path / "other_test.jsonl").write_text(json.dumps({**row, "subject": "cooking"}))
    with pytest.raises(
        ValueError, match=r"other_test\.jsonl, row 1 \(line 1\): the subject 'cooking' is not one of MMLU's 57"
    ):
        task.load("train", path=str(tmp_path / "other_test.jsonl"))
    with pytest.raises(ValueError, match="`max_words` must be at least 1"):
        get_task("mmlu_category", max_words=0)


def test_real_questions(task, data_folder):
    path = str(data_folder / "mmlu")
    for seed in (0, 1):
        sizes = {split: len(task.load(split, path=path, seed=seed).dataset) for split in task.splits}
        assert [sizes[split] for split in ("train", "validation", "test")] == [3000, 1000, 2000]
        # 12,517 texts are left when repeated ones count once
        assert sum(sizes.values()) == 12517
        assert sizes["unlabelled"] > 1500 and sizes["ood"] > 1500
        tokenizer = task.tokenizer(path, seed=seed)
        assert len(tokenizer) == 3010
        rows = task.load("test", path=path, seed=seed).dataset
        ids = [token for ids in tokenizer(rows["prompt"][:])["input_ids"] for token in ids]
        assert ids.count(tokenizer.unk_token_id) / len(ids) < 0.15
