"""The README's code is run as it stands, with folders of the names it uses; commands of the pages are real ones."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from first_trl.cli import main
from first_trl.experiments.recipe import load_recipe
from first_trl.utils.resources import recipe_names
from first_trl.vocabulary import STAGES
from tests.support.readme import README, RECIPES, ROOT, block, commands
from tests.support.tiny import tiny_llama, tiny_tokenizer


def test_python_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    for name, seed in (("my-teacher-sft", 0), ("my-student", 1)):
        tiny_llama(seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    row = json.dumps({"prompt": "w3 w4 w5", "completion": " w6 w7"})
    for split in ("train", "validation"):
        Path(f"{split}.jsonl").write_text("\n".join([row] * 16))
    code = block("In Python")
    assert len(code.strip().splitlines()) <= 15
    with pytest.warns(UserWarning, match="below 1000"):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert list((tmp_path / "cache" / "data").glob("train-*.parquet"))


def test_calibration_example():
    exec(compile(block("Calibration of anything"), "README.md", "exec"), {"__name__": "__main__"})


def test_exactly_two_setup_commands():
    commands = [line for line in README.splitlines() if line.startswith("python3.11 -m venv")]
    assert len(commands) == 2
    assert "first-trl run recipes/quickstart.yaml" in commands[0]
    assert "pytest" in commands[1]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md"])
def test_every_command_is_one(page):
    found = commands((ROOT / page).read_text(encoding="utf-8"))
    assert len(found) >= 5
    for command in found:
        name, *words = shlex.split(command)[1:]
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"first_trl.cli.{name}").add_arguments(parser)
        if "..." in words:
            continue
        args = parser.parse_intermixed_args(words)
        if name == "run" and args.recipe != "my_recipe.yaml":
            load_recipe(args.recipe, overrides=args.overrides)


def test_nothing_is_installed_by_a_name_that_the_index_lacks():
    """The package is installed from a checkout; behind that, its extras have a name that pip knows."""
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("recipes/*.md"),
        *ROOT.glob(".github/*.md"),
        *ROOT.glob("model_cards/*.j2"),
    ]
    pages += (ROOT / "first_trl").rglob("*.md")
    for page in pages:
        installed = re.findall(r"pip install[^`\n&]*", page.read_text(encoding="utf-8"))
        assert not [line for line in installed if re.search(r"\bfirst[_-]trl\b(?!\[)", line)], page


def test_every_recipe_is_in_the_table():
    table = RECIPES.split("\n## All recipes\n")[1].split("\n## ")[0]
    named = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    assert named == set(recipe_names())


def test_the_words_are_those_of_the_code(capsys):
    for word in ("role", "arm", "cell", "stage", "unit"):
        assert RECIPES.count(f"- **{word}**: ") == 1
    assert f"in this order: {', '.join(STAGES)}." in RECIPES
    assert main(["recipes", "list"]) == 0 and "quickstart" in capsys.readouterr().out
