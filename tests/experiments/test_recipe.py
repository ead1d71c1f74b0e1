"""Recipes: what is read, what is refused, and with which words."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from first_trl.experiments.recipe import load_recipe
from first_trl.utils.resources import recipe_names, recipe_path


def write(tmp_path: Path, change=None) -> str:
    data = yaml.safe_load(recipe_path("quickstart").read_text())
    if change:
        change(data)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_shipped_recipe_is_valid(name):
    assert load_recipe(name).name


def test_a_name_a_file_and_a_checkout_path_are_the_same_recipe(tmp_path):
    by_name = load_recipe("quickstart")
    assert by_name == load_recipe(str(recipe_path("quickstart"))) == load_recipe("recipes/quickstart.yaml")


def test_numbers_in_scientific_notation_are_numbers():
    assert load_recipe("quickstart").training["learning_rate"] == 3e-3
    assert load_recipe("quickstart", ["training.learning_rate=2e-5"]).training["learning_rate"] == 2e-5


def test_overrides_seed_and_folder():
    recipe = load_recipe("quickstart", ["capture.k=3", "training.num_train_epochs=1"], seed=7)
    assert (recipe.capture.k, recipe.training["num_train_epochs"], recipe.seed) == (3, 1, 7)
    assert recipe.folder == Path("outputs/quickstart/seed-7")
    assert load_recipe("quickstart", output_dir="here").folder == Path("here")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("traning.x=1", "unknown key 'traning'. Did you mean 'training'"),
        ("capture.K=3", "unknown key 'K'. Did you mean 'k'"),
        ("training.num_epochs=3", "unknown training argument 'num_epochs'. Did you mean 'num_train_epochs'"),
        ("teacher.sft.learning_rat=3", "Did you mean 'learning_rate'"),
        ("arms.first.kind=distil", "Did you mean 'distill'"),
        ("arms.sft_ts.of=sfd", "must name a trained arm"),
        (
            "arms.sft.of=direct",
            "of has no meaning for kind sft, only for temperature_scaling and novelty_scaling and agreement_scaling",
        ),
        ("arms.sft.novelty={k: 3}", "novelty has no meaning for kind sft, only for novelty_scaling"),
        ("arms.n={kind: novelty_scaling, of: sft_ts}", "must name a trained arm"),
        ("arms.n={kind: novelty_scaling, of: sft, novelty: {metric: l2}}", "must be cosine, pca or mahalanobis"),
        ("arms.n={kind: novelty_scaling, of: sft, novelty: {folds: 1}}", "folds must be at least 2, got 1"),
        (
            "arms.n={kind: novelty_scaling, of: sft, novelty: {fit: cross_group, feature: hidden_state}}",
            "fitted on validation rows",
        ),
        (
            "arms.n={kind: novelty_scaling, of: sft, novelty: {fit: steepest, feature: hidden_state}}",
            "is for one feature",
        ),
        (
            "arms.n={kind: novelty_scaling, of: sft, novelty: {fit: cross_group, feature: disagreement}}",
            "the feature disagreement is fitted on validation rows",
        ),
        ("arms.n={kind: agreement_scaling, of: sft}", "prompts must name 'validation' or a role of evaluation.splits"),
        ("evaluation.splits=[tset]", "'tset', which task.splits does not hold"),
        ("capture.k=many", "capture.k must be of type int"),
        ("evaluation.null_draws=0", "evaluation.null_draws must be at least 1, got 0"),
        ("seed=true", "seed must be of type int"),
        ("teacher.architecture=null", "needs `name_or_path` (a pretrained model) or `architecture`"),
        ("student.sft={}", "students are arms"),
        ("seed", "must read key.sub=value"),
        ("seed.x=1", "holds a value, not a mapping"),
    ],
)
def test_mistakes_are_named_with_the_mend(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe("quickstart", [override])


def test_missing_keys_files_and_broken_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe of that name\. Did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(ValueError, match="missing key 'task'"):
        load_recipe(write(tmp_path, lambda data: data.pop("task")))
    with pytest.raises(ValueError, match="must name the rows for 'validation'"):
        load_recipe(write(tmp_path, lambda data: data["task"]["splits"].pop("validation")))
    with pytest.raises(ValueError, match=r"name task\.splits\.pretrain"):
        load_recipe(write(tmp_path, lambda data: data["task"]["splits"].pop("pretrain")))
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(str(path))
    path.write_text("- a")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_recipe(str(path))


def test_the_command_line_answers_a_typo_in_one_line_and_without_torch():
    code = (
        "import sys; from first_trl.cli import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch was loaded'; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, "run", "quikstart"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("first-trl: There is no recipe file 'quikstart'")
    assert done.stderr.count("\n") == 1


def test_recipes_commands(capsys):
    from first_trl.cli import main

    assert main(["recipes", "list"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["recipes", "check"]) == 0
    assert "quickstart: valid" in capsys.readouterr().out
    assert main(["recipes", "check", "absent.yaml"]) == 2
