"""The two functions most callers need: one calibration error, or the full report behind it."""

import math
import warnings
from typing import Any

import numpy as np

from .bins import BinTable, tabulate
from .config import CalibrationConfig, EdgeDtype, Edges, Input, IntervalMethod, Mode, Norm, Strategy, Weighting
from .errors import bin_error, debiased_l2
from .examples import CalibrationWarning, Examples, prepare
from .notebook import CalibrationReport
from .resampling import bootstrap_interval, locate, null_errors, null_p_value, pure_bins
from .scores import average, brier_decomposition, brier_score, negative_log_likelihood, rank_scores
from .smooth import smooth_calibration_error


SMALL_SAMPLE = 300
_COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)


def expected_calibration_error(
    predictions: Any,
    references: Any,
    *,
    n_bins: int = 10,
    strategy: Strategy = "width",
    norm: Norm = "l1",
    weighting: Weighting = "count",
    mode: Mode = "top-label",
    bin_edges: Edges = "right",
    debias: bool = False,
    input: Input = "probs",
    temperature: float = 1.0,
    ignore_index: int | None = None,
    edge_dtype: EdgeDtype = "auto",
    sample_weight: Any = None,
) -> float:
    """
    Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3), or its l2 / maximum variant.

    The arguments are those of [`calibration_report`], which returns the same number under the key `ece` together with
    what is needed to judge it.

    Returns:
        `float` in [0, 1], lower is better.

    Raises:
        `ValueError`: for invalid input, naming the row and its value, and for a debiased error that a bin with a
        single example leaves undefined.

    Example:

    ```python
    >>> from first_trl.calibration import expected_calibration_error
    >>> round(expected_calibration_error([0.25, 0.25, 0.55, 0.75, 0.75], [0, 0, 1, 1, 1], n_bins=2), 12)
    0.29

    ```
    """
    config = CalibrationConfig(
        n_bins=n_bins,
        strategy=strategy,
        norm=norm,
        weighting=weighting,
        mode=mode,
        bin_edges=bin_edges,
        debias=debias,
        input=input,
        temperature=temperature,
        ignore_index=ignore_index,
        edge_dtype=edge_dtype,
    )
    examples = _prepare(predictions, references, config, sample_weight)
    value, reason = _headline(_tables(examples, config), config)
    if value is None:
        raise ValueError(f"debias=True: {reason}.")
    return value


def calibration_report(
    predictions: Any,
    references: Any,
    *,
    n_bins: int = 10,
    strategy: Strategy = "width",
    norm: Norm = "l1",
    weighting: Weighting = "count",
    mode: Mode = "top-label",
    bin_edges: Edges = "right",
    debias: bool = False,
    input: Input = "probs",
    temperature: float = 1.0,
    ignore_index: int | None = None,
    edge_dtype: EdgeDtype = "auto",
    sample_weight: Any = None,
    confidence_interval: float | None = None,
    interval_method: IntervalMethod = "inversion",
    null_test: bool = False,
    n_resamples: int = 1000,
    seed: int = 0,
    return_bins: bool = True,
) -> dict[str, Any]:
    """
    Calibration error with everything needed to judge it, as plain Python values.

    Args:
        predictions (array-like of shape `(N,)` or `(N, C)`):
            `(N,)`: confidence of the answer that was given. `(N, C)`: probability of each class. Lists, numpy arrays,
            torch tensors of any float format.
        references (array-like of shape `(N,)`):
            For `(N,)` predictions 1 where the answer is correct, else 0. For `(N, C)` predictions the class id.
        n_bins (`int`, defaults to `10`):
            Number of bins. FIRST uses 10, Guo et al. and torchmetrics 15.
        strategy (`str`, defaults to `"width"`):
            `"width"`: bins of equal width. `"mass"`: bins of equally many examples; equal confidences are never
            separated. `"quantile"`: edges at interpolated quantiles of the confidence. With `weighting="uniform"`,
            `bin_edges="left"` and 10 bins the last is the estimator of Plaut et al. (arXiv 2402.13213), except that a
            confidence of exactly 1 falls in the last bin here and in no bin there.
        norm (`str`, defaults to `"l1"`):
            `"l1"`: ECE. `"l2"`: root mean square calibration error. `"max"`: maximum calibration error.
        weighting (`str`, defaults to `"count"`):
            `"count"`: a bin weighs as many examples as it holds. `"uniform"`: every non-empty bin weighs the same.
        mode (`str`, defaults to `"top-label"`):
            `"top-label"`: the largest probability of a row against whether it is right; of several equal ones the
            first counts. `"classwise"`: the mean over classes of each class's own error. `"full"`: all N x C
            (probability, is it the label) pairs together. The last two need `(N, C)` predictions.
        bin_edges (`str`, defaults to `"right"`):
            `"right"`: bins `(a, b]` as in Guo et al. and scikit-learn, 0 in the first bin. `"left"`: bins `[a, b)` as
            in torchmetrics, 1 in the last bin.
        debias (`bool`, defaults to `False`):
            Report the debiased l2 error (Kumar et al. 2019) as `ece`. Needs `norm="l2"`.
        input (`str`, defaults to `"probs"`):
            What the predictions are: `"probs"`, `"logits"` or natural `"logprobs"`. Never guessed.
        temperature (`float`, defaults to `1.0`):
            Divide logits (or log-probabilities) by this first.
        ignore_index (`int`, *optional*):
            Leave out rows with this reference, for example -100.
        edge_dtype (`str`, defaults to `"auto"`):
            Precision to which equal-width edges are rounded before comparing. `"auto"`: that of the input, so that 0.3
            stays in its bin after a passage through float32 or float16.
        sample_weight (array-like of shape `(N,)`, *optional*):
            Non-negative weights. Equal-width bins only.
        confidence_interval (`float`, *optional*):
            Level of a bootstrap interval, for example 0.95.
        interval_method (`str`, defaults to `"inversion"`):
            `"inversion"` holds its level down to a perfectly calibrated model; `"basic"` and `"bca"` are the textbook
            bootstrap intervals, which cover small errors less often than they say.
        null_test (`bool`, defaults to `False`):
            Compare with a perfectly calibrated model that has the same confidences.
        n_resamples (`int`, defaults to `1000`):
            Resamples of the interval and of the test.
        seed (`int`, defaults to `0`):
            Seed of both.
        return_bins (`bool`, defaults to `True`):
            Whether to include the per-bin data.

    Returns:
        `dict[str, Any]`, which shows itself as tables and a diagram in a notebook:

        - `ece`: the error chosen by `norm`, `weighting`, `mode`, `debias`. `mce`, `rmsce`: maximum and l2 error.
          `ece_debiased`: debiased l2 error, `None` where undefined. `smece`: smooth ECE of the top label.
        - `accuracy`, `mean_confidence`, `signed_gap` (confidence minus accuracy, positive when over-confident), `trust`
          (accuracy minus `ece`), `auroc`, `aurc`, `selective_risk`: of the answers given. The last three count every
          example once, whatever its weight.
        - `brier`, `nll` (nats, full rows only), `brier_decomposition` (of the answers given).
        - `n`, `ties` (rows whose top probability is shared).
        - `ci_low`, `ci_high`: the interval around `ece`. `null_mean`, `null_high`, `p_value`: mean and 95 % point of
          `ece` for a calibrated model, and the share of such models that score at least as badly. `None` unless asked.
        - `bins`: lists `lower`, `upper`, `count`, `confidence`, `accuracy`, `gap`, `null_low`, `null_high` with `None`
          in empty bins; `classes` instead (one entry per class) for `mode="classwise"`.
        - `warnings`: why the number may mislead. `config`: every choice above.

    Raises:
        `ValueError`: for invalid input, naming the row and its value.
    """
    config = CalibrationConfig(
        n_bins=n_bins,
        strategy=strategy,
        norm=norm,
        weighting=weighting,
        mode=mode,
        bin_edges=bin_edges,
        debias=debias,
        input=input,
        temperature=temperature,
        ignore_index=ignore_index,
        edge_dtype=edge_dtype,
        confidence_interval=confidence_interval,
        interval_method=interval_method,
        null_test=null_test,
        n_resamples=n_resamples,
        seed=seed,
    )
    examples = _prepare(predictions, references, config, sample_weight)
    tables = _tables(examples, config)
    top = (
        tables[0]
        if config.mode == "top-label"
        else tabulate(examples.confidence, examples.correct, config, examples.edge_dtype, examples.weight)
    )
    ece, _ = _headline(tables, config)
    debiased, reason = _debiased(tables)
    report: dict[str, Any] = {
        "ece": ece,
        "mce": _mean_error(tables, "max", config.weighting),
        "rmsce": _mean_error(tables, "l2", config.weighting),
        "ece_debiased": debiased,
        "smece": smooth_calibration_error(examples.confidence, examples.correct, examples.weight),
    }
    report |= _answer_scores(examples, top, ece)
    report |= {"n": len(examples), "ties": examples.ties}
    report |= dict.fromkeys(("ci_low", "ci_high", "null_mean", "null_high", "p_value"))
    if ece is not None and not config.debias and (config.confidence_interval is not None or config.null_test):
        report |= _sampling_error(examples, ece, config)
    if return_bins and config.mode == "classwise":
        report["classes"] = [
            {"label": label, "ece": _headline([table], config)[0], "bins": table.to_dict()}
            for label, table in enumerate(tables)
        ]
    elif return_bins:
        report["bins"] = tables[0].to_dict()
    cautions = _cautions(examples, report)
    cautions += filter(None, [report.pop("interval_caution", None)])
    report["warnings"] = cautions if debiased is not None else [*cautions, f"ece_debiased is None: {reason}."]
    report["config"] = config.to_dict() | {
        "edge_dtype": examples.edge_dtype,
        "n_classes": None if examples.probabilities is None else int(examples.probabilities.shape[1]),
        "weighted": examples.weight is not None,
    }
    for message in cautions:
        warnings.warn(message, CalibrationWarning, stacklevel=2)
    return CalibrationReport(report)


def _prepare(predictions: Any, references: Any, config: CalibrationConfig, sample_weight: Any) -> Examples:
    if sample_weight is not None and (config.strategy != "width" or config.debias):
        raise ValueError('sample_weight needs strategy="width" and debias=False.')
    return prepare(predictions, references, config, sample_weight)


def _tables(examples: Examples, config: CalibrationConfig) -> list[BinTable]:
    """One table, or one per class for class-wise errors."""
    if config.mode == "top-label" or examples.probabilities is None or examples.labels is None:
        return [tabulate(examples.confidence, examples.correct, config, examples.edge_dtype, examples.weight)]
    rows, labels, weight = examples.probabilities, examples.labels, examples.weight
    n_classes = rows.shape[1]
    if config.mode == "classwise":
        return [
            tabulate(np.ascontiguousarray(rows[:, c]), labels == c, config, examples.edge_dtype, weight)
            for c in range(n_classes)
        ]
    outcome = (labels[:, None] == np.arange(n_classes)).ravel()
    repeated = None if weight is None else np.repeat(weight, n_classes)
    return [tabulate(rows.ravel(), outcome, config, examples.edge_dtype, repeated)]


def _mean_error(tables: list[BinTable], norm: str, weighting: str) -> float:
    return float(np.mean([bin_error(table.gap_sum, table.weight, norm, weighting) for table in tables]))


def _debiased(tables: list[BinTable]) -> tuple[float | None, str | None]:
    values = []
    for table in tables:
        value, reason = debiased_l2(table)
        if value is None:
            return None, reason
        values.append(value)
    return float(np.mean(values)), None


def _headline(tables: list[BinTable], config: CalibrationConfig) -> tuple[float | None, str | None]:
    if config.debias:
        return _debiased(tables)
    return _mean_error(tables, config.norm, config.weighting), None


def _answer_scores(examples: Examples, top: BinTable, ece: float | None) -> dict[str, Any]:
    """Accuracy, Brier, NLL and ranking scores of the answers given."""
    accuracy = average(examples.correct, examples.weight)
    confidence = average(examples.confidence, examples.weight)
    top_brier = average((examples.confidence.astype(np.float64) - examples.correct) ** 2, examples.weight)
    auroc, aurc, selective = rank_scores(examples.confidence, examples.correct, _COVERAGES)
    return {
        "accuracy": accuracy,
        "mean_confidence": confidence,
        "signed_gap": confidence - accuracy,
        "trust": None if ece is None else accuracy - ece,
        "brier": top_brier if examples.probabilities is None else brier_score(examples),
        "nll": negative_log_likelihood(examples),
        "brier_decomposition": brier_decomposition(top, top_brier),
        "auroc": auroc,
        "aurc": aurc,
        "selective_risk": selective,
    }


def _sampling_error(examples: Examples, ece: float, config: CalibrationConfig) -> dict[str, Any]:
    cells = locate(examples, config)
    interval_rng, null_rng = np.random.default_rng(config.seed).spawn(2)
    # The interval asks the test whether 0 is plausible, so that the two agree
    null = null_errors(cells, examples.probabilities, config, null_rng)
    found: dict[str, Any] = {}
    if config.confidence_interval is not None:
        found["ci_low"], found["ci_high"] = bootstrap_interval(cells, ece, config, interval_rng, null)
        if config.interval_method != "inversion" and (pure := pure_bins(cells)):
            found["interval_caution"] = (
                f"{pure} bins hold only right or only wrong answers, which interval_method={config.interval_method!r} takes "
                'for certain: the interval is too narrow. Use interval_method="inversion".'
            )
    if config.null_test:
        found["null_mean"] = float(null.mean())
        found["null_high"] = float(np.quantile(null, 0.95))
        found["p_value"] = null_p_value(null, ece)
    return found


def _cautions(examples: Examples, report: dict[str, Any]) -> list[str]:
    cautions = []
    if len(examples) < SMALL_SAMPLE:
        cautions.append(
            f"{len(examples)} examples: below {SMALL_SAMPLE} a binned calibration error is mostly sampling noise; "
            "look at null_test=True and confidence_interval=0.95."
        )
    if report["p_value"] is not None and report["p_value"] > 0.05:
        cautions.append(
            f"ece {report['ece']:.4f} is within what a perfectly calibrated model would score by chance "
            f"(mean {report['null_mean']:.4f}, 95 % below {report['null_high']:.4f})."
        )
    if report["nll"] is not None and math.isinf(report["nll"]):
        cautions.append("nll is infinite: a label was given probability 0.")
    return cautions
