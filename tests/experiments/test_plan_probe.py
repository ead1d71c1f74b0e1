"""The probe of a plan: every part of a run has a time, and what cannot be timed is said."""

from collections import namedtuple

import pytest

from first_trl.cli import main
from first_trl.experiments.plan import format_plan, plan_recipe
from first_trl.experiments.recipe import load_recipe
from tests.support.quickstart import TINY


@pytest.fixture(scope="module")
def plan():
    return plan_recipe(load_recipe("quickstart", [*TINY, "seeds=[0,1]"]), probe=True)


def test_every_training_capture_and_evaluation_has_a_time(plan):
    trainings = [training.unit for training in plan.settings[0].trainings]
    assert len(trainings) == 10
    assert {time.what for time in plan.times} == {*trainings, "capture", "evaluate (teachers)", "evaluate (students)"}
    assert all(time.seconds > 0 for time in plan.times)


def test_more_steps_take_longer(plan):
    longer = plan_recipe(load_recipe("quickstart", [*TINY, "arms.sft.training.num_train_epochs=40"]), probe=True)
    seconds = [{time.what: time.seconds for time in found.times}["students/sft"] for found in (plan, longer)]
    assert seconds[1] > 8 * seconds[0]


def test_it_is_printed_for_one_run_and_for_all(plan, capsys):
    text = format_plan(plan)
    assert "Time on this machine, at least" in text and "2 runs like the first" in text
    assert main(["run", "quickstart", *TINY, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Time on this machine" not in printed and "time is not estimated (--probe does)" in printed


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    memory = namedtuple("memory", "available")(1000)
    monkeypatch.setattr("first_trl.experiments.plan.probe.psutil.virtual_memory", lambda: memory)
    with pytest.raises(ValueError, match=r"--probe trains the teacher for a few steps: its .* Leave --probe out here"):
        plan_recipe(load_recipe("quickstart", TINY), probe=True)


def test_unknown_rows_are_refused(tmp_path):
    recipe = load_recipe("quickstart", ["task={name: commonsense_qa, splits: {train: train, validation: validation, test: test}, path: nowhere}",
        "evaluation.splits=[test]", "teacher.pretrain=null", "student.pretrain=null", "teacher.config.vocab_size=64", "student.config.vocab_size=64", "tokenizer=nowhere"])  # fmt: skip
    with pytest.raises(ValueError, match="--probe needs the rows of teacher, which are not on this machine"):
        plan_recipe(recipe, probe=True)


def test_it_belongs_to_a_dry_run(capsys):
    assert main(["run", "quickstart", "--probe"]) == 2
    assert "--probe belong to --dry-run" in capsys.readouterr().err
