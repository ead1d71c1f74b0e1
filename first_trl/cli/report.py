"""`first-trl report`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl report` to a parser."""
    parser.description = (
        "Merge the reports of finished runs of one recipe: mean and spread over seeds, paired differences with "
        "intervals, sweeps. Writes report.md, report.json, report.tex, report.html, results.csv.gz and figures."
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="folder of a run, or folder that holds runs")
    parser.add_argument(
        "--from",
        dest="results",
        metavar="FILE",
        help="results.csv.gz of a study: print its table, by --role, --metric, --arm and --baseline",
    )
    for name in ("role", "metric", "arm"):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar=name.upper(),
            help="with --from: only these; may be repeated",
        )
    parser.add_argument("--output-dir", help="where to (default: `report` in the folder that holds all runs)")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="ARM",
        help="arm that all others are compared with; may be repeated (default: those of the recipe, else plain "
        "fine-tuning and distillation, with and without temperature scaling)",
    )
    parser.add_argument(
        "--intervals",
        action="store_true",
        help="with --from and --baseline: the 95 %% intervals of the differences over the runs",
    )
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        choices=("pdf", "svg"),
        help="format of the figures beside PNG; may be repeated",
    )


def main(args: argparse.Namespace) -> int:
    """Merge the reports, or print a table of merged results."""
    if bool(args.folders) == bool(args.results):
        raise ValueError("Give the folders of finished runs, or --from with the results of a study.")
    # Nothing that was asked for is passed over
    names = ("output_dir", "format") if args.results else ("role", "metric", "arm", "intervals")
    unused = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
    if unused:
        only = (
            "with folders of runs, of which a report is written"
            if args.results
            else "with --from, for the table that it prints"
        )
        raise ValueError(f"{', '.join(unused)} can be given only {only}.")
    if args.intervals and not args.baseline:
        raise ValueError("--intervals are those of differences: name the arm to compare with, --baseline ARM.")
    if args.results:
        from ..experiments.report.results import read_results, results_table

        options = {"roles": args.role, "metrics": args.metric, "arms": args.arm, "baselines": args.baseline}
        print(results_table(read_results(args.results), **options, intervals=args.intervals), end="")
        return 0
    from ..experiments.report.write import write_merged_report

    output = Path(args.output_dir) if args.output_dir else None
    print(f"Merged report: {write_merged_report(args.folders, output, baselines=args.baseline, formats=args.format)}")
    return 0
