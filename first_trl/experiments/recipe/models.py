"""
The keys of a recipe: one YAML file that describes one experiment.

Every key is checked by its type when an object is made. What relates several keys is in `rules`.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Strict
from pydantic.dataclasses import dataclass

from ...training.options import DistillOptions, For, recalibrations
from ...utils.names import nearest
from ...vocabulary import POST_HOC


# A key nobody knows is refused. "3" is no number, and 1 is not `true`.
_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Integer = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Ge(1)]
Number = Annotated[float, Strict()]
Mapping = dict[Text, Any]
_STUDENTS = For(("sft", "distill"))
_DISTILL = For(("distill",))


def _short(key: str, cls: type) -> BeforeValidator:
    """A text in place of a mapping is the value of this key."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=str | cls
    )


def _method(value: str) -> str:
    if value not in recalibrations()[1:]:
        raise ValueError(f"unknown value {value!r}.{nearest(value, recalibrations()[1:])}")
    return value


@dataclass(config=_CONFIG)
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

    split: Text
    task: Text | None = None
    path: Text | None = None
    options: Mapping | None = None
    limit: Count | None = None
    unseen: Literal["group", "question"] | None = None


@dataclass(config=_CONFIG)
class TaskSpec:
    """
    Args:
        name (`str`): Task name, see `first_trl.tasks.list_tasks`.
        splits (`dict[str, SplitSpec]`): Role -> rows. Roles: `train` and `validation` (required), any number of
            evaluation roles such as `test` and `ood`, `pretrain` for models made from scratch, `threshold` for the
            thresholds that students bring (else `validation` has to serve), and further roles that arms train on
            (`arms.NAME.data`), such as prompts without answers.
        path (`str`, *optional*): Hub id, file or folder; default is the benchmark's own Hub dataset.
        revision (`str`, *optional*): Revision of the Hub dataset.
        options (`dict`): Options of the task, e.g. `template`.
        max_length (`int`, *optional*): Longest row in tokens.
        on_overflow (`str`): `error`, `drop`, `truncate_prompt_left` or `truncate_right` for longer rows.
        append_eos (`bool`): End the completion with the end-of-sequence token.
    """

    name: Text
    splits: dict[Text, Annotated[SplitSpec, _short("split", SplitSpec)]]
    path: Text | None = None
    revision: Text | None = None
    options: Mapping = field(default_factory=dict)
    max_length: Count | None = None
    on_overflow: Literal["error", "drop", "truncate_prompt_left", "truncate_right"] = "error"
    append_eos: Flag = False


@dataclass(config=_CONFIG)
class ModelSpec:
    """
    Args:
        name_or_path (`str`, *optional*): Hub id or folder.
        architecture (`str`, *optional*): Model type, e.g. `llama`. Without a name, the model is made from scratch.
            Beside a name it says what the name stands for, so that `--smoke` needs no download.
        config (`dict`): Configuration of the model made from scratch, or overrides of the loaded one.
        init_kwargs (`dict`): Passed to `from_pretrained`: `dtype`, `revision`, `attn_implementation`, ...
        keep_layers (`int`, *optional*): Begin with this many of the first layers of the named model, its embeddings and
            its head, instead of the whole.
        pretrain (`dict`, *optional*): Training arguments for next-token training on the `pretrain` rows, first.
        sft (`dict`, *optional*): Training arguments of the teacher's fine-tuning; none means it is fine-tuned already.
        lora (`dict`, *optional*): `peft.LoraConfig` arguments of the teacher's fine-tuning; none trains all weights.
        select (`str`, *optional*): `nll` keeps the teacher of the epoch with the lowest negative log-likelihood on
            `validation`, instead of the last.
    """

    name_or_path: Text | None = None
    architecture: Text | None = None
    config: Mapping = field(default_factory=dict)
    init_kwargs: Mapping = field(default_factory=dict)
    keep_layers: Count | None = None
    pretrain: Mapping | None = None
    sft: Mapping | None = None
    lora: Mapping | None = None
    select: Literal["nll"] | None = None

    @property
    def from_scratch(self) -> bool:
        return self.name_or_path is None

    @property
    def used_as_it_is(self) -> bool:
        """Whether there is nothing to make before fine-tuning: the model that is named, whole."""
        return not self.from_scratch and self.pretrain is None and self.keep_layers is None


@dataclass(config=_CONFIG)
class TeacherSpec:
    """
    A further teacher, for the arms that name it: the recipe's teacher, fine-tuned in another way.

    Args:
        sft (`dict`): Training arguments on top of the teacher's `sft`.
        select (`str`, *optional*): As in the teacher.
        folds (`int`, *optional*): Fine-tune this many teachers, each without one share of the training rows, and
            cache every row with the one that did not see it.
        fold_by (`str`): Column whose values stay together in a fold: `group`, or `id` for single rows.
        committee (`list[str]`, *optional*): Teachers whose mean distribution is cached, with their disagreement in
            `teacher_mutual_information`, instead of another fine-tuning: names in `teachers`, such as ones of other seeds
            (`sft: {seed: 1}`), and `teacher` for the recipe's own.
    """

    sft: Mapping = field(default_factory=dict)
    select: Literal["nll"] | None = None
    folds: Annotated[int, Strict(), Ge(2)] | None = None
    fold_by: Literal["group", "id"] = "group"
    committee: list[Text] | None = None


@dataclass(config=_CONFIG)
class CaptureSpec:
    """
    Args:
        target (`str`): `vocabulary`: the teacher's most likely tokens at every token of the answer. `options`: its
            distribution over the choices alone, matched by option, for a teacher of another tokenizer than the student's. It
            is read at one token a choice, or by the probability of whole texts where a choice has several.
        k (`int`): Entries kept per position.
        logprob_dtype (`str`): `float16` or `float32`.
        max_tokens_per_batch (`int`): Size of a teacher forward.
        shard_size (`int`): Rows a shard.
        num_draws (`int`): Draws stored per position, for the `sampled` estimator.
        vllm_url (`str`, *optional*): Score with the vLLM server at this address instead of in this process. It must
            serve the teacher of this run.
        vllm_model (`str`, *optional*): Name it is served under, when there are several.
        vllm_concurrency (`int`): Requests that wait for the server at a time; the cache is the same with any number.
        backend (`str`, *optional*): Engine that scores: `transformers`, `vllm` (with `vllm_url`), or one that a plugin
            registers. By default `vllm` where `vllm_url` is given, else `transformers`.
        backend_options (`dict`): Keyword arguments of a plugin's engine.
    """

    target: Literal["vocabulary", "options"] = "vocabulary"
    k: Count = 5
    logprob_dtype: Literal["float16", "float32"] = "float16"
    max_tokens_per_batch: Count = 8192
    shard_size: Count = 1000
    num_draws: Annotated[int, Strict(), Ge(0)] = 0
    vllm_url: Text | None = None
    vllm_model: Text | None = None
    vllm_concurrency: Count = 8
    backend: Text | None = None
    backend_options: Mapping = field(default_factory=dict)


@dataclass(config=_CONFIG)
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

    objective: Literal["ece", "nll"] = "ece"
    positions: Literal["first", "all"] = "first"
    n_bins: Count = 10
    methods: list[Annotated[Text, AfterValidator(_method)]] = field(
        default_factory=lambda: ["probability_temperature", "logit_temperature"]
    )


@dataclass(config=_CONFIG)
class NoveltySpec:
    """
    How the temperature of a `novelty_scaling` arm depends on the input, see
    [`~first_trl.evaluation.novelty_scaling.fit_novelty_scaling`].

    Args:
        feature (`str`): `distance` of the hidden state to those of training rows; `max_probability`, the control;
            `distance_and_max_probability`; `hidden_state`, a learnt head; or `disagreement`, what the hidden state tells of
            where the teachers of a committee disagree, for a student of one.
        fit (`str`): Where the slope is learnt: on `validation`; `steepest`, the steepest one that validation bears; or by
            `cross_group` on groups of training rows that were held out, which needs rows with a `group`. The intercept is
            always fitted on `validation`.
        metric (`str`): Of the distance: `cosine`, `pca` or `mahalanobis`.
        k (`int`): Nearest training rows.
        components (`int`): Principal components of `pca`, `mahalanobis`, `hidden_state` and `disagreement`.
        layers (`list[int]`, *optional*): Layers to choose from, 1 is the first; default: a quarter, half, three quarters and
            all of the depth.
        groups (`str`): Of `cross_group`: the rows' `group`, or `cluster`, for rows that have none: k-means clusters of their
            prompts' hidden states in the model before it was fine-tuned.
        clusters (`int`): Their number, for `groups: cluster`.
        folds (`int`): Parts of the groups, for `cross_group`.
        max_nll_increase (`float`): Nats a row that a slope of `steepest` or `cross_group` may cost on `validation` over one
            temperature; a smaller part of it is taken where it would cost more.
        at_least_scalar (`bool`): No temperature below the scalar one.
        reference_rows (`int`): Most training rows that are kept.
    """

    feature: Literal["distance", "max_probability", "distance_and_max_probability", "hidden_state", "disagreement"] = (
        "distance"
    )
    fit: Literal["validation", "steepest", "cross_group"] = "validation"
    metric: Literal["cosine", "pca", "mahalanobis"] = "cosine"
    k: Count = 10
    components: Count = 16
    layers: list[Count] | None = None
    groups: Literal["group", "cluster"] = "group"
    clusters: Annotated[int, Strict(), Ge(2)] = 32
    folds: Annotated[int, Strict(), Ge(2)] = 4
    max_nll_increase: Annotated[float, Strict(), Ge(0.0)] = 0.0
    at_least_scalar: Flag = False
    reference_rows: Count = 4000


@dataclass(config=_CONFIG)
class _Arm:
    """What an arm begins with."""

    kind: Literal["teacher", "sft", "distill", "temperature_scaling", "novelty_scaling", "agreement_scaling"]
    label: Text | None = None
    of: Annotated[Text, For(POST_HOC)] | None = None
    training: Annotated[Mapping, _STUDENTS] = field(default_factory=dict)


@dataclass(config=_CONFIG)
class ArmSpec(DistillOptions, _Arm):
    """
    One row of the report. An arm has the options of the trainer, see
    [`~first_trl.training.options.DistillOptions`], and these:

    Args:
        kind (`str`): `teacher`, `sft`, `distill`, `temperature_scaling`, `novelty_scaling` or `agreement_scaling`.
        label (`str`, *optional*): Name in tables and figures. With a grid, `{top_k}` and the like are filled in.
        of (`str`, *optional*): Arm that `temperature_scaling`, `novelty_scaling` or `agreement_scaling` is applied to.
        prompts (`str`, *optional*): Role whose prompts an `agreement_scaling` is fitted on, without their answers: where the
            model chooses what it chose before fine-tuning, its confidence is brought to what it was then.
        novelty (`NoveltySpec`, *optional*): How a `novelty_scaling` is fitted, where it is not by default.
        training (`dict`): Training arguments on top of the recipe's `training`.
        objective (`str`, *optional*): Objective of the fit, when it is another than the recipe's.
        min_value (`float`, *optional*): Lower bound of the fitted value; 1 keeps a temperature from sharpening.
        select (`str`, *optional*): `nll` keeps the student of the epoch with the lowest negative log-likelihood on
            `validation`, instead of the last.
        teacher (`str`, *optional*): A name in the recipe's `teachers`; default is the teacher itself.
        data (`list[str]`): Roles to train on; more than `train` for `distill` only.
        lora (`dict`, *optional*): `peft.LoraConfig` arguments; none trains all weights.
        swept (`dict`): Filled in for the arms that a grid makes: key -> value.
    """

    objective: Annotated[Literal["ece", "nll"], _DISTILL] | None = None
    min_value: Annotated[Number, _DISTILL] | None = None
    select: Annotated[Literal["nll"], _STUDENTS] | None = None
    teacher: Annotated[Text, For(("teacher", "distill"))] | None = None
    data: Annotated[list[Text], _DISTILL] = field(default_factory=lambda: ["train"])
    lora: Annotated[Mapping, _STUDENTS] | None = None
    novelty: Annotated[NoveltySpec, For(("novelty_scaling",))] | None = None
    prompts: Annotated[Text, For(("agreement_scaling",))] | None = None
    swept: Mapping = field(default_factory=dict)


@dataclass(config=_CONFIG)
class EvaluationSpec:
    """
    Args:
        splits (`list[str]`): Roles to evaluate on; the first is the in-domain one. Roles with choices are scored at
            the answer position, free text at every token of the reference answer.
        batch_size (`int`): Prompts a forward.
        scoring (`str`): How choices are scored: `token`, over the whole vocabulary, needs answers of one token each;
            `choices` takes the probability of each choice's whole text.
        length (`str`): With `scoring: choices`, what log-probabilities of texts are divided by: `none` (the probability of
            the text as it is), `tokens`, `characters` or `bytes`; or `unconditional`, which takes off what they are
            without the question.
        permutations (`int`): Ask every question with lettered options in this many orders of them, for the column of
            answers that flip; 0 for none. Costs that many evaluations more.
        n_bins (`int`): Equal-width bins of the ECE.
        null_draws (`int`): Draws of a perfectly calibrated model, for the ECE that it would show by chance.
    """

    splits: list[Text] = field(default_factory=lambda: ["test"])
    batch_size: Count = 64
    scoring: Literal["token", "choices"] = "token"
    length: Literal["none", "tokens", "characters", "bytes", "unconditional"] = "none"
    permutations: Annotated[int, Strict(), Ge(0)] = 0
    n_bins: Count = 10
    null_draws: Count = 200


@dataclass(config=_CONFIG)
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

    title: Text | None = None
    notes: list[Text] = field(default_factory=list)
    baselines: list[Text] = field(default_factory=list)
    highlight: list[Text] = field(default_factory=list)


@dataclass(config=_CONFIG)
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

    namespace: Text
    private: Flag = True
    license: Text | None = None
    arms: list[Text] = field(default_factory=list)
    cache: Flag = True


@dataclass(config=_CONFIG)
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
        tokenizer (`str`, *optional*): Name or folder; default is the task's own, or the teacher's, with
            `capture.target: options` the student's.
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
        plugins (`list[str]`): Modules that register a task, an estimator, a recalibration, a teacher backend or a report
            metric that the recipe names. They are looked for among the installed ones, beside the recipe and in the
            working folder.
        cell (`dict`): Filled in for the runs that `cases` and `grid` make: key -> value.
    """

    name: Text
    task: TaskSpec
    teacher: Annotated[ModelSpec, _short("name_or_path", ModelSpec)]
    student: Annotated[ModelSpec, _short("name_or_path", ModelSpec)]
    arms: dict[Text, ArmSpec]
    teachers: dict[Text, TeacherSpec] = field(default_factory=dict)
    training: Mapping = field(default_factory=dict)
    capture: CaptureSpec = field(default_factory=CaptureSpec)
    recalibration: RecalibrationSpec = field(default_factory=RecalibrationSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    report: ReportSpec = field(default_factory=ReportSpec)
    hub: HubSpec | None = None
    tokenizer: Text | None = None
    seed: Integer = 0
    seeds: list[Integer] = field(default_factory=list)
    grid: Mapping = field(default_factory=dict)
    cases: Mapping = field(default_factory=dict)
    output_dir: Text | None = None
    num_threads: Count | None = None
    report_to: Text = "none"
    description: Text = ""
    reproduces: list[Text] = field(default_factory=list)
    merge: Flag = True
    plugins: list[Text] = field(default_factory=list)
    cell: Mapping = field(default_factory=dict)

    @property
    def tokenizer_source(self) -> tuple[str | None, str | None]:
        """Name and revision of the tokenizer of rows, caches and students, where the task brings none."""
        if self.tokenizer is not None:
            return self.tokenizer, None
        model = self.student if self.capture.target == "options" else self.teacher
        return model.name_or_path, model.init_kwargs.get("revision")

    @property
    def folder(self) -> Path:
        """Folder of the run of one seed; of a recipe with `seeds` or a grid of runs, ask its [`cells`]."""
        return Path(self.output_dir) if self.output_dir else Path("outputs") / self.name / f"seed-{self.seed}"
