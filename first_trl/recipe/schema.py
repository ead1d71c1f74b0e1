"""A recipe: one YAML file that describes one experiment."""

import copy
import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .resources import recipe_path


STAGES = ("data", "pretrain", "teacher", "capture", "recalibrate", "students", "evaluate", "report")
ARM_KINDS = ("teacher", "sft", "distill", "temperature_scaling")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; learning rates are written that way."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Parse YAML with numbers such as `1e-3` as numbers. Raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)


@dataclass
class SplitSpec:
    """
    Rows for one role.

    Args:
        split (`str`): Split of the task, slices allowed: `"train[:90%]"`.
        task (`str`, *optional*): Another task than the recipe's, e.g. for out-of-domain evaluation.
        path (`str`, *optional*): Hub id, file or folder, when it is another than the task's.
        options (`dict`, *optional*): Options of that other task.
        limit (`int`, *optional*): Keep this many rows, drawn at random.
    """

    split: str
    task: str | None = None
    path: str | None = None
    options: dict[str, Any] | None = None
    limit: int | None = None


@dataclass
class TaskSpec:
    """
    Args:
        name (`str`): Task name, see `first_trl.tasks.list_tasks`.
        splits (`dict[str, SplitSpec]`): Role -> rows. Roles: `train` and `validation` (required), any number of
            evaluation roles such as `test` and `ood`, and `pretrain` for models made from scratch.
        path (`str`, *optional*): Hub id, file or folder; default is the benchmark's own Hub dataset.
        revision (`str`, *optional*): Revision of the Hub dataset.
        options (`dict`): Options of the task, e.g. `template`.
        max_length (`int`, *optional*): Longest row in tokens.
        on_overflow (`str`): `error`, `drop`, `truncate_prompt_left` or `truncate_right` for longer rows.
        append_eos (`bool`): End the completion with the end-of-sequence token.
    """

    name: str
    splits: dict[str, SplitSpec]
    path: str | None = None
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    on_overflow: str = "error"
    append_eos: bool = False


@dataclass
class ModelSpec:
    """
    Args:
        name_or_path (`str`, *optional*): Hub id or folder.
        architecture (`str`, *optional*): Model type to make from scratch instead, e.g. `llama`.
        config (`dict`): Configuration of the model made from scratch, or overrides of the loaded one.
        init_kwargs (`dict`): Passed to `from_pretrained`: `dtype`, `revision`, `attn_implementation`, ...
        pretrain (`dict`, *optional*): Training arguments for next-token training on the `pretrain` rows, first.
        sft (`dict`, *optional*): Training arguments of the teacher's fine-tuning; none means it is fine-tuned already.
    """

    name_or_path: str | None = None
    architecture: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrain: dict[str, Any] | None = None
    sft: dict[str, Any] | None = None


@dataclass
class CaptureSpec:
    """
    Args:
        k (`int`): Entries kept per position.
        logprob_dtype (`str`): `float16` or `float32`.
        max_tokens_per_batch (`int`): Size of a teacher forward.
        shard_size (`int`): Rows a shard.
    """

    k: int = 5
    logprob_dtype: str = "float16"
    max_tokens_per_batch: int = 8192
    shard_size: int = 1000


@dataclass
class RecalibrationSpec:
    """
    Args:
        objective (`str`): `ece` (the paper) or `nll`.
        estimator (`str`): Target the value is fitted on: `topk`, `bucket` or `renormalized`.
        positions (`str`): `first` (the answer position of multiple choice) or `all`.
        n_bins (`int`): Bins of the ECE.
        methods (`list[str]`): Methods to fit.
    """

    objective: str = "ece"
    estimator: str = "topk"
    positions: str = "first"
    n_bins: int = 10
    methods: list[str] = field(default_factory=lambda: ["probability_temperature", "logit_temperature"])


@dataclass
class ArmSpec:
    """
    One row of the report.

    Args:
        kind (`str`): `teacher`, `sft`, `distill` or `temperature_scaling`.
        label (`str`, *optional*): Name in tables and figures.
        of (`str`, *optional*): Arm that `temperature_scaling` is applied to.
        training (`dict`): Training arguments on top of the recipe's `training`.
        recalibration (`str`): Rescale of the teacher, for `distill`.
        recalibration_value (`float`, *optional*): Its value; fitted when not given.
        estimator (`str`): Estimator of the divergence, for `distill`.
        ce_weight (`float`): Weight of the hard-label cross-entropy, for `distill`.
        lora (`dict`, *optional*): `peft.LoraConfig` arguments; none trains all weights.
    """

    kind: str
    label: str | None = None
    of: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    recalibration: str = "none"
    recalibration_value: float | None = None
    estimator: str = "topk"
    ce_weight: float = 0.0
    lora: dict[str, Any] | None = None


@dataclass
class EvaluationSpec:
    """
    Args:
        splits (`list[str]`): Roles to evaluate on; the first is the in-domain one.
        batch_size (`int`): Prompts a forward.
        n_bins (`int`): Equal-width bins of the ECE.
    """

    splits: list[str] = field(default_factory=lambda: ["test"])
    batch_size: int = 64
    n_bins: int = 10


@dataclass
class ReportSpec:
    """
    Args:
        title (`str`, *optional*): Heading.
        notes (`list[str]`): What the numbers show and what they do not, printed under the table.
    """

    title: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Recipe:
    """
    One experiment.

    Args:
        name (`str`): Short name, used for the output folder.
        task (`TaskSpec`), teacher (`ModelSpec`), student (`ModelSpec`): What is learned, by whom, from whom.
        arms (`dict[str, ArmSpec]`): Rows of the report.
        training (`dict`): Training arguments every student starts from (`SFTConfig` / `FirstDistillConfig` names, and
            `global_batch_size`, which is divided by the number of processes).
        tokenizer (`str`, *optional*): Name or folder; default is the task's own, or the teacher's.
        seed (`int`): Seed of generated data, models and training.
        output_dir (`str`, *optional*): Default `outputs/<name>/seed-<seed>`.
        num_threads (`int`, *optional*): CPU threads of torch. Tiny models run best on one: more threads spend their time
            waiting for each other, above all on a busy machine.
        report_to (`str`): Where training logs go, as in `TrainingArguments`.
        description (`str`): What the experiment is about.
    """

    name: str
    task: TaskSpec
    teacher: ModelSpec
    student: ModelSpec
    arms: dict[str, ArmSpec]
    training: dict[str, Any] = field(default_factory=dict)
    capture: CaptureSpec = field(default_factory=CaptureSpec)
    recalibration: RecalibrationSpec = field(default_factory=RecalibrationSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    report: ReportSpec = field(default_factory=ReportSpec)
    tokenizer: str | None = None
    seed: int = 0
    output_dir: str | None = None
    num_threads: int | None = None
    report_to: str = "none"
    description: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path("outputs") / self.name / f"seed-{self.seed}"


def load_recipe(
    name: str, overrides: list[str] | None = None, *, seed: int | None = None, output_dir: str | None = None
) -> Recipe:
    """
    Read and check a recipe.

    Args:
        name (`str`):
            File, or name of a recipe that travels with the package.
        overrides (`list[str]`, *optional*):
            `"key.sub=value"`, values in YAML notation.
        seed (`int`, *optional*), output_dir (`str`, *optional*):
            Take the place of the recipe's own.

    Raises:
        `ValueError`: No such recipe, a key nobody knows (with the nearest known one), a value of the wrong type, or a
            combination without a meaning.
    """
    path = recipe_path(name)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of keys, got {type(data).__name__}.")
    for override in overrides or []:
        apply_override(data, override)
    if seed is not None:
        data["seed"] = seed
    if output_dir is not None:
        data["output_dir"] = output_dir
    recipe = build(Recipe, data, str(path))
    _check(recipe, str(path))
    return recipe


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in nested mappings; whether the key exists is checked with the recipe."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"Override {override!r} must read key.sub=value, e.g. training.num_train_epochs=3.")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of override {override!r} is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    target = data
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ValueError(f"Override {override!r}: {parent!r} holds a value, not a mapping.")
    target[last] = value


def build(cls: Any, data: Any, where: str) -> Any:
    """A dataclass from a mapping; every key and type is checked, `where` names the place in messages."""
    if cls is ModelSpec and isinstance(data, str):
        data = {"name_or_path": data}
    if cls is SplitSpec and isinstance(data, str):
        data = {"split": data}
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a mapping, got {data!r}.")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ValueError(f"{where}: unknown key {key!r}.{nearest(str(key), hints)}")
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"{where}: missing key {missing[0]!r}. Required here: {', '.join(required)}.")
    return cls(**{key: _convert(value, hints[key], f"{where}: {key}") for key, value in data.items()})


def nearest(name: str, known: typing.Iterable[str], *, list_known: bool = True) -> str:
    """Hint for an unknown name."""
    by_lower = {item.lower(): item for item in sorted(known)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f" Did you mean {by_lower[close[0]]!r}?" if close else ""
    return hint + (f" Known: {', '.join(by_lower.values())}." if list_known else "")


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}.")
        if dataclasses.is_dataclass(args[1]):
            return {str(key): build(args[1], item, f"{where}.{key}") for key, item in value.items()}
        return copy.deepcopy(value)
    if origin is list:
        if not isinstance(value, list) or not all(isinstance(item, args[0]) for item in value):
            raise ValueError(f"{where} must be a list of {args[0].__name__}, got {value!r}.")
        return list(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}.")
    return value


def _check(recipe: Recipe, where: str) -> None:
    from .training.config import FirstDistillConfig

    for role in ("train", "validation"):
        if role not in recipe.task.splits:
            raise ValueError(f"{where}: task.splits must name the rows for {role!r}.")
    for role in recipe.evaluation.splits:
        if role not in recipe.task.splits:
            raise ValueError(
                f"{where}: evaluation.splits names {role!r}, which task.splits does not hold "
                f"({', '.join(recipe.task.splits)})."
            )
    if not recipe.evaluation.splits:
        raise ValueError(f"{where}: evaluation.splits is empty; name at least one role to evaluate on.")
    for name, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if (model.name_or_path is None) == (model.architecture is None):
            raise ValueError(
                f"{where}: {name} needs either `name_or_path` (a pretrained model) or `architecture` (made from "
                "scratch), not both."
            )
        if model.pretrain is not None and "pretrain" not in recipe.task.splits:
            raise ValueError(f"{where}: {name}.pretrain needs rows: name task.splits.pretrain.")
    if recipe.student.sft is not None:
        raise ValueError(f"{where}: student.sft has no meaning; students are arms with their own training.")
    for arm_name, arm in recipe.arms.items():
        place = f"{where}: arms.{arm_name}"
        if arm.kind not in ARM_KINDS:
            raise ValueError(f"{place}.kind: unknown kind {arm.kind!r}.{nearest(arm.kind, ARM_KINDS)}")
        if arm.kind == "temperature_scaling":
            if arm.of not in recipe.arms or recipe.arms[str(arm.of)].kind == "temperature_scaling":
                raise ValueError(
                    f"{place}.of must name a trained arm, got {arm.of!r}.{nearest(str(arm.of), recipe.arms)}"
                )
        elif arm.of is not None:
            raise ValueError(f"{place}.of only belongs to kind temperature_scaling.")
    fields = {f.name for f in dataclasses.fields(FirstDistillConfig)} | {"global_batch_size"}
    trainings = {"training": recipe.training}
    trainings |= {f"arms.{name}.training": arm.training for name, arm in recipe.arms.items()}
    for name, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        trainings |= {f"{name}.{part}": getattr(model, part) or {} for part in ("pretrain", "sft")}
    for place, training in trainings.items():
        for key in training:
            if key not in fields:
                raise ValueError(
                    f"{where}: {place}: unknown training argument {key!r}.{nearest(key, fields, list_known=False)}"
                )
