"""What a plan holds. Everything is plain data, so that `dataclasses.asdict` of it is JSON."""

from dataclasses import dataclass, field
from typing import Any


# What CUDA, its libraries and fragmentation take beside a plan, in bytes
_CONTEXT = 2e9
_OF_TRAINING = {
    "activations": "a smaller `per_device_train_batch_size` with more `gradient_accumulation_steps` helps, and so does "
    "`gradient_checkpointing: true`",
    "optimizer": "LoRA, `optim: adamw_bnb_8bit` or weights divided over GPUs (`--sharding fsdp2`) help",
}
_OF_CAPTURE = {
    "activations": "a smaller `capture.max_tokens_per_batch` helps",
    "weights": "load it quantised or over several GPUs (`teacher.init_kwargs`), or serve it (`capture.vllm_url`)",
}


@dataclass
class UnitPlan:
    """
    A unit of work of one run.

    Args:
        stage (`str`), unit (`str`): Stage and subfolder.
        status (`str`): `done` (from these very settings), `changed` (done or begun from other settings, to be redone),
            `running` (begun, will be continued), `unchecked` (there, but whether it is from these settings cannot be told
            before what it depends on is finished) or `to do`.
    """

    stage: str
    unit: str
    status: str


@dataclass
class RunPlan:
    """One run: its seed, the grid values it stands for, its folder, its units, and what it shares."""

    seed: int
    cell: dict[str, Any]
    folder: str
    units: list[UnitPlan]
    pushes: list[dict[str, Any]] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(unit.status == status for unit in self.units)


@dataclass
class SplitPlan:
    """
    Rows of one role. Lengths are means, in tokens.

    Args:
        role (`str`), task (`str`), split (`str`): Which rows.
        rows (`int`, *optional*): Rows that are left; `None` where it is not known.
        tokens (`float`, *optional*): Tokens a row, prompt and completion.
        positions (`float`, *optional*): Supervised positions a row.
        longest (`int`, *optional*): Tokens of the longest row.
        key_bytes (`float`): Bytes of `id` and `group` in a compressed row.
        basis (`str`): Where the numbers come from.
        notes (`list[str]`): What they leave out.
        problem (`str`, *optional*): Why a run would refuse the rows.
    """

    role: str
    task: str
    split: str
    rows: int | None = None
    tokens: float | None = None
    positions: float | None = None
    longest: int | None = None
    key_bytes: float = 3.0
    basis: str = ""
    notes: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def all_tokens(self) -> int | None:
        return None if self.rows is None or self.tokens is None else round(self.rows * self.tokens)

    @property
    def all_positions(self) -> int | None:
        return None if self.rows is None or self.positions is None else round(self.rows * self.positions)


@dataclass
class ModelPlan:
    """
    A model of the recipe.

    Args:
        role (`str`): `teacher` or `student`.
        name (`str`): Hub id, folder, or the architecture that is made from scratch.
        parameters (`int`, *optional*): Distinct weights; `None` where there is no configuration.
        dtype (`str`): Dtype of the weights in memory.
        lora (`dict[str, int]`): Arms (or `teacher`) -> trainable weights with their LoRA.
        problem (`str`, *optional*): Why the configuration could not be read, and how to mend that.
    """

    role: str
    name: str
    parameters: int | None = None
    dtype: str = "float32"
    lora: dict[str, int] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class MemoryPlan:
    """
    Bytes on each GPU at one activity.

    Args:
        activity (`str`): E.g. `teacher, fine-tuning`.
        parts (`dict[str, float]`): `weights`, `gradients`, `optimizer`, `copies`, `head`, `activations`; empty for an unknown model.
        note (`str`): Batch, tokens and LoRA it was computed for.
    """

    activity: str
    parts: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def total(self) -> float | None:
        return sum(self.parts.values()) if self.parts else None

    @property
    def largest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def remedy(self) -> str:
        """What makes the largest part smaller."""
        if "optimizer" not in self.parts:
            return _OF_CAPTURE[self.largest]
        return _OF_TRAINING.get(self.largest, "LoRA or weights divided over GPUs (`--sharding fsdp2`) help")


@dataclass
class CachePlan:
    """
    The cache of one teacher.

    Args:
        unit (`str`): Subfolder of the run.
        roles (`list[str]`): Roles that it holds.
        rows, tokens, positions (`int`, *optional*): Rows, tokens that the teacher reads, positions that it scores.
        bytes (`int`, *optional*): Size on disk, see [`cache_bytes`].
        note (`str`): How it is captured.
    """

    unit: str
    roles: list[str]
    rows: int | None
    tokens: int | None
    positions: int | None
    bytes: int | None
    note: str = ""


@dataclass
class TrainingPlan:
    """
    One training.

    Args:
        unit (`str`): Subfolder of the run.
        rows (`int`, *optional*): Training rows.
        epochs (`float`): Epochs.
        batch (`int`, *optional*): Rows of an optimiser step over all processes.
        steps (`int`, *optional*): Optimiser steps; `None` where the rows are not known or the batch does not divide.
        tokens (`int`, *optional*): Tokens read in all epochs.
        note (`str`): LoRA, the roles trained on, or why there are no steps.
    """

    unit: str
    rows: int | None
    epochs: float
    batch: int | None
    steps: int | None
    tokens: int | None
    note: str = ""


@dataclass
class TimePlan:
    """Seconds that a part of one run takes on this machine, from a probe."""

    what: str
    seconds: float


@dataclass
class SettingPlan:
    """What the runs of one grid combination have in common; seeds do not change it."""

    cell: dict[str, Any]
    splits: list[SplitPlan]
    models: list[ModelPlan]
    memory: list[MemoryPlan]
    caches: list[CachePlan]
    trainings: list[TrainingPlan]


@dataclass
class Plan:
    """
    The plan of a recipe.

    Args:
        name (`str`), description (`str`): Of the recipe.
        processes (`int`), sharding (`str`): What memory and steps were computed for.
        settings (`list[SettingPlan]`): One a grid combination.
        runs (`list[RunPlan]`): One a seed of each.
        merged (`str`, *optional*): Folder of the merged report, for several runs.
        times (`list[TimePlan]`): Of one run of the first setting, where a probe was asked for.
    """

    name: str
    description: str
    processes: int
    sharding: str
    settings: list[SettingPlan]
    runs: list[RunPlan]
    merged: str | None = None
    times: list[TimePlan] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Why a run of this recipe would stop at its rows, each once."""
        return list(dict.fromkeys(s.problem for setting in self.settings for s in setting.splits if s.problem))

    def too_large_for(self, memory: float) -> list[str]:
        """
        What does not fit onto GPUs of this size, each with what would help.

        Args:
            memory (`float`): Bytes of one GPU.
        """
        plans = {plan.activity + plan.note: plan for setting in self.settings for plan in setting.memory}
        return [
            f"{plan.activity} ({plan.note}) needs about {plan.total / 1e9:.1f} GB on each GPU beside {_CONTEXT / 1e9:g} GB of "
            f"CUDA's own, and there are {memory / 1e9:.1f} GB. Most of it is {plan.largest}: {plan.remedy}."
            for plan in plans.values()
            if plan.total is not None and plan.total + _CONTEXT > memory
        ]
