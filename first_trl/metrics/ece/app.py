"""Space of the metric: drop a CSV in, read the calibration error and see the reliability diagram."""

import csv
import warnings
from pathlib import Path
from typing import Any

import evaluate
import gradio as gr


MODULE = Path(__file__).with_name("ece.py")
HELP = """
# Expected calibration error

Drop in a CSV file with a header, one row per answer:

- `confidence,correct`: the confidence of the answer given (0 to 1) and 1 or 0 for whether it is right, or
- one column of probabilities per class and a column `label` with the class id, counted from 0 in column order.

A further column `model` draws one panel per model. Nothing is stored.
"""


def read_table(path: str) -> dict[str, tuple[list[Any], list[int]]]:
    """
    Read predictions and references from a CSV file, by model.

    Raises:
        `ValueError`: naming the line that cannot be read.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = names
        if len(set(names)) != len(names):
            raise ValueError(f"The header names a column twice: {', '.join(names)}.")
        binary = {"confidence", "correct"} <= set(names)
        classes = [name for name in names if name not in ("label", "model")]
        if not binary and ("label" not in names or len(classes) < 2):
            raise ValueError(
                "The header needs the columns confidence and correct, or label and one column per class; it has "
                f"{', '.join(names) or 'nothing'}."
            )
        tables: dict[str, tuple[list[Any], list[int]]] = {}
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"Line {reader.line_num} does not have {len(names)} values.")
            predictions, references = tables.setdefault(row.get("model") or "", ([], []))
            try:
                if binary:
                    predictions.append(float(row["confidence"]))
                    references.append(_flag(row["correct"]))
                else:
                    predictions.append([float(row[name]) for name in classes])
                    references.append(int(row["label"]))
            except ValueError as error:
                raise ValueError(f"Line {reader.line_num}: {error}.") from error
    if not tables:
        raise ValueError("The file has a header but no rows.")
    return tables


def _flag(text: str) -> int:
    value = {"1": 1, "true": 1, "1.0": 1, "0": 0, "false": 0, "0.0": 0}.get(text.strip().lower())
    if value is None:
        raise ValueError(f"correct is {text!r}, expected 1 or 0")
    return value


def score(
    path: str | None, n_bins: float, strategy: str, norm: str, bin_edges: str, interval: bool, layout: str
) -> Any:
    """Text, figure and full result for the page."""
    if not path:
        return "Waiting for a file.", None, None
    options: dict[str, Any] = {"n_bins": int(n_bins), "strategy": strategy, "norm": norm, "bin_edges": bin_edges}
    if interval:
        options |= {"confidence_interval": 0.95, "null_test": True}
    try:
        reports = {}
        for name, (predictions, references) in read_table(path).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are shown from the result
                reports[name] = module.compute(predictions=predictions, references=references, **options)
    except (ValueError, UnicodeDecodeError) as error:
        return f"**This file cannot be scored.** {error}", None, None
    return (
        "\n\n".join(_line(name, report) for name, report in reports.items()),
        module.plot(reports, layout=layout),
        reports,
    )


def _line(name: str, report: dict[str, Any]) -> str:
    text = f"### {name + ': ' if name else ''}{report['ece']:.6f}\n\n{report['config']['norm']} calibration error"
    if report["ci_low"] is not None:
        text += f", 95 % interval {report['ci_low']:.4f} to {report['ci_high']:.4f}, p = {report['p_value']:.3f}"
    text += f"; accuracy {report['accuracy']:.4f}, mean confidence {report['mean_confidence']:.4f}, n = {report['n']}"
    return "\n\n".join([text, *(f"- {warning}" for warning in report["warnings"])])


module = evaluate.load(str(MODULE))

with gr.Blocks(title="Expected calibration error") as demo:
    gr.Markdown(HELP)
    with gr.Row():
        with gr.Column(scale=1):
            file = gr.File(label="CSV file", file_types=[".csv"], type="filepath")
            bins = gr.Slider(1, 50, value=10, step=1, label="Bins")
            strategy = gr.Radio(["width", "mass", "quantile"], value="width", label="Bins of equal")
            norm = gr.Radio(["l1", "l2", "max"], value="l1", label="Norm")
            edges = gr.Radio(["right", "left"], value="right", label="Closed edge of a bin")
            interval = gr.Checkbox(False, label="Interval and test (1000 resamples)")
            layout = gr.Radio(["panels", "overlay"], value="panels", label="Several models")
        with gr.Column(scale=2):
            text = gr.Markdown("Waiting for a file.")
            plot = gr.Plot(label="Reliability diagram")
            with gr.Accordion("Full result", open=False):
                result = gr.JSON()
    inputs = [file, bins, strategy, norm, edges, interval, layout]
    gr.on([control.change for control in inputs], score, inputs, [text, plot, result], api_name="score")  # type: ignore

if __name__ == "__main__":
    demo.launch()
