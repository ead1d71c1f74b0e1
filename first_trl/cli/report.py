"""`first-trl report`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl report` to a parser."""
    parser.description = (
        "Merge the reports of finished runs of one recipe: mean and spread over seeds, paired differences with "
        "intervals, sweeps. Writes report.md, report.json, report.tex, report.html and figures."
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run, or folder that holds runs")
    parser.add_argument("--output-dir", help="where to (default: `report` in the folder that holds all runs)")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="ARM",
        help="arm that all others are compared with; may be repeated (default: those of the recipe, else plain "
        "fine-tuning and distillation, with and without temperature scaling)",
    )


def main(args: argparse.Namespace) -> int:
    """Merge the reports."""
    from ..experiments.report.write import write_merged_report

    output = Path(args.output_dir) if args.output_dir else None
    print(f"Merged report: {write_merged_report(args.folders, output, baselines=args.baseline)}")
    return 0
