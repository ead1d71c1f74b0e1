"""What the arms of a study are to each other: references, baselines, points of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ...plugins import method_symbol
from ...training.options import DistillOptions
from ...vocabulary import BAYES, BAYES_LABEL, POST_HOC
from .collect import FinishedRun, is_number


# Keys whose numbers mean something else for every method
_OF_METHOD = ("recalibration_value", "min_value")
# Keys of an arm that change nothing about the target whose fit a sweep of values is compared with
_NOT_OF_TARGET = frozenset({"recalibration_value", "label", "swept", "base", "values", "fit"})


_KEY_SYMBOLS = {"top_k": "k"}


def key_title(key: str, method: str | None = None) -> str:
    """What a key that is swept stands for: `c` for the value of the probability temperature."""
    if method is not None:
        symbol = method_symbol(method)
        return f"lower bound of {symbol}" if key == "min_value" else symbol
    return _KEY_SYMBOLS.get(key, key.replace("_", " "))


def distinct_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Arm -> label, with the name of the arm where another one has the same label."""
    given = list(labels.values())
    return {name: f"{label} ({name})" if given.count(label) > 1 else label for name, label in labels.items()}


def describe_arms(runs: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """
    Every arm that some run of a cell has, in the order of the tables, the true posterior last.

    Returns:
        `dict`: Arm -> `label`, `kind`, `recalibration`, `base`, `values`, `swept`, `reference`, `baseline` (filled in
        later) and `missing`.
    """
    fullest = max(runs, key=lambda run: len(run.data["results"]))
    names = dict.fromkeys(name for run in (fullest, *runs) for name in run.data["results"])
    names = {**{name: None for name in names if name != BAYES}, **{name: None for name in names if name == BAYES}}
    arms = {}
    for name in names:
        has = [run for run in runs if name in run.data["results"]]
        spec = has[0].arms.get(name, {})
        label = (has[0].data.get("labels") or {}).get(name) or spec.get("label")
        kind = BAYES if name == BAYES else spec.get("kind")
        source = has[0].arms.get(str(spec.get("of")), {}) if kind in POST_HOC else spec
        arms[name] = {
            "label": label or (BAYES_LABEL if name == BAYES else name),
            "kind": kind,
            "recalibration": source.get("recalibration"),
            "base": spec.get("base", name),
            "values": spec.get("values", {}),
            "swept": False,
            "reference": kind == BAYES or source.get("kind") == "teacher",
            "baseline": False,
            "missing": [run.name for run in runs if run not in has],
        }
    labels = distinct_labels({name: arm["label"] for name, arm in arms.items()})
    for name, arm in arms.items():
        arm["label"] = labels[name]
    for sweep in find_sweeps(arms):
        for point in sweep["points"]:
            arms[point["arm"]]["swept"] = True
    return arms


def default_baselines(arms: Mapping[str, Any], runs: Sequence[FinishedRun]) -> list[str]:
    """
    The arms that a reader wants every other one compared with, told by their settings: fine-tuning on the labels,
    distillation from the teacher as it is, and both with temperature scaling. Points of a sweep are no baselines.
    """
    specs: dict[str, Any] = {}
    for run in runs:
        specs = {**run.arms, **specs}
    given = {name: specs.get(name, {}) for name, arm in arms.items() if not arm["swept"]}
    plain = {name for name, spec in given.items() if _is_plain(spec)}
    scaled = {
        name for name, spec in given.items() if spec.get("kind") == "temperature_scaling" and spec.get("of") in plain
    }
    return [name for name in given if name in plain | scaled]


def _is_plain(spec: Mapping[str, Any]) -> bool:
    kind = spec.get("kind")
    if kind == "sft":
        return not spec.get("lora")
    # Only the two-line form of distillation, without anything else that a study may be about
    return kind == "distill" and (
        all(spec.get(f.name, f.default) == f.default for f in fields(DistillOptions))
        and spec.get("data") in (None, ["train"])
        and not any(spec.get(key) for key in ("lora", "teacher", "select"))
    )


def check_baselines(asked: Sequence[str], runs: Sequence[FinishedRun]) -> None:
    """
    Raises:
        `ValueError`: A baseline that no run has.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.data["results"] if name != BAYES))
    for name in asked:
        if name not in known:
            raise ValueError(f"No run has an arm {name!r} to compare with. Arms: {', '.join(known)}.")


def find_sweeps(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    Arms that differ in one number, as curves.

    Returns:
        `list[dict]`: `key`, `base`, `label`, `method` (rescale whose value is swept, else `None`) and `points`, a list
        of `value` and `arm` by rising value.
    """
    curves: dict[tuple[str, str], dict[float, str]] = {}
    for name, arm in arms.items():
        if len(arm["values"]) != 1:
            continue
        ((key, value),) = arm["values"].items()
        if is_number(value):
            curves.setdefault((key, arm["base"]), {})[value] = name
    sweeps = []
    for (key, base), points in curves.items():
        if len(points) < 2:
            continue
        method = arms[next(iter(points.values()))]["recalibration"] if key in _OF_METHOD else None
        labels = [(value, arms[name]["label"]) for value, name in points.items()]
        sweeps.append(
            {
                "key": key,
                "base": base,
                "label": _curve_label(base, labels, (key, key_title(key, method))),
                "method": method,
                "points": [{"value": value, "arm": points[value]} for value in sorted(points)],
            }
        )
    return sweeps


def fit_beside(sweep: Mapping[str, Any], runs: Sequence[FinishedRun]) -> str | None:
    """
    The fit that would have chosen the value which a sweep sets by hand: that of the same arm without the value, else
    the one fit of the same method, target, objective and teacher.

    Returns:
        `str`: Its name among the fits of the run; `None` for other sweeps, and where there is no or more than one.
    """
    if sweep["key"] != "recalibration_value":
        return None
    name = sweep["points"][0]["arm"]
    run = next(run for run in runs if name in run.arms)
    point = run.arms[name]
    point = run.arms.get(str(point.get("of")), point)
    target = {key: value for key, value in point.items() if key not in _NOT_OF_TARGET}
    for spec in run.arms.values():
        own = {key: value for key, value in spec.items() if key not in _NOT_OF_TARGET}
        if own == target and not spec["values"] and spec.get("fit"):
            return str(spec["fit"])
    teachers = {spec["teacher"] for spec in run.arms.values() if spec.get("teacher")}
    kept = (run.recipe.get("capture") or {}).get("k") or len(run.data.get("kept_mass") or [])
    wanted = {
        "method": point.get("recalibration"),
        "estimator": point.get("estimator") or "topk",
        "top_k": point.get("top_k") or kept,
        "min_value": point.get("min_value"),
        "objective": point.get("objective") or (run.recipe.get("recalibration") or {}).get("objective") or "ece",
        "teacher": point.get("teacher"),
    }
    found = []
    for name, fit in (run.data.get("recalibration") or {}).items():
        own = {key: fit.get(key, wanted[key]) for key in ("estimator", "top_k", "min_value", "objective")}
        own["method"] = fit["recalibration"]["method"]
        # The fits of a further teacher bear its name at the end
        own["teacher"] = next((teacher for teacher in sorted(teachers) if name.endswith(f"-{teacher}")), None)
        if own == wanted:
            found.append(name)
    return found[0] if len(found) == 1 else None


def _curve_label(base: str, labels: Sequence[tuple[float, str]], names: Sequence[str]) -> str:
    """What the labels of the points have in common, when they follow one pattern."""
    for pattern in (*(f", {name} = {{}}" for name in names), "{}"):
        stems = set()
        for value, label in labels:
            before, found, after = label.rpartition(pattern.format(f"{value:g}"))
            stems.add((before + after).rstrip(" =:,") if found else label)
        if len(stems) == 1 and (stem := stems.pop()):
            return stem
    return base
