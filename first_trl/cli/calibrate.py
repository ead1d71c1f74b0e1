"""`first-trl calibrate FILE...`: the calibration report and reliability diagram of files that hold confidences."""

import argparse
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..calibration import CalibrationWarning, reliability_diagram, save_figure
from ..calibration.threshold import check_threshold
from ..evaluation.confidence import DEFINITIONS, Confidences
from ..evaluation.paired import paired_differences
from ..evaluation.readers import read_confidences
from ..utils.files import write_json
from ..utils.text_tables import text_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl calibrate` to a parser."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="samples_*.jsonl of lm-evaluation-harness (--log_samples), predictions of an evaluation, or a table of "
        "confidences (CSV, TSV, JSON lines, Parquet, Excel)",
    )
    parser.add_argument(
        "--output-dir",
        default="calibration_report",
        help="where report.json and reliability.png go (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        choices=("pdf", "svg"),
        help="format of the figure beside PNG; may be repeated",
    )
    binning = parser.add_argument_group("calibration error")
    binning.add_argument("--bins", type=int, default=10, help="number of bins (default: %(default)s, as in FIRST)")
    binning.add_argument(
        "--strategy",
        choices=("width", "mass", "quantile"),
        default="width",
        help="equal width (default), equal mass, quantile",
    )
    binning.add_argument(
        "--weighting",
        choices=("count", "uniform"),
        default="count",
        help="of bins: by their examples (default), or all alike. `--strategy quantile --weighting uniform --bin-edges left` "
        "is the estimator of Plaut et al. (2024) where no confidence is exactly 1",
    )
    binning.add_argument("--norm", choices=("l1", "l2", "max"), default="l1", help="l1 (ECE, default), l2 or max")
    binning.add_argument(
        "--bin-edges", choices=("right", "left"), default="right", help="closed side of a bin (default: %(default)s)"
    )
    binning.add_argument("--resamples", type=int, default=1000, help="for interval and null band; 0 leaves both out")
    drift = parser.add_argument_group(
        "threshold", "Does a threshold still keep its promise on these rows? Exit status 1 where they contradict it."
    )
    drift.add_argument(
        "--threshold",
        metavar="VALUE|MODEL",
        help="a confidence, or the folder or Hub id of a student that brings one, fitted at its own temperature (that of "
        "answer_pipeline and of first-trl evaluate)",
    )
    drift.add_argument(
        "--max-error",
        type=float,
        default=0.05,
        help="promised share of wrong answers at the threshold and above (default: %(default)s)",
    )
    drift.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        help="probability of failing although the promise is just kept (default: %(default)s)",
    )
    reading = parser.add_argument_group("how to read the files")
    reading.add_argument(
        "--reading", help="acc, acc_norm, acc_bytes or acc_mutual_info of a harness log (default: all that were logged); "
        "full_vocab, choice, renormalized or topk of our own predictions (default: full_vocab and renormalized)"
    )  # fmt: skip
    reading.add_argument("--filter", help="filter of a harness log (default: all)")
    reading.add_argument(
        "--target-delimiter", help="of the harness task (default: as in results_*.json beside the log, else one space)"
    )
    reading.add_argument("--confidence-column", default="confidence", help="of a table (default: %(default)s)")
    reading.add_argument("--correct-column", default="correct", help="of a table (default: %(default)s)")
    reading.add_argument("--correct-value", help="value of that column that means right (default: 1 or true)")


def main(args: argparse.Namespace) -> int:
    """
    Print the reports, and write `report.json` and `reliability.png`.

    Args:
        args (`argparse.Namespace`):
            Options of [`add_arguments`].

    Returns:
        `int`: 0; 1 where a file contradicts what `--threshold` promises.

    Raises:
        `ValueError`: for a file that cannot be read, naming the row, or a model that brings no such threshold.
    """
    options: dict[str, Any] = {
        "n_bins": args.bins,
        "strategy": args.strategy,
        "norm": args.norm,
        "weighting": args.weighting,
        "bin_edges": args.bin_edges,
    }
    if args.resamples:
        options |= {"confidence_interval": 0.95, "null_test": True, "n_resamples": args.resamples}
    if len({Path(path).resolve() for path in args.files}) < len(args.files):
        raise ValueError(f"A file was given twice: {' '.join(args.files)}.")
    found = [
        (Path(path), confidences)
        for path in args.files
        for confidences in read_confidences(
            path,
            reading=args.reading,
            filter=args.filter,
            target_delimiter=args.target_delimiter,
            confidence_column=args.confidence_column,
            correct_column=args.correct_column,
            correct_value=args.correct_value,
        )
    ]
    reports: dict[str, dict[str, Any]] = {}
    for name, (path, confidences) in zip(_names(found), found, strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CalibrationWarning)
            report = confidences.report(**options)
        cautions = [str(w.message) for w in caught if issubclass(w.category, CalibrationWarning)]
        reports[name] = {"file": str(path), **report, "cautions": cautions}
    print(format_reports(reports))
    binning = {key: options[key] for key in ("n_bins", "strategy", "weighting", "norm", "bin_edges")}
    differences, reasons = _differences(dict(zip(reports, found, strict=True)), args.resamples, binning)
    if differences:
        print("\n" + format_differences(differences))
    for reason in reasons:
        print(reason)
    kept = True
    for name, (_, confidences) in zip(reports, found, strict=True) if args.threshold is not None else ():
        reports[name]["threshold"], said = _check(confidences, args)
        kept = kept and reports[name]["threshold"]["holds"]
        print(f"{name}: {said}")
    folder = Path(args.output_dir)
    write_json(
        folder / "report.json",
        {name: report | {"paired_difference": differences.get(name)} for name, report in reports.items()},
    )
    figures = save_figure(reliability_diagram(reports), folder / "reliability.png", formats=args.format)
    print(f"\nWrote {', '.join(str(path) for path in (folder / 'report.json', *figures))}.")
    return 0 if kept else 1


def _check(confidences: Confidences, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Whether a threshold keeps its promise on the rows of a file, as values and in words."""
    try:
        threshold, of = float(args.threshold), ""
    except ValueError:
        # Imported here: a number needs no Hugging Face library
        from ..tasks.decision_extras import read_decision_extras, stored_temperature, stored_threshold

        reading = confidences.definition
        if reading.startswith("column "):
            reading = "full_vocab"  # what answer_pipeline gives unless it is asked for another
        promise = f"max_error={args.max_error:g}"
        extras = read_decision_extras(args.threshold)
        stored = stored_threshold(extras, promise, reading)
        assert stored.threshold is not None
        threshold = stored.threshold
        of = f" of {args.threshold} for {reading} at temperature {stored_temperature(extras)}"
        of += f" (which answered {100 * stored.coverage:.1f} % of the rows it was fitted on)"
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"--threshold is a confidence from 0 to 1, or a model; got {args.threshold}.")
    check = check_threshold(
        threshold, confidences.confidence, confidences.correct, max_error=args.max_error, alpha=args.alpha
    )
    rate = "no answer was checked"
    if check.error is not None:
        rate = (
            f"{100 * check.error:.1f} % of them wrong ({100 * check.error_low:.1f} to {100 * check.error_high:.1f} %)"
        )
    verdict = "holds" if check.holds else "is BROKEN"
    return asdict(check) | {"threshold": threshold, "max_error": args.max_error}, (
        f"threshold {threshold:.4f}{of}: {check.n_answered} of {check.n} rows answered, {rate}. The promise of at most "
        f"{100 * args.max_error:g} % {verdict} (p = {check.p_value:.3g})."
    )


def _differences(
    found: Mapping[str, tuple[Path, Confidences]], resamples: int, binning: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Name of a result -> its scores minus those of the first comparable one; and why others are not compared."""
    differences: dict[str, dict[str, Any]] = {}
    reasons = []
    for position, (name, (path, confidences)) in enumerate(found.items()):
        for other, (other_path, base) in list(found.items())[:position]:
            # Two tasks of one log may well have as many rows; tables are named after their files
            same = base.name == confidences.name or confidences.definition.startswith("column ")
            if other_path == path or base.definition != confidences.definition or not same:
                continue
            if len(base.confidence) == len(confidences.confidence):
                scores = paired_differences(base, confidences, n_resamples=resamples, **binning)
                differences[name] = {"minus": other, **scores}
            else:
                reasons.append(
                    f"{name} is not compared with {other}: {len(confidences.confidence)} and {len(base.confidence)} rows."
                )
            break
    return differences, reasons


def format_differences(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """The paired differences as a text table."""
    rows = []
    for name, found in differences.items():
        scores = dict(found)
        cells = [f"{name} minus {scores.pop('minus')}"]
        for score in scores.values():
            interval = "" if score["low"] is None else f" [{score['low']:+.4f}, {score['high']:+.4f}]"
            cells.append(f"{score['difference']:+.4f}{interval}")
        rows.append(cells)
    text = text_table(("paired difference", "accuracy", "confidence", "ECE"), rows)
    text.append(
        "Rows are paired by their order in the files, which have to hold the same questions. In brackets: 95 % interval."
    )
    return "\n".join(text)


def _names(found: list[tuple[Path, Confidences]]) -> list[str]:
    """Names of the results; where files share one (a log per model), as much of the path in front as tells them apart."""
    names = [confidences.name for _, confidences in found]
    for prefix in (lambda path: path.resolve().parent.name, lambda path: str(path.resolve().parent)):
        counts = Counter(names)
        names = [
            f"{prefix(path)}/{confidences.name}" if counts[name] > 1 else name
            for name, (path, confidences) in zip(names, found, strict=True)
        ]
    return names


def format_reports(reports: dict[str, dict[str, Any]]) -> str:
    """The reports as a text table, with how the numbers were made and what to beware of."""
    columns = ("", "n", "accuracy", "confidence", "ECE", "95 % interval", "calibrated by chance", "NLL", "Brier")
    rows: list[tuple[str, ...]] = []
    for name, r in reports.items():
        extras = r["extras"]
        interval = f"{r['ci_low']:.4f} - {r['ci_high']:.4f}" if r.get("ci_low") is not None else ""
        null = f"< {r['null_high']:.4f} (p = {r['p_value']:.3f})" if r.get("p_value") is not None else ""
        scores = [f"{extras[key]:.4f}" if key in extras else "" for key in ("nll", "brier")]
        rows.append(
            (
                name,
                str(r["n"]),
                f"{r['accuracy']:.4f}",
                f"{r['mean_confidence']:.4f}",
                f"{r['ece']:.6f}",
                interval,
                null,
                *scores,
            )
        )
    text = text_table(columns, rows)
    config = next(iter(reports.values()))["config"]
    text.append("")
    text.append(
        f"ECE: {config['n_bins']} bins, strategy {config['strategy']}, "
        + (f"weighting {config['weighting']}, " if config["weighting"] != "count" else "")
        + f"norm {config['norm']}, {config['bin_edges']} edges "
        "closed. 'calibrated by chance': 95 % of perfectly calibrated models with these confidences score below."
    )
    for name, r in reports.items():
        text.append(f"{name}: confidence = {DEFINITIONS.get(r['definition'], r['definition'])}")
        text += [f"  {count} rows left out: {reason}" for reason, count in r["dropped"].items()]
        text += [f"  caution: {caution}" for caution in r["cautions"]]
    return "\n".join(text)
