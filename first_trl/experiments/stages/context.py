"""What the stages of one run share: the recipe, the folder, the tokenizer, and the keys of its units."""

from functools import cached_property
from typing import Any

from transformers import AutoTokenizer

from ...tasks import Task, get_task
from ...tasks.source import looks_local
from ...utils.commits import hub_commit
from ...utils.files import write_json
from ..recipe import Recipe
from ..run_folder import DATA, RunFolder, read_json
from .units import Key, Unit, Workspace


class RunContext:
    """
    Args:
        recipe ([`Recipe`]): Of one run: one seed, no grid.
        stage (`str`, *optional*): Run only this stage; the others must be finished.

    Attributes:
        folder ([`RunFolder`]): Of the run.
        keys (`dict[str, Key]`): Content key of every unit so far.
        role_keys (`dict[str, str]`): Content key of the rows of each role.
        done (`set[str]`): Units whose files are there and of these settings.
    """

    def __init__(self, recipe: Recipe, stage: str | None = None) -> None:
        self.recipe = recipe
        self.folder = RunFolder(recipe.folder)
        self.workspace = Workspace(self.folder, stage)
        self.keys: dict[str, Key] = {}
        self.role_keys: dict[str, str] = {}
        self.done: set[str] = set()

    def add(self, unit: Unit, *, done: bool) -> None:
        """Note a unit's key for those behind it."""
        self.keys[unit.name] = unit.key
        if done:
            self.done.add(unit.name)

    @property
    def is_main(self) -> bool:
        return bool(self.workspace.state.is_main_process)

    def tokenizer(self, model: str = "student") -> Any:
        """The tokenizer of rows, caches and students; that of a `teacher` is another one with `capture.target: options`."""
        recipe = self.recipe
        name, revision = recipe.tokenizer_source
        if model == "teacher" and recipe.capture.target == "options" and recipe.teacher.name_or_path is not None:
            name, revision = recipe.teacher.name_or_path, recipe.teacher.init_kwargs.get("revision")
            return AutoTokenizer.from_pretrained(name, revision=run_commit(self, name, revision))
        task = get_task(recipe.task.name, **recipe.task.options)
        # Others than these ask the Hub nothing: the rows may all be local
        if recipe.tokenizer is None and type(task).tokenizer is not Task.tokenizer:
            data = self.data_revision(task, recipe.task.path, recipe.task.revision)
            tokenizer = task.tokenizer(path=recipe.task.path, revision=data, seed=recipe.seed)
            if tokenizer is not None:
                return tokenizer
        if name is None:
            raise ValueError(
                f"Task {recipe.task.name!r} brings no tokenizer, and the model it would come from is made from scratch: name one with the "
                "recipe's `tokenizer` key."
            )
        return AutoTokenizer.from_pretrained(name, revision=run_commit(self, name, revision))

    def data_revision(self, task: Task, path: str | None, revision: str | None) -> str | None:
        """Revision for [`~Task.load`]: where the rows come from the Hub, the same commit all through a run."""
        source = path or task.hub_id
        if source is None or looks_local(source):
            return revision
        return run_commit(self, source, revision, repo_type="dataset")

    def has_choices(self, role: str) -> bool:
        """Whether the rows of a role are multiple choice; others are free text."""
        return bool(read_json(self.folder.counts)[role]["choices"])

    @cached_property
    def has_posterior(self) -> bool | None:
        """Whether every evaluated row comes with its true answer distribution; `None` where the rows are not there."""
        roles = self.recipe.evaluation.splits
        if DATA not in self.done or not all(self.folder.rows(role).is_dir() for role in roles):
            return None
        return all("posterior" in self.folder.load_rows(role).column_names for role in roles)


def run_commit(run: Any, name: str, revision: str | None, **options: Any) -> str | None:
    """
    Commit that a revision of a repository of the Hub stands for all through a run: what was made of one must not be
    continued, or compared, with another that the name stands for since.

    Args:
        run ([`RunContext`]): The run, which keeps it.
        name (`str`): Id of a repository, or a folder.
        revision (`str`, *optional*): As the recipe asks for.
        options: As of [`hub_commit`].

    Returns:
        `str`: the commit, or the revision asked for where nothing tells it.
    """
    path = run.folder.commits
    known = read_json(path) if path.is_file() else {}
    key = f"{options.get('repo_type', 'model')} {name}" + (f"@{revision}" if revision else "")
    if key not in known and (commit := hub_commit(name, revision, **options)):
        known[key] = commit
        if run.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
    return known.get(key, revision)
