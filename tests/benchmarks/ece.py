"""
Time and accuracy of the calibration core against torchmetrics, and the cost of the `evaluate` path.

    python tests/benchmarks/ece.py --json ece.json

Needs torchmetrics (`pip install torchmetrics`). Times are the best of `--repeats` runs, single process.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from first_trl.calibration import CalibrationWarning, calibration_report, expected_calibration_error


N_BINS = 15


def best_time(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Seconds of the fastest run and the value returned."""
    times, value = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - start)
    return min(times), value


def exact_ece(confidence: np.ndarray, correct: np.ndarray, n_bins: int) -> Fraction:
    """ECE in rational arithmetic: every double is a fraction, sums are exact. Left-closed bins, as torchmetrics."""
    edges = np.arange(n_bins + 1) / n_bins
    index = np.searchsorted(edges[1:-1], confidence, side="right")
    total = Fraction(0)
    for b in range(n_bins):
        values = confidence[index == b]
        # A double in [2^-60, 1] is an integer multiple of 2^-112: sum those integers exactly.
        mantissa, exponent = np.frexp(values)
        gap = 0
        integers = (mantissa * 2.0**53).astype(np.int64)
        for e in np.unique(exponent):
            part = integers[exponent == e]
            # Sums of 2^53-sized integers overflow int64 beyond 1024 terms: add high and low halves.
            high, low = int((part >> 26).sum()), int((part & ((1 << 26) - 1)).sum())
            gap += ((high << 26) + low) << (int(e) + 59)
        total += abs(Fraction(gap, 1 << 112) - int(correct[index == b].sum()))
    return total / len(confidence)


def top_label(rows: int, repeats: int) -> dict[str, Any]:
    """`rows` confidences of answers given, float64."""
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 1.5, rows)
    correct = (rng.random(rows) < confidence**1.5).astype(np.int64)
    theirs_in = torch.from_numpy(confidence), torch.from_numpy(correct)
    ours, ours_value = best_time(
        lambda: expected_calibration_error(confidence, correct, n_bins=N_BINS, bin_edges="left"), repeats
    )
    theirs, theirs_value = best_time(lambda: float(binary_calibration_error(*theirs_in, n_bins=N_BINS)), repeats)
    truth = exact_ece(confidence, correct, N_BINS)
    return {
        "rows": rows,
        "ours_s": ours,
        "torchmetrics_s": theirs,
        "ratio": theirs / ours,
        "ours_error": float(abs(Fraction(ours_value) - truth)),
        "torchmetrics_error": float(abs(Fraction(theirs_value) - truth)),
    }


def class_rows(rows: int, classes: int, repeats: int) -> dict[str, Any]:
    """`rows` x `classes` probabilities, float64."""
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet([0.6] * classes, rows)
    labels = rng.integers(0, classes, rows)
    theirs_in = torch.from_numpy(probabilities), torch.from_numpy(labels)
    ours, ours_value = best_time(
        lambda: expected_calibration_error(probabilities, labels, n_bins=N_BINS, bin_edges="left"), repeats
    )
    theirs, theirs_value = best_time(
        lambda: float(multiclass_calibration_error(*theirs_in, num_classes=classes, n_bins=N_BINS)), repeats
    )
    truth = exact_ece(probabilities.max(1), (probabilities.argmax(1) == labels), N_BINS)
    return {
        "rows": rows,
        "classes": classes,
        "ours_s": ours,
        "torchmetrics_s": theirs,
        "ratio": theirs / ours,
        "ours_error": float(abs(Fraction(ours_value) - truth)),
        "torchmetrics_error": float(abs(Fraction(theirs_value) - truth)),
    }


def constants(rows: int) -> dict[str, Any]:
    """`rows` float32 confidences of 0.9, all correct: the error is 0.1."""
    value = expected_calibration_error(np.full(rows, 0.9, dtype=np.float32), np.ones(rows, dtype=np.int8))
    return {"rows": rows, "ours": value, "deviation": abs(value - (1 - float(np.float32(0.9))))}


def evaluate_path(rows: int, repeats: int) -> dict[str, Any]:
    """`evaluate.load(...).compute(...)` against the report it returns."""
    import evaluate

    folder = Path(__file__).resolve().parents[2] / "first_trl" / "metrics" / "ece"
    module = evaluate.load(str(folder))
    rng = np.random.default_rng(2)
    confidence = rng.beta(5, 1.5, rows)
    correct = (rng.random(rows) < confidence).astype(np.int64)
    core, _ = best_time(lambda: calibration_report(confidence, correct, n_bins=N_BINS), repeats)
    path, _ = best_time(lambda: module.compute(predictions=confidence, references=correct, n_bins=N_BINS), repeats)
    batches = 10

    def batched() -> Any:
        for part in range(batches):
            rows_of_part = slice(part * rows // batches, (part + 1) * rows // batches)
            module.add_batch(predictions=confidence[rows_of_part], references=correct[rows_of_part])
        return module.compute(n_bins=N_BINS)

    stored, _ = best_time(batched, 1)
    return {
        "rows": rows,
        "report_s": core,
        "compute_s": path,
        "ratio": path / core,
        "add_batch_s": stored,
        "add_batch_ratio": stored / core,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="confidences of the top-label case")
    parser.add_argument("--class-rows", type=int, default=1_000_000, help="rows of the class-probability case")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--constants", type=int, default=30_000_000, help="rows of the constant float32 case")
    parser.add_argument("--evaluate-rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; numpy uses one")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", CalibrationWarning)
    results = {
        "top_label": top_label(args.rows, args.repeats),
        "class_rows": class_rows(args.class_rows, args.classes, args.repeats),
        "constants": constants(args.constants),
        "evaluate": evaluate_path(args.evaluate_rows, args.repeats),
        "threads": args.threads,
    }
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
