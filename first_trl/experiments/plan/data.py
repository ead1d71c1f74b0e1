"""Rows and tokens of every role: counted where the rows are here or generated, else from published sizes."""

import logging
import re
import string
import zlib
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, ReadInstruction
from transformers import AutoTokenizer

from ...tasks import Task, TaskSplit, get_task, tokenize_rows
from ...tasks.answers import check_answers
from ...tasks.copies import find_copies, nothing_left
from ...tasks.sizes import SplitSize
from ...utils.tables import file_kind
from ...vocabulary import IGNORE_INDEX
from ..recipe import Recipe, SplitSpec
from ..stages.data import check_rows, honest_roles, is_tokenised, scorings, yielding_roles
from .schema import SplitPlan


# English in the vocabularies of today's models. Alpaca has 4.4 characters a GPT-2 token, lettered choices 3.2 to 3.8
CHARS_PER_TOKEN = 4.0
# Rows that are tokenised to learn how long they are
_SAMPLE = 200
_WIDEST = 100
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Options that change the text of a prompt, or nothing; any other changes which rows there are
_TEXT_OPTIONS = ("template", "completion", "subset", "with_passage", "drop_copies")


class _Unknown(Exception):
    """What a plan cannot know and a run can."""


def find_tokenizer(recipe: Recipe) -> Any:
    """The recipe's tokenizer when it is on this machine, else `None`."""
    task = recipe.task
    name, revision = recipe.tokenizer_source
    try:
        if recipe.tokenizer is None:
            source = get_task(task.name, **task.options)
            own = source.tokenizer(path=task.path, revision=task.revision, seed=recipe.seed)
            if own is not None:
                return own
        if name is None:
            return None
        folder = Path(name)
        # From a folder without a vocabulary, transformers makes a tokenizer of one token
        if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
            return None
        return AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def plan_splits(recipe: Recipe, tokenizer: Any) -> list[SplitPlan]:
    """One [`SplitPlan`] a role, in the recipe's order. What cannot be known stays open, with a note that says why."""
    read: dict[str, TaskSplit] = {}
    plans = [_plan(recipe, role, spec, tokenizer, read) for role, spec in recipe.task.splits.items()]
    honest = {role: read[role] for role in honest_roles(recipe) if role in read}
    copies = find_copies(honest, [role for role in yielding_roles(recipe) if role in honest])
    for plan, spec in zip(plans, recipe.task.splits.values(), strict=True):
        for reason, number in copies.dropped.get(plan.role, {}).items():
            plan.rows = (plan.rows or 0) - number
            plan.notes.append(f"{number} dropped ({reason})")
        if plan.rows == 0 and plan.role in copies.dropped:
            plan.problem = plan.problem or nothing_left(plan.role, copies.dropped[plan.role])
        if spec.unseen is not None:
            plan.notes.append(f"training rows that share a {spec.unseen} with it are dropped; not counted here")
    if not any(plan.problem for plan in plans):
        try:
            check_rows(recipe, {role: split.dataset for role, split in read.items()})
        except ValueError as error:
            plans[0].problem = str(error)
    return plans


def _plan(recipe: Recipe, role: str, spec: SplitSpec, tokenizer: Any, read: dict[str, TaskSplit]) -> SplitPlan:
    task = recipe.task
    name, options = spec.task or task.name, dict(spec.options or {})
    if spec.task is None:
        options = {**task.options, **options}
    path = spec.path or (task.path if spec.task is None else None)
    plan = SplitPlan(role, name, spec.split)
    try:
        source = get_task(name, **options)
        source.split_name(spec.split)
        source.check_path(path)
        here = source.hub_id is None and not source.needs_path
        if here or (path is not None and Path(path).expanduser().exists()):
            read[role] = _count(plan, recipe, source, spec, path, tokenizer)
        elif path is not None and path != source.hub_id:
            _ask_hub(plan, source, spec, path, task.revision if spec.task is None else None)
        else:
            _published(plan, recipe, source, spec, options)
    except _Unknown as error:
        plan.basis = "unknown"
        plan.notes.append(str(error))
    except (OSError, ValueError) as error:
        plan.basis, plan.problem = "unknown", str(error).strip()
    _limit(plan, recipe, role)
    return plan


def _count(
    plan: SplitPlan, recipe: Recipe, source: Task, spec: SplitSpec, path: str | None, tokenizer: Any
) -> TaskSplit:
    task = recipe.task
    split = source.load(
        spec.split,
        path=path,
        revision=task.revision if spec.task is None and path is None else None,
        limit=spec.limit,
        seed=recipe.seed,
    )
    rows = split.dataset
    plan.rows = len(rows)
    plan.key_bytes = _key_bytes(rows)
    plan.basis = "counted"
    plan.notes += [f"{number} dropped ({reason})" for reason, number in split.reasons.items()]
    text = plan.role == "pretrain"
    sample = rows.select(range(0, len(rows), max(1, len(rows) // _SAMPLE)))
    unlabelled = not text and all(completion is None for completion in sample["completion"])
    answers = any(sample["choices"])
    if tokenizer is not None:
        supervise = "all" if text else "answer_position" if unlabelled else "completion"
        append_eos = task.append_eos and not text and not unlabelled
        tokens = _tokenize(sample, tokenizer, supervise, append_eos)
        lengths = [len(row) for row in tokens["input_ids"]]
        widest = _tokenize(_widest(rows), tokenizer, supervise, append_eos)
        # The first token of a row is never scored
        scored = [sum(label != IGNORE_INDEX for label in row[1:]) for row in tokens["labels"]]
        plan.tokens, plan.positions = sum(lengths) / len(lengths), sum(scored) / len(scored)
        plan.longest = max(*lengths, *(len(row) for row in widest["input_ids"]))
        plan.basis += f", {len(sample)} rows tokenised"
        try:
            for scoring in scorings(recipe, plan.role) if answers else ():
                check_answers(tokenizer, rows, scoring)
            too_long = task.max_length is not None and plan.longest > task.max_length
            if too_long and task.on_overflow == "error" and not text and is_tokenised(recipe, plan.role, answers):
                _tokenize(_widest(rows), tokenizer, supervise, append_eos, max_length=task.max_length)
        except ValueError as error:
            plan.problem = str(error)
        return split
    prompts = [len(prompt) for prompt in sample["prompt"]]
    completions = [len(completion or "") for completion in sample["completion"]]
    _from_chars(plan, recipe, sum(prompts) / len(prompts), sum(completions) / len(completions), answers, text)
    plan.longest = round(max(_chars(_widest(rows))) / CHARS_PER_TOKEN) + 1
    plan.basis += f", {CHARS_PER_TOKEN:g} characters a token"
    return split


def _widest(rows: Dataset) -> Dataset:
    """The rows with the most characters, among which the one with the most tokens should be."""
    lengths = _chars(rows)
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])
    return rows.select(order[:_WIDEST])


def _chars(rows: Dataset) -> list[int]:
    return [len(a) + len(b or "") for a, b in zip(rows["prompt"], rows["completion"], strict=True)]


def _tokenize(
    sample: Dataset, tokenizer: Any, supervise: Any, append_eos: bool, max_length: int | None = None
) -> Dataset:
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return tokenize_rows(
            sample, tokenizer, supervise=supervise, append_eos=append_eos, max_length=max_length, on_overflow="error"
        ).dataset
    finally:
        if bars:
            datasets.enable_progress_bars()


def _from_chars(
    plan: SplitPlan, recipe: Recipe, prompt: float, completion: float, answers: bool, text: bool = False
) -> None:
    # An answer is one token, whatever its letters are
    scored = 1.0 if answers else completion / CHARS_PER_TOKEN
    end = 1.0 if recipe.task.append_eos and not text else 0.0
    plan.tokens, plan.positions = prompt / CHARS_PER_TOKEN + scored + end, scored + end


def _published(plan: SplitPlan, recipe: Recipe, source: Task, spec: SplitSpec, options: dict[str, Any]) -> None:
    name = spec.split.partition("[")[0]
    size = source.published.get(f"{source.hub_config}/{name}") or source.published.get(name)
    other = sorted(set(options) - set(_TEXT_OPTIONS))
    if size is None or other:
        why = f"the option {other[0]!r} changes which rows there are" if other else "no size of this split is known"
        raise _Unknown(f"{why}; give a local copy: task.path=FOLDER")
    plan.rows = _slice(size.rows, name, spec.split)
    if spec.limit is not None:
        plan.rows = min(plan.rows, spec.limit)
    plan.key_bytes = size.key_bytes
    plan.basis = "published size"
    if options.get("with_passage", True) is False or "{text}" in str(options.get("completion", "")):
        plan.notes.append("lengths unknown with these options; give a local copy: task.path=FOLDER")
        return
    lengths = size if size.prompt_chars is not None else _relative(source)
    if lengths is None:
        plan.notes.append("lengths unknown; give a local copy: task.path=FOLDER")
        return
    if lengths is not size:
        plan.notes.append("lengths of another split of the benchmark")
    _from_size(plan, source, lengths)
    if recipe.task.append_eos and name not in source.unlabelled_splits:
        plan.tokens, plan.positions = (plan.tokens or 0.0) + 1, (plan.positions or 0.0) + 1


def _from_size(plan: SplitPlan, source: Task, size: SplitSize) -> None:
    prompt = size.prompt_tokens
    measured = prompt is not None and size.completion_tokens is not None
    if prompt is None:
        prompt = (size.prompt_chars or 0.0) / CHARS_PER_TOKEN
    # Another template says more or fewer words around the same fields
    prompt += (_literal(source) - _literal(type(source)())) / CHARS_PER_TOKEN
    completion = size.completion_tokens
    if completion is None:
        completion = 1.0 if size.completion_chars is None else size.completion_chars / CHARS_PER_TOKEN
    plan.tokens, plan.positions, plan.longest = prompt + completion, completion, size.longest
    plan.basis += ", GPT-2 tokens" if measured else f", {CHARS_PER_TOKEN:g} characters a token"


def _relative(source: Task) -> SplitSize | None:
    """The first split of the same benchmark whose rows were measured."""
    return next((size for size in source.published.values() if size.prompt_chars is not None), None)


def _literal(task: Task) -> int:
    """Characters of the template that are not fields."""
    template = getattr(task, "_template", None) or getattr(task, "template", None) or ""
    return sum(len(literal) for literal, *_ in string.Formatter().parse(template))


def _slice(rows: int, name: str, split: str) -> int:
    if name == split:
        return rows
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: rows})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"the slice {split!r} of {rows} rows cannot be read: {error}") from None
    return sum(part.to - part.from_ for part in parts)


def _ask_hub(plan: SplitPlan, source: Task, spec: SplitSpec, path: str, revision: str | None) -> None:
    """Sizes from the card of a dataset on the Hub: its metadata is read, no rows."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or file_kind(path)[1:] != (None, None):
        raise ValueError(f"there is no file or folder {path!r}")
    name = spec.split.partition("[")[0]
    level = logging.getLogger("datasets").level
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        info = datasets.load_dataset_builder(path, source.hub_config, revision=revision).info
        found = (info.splits or {}).get(source.splits[name])
    except Exception as error:
        # The kinds of failure are many: no network, no such repository, gated
        raise _Unknown(f"{path} cannot be asked ({type(error).__name__}); give a local copy as path") from None
    finally:
        logging.getLogger("datasets").setLevel(level)
    if found is None or not found.num_examples:
        raise _Unknown(f"the card of {path} states no size of split {name!r}; give a local copy as path")
    plan.rows = _slice(found.num_examples, name, spec.split)
    if spec.limit is not None:
        plan.rows = min(plan.rows, spec.limit)
    plan.basis = "dataset card"
    if found.num_bytes:
        # All columns of a row: more than what the template shows, less than what it adds
        plan.tokens, plan.positions = found.num_bytes / found.num_examples / CHARS_PER_TOKEN, 1.0
        plan.notes.append("tokens are those of whole source rows, one of them taken to be the answer")


def _limit(plan: SplitPlan, recipe: Recipe, role: str) -> None:
    """What `max_length` does to the lengths."""
    bound = recipe.task.max_length
    if bound is None or plan.tokens is None or plan.positions is None:
        return
    if plan.longest is None:
        plan.longest = bound
    elif plan.longest > bound:
        cut = role == "pretrain" or recipe.task.on_overflow.startswith("truncate")
        fate = "cut" if cut else "dropped" if recipe.task.on_overflow == "drop" else "an error"
        plan.notes.append(f"rows of up to {plan.longest} tokens: those over {bound} are {fate}")
        plan.longest = bound
    plan.tokens, plan.positions = min(plan.tokens, float(bound)), min(plan.positions, float(bound))


def _key_bytes(rows: Dataset) -> float:
    """Bytes of `id` and `group` in a compressed row, from the first thousand."""
    first = rows.select(range(min(len(rows), 1000)))
    text = "\n".join(first["id"]) + "\n".join(first["group"])
    return len(zlib.compress(text.encode(), 9)) / len(first)
