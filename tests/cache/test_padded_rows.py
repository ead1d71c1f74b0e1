"""Tokenised rows that come padded: a teacher reads the tokens, never the padding, or the row is refused."""

import pytest
from datasets import Dataset

from first_trl import FirstDistillTrainer, add_teacher_topk
from tests.support.tiny import tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


PAD, END = 0, 1


def padded(row, left, right, token=PAD):
    """The row between padding, with every column that has an entry per token."""
    n = len(row["input_ids"])
    return {
        "input_ids": [token] * left + row["input_ids"] + [token] * right,
        "labels": [-100] * left + row["labels"] + [-100] * right,
        "attention_mask": [0] * left + [1] * n + [0] * right,
        "position_ids": [0] * left + list(range(n)) + [0] * right,
    }


def capture(rows, folder, tokenizer=None):
    return add_teacher_topk(
        Dataset.from_list(rows), tiny_llama(), tokenizer or tiny_tokenizer(), k=5, output_dir=folder, disable_tqdm=True
    )


@pytest.mark.parametrize("token", [PAD, END])
@pytest.mark.parametrize(("left", "right"), [(6, 0), (0, 6), (3, 2)])
def test_padding_is_not_read(left, right, token, tmp_path):
    """Wherever it is, and when the padding token also ends texts."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token_id = token
    rows = tiny_rows()
    expected = capture(rows, tmp_path / "plain", tokenizer)
    cache = capture([padded(row, left, right, token) for row in rows], tmp_path / "padded", tokenizer)
    for name in ("input_ids", "labels", "teacher_topk_ids", "teacher_topk_logprobs", "teacher_tail_logprob"):
        assert cache[name][:] == expected[name][:], name
    trainer = FirstDistillTrainer(tiny_llama(1), tiny_config(tmp_path), cache, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels, mask, row in zip(
        *(batch[n] for n in ("input_ids", "labels", "attention_mask")), rows, strict=True
    ):
        assert ids[mask.bool()].tolist() == row["input_ids"]
        # What fills up a batch is never supervised; nothing predicts the first token
        assert labels[~mask.bool()].tolist() == [-100] * int((mask == 0).sum())
        assert labels[mask.bool()][1:].tolist() == row["labels"][1:]


def test_one_padded_row_among_others(tmp_path):
    rows = tiny_rows()
    expected = capture(rows, tmp_path / "plain")
    some = [padded(row, 4 * (i == 5), 0) for i, row in enumerate(rows)]
    assert capture(some, tmp_path / "some")["teacher_topk_logprobs"][:] == expected["teacher_topk_logprobs"][:]


def edited(**columns):
    rows = [padded(row, 0, 0) for row in tiny_rows(3)]
    rows[1] |= columns
    return [{name: value for name, value in row.items() if columns or name != "attention_mask"} for row in rows]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "attention_mask": [1, 0, 1]}, "masks tokens between others"),
        ({"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "attention_mask": [0, 0, 0]}, "masks every token"),
        ({"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "attention_mask": [1, 1]}, "differ in length"),
    ],
)
def test_masks_that_are_no_padding_are_refused(columns, message, tmp_path):
    with pytest.raises(ValueError, match=f"Row 1 of the dataset: `attention_mask` .*{message}|Row 1 .*{message}"):
        capture(edited(**columns), tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        {"position_ids": [0, 1, 2, 0, 1]},
        {"seq_lengths": [3, 2]},
        {"attention_mask": [1, 1, 1, 2, 2]},
        {"position_ids": [0, 1, 2, 0, 1, 0], "attention_mask": [1, 1, 1, 1, 1, 0]},
    ],
)
def test_several_documents_in_a_row_are_refused(columns, tmp_path):
    """The teacher would read the second behind the first."""
    n = len(columns.get("attention_mask", range(5)))
    row = {"input_ids": [3, 4, 5, 6, 7, 8][:n], "labels": [-100, 4, 5, -100, 7, -100][:n]}
    with pytest.raises(ValueError, match=r"Row 1 of the dataset: by its .* it holds several documents"):
        capture([row | dict.fromkeys(columns), row | columns], tmp_path)


@pytest.mark.parametrize(
    ("left", "message"), [(3, "begins with the padding token"), (0, "ends with the padding token")]
)
def test_padding_that_no_mask_tells_is_refused(left, message, tmp_path):
    rows = tiny_rows(3)
    rows[1] = {
        "input_ids": [PAD] * left + rows[1]["input_ids"] + [PAD] * (3 - left),
        "labels": [-100] * left + rows[1]["labels"] + [PAD] * (3 - left),
    }
    with pytest.raises(ValueError, match=f"Row 1 of the dataset {message} '<pad>'"):
        capture(rows, tmp_path)


def test_the_tokenizers_padding_side_changes_no_batch(tmp_path):
    """Chat models pad on the left to generate; a training batch is filled up on the right either way."""
    batches = []
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = side
        cache = capture(tiny_rows(), tmp_path / side, tokenizer)
        trainer = FirstDistillTrainer(tiny_llama(1), tiny_config(tmp_path), cache, processing_class=tokenizer)
        batches.append(next(iter(trainer.get_train_dataloader())))
    assert {name: value.tolist() for name, value in batches[0].items()} == {
        name: value.tolist() for name, value in batches[1].items()
    }
