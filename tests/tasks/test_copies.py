"""Copies of questions between what is trained or chosen on and what is evaluated, and copies with two answers."""

import json
import unicodedata

import pytest

from first_trl.tasks import get_task
from first_trl.tasks.copies import find_copies


def split(folder, name, *rows, **options):
    """Rows are (question, choices, answer)."""
    path = folder / f"{name}.jsonl"
    lines = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in rows]
    path.write_text("\n".join(lines))
    source = "unlabelled" if all(a is None for _, _, a in rows) else "train"
    return get_task("custom", **options).load(source, path=str(path.rename(folder / f"{name}_{source}.jsonl")))


AB = ["cork", "anvil"]
ROW = ("Which floats?", AB, "cork")


def test_what_is_trained_on_yields_to_what_is_chosen_and_evaluated_on(tmp_path):
    splits = {
        "train": split(tmp_path, "a", ROW, ("Only here?", AB, "A"), ("In test?", AB, "B"), ("In both?", AB, "B")),
        "validation": split(tmp_path, "b", ROW, ("In both?", AB, "B"), ("Chosen on?", AB, "A")),
        "test": split(tmp_path, "c", ("In test?", AB, "B"), ("In both?", AB, "B"), ("Shared?", AB, "B")),
        "ood": split(tmp_path, "d", ("Shared?", AB, "B"), ("Other?", AB, "B")),
    }
    found = find_copies(splits, ["train", "validation"])
    assert found.dropped == {
        "train": {"same question as in validation": 1, "same question as in test": 2},
        "validation": {"same question as in test": 1},
    }
    assert found.ids == {
        "train": {"custom-train-0", "custom-train-2", "custom-train-3"},
        "validation": {"custom-train-1"},
    }
    assert found.shared == {"ood": {"test": 1}}


def test_copies_with_two_answers_go_and_equal_ones_stay(tmp_path):
    train = split(tmp_path, "a", ROW, ("Which floats?", AB, "anvil"), ("Twice?", AB, "A"), ("Twice?", AB, "cork"))
    validation = split(tmp_path, "b", ("Else?", AB, "A"))
    found = find_copies({"train": train, "validation": validation}, ["train", "validation"])
    assert found.dropped == {"train": {"same question with another answer": 2}}
    assert found.ids["train"] == {"custom-train-0", "custom-train-1"}


@pytest.mark.parametrize(
    ("other", "copies"),
    [
        (("Which floats?", ["anvil", "cork"], "A"), True),  # The choices in another order
        (("  Which floats? ", ["cork ", "anvil"], "A"), True),
        (("which floats?", ["Anvil", "cork"], "B"), True),
        (("Which\u00a0 floats?", AB, "A"), True),
        (("Which floats?", ["cork", "stone"], "A"), False),
        (("Which floats? ", ["cork", "anvil", "brick"], "A"), False),
        (("Which sinks?", AB, "A"), False),
        (("Which floats!", AB, "A"), False),  # 2 + 2 is not 2 - 2
    ],
)
def test_what_a_copy_is(tmp_path, other, copies):
    splits = {"train": split(tmp_path, "a", ROW), "validation": split(tmp_path, "b", other)}
    assert bool(find_copies(splits, ["train", "validation"]).dropped) is copies


def test_accents_may_be_encoded_in_two_ways(tmp_path):
    one, other = ((unicodedata.normalize(form, "Où flotte-t-il ?"), AB, "A") for form in ("NFC", "NFD"))
    splits = {"train": split(tmp_path, "a", one), "test": split(tmp_path, "b", other)}
    assert find_copies(splits, ["train"]).dropped == {"train": {"same question as in test": 1}}


def test_answers_that_differ_with_the_case_of_a_question_do_not_contradict(tmp_path):
    train = split(tmp_path, "a", ("Is b a capital?", ["yes", "no"], "no"), ("Is B a capital?", ["yes", "no"], "yes"))
    assert find_copies({"train": train}, ["train"]).dropped == {}
    spaced = split(tmp_path, "b", ROW, ("Which  floats?", AB, "anvil"))
    assert find_copies({"train": spaced}, ["train"]).dropped == {"train": {"same question with another answer": 2}}


def test_what_is_trained_on_yields_to_what_thresholds_are_fitted_on(tmp_path):
    """They say how often answers are wrong, and a model is hardly wrong where it was trained."""
    splits = {
        "train": split(tmp_path, "a", ROW, ("Else?", AB, "A")),
        "validation": split(tmp_path, "b", ("Chosen on?", AB, "A")),
        "threshold": split(tmp_path, "c", ROW, ("Chosen on?", AB, "A"), ("New?", AB, "B")),
    }
    found = find_copies(splits, ["train", "validation", "threshold"])
    assert found.dropped == {
        "train": {"same question as in threshold": 1},
        "threshold": {"same question as in validation": 1},
    }


def test_reordered_choices_with_the_same_answer_do_not_contradict(tmp_path):
    train = split(
        tmp_path, "a", ROW, ("Which floats?", ["anvil", "cork"], "B"), ("Which floats?", ["anvil", "cork"], "A")
    )
    assert find_copies({"train": train}, ["train"]).ids == {"train": {f"custom-train-{i}" for i in range(3)}}
    agreeing = split(tmp_path, "b", ROW, ("Which floats?", ["anvil", "cork"], "B"))
    assert find_copies({"train": agreeing}, ["train"]).dropped == {}


def test_prompts_without_an_answer_are_trained_on_too(tmp_path):
    splits = {
        "train": split(tmp_path, "a", ("Else?", AB, "A")),
        "more": split(tmp_path, "b", ("Which floats?", AB, None), ("New?", AB, None)),
        "validation": split(tmp_path, "c", ("Different?", AB, "A")),
        "test": split(tmp_path, "d", ROW),
    }
    found = find_copies(splits, ["train", "validation", "more"])
    assert found.dropped == {"more": {"same question as in test": 1}}


def test_the_option_switches_it_off_and_draws_are_no_copies(tmp_path):
    rows = (ROW, ("Which floats?", AB, "anvil"))
    splits = {"train": split(tmp_path, "a", *rows, drop_copies=False), "validation": split(tmp_path, "b", ROW)}
    assert find_copies(splits, ["train", "validation"]).dropped == {}
    world = {role: get_task("noisy_world").load(role) for role in ("train", "validation", "test")}
    assert find_copies(world, ["train", "validation"]).dropped == {}
    world = {role: get_task("noisy_world", drop_copies=True).load(role) for role in ("train", "validation", "test")}
    assert sum(find_copies(world, ["train", "validation"]).dropped["train"].values()) > 100


def test_free_texts_do_not_contradict_each_other(tmp_path):
    path = tmp_path / "x.json"
    rows = [{"instruction": "Say hello.", "input": "", "output": text} for text in ("Hello.", "Hi.")]
    path.write_text(json.dumps(rows))
    load = get_task("alpaca").load
    assert find_copies({"train": load("train", path=str(path))}, ["train"]).dropped == {}
    halves = {"train": load("train[:1]", path=str(path)), "validation": load("train[1:]", path=str(path))}
    assert find_copies(halves, ["train", "validation"]).dropped == {"train": {"same question as in validation": 1}}


def test_a_question_about_another_passage_is_another_question(tmp_path):
    path = tmp_path / "x.jsonl"
    row = {"question": "is it blue", "answer": True}
    path.write_text("\n".join(json.dumps({**row, "passage": text}) for text in ("The sky.", "The sea.", "The sky.")))
    load = get_task("boolq").load
    splits = {"train": load("train[:2]", path=str(path)), "validation": load("train[2:]", path=str(path))}
    assert find_copies(splits, ["train", "validation"]).ids == {"train": {"boolq-train-0"}}
