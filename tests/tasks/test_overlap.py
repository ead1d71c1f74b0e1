"""Training rows that share a group or a question with an evaluation split."""

import json
import time

import pytest
from datasets import Dataset

from first_trl.experiments.smoke.rows import DATA
from first_trl.tasks import get_task
from first_trl.tasks.overlap import drop_overlap, normalized


def rows(*questions, groups=None):
    return Dataset.from_dict({"question": list(questions), "group": groups or [""] * len(questions)})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_pair_of_the_noisy_worlds_ood_split_is_in_its_training_rows(seed):
    task = get_task("noisy_world")
    splits = {
        name: task.load(name, seed=seed).dataset for name in ("train", "validation", "test", "ood", "unlabelled")
    }
    for name in ("train", "validation", "test", "unlabelled"):
        kept, dropped = drop_overlap(splits[name], splits["ood"], by="group")
        assert dropped == 0 and kept is splits[name]
    # The same check on rows that do overlap finds them
    kept, dropped = drop_overlap(splits["train"], splits["test"].select(range(20)), by="group")
    shared = set(splits["test"]["group"][:20])
    assert dropped == sum(group in shared for group in splits["train"]["group"]) > 0
    assert not shared & set(kept["group"])


def test_a_planted_question_is_dropped_from_alpaca(tmp_path):
    questions = get_task("commonsense_qa").load("validation", path=str(DATA / "commonsense_qa")).dataset
    stem = questions["question"][3]
    data = json.loads((DATA / "alpaca" / "alpaca_data.json").read_text())
    planted = [
        {"instruction": f"Answer this: {stem.upper()}", "input": "", "output": "x"},
        {
            "instruction": "Pick the best answer.",
            "input": f"Q. {stem.replace(' ', '  ')}\n- one\n- two",
            "output": "x",
        },
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps([*data, *planted]))
    train = get_task("alpaca").load("train", path=str(tmp_path / "alpaca.json")).dataset
    clean, before = drop_overlap(train.select(range(len(data))), questions, by="question")
    kept, dropped = drop_overlap(train, questions, by="question")
    assert dropped == before + 2
    assert kept["id"][:] == clean["id"][:]
    assert drop_overlap(kept, questions, by="question")[1] == 0


def test_questions_are_compared_without_case_punctuation_and_white_space():
    assert normalized(" What's \n the ＣＡＰＩＴＡＬ, of_Peru?") == "what s the capital of peru"
    train = rows("what is  a pen", "Is it a pen?", "A pen, is what?", "")
    kept, dropped = drop_overlap(train, rows("WHAT is a pen?!", "", "..."), by="question")
    assert (dropped, kept["question"][:]) == (1, ["Is it a pen?", "A pen, is what?", ""])


def test_only_long_questions_are_looked_for_inside_others():
    short, long = "Who is she, really", "Who is she really, ok"
    assert (len(normalized(short)), len(normalized(long))) == (17, 20)
    train = rows(f"Tell me: {short}", f"Tell me: {long}", f"Tell me: {long[:-1]}", f"({long}) and then what?")
    kept, dropped = drop_overlap(train, rows(short, long), by="question")
    assert (dropped, kept["question"][:]) == (2, [train["question"][0], train["question"][2]])
    # Several questions with one beginning, the longer of which alone is inside
    start = "which of the following is not"
    train = rows(f"x {start} a metal", f"x {start} a plant")
    assert drop_overlap(train, rows(f"{start} a gas", f"{start} a plant"), by="question")[1] == 1
    # A script without spaces
    train = rows("次の質問に答えてください日本で一番高い山の名前は何と言いますか教えてください")
    with pytest.raises(ValueError, match="Every training row"):
        drop_overlap(train, rows("日本で一番高い山の名前は何と言いますか教えて"), by="question")


def test_rows_without_a_group_share_none():
    train = rows("a", "b", "c", groups=["", "x", "y"])
    kept, dropped = drop_overlap(train, rows("d", "e", groups=["", "x"]), by="group")
    assert (dropped, kept["question"][:]) == (1, ["a", "c"])


def test_errors():
    with pytest.raises(ValueError, match="`by` must be one of group, question; got 'id'"):
        drop_overlap(rows("a"), rows("b"), by="id")
    with pytest.raises(ValueError, match=r"no groups .*Use 'question'"):
        drop_overlap(rows("a"), rows("b"), by="group")
    with pytest.raises(ValueError, match=r"training rows have no column 'group' \(they have question\)"):
        drop_overlap(rows("a").select_columns("question"), rows("b"), by="group")
    with pytest.raises(ValueError, match="Every training row shares its question"):
        drop_overlap(rows("a"), rows("A."), by="question")


def test_fifty_thousand_rows_take_seconds(data_folder):
    alpaca = get_task("alpaca").load("train", path=str(data_folder / "alpaca_5000" / "alpaca_5000.json.gz")).dataset
    questions = get_task("commonsense_qa").load("validation", path=str(data_folder / "commonsense_qa")).dataset
    large = alpaca.select(list(range(len(alpaca))) * 10)
    start = time.perf_counter()
    _, dropped = drop_overlap(large, questions, by="question")
    # About one second here; comparing every pair of rows would take minutes
    assert time.perf_counter() - start < 20
    assert dropped == 0
