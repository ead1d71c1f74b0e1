"""Space of the metric: drop a table in, read the calibration error and see the reliability diagram."""

import warnings
from pathlib import Path
from typing import Any

import evaluate
import gradio as gr

from first_trl.utils.tables import as_number, listed, load_table


MODULE = Path(__file__).with_name("ece.py")
HELP = """
# Expected calibration error

Drop in a table (CSV, TSV, Excel, JSON lines, Parquet) with named columns, one row per answer:

- `confidence,correct`: the confidence of the answer given (0 to 1) and 1 or 0 for whether it is right, or
- one column of probabilities per class and a column `label` with the class id, counted from 0 in column order.

A further column `model` draws one panel per model. Nothing is stored.
"""


def read_table(path: str) -> dict[str, tuple[list[Any], list[int]]]:
    """
    Read predictions and references from a file, by model.

    Raises:
        `ValueError`: naming the rows that cannot be read.
    """
    table = load_table(path)
    names = list(table.rows[0])
    binary = {"confidence", "correct"} <= set(names)
    classes = [name for name in names if name not in ("label", "model")]
    if not binary and ("label" not in names or len(classes) < 2):
        raise ValueError(
            "The header needs the columns confidence and correct, or label and one column per class; it has "
            f"{', '.join(names)}."
        )
    tables: dict[str, tuple[list[Any], list[int]]] = {}
    errors = []
    for number, row in enumerate(table.rows):
        try:
            if binary:
                values: Any = _number(row, "confidence")
                reference = _flag(row.get("correct"))
            else:
                values = [_number(row, name) for name in classes]
                reference = _class_id(row.get("label"))
        except ValueError as error:
            errors.append(f"{table.place(number)}: {error}.")
            continue
        predictions, references = tables.setdefault("" if row.get("model") is None else str(row["model"]), ([], []))
        predictions.append(values)
        references.append(reference)
    if errors:
        raise ValueError(listed(errors, len(table.rows)))
    return tables


def _number(row: dict[str, Any], name: str) -> float:
    value = as_number(row.get(name))
    if value is None:
        raise ValueError(f"{name} is {row.get(name)!r}, not a number")
    return value


def _flag(value: Any) -> int:
    flag = {"1": 1, "true": 1, "1.0": 1, "0": 0, "false": 0, "0.0": 0}.get(str(value).strip().lower())
    if flag is None:
        raise ValueError(f"correct is {value!r}, expected 1 or 0")
    return flag


def _class_id(value: Any) -> int:
    # A class id is no flag: True and False say whether an answer is right
    number = as_number(value)
    if number is None or number != int(number):
        raise ValueError(f"label is {value!r}, not the number of a class, counted from 0")
    return int(number)


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
        with warnings.catch_warnings(record=True) as cautions:
            warnings.simplefilter("always")
            tables = read_table(path)
        for name, (predictions, references) in tables.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are shown from the result
                reports[name] = module.compute(predictions=predictions, references=references, **options)
    except ValueError as error:
        # The page keeps uploads under names of its own
        text = str(error).replace(f"{Path(path)}", Path(path).name)
        return f"**This file cannot be scored.** {text}", None, None
    return (
        "\n\n".join(
            [
                *(_line(name, report) for name, report in reports.items()),
                *(f"- {str(caution.message).replace(str(Path(path)), Path(path).name)}" for caution in cautions),
            ]
        ),
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
            file = gr.File(label="Table", type="filepath")
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
