"""Questions of one's own in a run: copies, answers of several tokens, and what a dry run says of data it cannot read."""

import json
import os

import pytest
from datasets import load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from first_trl.cli import main
from first_trl.experiments.recipe import load_recipe
from first_trl.experiments.stages.context import RunContext
from first_trl.experiments.stages.data import data_units
from tests.support.tiny import tiny_llama


WORDS = [
    "which",
    "thing",
    "floats",
    "?",
    "Answer",
    "Choices",
    ":",
    "(",
    "A",
    ")",
    "B",
    "C",
    "cork",
    "anvil",
    "brick",
    "of",
    "kind",
]
NUMBERS = [str(i) for i in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model whose tokenizer has a token a word, and `anvil` as two."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *WORDS, "\n", " ", *[f" {word}" for word in WORDS], *NUMBERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=r" ", behavior="merged_with_next")
    folder = tmp_path_factory.mktemp("model")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    tiny_llama(vocab_size=len(vocabulary), max_position_embeddings=128).save_pretrained(folder)
    return folder


def question(i, answer="A"):
    return f"which thing floats of kind {i} ?,cork,anvil,brick,{answer}\n"


def write(folder, rows, name="questions.csv"):
    path = folder / name
    path.write_text("question,A,B,C,answer\n" + "".join(rows))
    return path


def words(path, model, *more):
    return [
        "my_questions",
        "task.options.shuffle_seed=null",
        f"task.path={path}",
        f"teacher.name_or_path={model}",
        f"student.name_or_path={model}",
        *more,
    ]


def counts(folder):
    return json.loads((folder / "data" / "counts.json").read_text())


@pytest.fixture
def parts(tmp_path):
    """A folder with a file a split: question 3 in train and validation, 8 in train and test, 5 twice with two answers."""
    folder = tmp_path / "questions"
    folder.mkdir()
    write(folder, [question(i) for i in range(10)] + [question(5, "B")], "train.csv")
    write(folder, [question(i) for i in (3, 10, 11)], "validation.csv")
    write(folder, [question(i) for i in (8, 12, 13)], "test.csv")
    return folder


WORDS_AND_LETTER = 'task.options={completion: " {text} {letter}"}'
SPLITS = "task.splits={train: train, validation: validation, test: test}"


def test_the_data_stage_drops_what_is_evaluated_or_contradicted(parts, model, tmp_path, capsys):
    run = ["run", *words(parts, model, SPLITS), "--stage", "data", "--output-dir"]
    assert main([*run, str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "1 dropped (same question as in validation), 2 dropped (same question with another answer)" in out
    assert counts(tmp_path / "run")["train"]["dropped"] == {
        "same question as in validation": 1,
        "same question as in test": 1,
        "same question with another answer": 2,
    }
    tokens = load_from_disk(str(tmp_path / "run" / "data" / "tokens" / "train"))
    assert tokens["id"][:] == [f"custom-train-{i}" for i in (0, 1, 2, 4, 6, 7, 9)]
    assert main([*run, str(tmp_path / "kept"), "task.options.drop_copies=false"]) == 0
    assert counts(tmp_path / "kept")["train"]["rows"] == 11


def test_training_rows_yield_to_the_rows_of_thresholds(parts, model, tmp_path):
    write(parts, [question(i) for i in (9, 14, 15)], "ood.csv")
    splits = SPLITS.replace("test: test", "test: test, threshold: ood")
    run = ["run", *words(parts, model, splits), "--stage", "data", "--output-dir", str(tmp_path / "run")]
    assert main(run) == 0
    assert counts(tmp_path / "run")["train"]["dropped"]["same question as in threshold"] == 1

    def key(name, *overrides):
        run = RunContext(load_recipe(name, overrides))
        data_units(run)
        return run.role_keys["train"]

    assert key(*words(parts, model, splits)) != key(*words(parts, model, SPLITS))


def test_what_models_read_first_yields_to_what_is_evaluated(parts, model, tmp_path):
    """A model made from scratch would have read the questions of the test with their answers."""
    write(parts, [question(i) for i in (0, 3, 8, 16)], "ood.csv")
    splits = SPLITS.replace("test: test", "test: test, pretrain: ood")
    run = ["run", *words(parts, model, splits), "--stage", "data", "--output-dir", str(tmp_path / "run")]
    assert main(run) == 0
    found = counts(tmp_path / "run")["pretrain"]
    assert found["dropped"] == {"same question as in validation": 1, "same question as in test": 1}
    assert found["rows"] == 2


def test_rows_of_validation_may_be_evaluated_on_purpose(parts, model, tmp_path):
    splits = SPLITS.replace("test: test", "test: test, again: validation")
    run = ["run", *words(parts, model, splits, "evaluation.splits=[test, again]"), "--stage", "data"]
    assert main([*run, "--output-dir", str(tmp_path / "run")]) == 0
    found = counts(tmp_path / "run")
    assert (found["validation"]["rows"], found["again"]["rows"], found["train"]["rows"]) == (3, 3, 7)


def test_a_dry_run_counts_the_same(parts, model, capsys):
    assert main(["run", *words(parts, model, SPLITS), "--dry-run", "--json"]) == 0
    train = json.loads(capsys.readouterr().out)["settings"][0]["splits"][0]
    assert train["rows"] == 7 and "2 dropped (same question with another answer)" in train["notes"]


def test_training_rows_depend_on_the_roles_that_they_yield_to(parts, model):
    def keys(name, *overrides):
        run = RunContext(load_recipe(name, overrides))
        data_units(run)
        return run.role_keys

    own = words(parts, model, SPLITS)[1:]
    before, after = keys("my_questions", *own), keys("my_questions", *own, "task.splits.test={split: train}")
    assert all(before[role] != after[role] for role in ("train", "validation", "test"))
    off = "task.options.drop_copies=false"
    before, after = keys("my_questions", *own, off), keys("my_questions", *own, off, "task.splits.test={split: train}")
    assert before["train"] == after["train"] and before["test"] != after["test"]
    # Draws of a generated task are no copies: a further evaluation role trains nothing again
    before, after = keys("quickstart"), keys("quickstart", "task.splits.ood={split: ood, limit: 9}")
    assert before["train"] == after["train"] and before["ood"] != after["ood"]


def test_both_fine_tunings_project_the_answers_alone():
    recipe = load_recipe("my_questions")
    assert recipe.teacher.sft["fused_loss"] is True and recipe.training["fused_loss"] is True


def test_answers_corrected_in_place_are_read_again(parts, model, tmp_path, capsys):
    """The same file, of the same size and time: what counts is what it says."""
    run = ["run", *words(parts, model, SPLITS), "--stage", "data", "--output-dir", str(tmp_path / "run")]

    def gold(role):
        assert main(run) == 0
        rows = load_from_disk(str(tmp_path / "run" / "data" / "rows" / role))
        return rows["gold"][:], ": running" in capsys.readouterr().out

    assert gold("test") == ([0, 0, 0], True)
    assert gold("test") == ([0, 0, 0], False)
    before = (parts / "test.csv").stat()
    path = write(parts, [question(i, "C") for i in (8, 12, 13)], "test.csv")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert gold("test") == ([2, 2, 2], True)
    os.utime(path, ns=(0, 0))
    assert gold("test") == ([2, 2, 2], False)


TWO_TOKENS = "the answer ' cork A' is 2 tokens"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([WORDS_AND_LETTER, "evaluation.scoring=choices", "arms.direct.restrict_to_choices=true"], TWO_TOKENS),
        (["task.max_length=8", "task.on_overflow=error"], "max_length"),
        (["arms.direct.soft_label_weight=0.5"], "the rows of 'train' have no soft labels"),
        (["task.splits.train=unlabelled"], "The rows of 'train' have no answers"),
        (["task.splits.train=validation", "task.splits.test=validation"], "No row of 'train' is left without copies"),
    ],
)
def test_a_dry_run_refuses_what_the_data_stage_refuses(parts, model, change, message, tmp_path, capsys):
    write(parts, [question(i, "") for i in (20, 21)], "unlabelled.csv")
    run = ["run", *words(parts, model, SPLITS, *change)]
    for more in (["--dry-run"], ["--stage", "data", "--output-dir", str(tmp_path / "run")]):
        assert main([*run, *more]) == 2
        assert message in capsys.readouterr().err


def test_nothing_left_to_train_on_is_said(model, tmp_path, capsys):
    folder = tmp_path / "questions"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        write(folder, [question(i) for i in range(4)], f"{name}.csv")
    assert main(["run", *words(folder, model, SPLITS), "--stage", "data", "--output-dir", str(tmp_path / "run")]) == 2
    assert "No row of 'train' is left without copies (4 same question as in test)" in capsys.readouterr().err


def test_answers_of_two_tokens_are_refused_before_anything_is_trained(parts, model, tmp_path, capsys):
    run = ["run", *words(parts, model, SPLITS, WORDS_AND_LETTER)]
    assert main([*run, "--stage", "data", "--output-dir", str(tmp_path / "run")]) == 2
    assert "Role 'test', custom-test-0: the answer ' cork A' is 2 tokens behind the prompt" in capsys.readouterr().err
    assert main([*run, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert "the answer ' cork A' is 2 tokens" in err and "Trainings" in out


def test_a_target_over_choices_needs_answers_of_one_token_too(parts, model, tmp_path, capsys):
    """However they are evaluated: refused before anything is trained, at the rows that are trained on."""
    run = ["run", *words(parts, model, SPLITS, WORDS_AND_LETTER)]
    run += ["evaluation.scoring=choices", "--stage", "data", "--output-dir"]
    assert main([*run, str(tmp_path / "whole")]) == 0
    assert main([*run, str(tmp_path / "run"), "arms.direct.restrict_to_choices=true"]) == 2
    assert "Role 'train', custom-train-0: the answer ' cork A' is 2 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.options.templat=x", "has no option 'templat'"),
        ("task.splits.train=trian", "has no split 'trian'"),
        ("task.path=nowhere.csv", "there is no file or folder 'nowhere.csv'"),
    ],
)
def test_a_dry_run_of_what_would_not_run_exits_2(parts, model, change, message, capsys):
    assert main(["run", *words(parts, model, SPLITS, change), "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert message in err and "Plan of my_questions" in out and "a run would stop here" in out


def test_a_dry_run_of_unreadable_rows_says_which(parts, model, capsys):
    (parts / "validation.csv").write_text("question,A,B,C,answer\n" + question(1) + "one, too,many,cells,here,A\n")
    assert main(["run", *words(parts, model, SPLITS), "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert "validation.csv, row 2 (line 3) has 6 cells under 5 columns" in err
    assert "train" in out and "counted" in out
