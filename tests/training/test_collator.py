"""Batches: which teacher entry stands beside which token, and what is refused."""

import math

import numpy as np
import pytest
import torch

from first_trl import Recalibration
from first_trl.training.collator import DataCollatorForDistillation


def example(tokens, labels, **columns):
    return {"input_ids": tokens, "labels": labels, **columns}


def two_rows():
    half = math.log(0.5)
    return [
        example(
            [5, 6, 7],
            [5, -100, 7],
            teacher_topk_ids=[[7, 1]],
            teacher_topk_logprobs=[[half, math.log(0.25)]],
            teacher_tail_logprob=[math.log(0.25)],
        ),
        example(
            [8, 9, 4, 3],
            [-100, 9, 4, -100],
            teacher_topk_ids=[[9, 2], [4, 3]],
            teacher_topk_logprobs=[[half, half], [math.log(0.9), math.log(0.1)]],
            teacher_tail_logprob=[-math.inf, -math.inf],
        ),
    ]


def flattened(rows):
    """The same rows as the trainer stores them: numpy, without inner lists."""
    return [
        {name: np.concatenate([np.ravel(value) for value in values]) for name, values in row.items()} for row in rows
    ]


@pytest.mark.parametrize("prepare", [list, flattened], ids=["nested", "flat"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_targets_follow_the_labels(prepare, padding_free):
    collator = DataCollatorForDistillation(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=4)
    batch = collator(prepare(two_rows()))
    labels = batch["labels"][:, 1:]
    assert labels[labels != -100].tolist() == [7, 9, 4] == batch["teacher_ids"][:, 0].tolist()
    assert batch["labels"][0, 0] == -100  # set by the row, scored by nobody
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["teacher_ids"].dtype == torch.int64
    expected = torch.tensor([[2 / 3, 1 / 3], [0.5, 0.5], [0.9, 0.1]])
    torch.testing.assert_close(batch["teacher_log_target"].exp(), expected)
    assert "teacher_tail_log_target" not in batch


def test_bucket_keeps_the_tail_and_top_k_moves_ranks_into_it():
    collator = DataCollatorForDistillation(pad_token_id=0, estimator="bucket")
    batch = collator(two_rows())
    torch.testing.assert_close(batch["teacher_tail_log_target"].exp(), torch.tensor([0.25, 0.0, 0.0]))
    torch.testing.assert_close(batch["teacher_log_target"].exp()[0], torch.tensor([0.5, 0.25]))
    collator = DataCollatorForDistillation(pad_token_id=0, estimator="bucket", top_k=1)
    batch = collator(two_rows())
    assert batch["teacher_ids"].tolist() == [[7], [9], [4]]
    torch.testing.assert_close(batch["teacher_tail_log_target"].exp(), torch.tensor([0.5, 0.5, 0.1]))


def test_recalibration_acts_on_the_raw_probabilities():
    collator = DataCollatorForDistillation(pad_token_id=0, recalibration=Recalibration("probability_temperature", 0.5))
    batch = collator(two_rows())
    expected = torch.softmax(torch.tensor([0.5, 0.25]) / 0.5, 0)
    torch.testing.assert_close(batch["teacher_log_target"][0].exp(), expected)


def draw_rows():
    return [
        example([5, 6, 7], [-100, 6, 7], teacher_draw_ids=[[6], [1, 2, 7]], teacher_draw_counts=[[4], [1, 1, 2]]),
        example([8, 9], [-100, 9], teacher_draw_ids=[[9, 3]], teacher_draw_counts=[[3, 1]]),
    ]


def flattened_draws(rows):
    for row in rows:
        row["teacher_draw_lengths"] = [len(entry) for entry in row["teacher_draw_ids"]]
    return [
        {name: np.concatenate([np.ravel(value) for value in values]) for name, values in row.items()} for row in rows
    ]


@pytest.mark.parametrize("prepare", [list, flattened_draws], ids=["nested", "flat"])
def test_draws_are_padded_to_the_longest(prepare):
    batch = DataCollatorForDistillation(pad_token_id=0, estimator="sampled")(prepare(draw_rows()))
    target = batch["teacher_log_target"]
    assert target.dtype == torch.float32
    assert target.exp().tolist() == [[1.0, 0.0, 0.0], [0.25, 0.25, 0.5], [0.75, 0.25, 0.0]]
    assert torch.isinf(target).tolist() == [[False, True, True], [False, False, False], [False, False, True]]
    assert batch["teacher_ids"].tolist() == [[6, 0, 0], [1, 2, 7], [9, 3, 0]]


def test_draws_that_are_no_counts_are_refused():
    rows = draw_rows()
    rows[0]["teacher_draw_counts"][1][0] = 0
    with pytest.raises(ValueError, match="drawn 0 times"):
        DataCollatorForDistillation(pad_token_id=0, estimator="sampled")(rows)
    rows = draw_rows()
    rows[0]["teacher_draw_ids"][0], rows[0]["teacher_draw_counts"][0] = [], []
    with pytest.raises(ValueError, match="no teacher draw"):
        DataCollatorForDistillation(pad_token_id=0, estimator="sampled")(rows)


def test_plain_rows_give_a_plain_batch():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    batch = DataCollatorForDistillation(pad_token_id=0)(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]


def test_a_batch_without_supervised_positions():
    row = example([1, 2], [1, -100], teacher_topk_ids=[], teacher_topk_logprobs=[], teacher_tail_logprob=[])
    for estimator in ("topk", "bucket"):
        batch = DataCollatorForDistillation(pad_token_id=0, estimator=estimator)([row, row])
        assert batch["teacher_ids"].shape == batch["teacher_log_target"].shape == (0, 1)
    assert batch["teacher_tail_log_target"].shape == (0,)


def misaligned():
    def cut(name):
        def change(rows):
            rows[1][name] = rows[1][name][:-1]

        return change

    def mask(rows):
        rows[1]["labels"][1] = -100

    def unmask(rows):
        rows[0]["labels"][1] = 6

    names = ("teacher_topk_ids", "teacher_topk_logprobs", "teacher_tail_logprob")
    return {**{name: cut(name) for name in names}, "masked later": mask, "unmasked later": unmask}


@pytest.mark.parametrize("case", misaligned())
def test_labels_and_entries_that_do_not_fit_are_refused(case):
    rows = two_rows()
    misaligned()[case](rows)
    with pytest.raises(ValueError, match="labels and teacher columns no longer belong together"):
        DataCollatorForDistillation(pad_token_id=0)(rows)


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_numbers_that_are_no_logprobs_are_refused(value):
    rows = two_rows()
    rows[0]["teacher_topk_logprobs"][0][0] = value
    with pytest.raises(ValueError, match="a log-probability is a number <= 0"):
        DataCollatorForDistillation(pad_token_id=0)(rows)
