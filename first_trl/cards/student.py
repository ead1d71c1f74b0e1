"""Model card of a student, full or adapter, with or without an evaluation."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from ..calibration import reliability_diagram, save_figure
from ..calibration.threshold import ConfidenceThreshold
from ..utils.versions import __version__
from ..vocabulary import FEW_ROWS, Metric
from .license import License
from .render import render
from .scores import Scored, shown_metrics
from .wording import legend, limits, shown_arguments


if TYPE_CHECKING:
    from matplotlib.figure import Figure


DIAGRAM = "reliability.png"
_SMALL_SAMPLE = 300
_ECE_NOTES = {
    "row": "top label over the whole vocabulary, equal-width bins",
    "token": "top label over the whole vocabulary, equal-width bins",
    "answer": "probability of the answer's whole text, equal-width bins",
}
# Scores in the Hub's metadata, where there is room to spell them out
_METRIC_NAMES = {
    "accuracy": "Accuracy",
    "ece": "Expected calibration error",
    "trust": "Trust (accuracy - ECE)",
    "nll": "Negative log-likelihood (nats)",
    "brier": "Brier score",
}
_TASKS = {
    "row": ("multiple-choice", "Multiple choice by the next token"),
    "answer": ("multiple-choice", "Multiple choice by whole texts"),
    "token": ("text-generation", "Next token of reference texts"),
}


@dataclass(frozen=True)
class Evaluation:
    """
    Models on one set of rows.

    Args:
        name (`str`): Heading, e.g. the role in a recipe.
        models (`dict[str, Scored]`): Label -> scores: the student of the card and what it is compared with.
        student (`str`): Label of the student.
        dataset_name (`str`): Name of the data.
        dataset_id (`str`, *optional*): Where it is on the Hub.
        dataset_config (`str`, *optional*), dataset_revision (`str`, *optional*), split (`str`, *optional*): The part.
        domain (`str`, *optional*): What a score on these rows is a score of: `in-domain`, `out-of-domain`, or
            `validation` for what temperatures and epochs were chosen on, which stays out of the metadata.
        bounds (`frozenset[str]`): Labels that no model can reach, such as the true posterior.
        note (`str`): Anything a reader must know about these rows.
    """

    name: str
    models: dict[str, Scored]
    student: str
    dataset_name: str
    dataset_id: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str | None = None
    domain: str | None = None
    bounds: frozenset[str] = frozenset()
    note: str = ""

    @property
    def scored(self) -> Scored:
        return self.models[self.student]


@dataclass(frozen=True)
class DecisionFacts:
    """
    A student as a decision model.

    Args:
        stock (`bool`): Whether stock transformers can load it as one.
        temperature (`float` or `str`): That lives with it; in words where it depends on the number of options.
        fitted_on (`str`): Rows that the threshold was fitted on.
        threshold ([`ConfidenceThreshold`]): For the probability of the most likely of all tokens.
    """

    stock: bool
    temperature: float | str
    fitted_on: str
    threshold: ConfidenceThreshold

    @property
    def text(self) -> str:
        """What the threshold promises."""
        promise = f'`abstain_below="max_error={self.threshold.max_error:g}"`'
        rows = f"{self.threshold.n:,} `{self.fitted_on}` rows"
        if self.threshold.threshold is None or self.threshold.error is None:
            return f"No threshold on {rows} keeps the error rate below {100 * self.threshold.max_error:g} %."
        return (
            f"{promise} answers at a confidence of {self.threshold.threshold:.3f} and above: {100 * self.threshold.coverage:.0f} % of "
            f"{rows}, with {100 * self.threshold.error:.1f} % errors there; on rows like these, and as far as nothing else was "
            f"chosen on them, at most {100 * self.threshold.max_error:g} % with {100 * (1 - self.threshold.delta):g} % confidence."
        )


@dataclass
class StudentCard:
    """
    What a student's card says. Everything that is `None` is left out, or named as not known where a reader would look
    for it.

    Args:
        name (`str`): Title.
        repo_id (`str`, *optional*): Repository the card is for; enters the examples.
        adapter (`bool`): Whether the repository holds a PEFT adapter instead of a whole model.
        distilled (`bool`): Whether it learned from a teacher cache; a baseline that learned from labels did not.
        base_model (`str`, *optional*): The base on the Hub; goes into the metadata.
        base_description (`str`): The base in words.
        teacher (`str`, *optional*), cache (`str`, *optional*), recalibration (`str`, *optional*), estimator (`str`,
            *optional*): In words, Markdown allowed.
        cache_repo (`str`, *optional*): The cache on the Hub; goes into the metadata.
        facts (`list[tuple[str, str]]`): Further rows of the table of origins.
        arguments (`dict`): Training arguments; those that decide the result are shown.
        own_arguments (`tuple[str, ...]`): Those of `arguments` that are options of this package and decide it too.
        datasets (`list[str]`): Hub ids of the training data.
        evaluations (`list[Evaluation]`): Empty when nothing was evaluated.
        baseline (`str`, *optional*): Label drawn beside the student in the diagram.
        notes (`list[str]`): What the figures show and what they do not.
        license ([`License`], *optional*): Of the student.
        license_source (`str`): Where it comes from, or why there is none.
        teacher_license ([`License`], *optional*): Of the teacher.
        tags (`list[str]`): Beside the standing ones.
        prompt (`str`), choices (`list[str]`): For the example; without choices it shows the next token.
        versions (`dict[str, str]`): Libraries that the student was made with.
        cache_versions (`dict[str, str]`): Libraries that the teacher cache was made with.
        decision ([`DecisionFacts`], *optional*): The student as a decision model.
    """

    name: str
    repo_id: str | None = None
    adapter: bool = False
    distilled: bool = True
    base_model: str | None = None
    base_description: str = "not recorded"
    teacher: str | None = None
    teacher_license: License | None = None
    cache: str | None = None
    cache_repo: str | None = None
    recalibration: str | None = None
    estimator: str | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    own_arguments: tuple[str, ...] = ()
    datasets: list[str] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    baseline: str | None = None
    notes: list[str] = field(default_factory=list)
    license: License | None = None
    license_source: str = ""
    tags: list[str] = field(default_factory=list)
    prompt: str = "..."
    choices: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    cache_versions: dict[str, str] = field(default_factory=dict)
    decision: DecisionFacts | None = None

    @property
    def _metrics(self) -> tuple[Metric, ...]:
        return shown_metrics(scored for evaluation in self.evaluations for scored in evaluation.models.values())

    def metadata(self) -> ModelCardData:
        """The header, as the Hub's client writes and reads it."""
        kind = ["distillation"] if self.distilled else []
        datasets = list(dict.fromkeys([*self.datasets, *([self.cache_repo] if self.cache_repo else [])]))
        optional: dict[str, Any] = {} if self.license is None else dict(self.license.metadata)
        if self.base_model:
            optional["base_model_relation"] = "adapter" if self.adapter else "finetune"
        results = self._eval_results()
        return ModelCardData(
            base_model=self.base_model,
            library_name="peft" if self.adapter else "transformers",
            pipeline_tag="text-generation",
            datasets=datasets or None,
            metrics=[metric.key for metric in self._metrics] if results else None,
            tags=["first_trl", *kind, "calibration", "trl", *(["lora"] if self.adapter else []), *self.tags],
            model_name=self.name if results else None,
            eval_results=results or None,
            **optional,
        )

    def _eval_results(self) -> list[EvalResult]:
        results: list[EvalResult] = []
        places = set()
        for evaluation in self.evaluations:
            if evaluation.domain == "validation":
                continue
            kind = evaluation.dataset_id or evaluation.dataset_name.replace(" ", "_")
            place = (kind, evaluation.dataset_config, evaluation.split, evaluation.dataset_revision)
            # The Hub tells results apart by data set, config, split and revision
            split = (
                evaluation.split if place not in places else f"{evaluation.split or ''} ({evaluation.name})".strip()
            )
            places.add(place)
            task = _TASKS[evaluation.scored.unit]
            for metric in self._metrics:
                score = evaluation.scored.scores.get(metric.key)
                if score is None:
                    continue
                arguments: dict[str, Any] = {}
                if metric.key in ("ece", "trust"):
                    arguments = {"n_bins": evaluation.scored.n_bins, "confidence": _ECE_NOTES[evaluation.scored.unit]}
                if score.low is not None:
                    arguments["interval_95"] = [score.low, score.high]
                results.append(
                    EvalResult(
                        task_type=task[0],
                        task_name=task[1],
                        dataset_type=kind,
                        dataset_name=f"{evaluation.dataset_name} ({evaluation.name})",
                        dataset_config=evaluation.dataset_config,
                        dataset_split=split,
                        dataset_revision=evaluation.dataset_revision,
                        metric_type=metric.key,
                        metric_name=_METRIC_NAMES.get(metric.key, metric.title.removesuffix(" %")),
                        metric_value=score.value,
                        metric_args=arguments or None,
                    )
                )
        return results

    def diagram(self) -> "Figure | None":
        """Reliability of the student, and of the baseline beside it; `None` without an evaluation."""
        panels, columns = {}, 1
        for evaluation in self.evaluations:
            shown = [evaluation.student]
            if self.baseline in evaluation.models and self.baseline != evaluation.student:
                shown.append(str(self.baseline))
            columns = max(columns, len(shown))
            for label in shown:
                panels[f"{label}, {evaluation.name}"] = evaluation.models[label].calibration
        return reliability_diagram(panels, columns=columns, min_count=FEW_ROWS) if panels else None

    def write(self, folder: Path) -> Path:
        """Write `README.md` and, where there is something to draw, `reliability.png`; returns the card."""
        folder.mkdir(parents=True, exist_ok=True)
        figure = self.diagram()
        if figure is not None:
            save_figure(figure, folder / DIAGRAM, dpi=110)
        else:
            (folder / DIAGRAM).unlink(missing_ok=True)  # of an earlier model
        card = folder / "README.md"
        card.write_text(self.render(), encoding="utf-8")
        return card

    def render(self) -> str:
        """The card with its YAML header."""
        origins = [
            ("Base model", self._base()),
            ("Trained weights", "an adapter (PEFT); the base model is loaded beneath it" if self.adapter else "all"),
            ("Teacher", self.teacher),
            ("Teacher cache", self.cache),
            ("Recalibration of the teacher", self.recalibration),
            ("Estimator", self.estimator),
            *self.facts,
            ("Made with", _libraries({"first_trl": __version__, **self.versions})),
            ("Cache made with", _libraries(self.cache_versions)),
        ]
        units = {evaluation.scored.unit for evaluation in self.evaluations}
        n_bins = self.evaluations[0].scored.n_bins if self.evaluations else 10
        # Free text has no options
        choices = [] if units == {"token"} else self.choices
        return render(
            "student.md.j2",
            metadata=self.metadata().to_yaml(),
            card=self,
            repo_id=self.repo_id or "path/or/repo",
            origins=[(name, text) for name, text in origins if text],
            arguments=shown_arguments(self.arguments, self.own_arguments),
            metrics=self._metrics,
            tables=[
                (evaluation, _table(evaluation, self._metrics), _remarks(evaluation))
                for evaluation in self.evaluations
            ],
            figure=DIAGRAM,
            legend=legend(units, n_bins),
            limits=limits(units, self.distilled),
            prompt=json.dumps(self.prompt, ensure_ascii=False),
            choices=json.dumps(choices, ensure_ascii=False) if choices else "",
            whole="answer" in units,
            request=self._request(),
        )

    def _request(self) -> str:
        if self.decision is None or not self.decision.stock:
            return ""
        # Imported here: other cards need no tokenizer library
        from ..tasks.decision import decision_request

        return repr(decision_request({"prompt": self.prompt, "choices": self.choices or ["A", "B"]}))

    def _base(self) -> str:
        if self.base_model is None:
            return self.base_description
        link = f"[{self.base_model}](https://huggingface.co/{self.base_model})"
        return f"{link}, {self.base_description}" if self.base_description else link


def _libraries(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(evaluation: Evaluation, metrics: tuple[Metric, ...]) -> list[list[str]]:
    rows = []
    for label, scored in evaluation.models.items():
        cells = [scored.scores[m.key].shown(m) if m.key in scored.scores else "" for m in metrics]
        rows.append([f"**{label}** (this model)" if label == evaluation.student else label, *cells])
    return rows


def _remarks(evaluation: Evaluation) -> list[str]:
    scored = evaluation.scored
    remarks = []
    if evaluation.domain == "validation":
        remarks.append(
            "What temperatures and epochs were chosen on: for choices, not for claims. These figures are not in the "
            "metadata."
        )
    if evaluation.note:
        remarks.append(evaluation.note)
    if scored.null is not None:
        mean, high = scored.null
        ece = scored.scores["ece"].value
        verdict = (
            "an ECE in that range is no evidence of miscalibration"
            if ece <= high
            else f"the {100 * ece:.1f} % of this model is more than chance"
        )
        remarks.append(
            f"Noise floor: a perfectly calibrated model with these confidences would show an ECE of "
            f"{100 * mean:.1f} % on average and below {100 * high:.1f} % in 95 of 100 samples of {scored.n:,} {scored.unit}s; {verdict}."
        )
    if scored.n < _SMALL_SAMPLE:
        remarks.append(f"Only {scored.n} {scored.unit}s: a binned calibration error is mostly sampling noise here.")
    if scored.unit == "token":
        remarks.append(
            "Free text, every token of the reference given the ones before it. The intervals are over whole texts"
            + ("; the noise floor takes tokens for independent and is too low for that." if scored.null else ".")
        )
    if scored.options:
        remarks.append(
            f"Renormalised over the answer options: accuracy {100 * scored.options['accuracy']:.1f} %, "
            f"ECE {100 * scored.options['ece']:.1f} %."
        )
    beaten = _better(evaluation)
    if beaten:
        remarks.append(f"Lower ECE than this model here: {', '.join(beaten)}.")
    return remarks


def _better(evaluation: Evaluation) -> list[str]:
    ece = evaluation.scored.scores["ece"].value
    return [
        label
        for label, scored in evaluation.models.items()
        if label not in evaluation.bounds and scored.scores["ece"].value < ece
    ]
