"""
How often the fit of a recalibration finds the value that made the teacher wrong.

A teacher's raw top-k probabilities are drawn, the labels are drawn from those probabilities rescaled with a known value, and
`fit_recalibration` has to find that value: the share of runs in which it lies inside the bootstrap interval, and the mean
error of the fitted value.

    python tests/benchmarks/recalibration_recovery.py --runs 100 --json recovery.json
"""

import argparse
import json
import time
import warnings

import numpy as np

from first_trl import Recalibration, fit_recalibration


SCENARIOS = {
    "c = 0.24": ("probability_temperature", 0.24),
    "c = 0.36": ("probability_temperature", 0.36),
    "c = 0.5": ("probability_temperature", 0.5),
    "T = 0.8": ("logit_temperature", 0.8),
    "T = 1.5": ("logit_temperature", 1.5),
    "T = 2.5": ("logit_temperature", 2.5),
}


def simulate(method: str, value: float, n: int, seed: int, k: int = 5, vocab: int = 30) -> dict[str, np.ndarray]:
    """Flat cache arrays of a teacher whose bucket target is exact at `value`: labels are drawn from it, tail included."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, vocab)) * rng.uniform(1.0, 4.0, size=(n, 1))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    order = np.argsort(-logprobs, axis=1, kind="stable")
    top = np.take_along_axis(logprobs, order[:, :k], 1)
    tail = np.logaddexp.reduce(np.take_along_axis(logprobs, order[:, k:], 1), axis=1)
    head, bucket = Recalibration(method, value).apply(top, tail, estimator="bucket")
    assert bucket is not None
    target = np.exp(np.c_[head, bucket])
    rank = np.minimum((target.cumsum(1) < rng.random((n, 1))).sum(1), k)
    # Any token outside the k stands for the bucket.
    return {"logprobs": top, "ids": order[:, :k], "labels": order[np.arange(n), rank], "tail_logprob": tail}


def recover(
    method: str, value: float, objective: str, n: int, runs: int, n_bootstrap: int, seed: int
) -> dict[str, float]:
    """Coverage of the interval and error of the fitted value over independent runs."""
    fitted, covered, widths = [], [], []
    for run in range(runs):
        cache = simulate(method, value, n, seed + run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = fit_recalibration(
                cache, method=method, objective=objective, estimator="bucket", n_bootstrap=n_bootstrap, seed=run
            )
        assert fit.bootstrap is not None
        fitted.append(fit.recalibration.value)
        covered.append(fit.bootstrap["low"] <= value <= fit.bootstrap["high"])
        widths.append(fit.bootstrap["high"] - fit.bootstrap["low"])
    values = np.array(fitted, dtype=float)
    return {
        "coverage": float(np.mean(covered)),
        "mean": float(values.mean()),
        "sd": float(values.std()),
        "mean_interval_width": float(np.mean(widths)),
    }


def main() -> None:
    """Run all scenarios and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--n", type=int, default=2000, help="validation positions a run")
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()
    results = {}
    print(f"{'scenario':10s} {'objective':10s} {'coverage':>9s} {'mean':>8s} {'sd':>8s} {'width':>8s}")
    for name, (method, value) in SCENARIOS.items():
        for objective in ("ece", "nll"):
            started = time.perf_counter()
            r = recover(method, value, objective, args.n, args.runs, args.bootstrap, args.seed)
            r["seconds_per_fit"] = (time.perf_counter() - started) / args.runs
            results[f"{name} by {objective}"] = r
            print(
                f"{name:10s} {objective:10s} {r['coverage']:9.2f} {r['mean']:8.3f} {r['sd']:8.3f} "
                f"{r['mean_interval_width']:8.3f}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"n": args.n, "runs": args.runs, "bootstrap": args.bootstrap, "results": results}, file, indent=2
            )


if __name__ == "__main__":
    main()
