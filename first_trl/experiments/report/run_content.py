"""What the report of one run says, part by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...plugins import method_symbol, report_metrics
from ...vocabulary import Metric, number, role_title, score_meaning
from .document import Fold, Heading, Items, Paragraph, Part, Picture, Table, Value
from .tables import FLIPS, NOTHING


if TYPE_CHECKING:
    from ...cache.manifest import Manifest
    from ..recipe import Recipe


@dataclass(frozen=True)
class RunContent:
    """What [`write_report`] was given, with the labels of the arms and the figures (file -> caption)."""

    recipe: "Recipe"
    labels: Mapping[str, str]
    results: Mapping[str, Mapping[str, dict[str, Any]]]
    temperatures: Mapping[str, float]
    decisions: Mapping[str, Mapping[str, Any]]
    fits: Mapping[str, dict[str, Any]]
    manifest: "Manifest"
    counts: Mapping[str, Any]
    timings: Sequence[Mapping[str, Any]]
    figures: Mapping[str, str]
    novelty: Mapping[str, Mapping[str, Any]]


def write_run_parts(run: RunContent) -> list[Part]:
    """The whole report."""
    recipe, manifest = run.recipe, run.manifest
    parts: list[Part] = [Heading(1, recipe.report.title or recipe.name)]
    if recipe.description:
        parts.append(Paragraph(recipe.description.strip()))
    parts.append(
        Paragraph(
            f"Seed {recipe.seed}. Teacher: {manifest.teacher['parameters']:,} parameters; its {manifest.k} most likely "
            f"tokens hold {100 * manifest.kept_mass[-1]:.1f} % of its mass on the training rows. Cache: "
            f"{manifest.counts['positions']:,} positions of {manifest.counts['rows']:,} rows."
        )
    )
    for index, role in enumerate(recipe.evaluation.splits):
        parts += _role_parts(run, role, index)
    parts += _decision_parts(run)
    if run.novelty:
        parts += [Heading(2, "How new the rows are"), _novelty_table(run), *_picture(run, "novelty.png")]
    parts += _teacher_parts(run)
    if recipe.report.notes:
        notes = [" ".join(note.split()) for note in recipe.report.notes]
        parts += [Heading(2, "What these numbers show, and what they do not"), Items(notes)]
    parts += [Heading(2, "Rows"), _row_table(run.counts)]
    seconds = sum(entry["seconds"] for entry in run.timings)
    parts.append(Paragraph(f"Time of all units, kept ones included: {seconds:.0f} s."))
    if mixed := mixed_units(run.timings):
        parts.append(Paragraph(mixed))
    return parts


def mixed_units(timings: Sequence[Mapping[str, Any]]) -> str | None:
    """One line where units were made with different libraries, devices or numbers of processes."""
    found: dict[str, dict[str, None]] = {}
    for entry in timings:
        for name, value in (entry.get("made_with") or {}).items():
            found.setdefault(name, {})[str(value)] = None
    differing = [f"{name} {' and '.join(values)}" for name, values in found.items() if len(values) > 1]
    if not differing:
        return None
    return f"Units of this run were not all made alike: {'; '.join(differing)}. Their `unit.json` says which is which."


def _role_parts(run: RunContent, role: str, index: int) -> list[Part]:
    sample = next(iter(run.results.values()))[role]
    n_bins = sample["full_vocab"]["calibration"]["config"]["n_bins"]
    parts: list[Part] = [
        Heading(2, role_title(role, index, run.counts.get(role, {}).get("domain"))),
        _score_table(run, role, "full_vocab"),
        Paragraph(score_meaning(sample, n_bins)),
    ]
    if sample["n_truncated"]:
        cut = f"{sample['n_truncated']} of {sample['n_rows']} prompts were cut on the left to `max_length`."
        parts.append(Paragraph(cut))
    if sample["n_unlabelled"]:
        parts.append(Paragraph(f"{sample['n_unlabelled']} of {sample['n_rows']} rows have no answer: not scored."))
    if order := sample.get("option_order"):
        parts.append(
            Paragraph(
                f"{FLIPS}: how often the answer is another option when the options are shown in another order, over "
                f"{order['n']} questions in {order['n_orders']:.3g} orders each. It is 0 for a model that is blind to the order."
            )
        )
    parts += _picture(run, f"reliability_{role}.png")
    # Free text has no options
    if "options" in sample:
        title = f"`{role}`, probabilities renormalised over the answer options"
        parts.append(Fold(title, [_score_table(run, role, "options")]))
    return parts


def _decision_parts(run: RunContent) -> list[Part]:
    """Students with the temperature and the threshold that live with them."""
    if not run.decisions:
        return []
    some = next(iter(run.decisions.values()))
    promise = f"{100 * some['threshold']['max_error']:g} %"
    rows: list[list[Value | str]] = []
    for name, found in run.decisions.items():
        threshold = found["threshold"]["threshold"]
        row = [
            run.labels[name],
            found.get("temperature_text", f"{found['temperature']:.2f}"),
            "none" if threshold is None else f"{threshold:.3f}",
        ]
        for scores in found["roles"].values():
            wrong = NOTHING if scores["error"] is None else f"{100 * scores['error']:.1f}"
            row += [f"{100 * scores['ece']:.1f}", f"{100 * scores['coverage']:.0f}", wrong]
        rows.append([*row])
    columns = [f"{title} ({role})" for role in some["roles"] for title in ("ECE %", "answered %", "wrong %")]
    fitted_on = some["fitted_on"]
    caption = (
        f"Students as decision models: option probabilities at the temperature T that lives with them (by the number n of options where these differ), and the smallest "
        f"confidence above which at most {promise} of the answers are wrong, with {100 * (1 - some['threshold']['delta']):g} % "
        f"confidence, on rows like those of `{fitted_on}`."
    )
    parts: list[Part] = [
        Heading(2, "Decision models"),
        Table(caption, ["arm", "T", f"threshold for {promise}", *columns], rows),
    ]
    if fitted_on == "validation":
        parts.append(
            Paragraph(
                "The thresholds were fitted on the rows that temperatures were chosen on: for a strict guarantee name "
                "further rows in `task.splits.threshold`. After a shift there is none; `first-trl calibrate --threshold` checks."
            )
        )
    return [*parts, *(part for role in some["roles"] for part in _picture(run, f"risk_coverage_{role}.png"))]


def _teacher_parts(run: RunContent) -> list[Part]:
    parts: list[Part] = [Heading(2, "Teacher"), *_picture(run, "topk_mass.png")]
    if run.fits:
        parts.append(_fit_table(run.fits))
        if messages := fit_messages(run.fits):
            parts.append(Items(messages))
        parts += [part for name in run.fits for part in _picture(run, f"recalibration_{name}.png")]
    if run.temperatures:
        fitted = ", ".join(f"{run.labels[name]} {value:.2f}" for name, value in run.temperatures.items())
        parts.append(Paragraph(f"Post-hoc temperatures (fitted by NLL on `validation`): {fitted}."))
    return parts


def fit_messages(fits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warnings of fits, each once, with the fits that it is about."""
    about: dict[str, list[str]] = {}
    for name, fit in fits.items():
        for message in dict.fromkeys(fit.get("messages", [])):
            about.setdefault(message, []).append(f"`{name}`")
    return [f"Warning about {', '.join(names)}: {message}" for message, names in about.items()]


def _score_table(run: RunContent, role: str, reading: str) -> Table:
    """One row an arm; the last column is `n`, or the mass on the options for the reading that divides by it."""
    over_options = reading == "options"
    flips = not over_options and any("option_order" in run.results[name][role] for name in run.labels)
    rows: list[list[Value | str]] = []
    for name, label in run.labels.items():
        report = run.results[name][role]
        last = f"{100 * report['option_mass']:.1f}" if over_options else str(report["n"])
        flipped = report.get("option_order", {}).get("flip_rate")
        more = [NOTHING if flipped is None else f"{100 * flipped:.1f}"] if flips else []
        rows.append([label, *(_cell(report[reading], metric) for metric in report_metrics()), *more, last])
    named = [*([FLIPS] if flips else []), "Mass on the options %" if over_options else "n"]
    header = ["arm", *(metric.title for metric in report_metrics()), *named]
    how = " over the answer options" if over_options else ""
    return Table(f"`{role}`{how}, seed {run.recipe.seed}.", header, rows)


def _novelty_table(run: RunContent) -> Table:
    """One row an arm and role: its temperatures, and how well the feature tells the role from the first one."""
    rows: list[list[Value | str]] = []
    for name, fit in run.novelty.items():
        slopes = ", ".join(f"{slope:.2f}" for slope in fit["slopes"][:2]) + (", ..." if len(fit["slopes"]) > 2 else "")
        for i, (role, summary) in enumerate(fit["roles"].items()):
            tenths = summary["temperature"]["tenths"]
            told = fit["auroc"].get(role, {})
            first = [run.labels[name], fit["feature"].replace("_", " "), str(fit["layer"] or NOTHING), slopes]
            rows.append(
                [
                    *(first if i == 0 else [""] * 4),
                    role,
                    f"{tenths[5]:.2f} ({tenths[1]:.2f} to {tenths[9]:.2f})",
                    *(f"{told[key]:.2f}" if told else NOTHING for key in ("feature", "max_probability")),
                ]
            )
    caption = (
        "Temperatures by novelty: median and 10 to 90 % of the rows. AUROC: how often a row of the role is newer by the "
        f"feature than one of `{run.recipe.evaluation.splits[0]}`, and how often the model is less sure of it."
    )
    header = ["arm", "feature", "layer", "slope", "role", "temperature", "AUROC", "of the largest probability"]
    return Table(caption, header, rows)


def _fit_table(fits: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: list[list[Value | str]] = []
    for name, fit in fits.items():
        spread = fit.get("bootstrap")
        around = f" ({spread['low']:.2f} to {spread['high']:.2f})" if spread else ""
        eces = [f"{100 * fit[stage]['ece']:.1f}" for stage in ("raw", "chosen")]
        # No label is among the kept tokens, or one has the probability 0
        nlls = [NOTHING if fit[stage]["nll"] is None else f"{fit[stage]['nll']:.3f}" for stage in ("raw", "chosen")]
        symbol = method_symbol(fit["recalibration"]["method"])
        rows.append([f"`{name}`", f"{symbol} = {fit['recalibration']['value']:.3g}{around}", *eces, *nlls])
    caption = (
        "Rescale of the teacher, fitted on `validation` only, on the target that is trained on. In brackets: 95 % of "
        "bootstrap choices."
    )
    return Table(caption, ["rescale", "chosen", "ECE % raw", "after", "NLL raw", "after"], rows)


def _row_table(counts: Mapping[str, Any]) -> Table:
    rows: list[list[Value | str]] = []
    for role, count in counts.items():
        dropped = ", ".join(f"{number} ({reason})" for reason, number in count["dropped"].items()) or "0"
        numbers = (count["read"], count["rows"], count["not_selected"], count.get("cut", 0))
        rows.append([role, *map(str, numbers), dropped])
    header = ["role", "read", "used", "left out by limit", "cut", "dropped"]
    shared = [
        f"{number} questions of `{role}` stand in `{other}` too"
        for role, count in counts.items()
        for other, number in count.get("shared", {}).items()
    ]
    caption = "What became of the rows that were read." + (f" {'; '.join(shared)}." if shared else "")
    return Table(caption, header, rows)


def _picture(run: RunContent, name: str) -> list[Part]:
    return [Picture(name, run.figures[name])] if name in run.figures else []


def _cell(scores: dict[str, Any], metric: Metric) -> str:
    """A score as it is printed; a plugin's metric is missing where a run was evaluated without the plugin."""
    return number(scores[metric.key], metric) if metric.key in scores else ""
