"""The runs a recipe stands for: seeds, cases, grids, and the arms that a grid makes."""

import re
from pathlib import Path

import pytest

from first_trl.experiments.recipe import cells, load_recipe, merged_folder


def expand(*overrides, **options):
    return cells(load_recipe("quickstart", list(overrides), **options))


def test_a_plain_recipe_is_one_run_in_its_own_folder():
    (run,) = expand()
    assert run.folder == Path("outputs/quickstart/seed-0")
    assert merged_folder(load_recipe("quickstart")) is None


def test_seeds_make_one_folder_each_and_a_seed_that_is_asked_for_keeps_its_own():
    assert [run.folder.name for run in expand("seeds=[3, 5]")] == ["seed-3", "seed-5"]
    assert [run.seed for run in expand("seeds=[3, 5]")] == [3, 5]
    (alone,) = expand("seeds=[3, 5]", seed=5)
    assert alone.folder == Path("outputs/quickstart/seed-5")
    (elsewhere,) = expand("seeds=[3, 5]", seed=5, output_dir="here")
    assert elsewhere.folder == Path("here/seed-5")
    assert merged_folder(load_recipe("quickstart", ["seeds=[3, 5]"], output_dir="here")) == Path("here")


def test_a_grid_of_an_arm_stays_in_one_run():
    (run,) = expand("grid={arms.first.recalibration_value: [0.1, 0.25], arms.direct.top_k: [1, 2]}")
    assert run.folder == Path("outputs/quickstart/seed-0")
    assert [name for name in run.arms if name.startswith("first@")] == [
        "first@recalibration_value=0.1",
        "first@recalibration_value=0.25",
    ]
    assert "first" not in run.arms
    arm = run.arms["first@recalibration_value=0.25"]
    assert (arm.recalibration_value, arm.swept) == (0.25, {"recalibration_value": 0.25})
    # What is applied to a swept arm is applied to each of its values
    scaled = run.arms["direct_ts@top_k=2"]
    assert (scaled.of, scaled.swept) == ("direct@top_k=2", {"top_k": 2})
    assert run.arms["first@recalibration_value=0.1"].label.endswith("recalibration_value = 0.1")


def test_a_grid_of_an_arm_behind_another_is_its_own():
    (run,) = expand("arms.n={kind: novelty_scaling, of: direct, novelty: {}}", "grid={arms.n.novelty.k: [1, 10]}")
    made = {name: run.arms[name] for name in run.arms if name.startswith("n@")}
    assert {name: (arm.of, arm.novelty.k) for name, arm in made.items()} == {
        "n@novelty.k=1": ("direct", 1),
        "n@novelty.k=10": ("direct", 10),
    }
    (run,) = expand("arms.n={kind: novelty_scaling, of: direct}", "grid={arms.direct.top_k: [1, 2]}")
    assert run.arms["n@top_k=2"].of == "direct@top_k=2"


def test_labels_take_the_values_they_name():
    (run,) = expand('arms.first.label="c is {recalibration_value}"', "grid={arms.first.recalibration_value: [0.3]}")
    assert run.arms["first@recalibration_value=0.3"].label == "c is 0.3"


def test_other_keys_and_cases_make_runs():
    runs = expand(
        "seeds=[0, 1]",
        "grid={training.learning_rate: [1e-3, 2e-3]}",
        "cases={a: {}, b: {task: {name: digits, splits: {train: train, validation: validation, test: test}}, "
        "teacher.pretrain: null, student.pretrain: null, evaluation.splits: [test], arms.first_lora: null}}",
    )
    assert len(runs) == 8
    assert runs[0].folder == Path("outputs/quickstart/a,training.learning_rate=0.001/seed-0")
    assert runs[0].cell == {"case": "a", "training.learning_rate": 1e-3}
    last = runs[-1]
    assert (last.task.name, last.training["learning_rate"], last.seed) == ("digits", 2e-3, 1)
    assert last.task.splits["test"].split == "test"  # the short form of a file works in a case too
    assert "first_lora" in runs[0].arms and "first_lora" not in last.arms
    assert runs[0].task.name == "noisy_world"  # one case leaves the others alone


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid={arms.frist.top_k: [1]}", "grid.arms.frist.top_k must read arms.NAME.KEY. Did you mean 'first'"),
        ("grid={arms.first.top_k: 3}", "grid.arms.first.top_k must be a list of values, got 3"),
        ("grid={arms.first.top_k: []}", "must be a list of values, got []"),
        ("grid={arms.first.topk: [1]}", "unknown key 'topk'. Did you mean 'top_k'"),
        ("grid={arms.first.top_k: [6]}", "top_k must be from 1 to capture.k = 5, got 6"),
        (
            "cases={a: {student.pretrain: null, student.pretrain.max_steps: 1}}",
            "'pretrain' is None, which has no keys",
        ),
        ("grid={trainig.learning_rate: [1]}", "there is no 'trainig' to change. Did you mean 'training'"),
        ("cases={a: 3}", "cases.a must map dotted keys to values"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        expand(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms.sft.estimator=bucket", "estimator has no meaning for kind sft, only for distill"),
        ("arms.teacher.lora={r: 4}", "lora has no meaning for kind teacher, only for sft and distill"),
        ("arms.first.teacher=early", "no teacher 'early'"),
        ("arms.first.data=[test]", "choose roles of task.splits that nothing is evaluated on"),
        ("arms.first.data=[]", "data is empty"),
        ("arms.first.token_dropout=1.0", "token_dropout must be in [0, 1)"),
        ("arms.first.select=ece", "select must be nll"),
        ("teachers={early: {folds: 1}}", "folds must be at least 2"),
        ("teachers={early: {fold_by: job}}", "fold_by must be group or id"),
        ("teachers={m: {committee: [teacher]}}", "teachers.m.committee must name two or more teachers"),
        ("teachers={m: {committee: [teacher, other]}}", "teachers.m.committee: no teacher 'other'"),
        ("teachers={a: {folds: 2}, m: {committee: [teacher, a]}}", "all be made of the same folds, or of none"),
        ("teachers={a: {}, m: {committee: [teacher, a], sft: {seed: 1}}}", "leave out sft, select and folds here"),
        ("teachers={a: {}, m: {committee: [teacher, a]}, n: {committee: [a, m]}}", "'m' is a committee itself"),
        ("arms.first.disagreement_weight=1.0", "needs a `teacher` with a `committee`"),
        ("arms.n={kind: novelty_scaling, of: first, novelty: {feature: disagreement}}", "is not distilled from one"),
        ("task.splits.ood={split: ood, unseen: pair}", "unseen must be group or question"),
        ("task.splits.validation={split: validation, unseen: group}", "only belongs to roles of evaluation.splits"),
        ("hub={namespace: me, arms: [teacher]}", "which trains no student"),
        ("report.baselines=[sfd]", "no arm 'sfd'. Did you mean 'sft'"),
        ("student.lora={}", "student.lora has no meaning"),
    ],
)
def test_combinations_without_a_meaning_are_refused(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe("quickstart", [override])


def test_a_teacher_of_folds_cannot_be_evaluated():
    with pytest.raises(ValueError, match="made of folds"):
        load_recipe("quickstart", ["teachers={cross: {folds: 4}}", "arms.teacher.teacher=cross"])


def test_a_committee_cannot_be_evaluated():
    with pytest.raises(ValueError, match="is a committee"):
        load_recipe("quickstart", ["teachers={a: {}, mean: {committee: [teacher, a]}}", "arms.teacher.teacher=mean"])


def test_an_override_reaches_into_a_case_and_leaves_the_rest_of_it():
    (whole,) = [run for run in cells(load_recipe("beyond_study", seed=40)) if run.cell == {"case": "digits"}]
    overrides = ["cases.digits.training.num_train_epochs=2", "cases.digits.teacher.sft.num_train_epochs=3"]
    overrides += ["cases.digits.task.max_length=32", "cases.digits.capture.k=7"]
    (run,) = [run for run in cells(load_recipe("beyond_study", overrides, seed=40)) if run.cell == {"case": "digits"}]
    assert run.training == whole.training | {"num_train_epochs": 2}
    assert run.teacher.sft == whole.teacher.sft | {"num_train_epochs": 3}
    assert (run.task.max_length, run.task.splits) == (32, whole.task.splits)
    assert run.capture.k == 7
    with pytest.raises(ValueError, match=r"there is no case 'digit'\. Did you mean 'digits'"):
        load_recipe("beyond_study", ["cases.digit.training.num_train_epochs=2"])


def test_an_override_of_one_arm_leaves_its_yaml_siblings_alone():
    recipe = load_recipe("beyond_study", ["arms.plus.training.max_steps=10"])
    assert recipe.arms["plus"].training == {"max_steps": 10}
    assert recipe.arms["plus_topk"].training == {"max_steps": 608}


def test_only_the_run_of_all_seeds_merges():
    assert load_recipe("quickstart_study").merge
    assert not load_recipe("quickstart_study", seed=0).merge


def test_no_two_runs_share_a_folder_and_no_two_arms_a_name():
    with pytest.raises(ValueError, match="two runs have the folder"):
        expand("seeds=[1, 1]")
    with pytest.raises(ValueError, match="makes the arm 'first@top_k=2' twice"):
        expand("grid={arms.first.top_k: [2, 2]}")
    (run,) = expand("grid={arms.first.recalibration_value: [0.3, 0.3000001]}")
    assert sum(name.startswith("first@") for name in run.arms) == 2


def test_local_names_are_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-teacher").mkdir()
    (tmp_path / "questions.csv").write_text("question,A,B,answer\n")
    names = ["teacher.name_or_path=my-teacher", "student.name_or_path=org/model", "task.path=questions.csv"]
    recipe = load_recipe("my_questions", names)
    assert recipe.teacher.name_or_path == str(tmp_path / "my-teacher")
    assert recipe.student.name_or_path == "org/model"
    assert recipe.task.path == str(tmp_path / "questions.csv")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms.first.recalibration=logit_temprature", "Did you mean 'logit_temperature'"),
        ("arms.first.estimator=buckett", "Did you mean 'bucket'"),
        ("arms.first.estimator=sampled", "needs draws: set capture.num_draws"),
        ("arms.first.recalibration_value=-3", "needs a finite temperature above 0"),
        ("arms.direct.min_value=1.0", "min_value has no effect without `recalibration`"),
        ("arms.label_smoothing.objective=nll", "is about a fit, and recalibration_value is given"),
        ("arms.first.student_temperature=0.5", "belongs to the estimator probability_softmax"),
        ("recalibration.objective=eec", "Did you mean 'ece'"),
        ("recalibration.methods=[logit]", "Did you mean 'logit_temperature'"),
        ("capture.k=0", "capture.k must be at least 1"),
        ("capture.logprob_dtype=float61", "Did you mean 'float16'"),
        ("task.on_overflow=dorp", "Did you mean 'drop'"),
        ("evaluation.batch_size=0", "evaluation.batch_size must be at least 1"),
        ("training.token_dropout=0.3", "is a key of the arm itself: arms.NAME.token_dropout"),
        ("arms.first.training.top_k=3", "is a key of the arm itself: arms.NAME.top_k"),
        ("training.hub_token=hf_x", "log in with `hf auth login`"),
        ("arms.bayes={kind: sft}", "'bayes' is the row of the true posterior"),
    ],
)
def test_a_typo_is_answered_before_the_teacher_is_trained(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe("quickstart", [override])


def test_one_server_cannot_be_several_teachers():
    options = ["teachers={other: {select: nll}}", "capture.vllm_url=http://127.0.0.1:8000"]
    with pytest.raises(ValueError, match="serves one teacher, and `teachers` names more"):
        load_recipe("quickstart", options)
