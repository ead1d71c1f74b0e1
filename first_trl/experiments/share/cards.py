"""Cards of the students of a finished run, from its folder alone."""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ...cache.manifest import Manifest
from ...cards.license import License, find_license
from ...cards.render import hub_id
from ...cards.student import Evaluation, StudentCard
from ...cards.wording import cache_text, estimator_text, recalibration_text, shared_cache_text
from ...tasks import get_task
from ...training.options import CARD_OPTIONS, DistillOptions, Fact, marks
from ...vocabulary import BAYES
from .decisions import write_decision_files
from .run import Run


# Rows that the example of a card is taken from
_EXAMPLE_ROWS = 200


def write_student_cards(
    run: str | Path,
    *,
    arms: list[str] | None = None,
    repo_ids: dict[str, str] | None = None,
    caches: Mapping[str, Mapping[str, str]] | None = None,
    base_repo: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> dict[str, Path]:
    """
    Write `README.md` and `reliability.png` beside the weights of a run's students, and what makes them decision models.

    Args:
        run (`str` or `Path`):
            Folder of a finished run.
        arms (`list[str]`, *optional*):
            Students; all by default.
        repo_ids (`dict[str, str]`, *optional*):
            Arm -> repository, for the examples.
        caches (`dict[str, dict[str, str]]`, *optional*):
            Folder of a teacher cache in the run -> `{"repo_id", "commit"}`, where it is shared.
        base_repo (`str`, *optional*):
            Where the students' base is shared, when the run has made it.
        license (`str`, *optional*):
            Licence of students whose base states none, as the Hub writes it.
        token (`str`, *optional*):
            Hub token, to read the licences of private base models.

    Returns:
        `dict[str, Path]`: Arm -> card.

    Raises:
        `ValueError`: The folder is no finished run, or an arm has no weights.
    """
    found = Run(run)
    # One question a model, not one a student, also when nobody answers
    licence_of = lru_cache(maxsize=None)(partial(find_license, token=token))
    cards = {}
    for arm in found.students if arms is None else arms:
        card = _card(found, arm, license, licence_of)
        card.repo_id = (repo_ids or {}).get(arm)
        if card.repo_id is not None:
            card.name = card.repo_id.rsplit("/", 1)[-1]
        if base_repo is not None:
            card.base_model, card.base_description = base_repo, found.model_text("student")
        if card.distilled and caches:
            place = caches.get(found.cache_folder(arm).name)
            if place is not None:
                card.cache_repo = place["repo_id"]
                card.cache = shared_cache_text(place["repo_id"], place["commit"], card.cache)
            elif card.cache:
                card.cache += "; not shared"
        card.decision = write_decision_files(found, arm)
        cards[arm] = card.write(found.student(arm).model)
    return cards


def _card(run: Run, arm: str, license: str | None, licence_of: Callable[[str | None], License | None]) -> StudentCard:
    spec, recipe = run.arms[arm], run.recipe
    distilled = spec["kind"] == "distill"
    name = recipe["student"]["name_or_path"]
    adapter = run.student(arm).is_adapter
    # Pre-trained further in this run, a model still descends from the one on the Hub, but no adapter fits that one
    base = run.base_hub_id if adapter else hub_id(name)
    found = licence_of(name) or licence_of(str(run.base_folder) if run.base_folder else None)
    inherited, source = _license(run, found, license)
    manifests = run.manifests(arm) if distilled else []
    datasets = [run.source(role)["id"] for role in spec.get("data") or ["train"]]
    prompt, choices = _example(run)
    card = StudentCard(
        name=f"{recipe['name']}-{arm}",
        adapter=adapter,
        distilled=distilled,
        base_model=base,
        base_description=_base_text(run, base),
        facts=_facts(run, arm),
        arguments=run.unit(arm).get("training") or {**recipe["training"], **spec["training"]},
        own_arguments=CARD_OPTIONS,
        datasets=[name for name in dict.fromkeys(datasets) if name],
        evaluations=_evaluations(run, arm),
        baseline=_baseline(run, arm),
        notes=[" ".join(note.split()) for note in (recipe.get("report") or {}).get("notes") or []],
        license=inherited,
        license_source=source,
        prompt=prompt,
        choices=choices,
        versions=run.versions(arm),
        cache_versions=manifests[0].versions if manifests else {},
    )
    if distilled:
        card.teacher = _teacher_text(run, arm, manifests)
        card.teacher_license = licence_of(recipe["teacher"]["name_or_path"])
        card.cache = cache_text(manifests)
        card.recalibration = _recalibration_text(run, arm)
        card.estimator = estimator_text(spec["estimator"])
    return card


def _base_text(run: Run, base: str | None) -> str:
    if base is None:
        return run.model_text("student")
    return "" if base == run.base_hub_id else "pre-trained further in the same run"


def _license(run: Run, found: License | None, given: str | None) -> tuple[License | None, str]:
    if found is not None:
        return found, "as its base model"
    if given is not None:
        return License(given), "chosen by the author of this repository"
    if run.recipe["student"]["name_or_path"] is None:
        return None, "the model was made from scratch, and its author has chosen no licence"
    return None, "the card of the base model states no licence, or could not be read when this card was made"


def _evaluations(run: Run, arm: str) -> list[Evaluation]:
    evaluations = []
    shown = [name for name in run.report["results"] if not run.is_other_point(name, arm)]
    for role in run.roles:
        models = {run.label(name): scored for name in shown if (scored := run.score(name, role)) is not None}
        if run.label(arm) not in models:
            continue
        source = run.source(role)
        evaluations.append(
            Evaluation(
                name=role,
                models=models,
                student=run.label(arm),
                dataset_name=source["name"],
                dataset_id=source["id"],
                dataset_config=source["config"],
                dataset_revision=source["revision"],
                split=source["split"],
                domain=run.domain(role),
                bounds=frozenset({run.label(BAYES)}),
                note=_left_out(run, arm, role),
            )
        )
    return evaluations


def _left_out(run: Run, arm: str, role: str) -> str:
    """What a reader misses of the points of sweeps, which would bury the table."""
    others = [results for name, results in run.report["results"].items() if run.is_other_point(name, arm)]
    errors = [100 * results[role]["full_vocab"]["ece"] for results in others if role in results]
    if not errors:
        return ""
    among = f"is {errors[0]:.1f} %" if len(errors) == 1 else f"lies between {min(errors):.1f} and {max(errors):.1f} %"
    return f"Not in the table: {len(errors)} other points of sweeps, whose ECE {among}."


def _baseline(run: Run, arm: str) -> str | None:
    """What a reader compares with first: the student fine-tuned on labels, else the teacher."""
    for kind in ("sft", "teacher"):
        for name, spec in run.arms.items():
            if spec["kind"] == kind and name != arm and not run.is_swept(name):
                return run.label(name)
    return None


def _facts(run: Run, arm: str) -> list[tuple[str, str]]:
    spec = run.arms[arm]
    roles = spec.get("data") or ["train"]
    facts = [*_task_facts(run), ("Training data", "; ".join(_rows_text(run, role) for role in roles))]
    for key, found in marks(DistillOptions).items():
        facts += [
            (mark.title, mark.text.format(value=spec[key], k=run.recipe["capture"]["k"]))
            for mark in found
            if isinstance(mark, Fact) and spec.get(key)
        ]
    if spec.get("select") == "nll":
        facts.append(("Epoch", "the one with the lowest negative log-likelihood on the validation rows"))
    if spec.get("lora"):
        facts.append(("LoRA", ", ".join(f"`{name}` {value}" for name, value in spec["lora"].items())))
    if behind := run.report.get("novelty_of", {}).get(arm):
        facts.append(("Novelty", _novelty_text(run.report["novelty"][behind])))
    seed = run.recipe.get("seed")
    facts.append(("Recipe", f"`{run.recipe['name']}`, arm `{arm}`" + (f", seed {seed}" if seed is not None else "")))
    return facts


def _novelty_text(fit: Mapping[str, Any]) -> str:
    told = ", ".join(f"{scores['feature']:.2f} for `{role}`" for role, scores in fit["auroc"].items())
    return (
        f"`answer_pipeline(..., novelty=True)` divides the logits by {math.exp(fit['intercept']):.2f} · "
        f"exp({fit['slopes'][0]:.2f} d), d the distance of a prompt to the training rows in layer {fit['layer']}; without it "
        f"one temperature, {fit['scalar']:.2f}, fits best" + (f". AUROC of the distance: {told}" if told else "")
    )


def _rows_text(run: Run, role: str) -> str:
    """The rows of a role that is trained on, named where it is not the plain one."""
    counts = (run.report.get("rows") or {}).get(role)
    text = run.source_text(role) if role == "train" else f"`{role}`: {run.source_text(role)}"
    if counts:
        without = counts.get("without_answer", 0)
        text += f", {counts['rows']:,} rows"
        text += f" ({without:,} without an answer)" if without else ""
    return text


def _teacher_text(run: Run, arm: str, manifests: list[Manifest]) -> str:
    text = run.teacher_text(arm)
    if manifests:
        parameters = manifests[0].teacher.get("parameters")
        digests = list(dict.fromkeys(f"`{manifest.teacher['weights_digest']}`" for manifest in manifests))
        text += f", {parameters:,} parameters" if parameters else ""
        text += f" (digest of the weights {', '.join(digests)})"
    return text


def _recalibration_text(run: Run, arm: str) -> str:
    spec = run.arms[arm]
    method, value = spec["recalibration"], spec["recalibration_value"]
    if value is not None or method == "none":
        return recalibration_text(method, value, "set by hand in the recipe")
    fit = run.fit(arm)
    if fit is None:
        return recalibration_text(method, run.unit(arm).get("fitted"), "fitted on the validation rows")
    how = (
        f"fitted by {fit['objective'].upper()} on {fit['n']:,} positions of the validation rows, on the target "
        f"`{fit['estimator']}` with {fit['top_k']} entries, which took the teacher's ECE there from {100 * fit['raw']['ece']:.1f} to "
        f"{100 * fit['chosen']['ece']:.1f} %"
    )
    if fit.get("min_value") is not None:
        how += f", not below {fit['min_value']:g}"
    spread = fit.get("bootstrap")
    if spread:
        how += f" (95 % of bootstrap choices between {spread['low']:.3g} and {spread['high']:.3g})"
    return recalibration_text(method, fit["recalibration"]["value"], how)


def _example(run: Run) -> tuple[str, list[str]]:
    """
    Prompt and choices of an example that the student's tokenizer can read: the first evaluated row where the task brings
    its text. Else nobody's data enters a card: the end that all prompts share, and choices that all rows share.
    """
    role = run.roles[0]
    if not run.folder.rows(role).is_dir():
        return "...", []
    rows = run.folder.load_rows(role)
    if run.source(role)["bundled"]:
        return str(rows[0]["prompt"]), [str(choice) for choice in rows[0].get("choices") or []]
    some = rows.select(range(min(len(rows), _EXAMPLE_ROWS)))
    lists = (
        [[str(choice) for choice in choices] for choices in some["choices"]] if "choices" in rows.column_names else []
    )
    shortest = min(lists, key=len, default=[])
    # Letters differ in number from row to row; words of a row are its own
    shared = shortest if all(choices[: len(shortest)] == shortest for choices in lists) else []
    prompts = [str(prompt) for prompt in some["prompt"]]
    end = _common_end(prompts) if len(set(prompts)) > 1 else ""
    return "..." + end, shared


def _common_end(texts: list[str]) -> str:
    shortest = min(texts, key=len)
    n = next((i for i in range(len(shortest)) if len({text[len(text) - 1 - i] for text in texts}) > 1), len(shortest))
    return shortest[len(shortest) - n :]


def _task_facts(run: Run) -> list[tuple[str, str]]:
    """How rows become text: the task, its options and the template of its prompts."""
    spec = run.recipe["task"]
    options = dict(spec.get("options") or {})
    try:
        template = getattr(get_task(spec["name"], **options), "template", None)
    except (ValueError, TypeError):  # of a plugin, or of another version
        template = options.get("template")
    shown = ", ".join(
        f"`{name}` `{json.dumps(value, ensure_ascii=False)}`" for name, value in options.items() if name != "template"
    )
    facts = [("Task", f"`{spec['name']}`" + (f" with {shown}" if shown else ""))]
    if template is not None:
        facts.append(("Prompt template", f"`{json.dumps(template, ensure_ascii=False)}`"))
    return facts
