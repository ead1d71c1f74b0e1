"""
How often the 95 % intervals of scores over clusters cover the truth: few clusters, sure models, few wrong answers.

Rows of a cluster share a shift of their logit, so that they are right or wrong together the more, the larger it is. The true
accuracy and ECE are those of two million rows of other clusters. A cell is good when it is not below 92 %, given its
Monte-Carlo error; above 98 % is said (over-cautious), not failed.

    python tests/benchmarks/cluster_coverage.py
    python tests/benchmarks/cluster_coverage.py --runs 1000 --clusters 5 20 --sizes 10
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from first_trl.calibration.errors import equal_width_bins
from first_trl.calibration.intervals import clustered_intervals


Draw = Callable[[np.random.Generator, int], np.ndarray]

# Name -> (confidences, shift of their logit, spread of the clusters' logits)
LAWS: dict[str, tuple[Draw, float, float]] = {
    "sure, right": (lambda rng, n: np.full(n, 0.99), 0.0, 1.0),
    "sure, too sure": (lambda rng, n: np.full(n, 0.99), -2.0, 1.0),
    "spread, calibrated alone": (lambda rng, n: rng.beta(5, 1.5, n), 0.0, 0.0),
    "spread, too sure": (lambda rng, n: rng.beta(5, 1.5, n), -0.7, 1.0),
    "spread, not sure enough": (lambda rng, n: rng.beta(4, 3, n), 0.7, 1.0),
}
NAMES = ("accuracy", "ece", "trust", "mean_confidence")


def draw(law: str, clusters: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters of size 1 to `2 size - 1`, their confidences, and the probability that each is right."""
    confidences, shift, spread = LAWS[law]
    row = np.repeat(np.arange(clusters), rng.integers(1, 2 * size, clusters))
    confidence = np.clip(confidences(rng, len(row)), 1e-6, 1 - 1e-6)
    logit = np.log(confidence / (1 - confidence)) + shift + spread * rng.standard_normal(clusters)[row]
    return row, confidence, 1 / (1 + np.exp(-logit))


def truth(law: str) -> dict[str, float]:
    # Single rows: the size of a cluster tells nothing of its answers
    _, confidence, chance = draw(law, 2_000_000, 1, np.random.default_rng(99))
    ece = float(np.abs(np.bincount(equal_width_bins(confidence, 10), confidence - chance)).sum() / len(chance))
    accuracy = float(chance.mean())
    return {
        "accuracy": accuracy,
        "ece": ece,
        "trust": accuracy - ece,
        "mean_confidence": float(confidence.mean()),
    }


def coverage(
    law: str, clusters: int, size: int, runs: int, *, seed: int = 0, n_resamples: int = 300
) -> dict[str, Any]:
    """Share of intervals that hold the truth, by score, and their mean widths."""
    rng, expected = np.random.default_rng([seed, clusters, size]), truth(law)
    held, width = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0.0)
    for run in range(runs):
        row, confidence, chance = draw(law, clusters, size, rng)
        right = (rng.random(len(row)) < chance).astype(np.float64)
        found = clustered_intervals(row, confidence, right, {}, n_resamples=n_resamples, seed=run)
        for name in NAMES:
            low, high = found[name]
            held[name] += low - 1e-9 <= expected[name] <= high + 1e-9
            width[name] += (high - low) / runs
    return {"coverage": {name: count / runs for name, count in held.items()}, "width": width}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--clusters", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args.runs} runs a cell, seed {args.seed}; coverage %, Monte-Carlo error of one at 95 %: "
          f"{100 * math.sqrt(0.05 * 0.95 / args.runs):.1f}")  # fmt: skip
    print(
        f"| law | clusters | rows each | {' | '.join(NAMES)} | width of ece, trust % |\n|{' --- |' * (4 + len(NAMES))}"
    )
    for law in LAWS:
        for clusters in args.clusters:
            for size in args.sizes:
                found = coverage(law, clusters, size, args.runs, seed=args.seed)
                shares = " | ".join(f"{100 * found['coverage'][name]:.0f}" for name in NAMES)
                widths = ", ".join(f"{100 * found['width'][name]:.0f}" for name in ("ece", "trust"))
                print(f"| {law} | {clusters} | {size} | {shares} | {widths} |", flush=True)


if __name__ == "__main__":
    main()
