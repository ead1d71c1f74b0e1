"""
How often the 95 % interval of a calibration error covers the true one: small samples, pure bins, confidences near 1.

The true value is the binned error of the population with the same ten bins, from two million confidences and their exact
accuracies. Each cell is a law and a number of rows; its Monte-Carlo standard error stands beside it. A cell is good when it
is not below 92 %, given that error; above 98 % is said (over-cautious), not failed. Also printed: how often the interval's
lower limit is above 0 while the null test finds nothing, or the other way round, which must never happen.

    python tests/benchmarks/interval_coverage.py
    python tests/benchmarks/interval_coverage.py --runs 1000 --methods inversion basic bca --json coverage.json
"""

import argparse
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from first_trl.calibration import CalibrationWarning, calibration_report


Law = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
ROWS = (20, 50, 100, 500)


def constant(confidence: float, accuracy: float) -> Law:
    return lambda rng, n: (np.full(n, confidence), np.full(n, accuracy))


def beta(a: float, b: float, curve: Callable[[np.ndarray], np.ndarray]) -> Law:
    def law(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        confidence = rng.beta(a, b, n)
        return confidence, np.clip(curve(confidence), 0, 1)

    return law


def mixed(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Half sure and always right, half unsure and over-confident."""
    sure = rng.random(n) < 0.5
    confidence = np.where(sure, 0.995, rng.uniform(0.3, 0.9, n))
    return confidence, np.where(sure, 0.999, confidence - 0.15)


def two_points(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    high = rng.random(n) < 0.8
    return np.where(high, 0.98, 0.02), np.where(high, 0.9, 0.05)


LAWS: dict[str, Law] = {
    "calibrated at .99": constant(0.99, 0.99),
    ".999, accuracy .97": constant(0.999, 0.97),
    ".99, accuracy .9": constant(0.99, 0.9),
    ".9, accuracy .97": constant(0.9, 0.97),
    "calibrated at .999": constant(0.999, 0.999),
    "sure half, unsure half": mixed,
    "two points": two_points,
    "sure model, 5 points too sure": beta(30, 1, lambda c: c - 0.05),
    "spread, 10 points too sure": beta(5, 1.5, lambda c: c - 0.1),
    "spread, calibrated": beta(5, 1.5, lambda c: c),
}


def true_error(law: Law) -> float:
    confidence, chance = law(np.random.default_rng(99), 2_000_000)
    index = np.clip(np.ceil(confidence * 10).astype(int) - 1, 0, 9)
    return float(np.abs(np.bincount(index, confidence - chance)).sum() / len(confidence))


def coverage(law: Law, n: int, runs: int, *, method: str = "inversion", seed: int = 0) -> dict[str, Any]:
    """Coverage of one cell, its standard error, misses on both sides, mean width and contradictions with the null test."""
    truth, rng = true_error(law), np.random.default_rng([seed, n])
    low = high = contradictions = 0
    width = 0.0
    for run in range(runs):
        confidence, chance = law(rng, n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            report = calibration_report(
                confidence, rng.random(n) < chance, confidence_interval=0.95, interval_method=method, null_test=True,
                n_resamples=400, seed=run, return_bins=False,
            )  # fmt: skip
        # Numbers equal up to rounding count as covered
        low += truth < report["ci_low"] - 1e-9
        high += truth > report["ci_high"] + 1e-9
        width += (report["ci_high"] - report["ci_low"]) / runs
        contradictions += (report["ci_low"] > 0) != (report["p_value"] <= 0.025)
    share = 1 - (low + high) / runs
    error = math.sqrt(max(share * (1 - share), 1 / runs) / runs)
    return {
        "n": n, "truth": truth, "coverage": share, "se": error, "above_truth": low / runs, "below_truth": high / runs,
        "width": width, "contradictions": contradictions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--methods", nargs="+", default=["inversion"], choices=["inversion", "basic", "bca"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    print(f"{args.runs} runs a cell, seed {args.seed}; coverage % ± Monte-Carlo standard error")
    print("| method | law | n | true error % | coverage % | limit above / below the truth % | mean width % | |")
    print(f"|{' --- |' * 8}")
    for method in args.methods:
        for name, law in LAWS.items():
            for n in args.rows:
                row = coverage(law, n, args.runs, method=method, seed=args.seed)
                results.append({"method": method, "law": name, **row})
                low = row["coverage"] + 2 * row["se"] < 0.92
                verdict = "TOO LOW" if low else "over-cautious" if row["coverage"] - 2 * row["se"] > 0.98 else ""
                if method == "inversion" and row["contradictions"]:
                    verdict += f" {row['contradictions']} contradictions"
                print(
                    f"| {method} | {name} | {n} | {100 * row['truth']:.2f} | {100 * row['coverage']:.1f} ± "
                    f"{100 * row['se']:.1f} | {100 * row['above_truth']:.1f} / {100 * row['below_truth']:.1f} | "
                    f"{100 * row['width']:.1f} | {verdict} |",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
