"""What the stages of one run share: the recipe, the folder, the rows, and the keys of what is finished."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from ...tasks import get_task
from ..recipe import Recipe
from .workspace import Workspace


class RunContext:
    """
    Args:
        recipe ([`Recipe`]): Of one run: one seed, no grid.
        stage (`str`, *optional*): Run only this stage; the others must be finished.

    Attributes:
        keys (`dict[str, str]`): Content key of every unit that is finished.
    """

    def __init__(self, recipe: Recipe, stage: str | None = None) -> None:
        self.recipe = recipe
        self.workspace = Workspace(recipe.folder, stage)
        self.keys: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def is_main(self) -> bool:
        return bool(self.workspace.state.is_main_process)

    def tokenizer(self) -> Any:
        recipe = self.recipe
        name = recipe.tokenizer or recipe.teacher.name_or_path
        task = get_task(recipe.task.name, **recipe.task.options)
        tokenizer = task.tokenizer(path=recipe.task.path, revision=recipe.task.revision, seed=recipe.seed)
        if recipe.tokenizer is None and tokenizer is not None:
            return tokenizer
        if name is None:
            raise ValueError(
                f"Task {recipe.task.name!r} brings no tokenizer and the teacher is made from scratch: name one with the "
                "recipe's `tokenizer` key."
            )
        return AutoTokenizer.from_pretrained(name, revision=self.tokenizer_revision)

    @property
    def tokenizer_revision(self) -> str | None:
        """The teacher's, whose tokenizer it is unless the recipe names another."""
        return None if self.recipe.tokenizer is not None else self.recipe.teacher.init_kwargs.get("revision")

    def rows(self, role: str) -> Dataset:
        """Rows of a role as the task gives them."""
        return load_from_disk(str(self.folder / "data" / "rows" / role))

    def tokens(self, role: str) -> Dataset:
        """Rows of a role, tokenised and labelled."""
        return load_from_disk(str(self.folder / "data" / "tokens" / role))

    def counts(self) -> dict[str, Any]:
        """What became of the rows of each role."""
        counts: dict[str, Any] = json.loads((self.folder / "data" / "counts.json").read_text(encoding="utf-8"))
        return counts

    def has_choices(self, role: str) -> bool:
        """Whether the rows of a role are multiple choice; others are free text."""
        return bool(self.counts()[role]["choices"])
