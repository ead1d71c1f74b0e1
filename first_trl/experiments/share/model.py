"""Cards of the models of a run that are no students: the fine-tuned teacher, the base of its adapters."""

from typing import Any

from huggingface_hub import ModelCardData

from ...cards.license import License, find_license
from ...cards.render import hub_id, render
from ...cards.scores import shown_metrics
from ...cards.wording import legend
from .run import Run


def run_model_card(
    run: Run, arm: str | None, repo_id: str, license: str | None = None, token: str | None = None
) -> str:
    """
    Card of a fine-tuned teacher of a run, or of the base that its adapters need.

    Args:
        run ([`Run`]):
            The run.
        arm (`str`, *optional*):
            Arm that stands for the teacher; `None` for the base.
        repo_id (`str`):
            Repository the card is for.
        license (`str`, *optional*):
            Licence of a model that inherits none.
        token (`str`, *optional*):
            Hub token, to read the licence of a private model.

    Returns:
        `str`: The card with its YAML header.
    """
    role = "student" if arm is None else "teacher"
    spec = run.recipe[role]
    origin = hub_id(spec["name_or_path"])
    adapter = arm is not None and run.teacher(arm).is_adapter
    stated = find_license(spec["name_or_path"], token) or (License(license) if license else None)
    optional: dict[str, Any] = {} if stated is None else dict(stated.metadata)
    if origin:
        optional["base_model_relation"] = "adapter" if adapter else "finetune"
    data = ModelCardData(
        base_model=origin,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["first_trl", "trl"],
        **optional,
    )
    units: set[str] = set()
    tables, n_bins = [], 10
    found = {name: run.score(arm, name) for name in run.roles} if arm is not None else {}
    metrics = shown_metrics(scored for scored in found.values() if scored is not None)
    for name, scored in found.items():
        if scored is not None:
            cells = [scored.scores[m.key].shown(m) if m.key in scored.scores else "" for m in metrics]
            tables.append((name, run.domain(name), f"{scored.n:,} {scored.unit}s", cells))
            units, n_bins = units | {scored.unit}, scored.n_bins
    return render(
        "teacher.md.j2",
        metadata=data.to_yaml(),
        is_teacher=arm is not None,
        name=repo_id.rsplit("/", 1)[-1],
        origin=run.model_text(role) if arm is None else run.teacher_text(arm),
        recipe=run.recipe["name"],
        seed=run.recipe.get("seed"),
        metrics=metrics,
        tables=tables,
        legend=legend(units, n_bins, in_metadata=False),
        license=stated,
    )
