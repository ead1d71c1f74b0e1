"""The whole plan: every recipe, what is finished, what is pushed, and how it reads."""

import dataclasses
import json
from pathlib import Path

import pytest

import first_trl
from first_trl.experiments.plan import format_plan, plan_recipe
from first_trl.experiments.recipe import load_recipe
from first_trl.experiments.stages.context import RunContext
from first_trl.experiments.stages.table import STAGE_TABLE
from first_trl.utils.resources import recipe_names


CONFIGS = Path(first_trl.__file__).parent / "experiments" / "plan" / "model_configs"
SMALL = [f"task.splits.{role}={{split: {role}, limit: 20}}" for role in ("train", "validation", "test", "ood")]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(("paper/", "modern/"))])
def test_every_recipe_of_real_models_is_planned_offline(name):
    plan = plan_recipe(load_recipe(name), processes=8, sharding="fsdp2", configs=CONFIGS)
    json.dumps(dataclasses.asdict(plan))
    for setting in plan.settings:
        assert [model.problem for model in setting.models] == [None, None]
        assert all(split.rows for split in setting.splits)
        assert all(cache.bytes for cache in setting.caches)
        assert all(training.steps for training in setting.trainings)
        assert all(memory.total for memory in setting.memory if "served" not in memory.note)
    text = format_plan(plan)
    for part in ("Runs", "Rows", "Models", "Memory per GPU (8 processes, fsdp2)", "Teacher cache", "Trainings"):
        assert f"\n{part}" in text


def test_numbers_of_one_plan():
    recipe = load_recipe("commonsense_qa", ["hub={namespace: me, arms: [first, first_lora]}", "seed=3"])
    plan = plan_recipe(recipe, configs=CONFIGS)
    [setting], [run] = plan.settings, plan.runs
    assert [model.parameters for model in setting.models] == [1_543_714_304, 494_032_768]
    assert setting.models[1].lora == {"first_lora": 8_798_208}
    steps = {training.unit: training.steps for training in setting.trainings}
    assert steps["teacher"] == steps["students/first"] == 3 * 274
    assert setting.caches[0].tokens == sum(split.all_tokens for split in setting.splits[:2])
    assert {push["repo_id"]: push["bytes"] for push in run.pushes} == {
        "me/commonsense_qa-seed-3-cache": setting.caches[0].bytes,
        "me/commonsense_qa-seed-3-first": 2 * 494_032_768,
        "me/commonsense_qa-seed-3-first_lora": 4 * 8_798_208,
    }
    text = format_plan(plan)
    assert "1.544 B" in text
    assert "LoRA 8.798 M (first_lora)" in text
    assert "me/commonsense_qa-seed-3-first_lora" in text
    assert "8,767" in text


def test_an_unknown_model_leaves_the_rest_of_the_plan():
    plan = plan_recipe(load_recipe("commonsense_qa", ["student.name_or_path=nobody/nothing"]), configs=CONFIGS)
    [setting] = plan.settings
    assert setting.models[0].problem is None
    assert "student.name_or_path=FOLDER" in setting.models[1].problem
    known = {memory.activity: memory.total is not None for memory in setting.memory}
    assert known == {
        "teacher, fine-tuning": True, "teacher, capture": True, "student, fine-tuning": False,
        "student, distillation": False,
    }  # fmt: skip
    assert all(training.steps == 822 for training in setting.trainings)
    assert "student.name_or_path=FOLDER" in format_plan(plan)


def test_a_batch_that_does_not_divide_is_told():
    plan = plan_recipe(load_recipe("commonsense_qa"), processes=3, configs=CONFIGS)
    training = plan.settings[0].trainings[0]
    assert training.steps is None
    assert "does not divide by 12" in training.note
    assert "does not divide by 12" in format_plan(plan)


def test_runs_of_seeds_and_a_grid():
    overrides = ["seeds=[0, 1]", "grid={capture.k: [2, 5], arms.first.recalibration_value: [0.2, 0.3]}"]
    plan = plan_recipe(load_recipe("commonsense_qa", overrides), configs=CONFIGS)
    assert [(run.seed, run.cell) for run in plan.runs] == [
        (seed, {"capture.k": k}) for k in (2, 5) for seed in (0, 1)
    ]  # fmt: skip
    assert plan.merged == "outputs/commonsense_qa/report"
    assert [setting.cell["capture.k"] for setting in plan.settings] == [2, 5]
    assert plan.settings[0].caches[0].bytes < plan.settings[1].caches[0].bytes
    units = [unit.unit for unit in plan.runs[0].units]
    assert "students/first@recalibration_value=0.2" in units
    text = format_plan(plan)
    # What the grid does not change is printed once
    assert text.count("\nModels") == 1
    assert text.count("\nTeacher cache") == 2


def test_a_committee_trains_its_members_and_is_captured_once():
    recipe = load_recipe("quickstart", [
        "teachers={mean: {committee: [teacher, one, two]}, one: {sft: {seed: 1}}, two: {sft: {seed: 2}}, unused: {}}",
        "arms={mean: {kind: distill, teacher: mean}}",
    ])  # fmt: skip
    [setting] = plan_recipe(recipe).settings
    trainings = [training.unit for training in setting.trainings if training.unit.startswith("teacher")]
    assert trainings == ["teacher", "teacher-one", "teacher-two"]
    assert [cache.unit for cache in setting.caches] == ["cache", "cache-mean"]
    # With folds: of each, the mean of those that did not see it
    recipe = load_recipe("quickstart", [
        "teachers={a: {folds: 2}, b: {folds: 2, sft: {seed: 1}}, mean: {committee: [a, b]}}",
        "arms={mean: {kind: distill, teacher: mean}}",
    ])  # fmt: skip
    plan = plan_recipe(recipe)
    units = [unit.unit for unit in plan.runs[0].units if unit.unit.startswith(("teacher-", "cache-"))]
    assert units == [
        *(f"teacher-{name}/fold-{fold}" for name in ("a", "b", "mean") for fold in (0, 1)),
        "cache-mean/fold-0", "cache-mean/fold-1",
    ]  # fmt: skip


def test_further_teachers_and_folds():
    recipe = load_recipe("quickstart", [
        "teachers={cross: {folds: 4}, short: {sft: {num_train_epochs: 1}}}",
        "arms={first: {kind: distill, teacher: cross}, other: {kind: distill, teacher: short}}",
    ])  # fmt: skip
    plan = plan_recipe(recipe)
    [setting] = plan.settings
    trainings = {training.unit: training for training in setting.trainings}
    assert [trainings[f"teacher-cross/fold-{fold}"].rows for fold in range(4)] == [1800] * 4
    assert trainings["teacher-short"].steps * 6 == trainings["teacher"].steps
    assert [cache.unit for cache in setting.caches] == ["cache", "cache-cross", "cache-short"]
    assert setting.caches[1].rows == 3600
    units = [unit.unit for unit in plan.runs[0].units]
    assert {"cache-cross/fold-3", "teacher-cross/fold-0", "recalibration"} <= set(units)


def test_finished_units_are_known_by_their_settings(tmp_path):
    overrides = [*SMALL, "task.splits.pretrain={split: pretrain, limit: 20}", "teacher.pretrain=null"]
    overrides += ["student.pretrain=null"]

    def statuses(*more):
        plan = plan_recipe(load_recipe("quickstart", [*overrides, *more], output_dir=str(tmp_path)))
        return plan, {unit.unit: unit.status for unit in plan.runs[0].units}

    assert set(statuses()[1].values()) == {"to do"}
    assert not list(tmp_path.iterdir())  # planning leaves nothing behind
    context = RunContext(load_recipe("quickstart", overrides, output_dir=str(tmp_path)))
    for stage in STAGE_TABLE[:2]:
        stage.run(context)
    (tmp_path / "teacher").mkdir()
    plan, found = statuses()
    assert [name for name, status in found.items() if status == "done"] == ["data", "base/teacher", "base/student"]
    assert "pretrain     done: base/teacher, base/student" in format_plan(plan)
    (tmp_path / "teacher" / "unit.json").write_text(json.dumps({"key": "other", "status": "done"}))
    assert statuses()[1]["teacher"] == "changed"
    other = statuses("seed=1")[1]
    assert (other["data"], other["base/teacher"]) == ("changed", "changed")
    assert statuses("training.num_train_epochs=1")[1]["data"] == "done"
    marker = json.loads((tmp_path / "base" / "student" / "unit.json").read_text())
    (tmp_path / "base" / "student" / "unit.json").write_text(json.dumps({**marker, "status": "running"}))
    assert statuses()[1]["base/student"] == "running"


def test_the_launch_tells_processes_and_sharding(monkeypatch):
    recipe = load_recipe("commonsense_qa")  # of published sizes: no rows are made to be counted
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert plan_recipe(recipe, configs=CONFIGS).sharding == "fsdp2"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert plan_recipe(recipe, configs=CONFIGS).sharding == "zero3"
    with pytest.raises(ValueError, match="must be one of none, fsdp2, zero3"):
        plan_recipe(recipe, sharding="magic")
