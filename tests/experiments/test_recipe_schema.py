"""The JSON schema that editors read is that of the code, and says of a recipe what the code says."""

import json
from pathlib import Path

import jsonschema
import pytest

from first_trl.cli import main
from first_trl.experiments.recipe.read import apply_override, read_yaml
from first_trl.utils.resources import recipe_names, recipe_path


SCHEMA = recipe_path("quickstart").parent / "recipe.schema.json"


def test_the_schema_beside_the_recipes_is_up_to_date(tmp_path):
    assert main(["recipes", "schema", "--output", str(tmp_path / "schema.json")]) == 0
    written = (tmp_path / "schema.json").read_text()
    assert written == SCHEMA.read_text(), "Run `first-trl recipes schema --output recipes/recipe.schema.json`."


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_recipe_names_the_schema_and_fits_it(name):
    text = recipe_path(name).read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (recipe_path(name).parent / first.partition("=")[2]).resolve() == Path(SCHEMA).resolve()
    jsonschema.validate(read_yaml(text), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    "override",
    ["capture.K=3", "training.learning_rat=1", "arms.first.kind=distil", "arms.first.top_k=0", "capture.k=many",
     "arms.first.estimator=buckett", "teacher.init_kwargs={dtyp: bfloat16}", "arms.first_lora.lora.lora_alfa=1"],
)  # fmt: skip
def test_an_editor_marks_the_mistakes(override):
    data = read_yaml(recipe_path("quickstart").read_text(encoding="utf-8"))
    apply_override(data, override)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json.loads(SCHEMA.read_text()))
