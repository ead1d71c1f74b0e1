"""The keys of a recipe: one YAML file that describes one experiment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


STAGES = ("data", "pretrain", "teacher", "capture", "recalibrate", "students", "evaluate", "report", "share")
ARM_KINDS = ("teacher", "sft", "distill", "temperature_scaling")


@dataclass
class SplitSpec:
    """
    Rows for one role.

    Args:
        split (`str`): Split of the task, slices allowed: `"train[:90%]"`.
        task (`str`, *optional*): Another task than the recipe's, e.g. for out-of-domain evaluation.
        path (`str`, *optional*): Hub id, file or folder, when it is another than the task's.
        options (`dict`, *optional*): Options of that other task, or on top of the task's own.
        limit (`int`, *optional*): Keep this many rows, drawn at random.
        unseen (`str`, *optional*): `group` or `question`: the guarantee that no row that students train on, or that
            anything is chosen on, shares it with this role. Rows that do are dropped and counted.
    """

    split: str
    task: str | None = None
    path: str | None = None
    options: dict[str, Any] | None = None
    limit: int | None = None
    unseen: str | None = None


@dataclass
class TaskSpec:
    """
    Args:
        name (`str`): Task name, see `first_trl.tasks.list_tasks`.
        splits (`dict[str, SplitSpec]`): Role -> rows. Roles: `train` and `validation` (required), any number of
            evaluation roles such as `test` and `ood`, `pretrain` for models made from scratch, and further roles that
            arms train on (`arms.NAME.data`), such as prompts without answers.
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
        architecture (`str`, *optional*): Model type, e.g. `llama`. Without a name, the model is made from scratch.
            Beside a name it says what the name stands for, so that `--smoke` needs no download.
        config (`dict`): Configuration of the model made from scratch, or overrides of the loaded one.
        init_kwargs (`dict`): Passed to `from_pretrained`: `dtype`, `revision`, `attn_implementation`, ...
        pretrain (`dict`, *optional*): Training arguments for next-token training on the `pretrain` rows, first.
        sft (`dict`, *optional*): Training arguments of the teacher's fine-tuning; none means it is fine-tuned already.
        lora (`dict`, *optional*): `peft.LoraConfig` arguments of the teacher's fine-tuning; none trains all weights.
        select (`str`, *optional*): `nll` keeps the teacher of the epoch with the lowest negative log-likelihood on
            `validation`, instead of the last.
    """

    name_or_path: str | None = None
    architecture: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrain: dict[str, Any] | None = None
    sft: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    select: str | None = None

    @property
    def from_scratch(self) -> bool:
        return self.name_or_path is None


@dataclass
class TeacherSpec:
    """
    A further teacher, for the arms that name it: the recipe's teacher, fine-tuned in another way.

    Args:
        sft (`dict`): Training arguments on top of the teacher's `sft`.
        select (`str`, *optional*): As in the teacher.
        folds (`int`, *optional*): Fine-tune this many teachers, each without one share of the training rows, and
            cache every row with the one that did not see it.
        fold_by (`str`): Column whose values stay together in a fold: `group`, or `id` for single rows.
    """

    sft: dict[str, Any] = field(default_factory=dict)
    select: str | None = None
    folds: int | None = None
    fold_by: str = "group"


@dataclass
class CaptureSpec:
    """
    Args:
        k (`int`): Entries kept per position.
        logprob_dtype (`str`): `float16` or `float32`.
        max_tokens_per_batch (`int`): Size of a teacher forward.
        shard_size (`int`): Rows a shard.
        num_draws (`int`): Draws stored per position, for the `sampled` estimator.
        vllm_url (`str`, *optional*): Score with the vLLM server at this address instead of in this process. It must
            serve the teacher of this run.
        vllm_model (`str`, *optional*): Name it is served under, when there are several.
    """

    k: int = 5
    logprob_dtype: str = "float16"
    max_tokens_per_batch: int = 8192
    shard_size: int = 1000
    num_draws: int = 0
    vllm_url: str | None = None
    vllm_model: str | None = None


@dataclass
class RecalibrationSpec:
    """
    How the rescale of the teacher is fitted on `validation`. Every arm without a `recalibration_value` gets the value
    fitted on the target that it trains on: its own method, estimator, `top_k`, objective and lower bound.

    Args:
        objective (`str`): `ece` (the paper) or `nll`.
        positions (`str`): `first` (the answer position of multiple choice) or `all`.
        n_bins (`int`): Bins of the ECE.
        methods (`list[str]`): Methods to fit for the report, whether an arm needs them or not.
    """

    objective: str = "ece"
    positions: str = "first"
    n_bins: int = 10
    methods: list[str] = field(default_factory=lambda: ["probability_temperature", "logit_temperature"])


@dataclass
class ArmSpec:
    """
    One row of the report.

    Args:
        kind (`str`): `teacher`, `sft`, `distill` or `temperature_scaling`.
        label (`str`, *optional*): Name in tables and figures. With a grid, `{top_k}` and the like are filled in.
        of (`str`, *optional*): Arm that `temperature_scaling` is applied to.
        training (`dict`): Training arguments on top of the recipe's `training`.
        recalibration (`str`): Rescale of the teacher, for `distill`.
        recalibration_value (`float`, *optional*): Its value; fitted when not given.
        estimator (`str`): Estimator of the divergence, for `distill`.
        ce_weight (`float`): Weight of the hard-label cross-entropy, for `distill`.
        top_k (`int`, *optional*): Entries of the cache to use, all by default; for `distill`.
        student_temperature (`float`, *optional*): Of the `probability_softmax` estimator.
        objective (`str`, *optional*): Objective of the fit, when it is another than the recipe's.
        min_value (`float`, *optional*): Lower bound of the fitted value; 1 keeps a temperature from sharpening.
        token_dropout (`float`): Share of the input tokens that a student does not see in training; for `sft` and
            `distill`. `training.token_dropout_id` names the token put in their place.
        select (`str`, *optional*): `nll` keeps the student of the epoch with the lowest negative log-likelihood on
            `validation`, instead of the last.
        teacher (`str`, *optional*): A name in the recipe's `teachers`; default is the teacher itself.
        data (`list[str]`): Roles to train on; more than `train` for `distill` only.
        lora (`dict`, *optional*): `peft.LoraConfig` arguments; none trains all weights.
        swept (`dict`): Filled in for the arms that a grid makes: key -> value.
    """

    kind: str
    label: str | None = None
    of: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    recalibration: str = "none"
    recalibration_value: float | None = None
    estimator: str = "topk"
    ce_weight: float = 0.0
    top_k: int | None = None
    student_temperature: float | None = None
    objective: str | None = None
    min_value: float | None = None
    token_dropout: float = 0.0
    select: str | None = None
    teacher: str | None = None
    data: list[str] = field(default_factory=lambda: ["train"])
    lora: dict[str, Any] | None = None
    swept: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluationSpec:
    """
    Args:
        splits (`list[str]`): Roles to evaluate on; the first is the in-domain one. Roles with choices are scored at
            the answer position, free text at every token of the reference answer.
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
        baselines (`list[str]`): Arms that the merged report compares every other arm with; default: fine-tuning and
            plain distillation, with and without temperature scaling.
        highlight (`list[str]`): Arms whose wins and losses against the baselines the merged report sums up over all
            cases.
    """

    title: str | None = None
    notes: list[str] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    highlight: list[str] = field(default_factory=list)


@dataclass
class HubSpec:
    """
    What the last stage shares.

    Args:
        namespace (`str`): User or organisation on the Hub. Repositories are called `<recipe>-<arm>`, and
            `<recipe>-cache`.
        private (`bool`): Visibility of repositories that are created.
        arms (`list[str]`): Students to share; default: all but the points of a sweep.
        cache (`bool`): Share the teacher cache too.
        license (`str`, *optional*): Licence of students whose base model states none.
    """

    namespace: str
    private: bool = True
    license: str | None = None
    arms: list[str] = field(default_factory=list)
    cache: bool = True


@dataclass
class Recipe:
    """
    One experiment.

    Args:
        name (`str`): Short name, used for the output folder.
        task (`TaskSpec`), teacher (`ModelSpec`), student (`ModelSpec`): What is learned, by whom, from whom.
        arms (`dict[str, ArmSpec]`): Rows of the report.
        teachers (`dict[str, TeacherSpec]`): Further teachers, for arms that name them.
        training (`dict`): Training arguments every student starts from (`SFTConfig` / `FirstDistillConfig` names, and
            `global_batch_size`, which is divided by the number of processes).
        tokenizer (`str`, *optional*): Name or folder; default is the task's own, or the teacher's.
        seed (`int`): Seed of generated data, models and training.
        seeds (`list[int]`): Run all of these, one folder each, and merge their reports.
        grid (`dict[str, list]`): Dotted key -> values. A key of an arm (`arms.NAME.KEY`) makes one arm a value, which
            share teacher and cache; any other key makes one run a value. Several keys make all combinations.
        cases (`dict[str, dict]`): Name -> dotted keys and their values: variants of the experiment that differ in
            several keys, such as tasks. One run a case. `arms.NAME: null` leaves an arm out of a case.
        output_dir (`str`, *optional*): Default `outputs/<name>/seed-<seed>`; with `seeds`, `cases` or a grid of runs,
            the folder of all runs, by default `outputs/<name>`.
        hub (`HubSpec`, *optional*): Share the results as the last stage.
        num_threads (`int`, *optional*): CPU threads of torch. Tiny models run best on one: more threads spend their time
            waiting for each other, above all on a busy machine.
        report_to (`str`): Where training logs go, as in `TrainingArguments`.
        description (`str`): What the experiment is about.
        reproduces (`list[str]`): Experiments of the paper that this recipe stands for, e.g. `E3`, or an ablation.
        merge (`bool`): Merge the reports of all runs at the end. A run of one seed leaves that to the run of all.
        cell (`dict`): Filled in for the runs that `cases` and `grid` make: key -> value.
    """

    name: str
    task: TaskSpec
    teacher: ModelSpec
    student: ModelSpec
    arms: dict[str, ArmSpec]
    teachers: dict[str, TeacherSpec] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    capture: CaptureSpec = field(default_factory=CaptureSpec)
    recalibration: RecalibrationSpec = field(default_factory=RecalibrationSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    report: ReportSpec = field(default_factory=ReportSpec)
    hub: HubSpec | None = None
    tokenizer: str | None = None
    seed: int = 0
    seeds: list[int] = field(default_factory=list)
    grid: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    num_threads: int | None = None
    report_to: str = "none"
    description: str = ""
    reproduces: list[str] = field(default_factory=list)
    merge: bool = True
    cell: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Folder of the run of one seed; of a recipe with `seeds` or a grid of runs, ask its [`cells`]."""
        return Path(self.output_dir) if self.output_dir else Path("outputs") / self.name / f"seed-{self.seed}"
