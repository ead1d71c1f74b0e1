"""The digits as text: real images, honest splits, shifts that shift."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from first_trl.tasks import answer_token_ids_of_rows, get_task, tokenize_rows
from first_trl.tasks.digits import make_images, pool_levels


@pytest.fixture(scope="module")
def task():
    return get_task("digits")


def test_splits_are_disjoint_and_cover_all_images():
    images, digits = load_digits(return_X_y=True)
    splits = make_images(0)
    assert {split: len(x) for split, (x, _) in splits.items()} == {
        "train": 900,
        "validation": 300,
        "test": 597,
        "ood": 597,
        "ood_shift": 597,
    }
    together = np.concatenate([splits[split][0].reshape(-1, 64) for split in ("train", "validation", "test")])
    labels = np.concatenate([splits[split][1] for split in ("train", "validation", "test")])
    key = np.lexsort(together.T)
    expected = np.lexsort(images.T)
    np.testing.assert_array_equal(together[key], images[expected])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(digits))


def test_pooling_by_hand():
    image = np.zeros((1, 8, 8))
    image[0, 0:2, 0:2] = 16  # a full block: level 8 would not exist
    image[0, 0:2, 2:4] = [[8, 8], [8, 7.9]]  # mean 7.975: level 3
    image[0, 6:8, 6:8] = [[2, 2], [2, 2]]  # mean 2: level 1
    levels = pool_levels(image)[0]
    assert (levels[0, 0], levels[0, 1], levels[3, 3], levels.sum()) == (7, 3, 1, 11)


def test_text_says_the_image(task):
    rows, (images, digits) = task.load("test", seed=3).dataset, make_images(3)["test"]
    for index in (0, 100, 596):
        levels = pool_levels(images[index : index + 1])[0]
        words = rows[index]["prompt"].split()
        assert words[-2:] == ["digit", ":"] and len(words) == 18
        assert words[6] == f"r1c2={levels[1, 2]}"
        assert rows[index]["completion"] == f" {digits[index]}" and rows[index]["gold"] == digits[index]


def test_shifted_splits_are_the_test_images_moved():
    splits = make_images(1)
    test, noisy, shifted = (splits[split][0] for split in ("test", "ood", "ood_shift"))
    for split in ("ood", "ood_shift"):
        np.testing.assert_array_equal(splits[split][1], splits["test"][1])
    assert noisy.min() >= 0 and noisy.max() <= 16
    inside = (test > 7) & (test < 9)  # far from the bounds, where clipping hides the spread
    assert (noisy - test)[inside].std() == pytest.approx(3.0, abs=0.15)
    for image, moved in zip(test, shifted, strict=True):
        candidates = [
            (image[:, :-1], moved[:, 1:]),
            (image[:, 1:], moved[:, :-1]),
            (image[:-1], moved[1:]),
            (image[1:], moved[:-1]),
        ]
        assert any(np.array_equal(a, b) for a, b in candidates)
    assert not np.array_equal(test, shifted)


def test_tokens(task):
    tokenizer = task.tokenizer()
    assert len(tokenizer) == 143
    rows = task.load("train").dataset
    tokenized = tokenize_rows(rows, tokenizer).dataset
    assert {len(ids) for ids in tokenized["input_ids"]} == {20}
    assert {tuple(ids) for ids in answer_token_ids_of_rows(tokenizer, rows)} == {
        tuple(tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)]))
    }
    assert tokenizer.decode(tokenized["input_ids"][0], skip_special_tokens=True) == (
        rows[0]["prompt"] + rows[0]["completion"]
    )
    assert task.load("train").dataset.to_list() == rows.to_list()
    assert task.load("train", seed=1).dataset["prompt"][0] != rows["prompt"][0]
