"""Expected calibration error as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np

from first_trl.calibration.arrays import as_numbers, same_order
from first_trl.calibration.diagram import reliability_diagram
from first_trl.calibration.examples import check_references
from first_trl.calibration.report import calibration_report


_DESCRIPTION = """
Expected calibration error (ECE): how far the confidence of a model is from its accuracy. A model is calibrated when of
all answers it gives with confidence 0.8, 80 % are right. The module also returns the maximum and the root mean square
error, the debiased and the smooth error, Brier score, negative log-likelihood, AUROC and selective risk, the data of
the reliability diagram, and on request a confidence interval and a test against a perfectly calibrated model.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list, array or tensor):
        Shape (N,): confidence of the answer that was given. Shape (N, C): probability of each class.
    references (list, array or tensor of shape (N,)):
        For (N,) predictions 1 where the answer is correct, else 0. For (N, C) predictions the class id.
    n_bins (int, defaults to 10): number of bins.
    strategy (str, defaults to "width"): "width", "mass" (ties are never separated) or "quantile".
    norm (str, defaults to "l1"): "l1" (ECE), "l2" (root mean square) or "max".
    weighting (str, defaults to "count"): "count", or "uniform" for the plain mean over non-empty bins.
    mode (str, defaults to "top-label"): "top-label", "classwise" or "full".
    bin_edges (str, defaults to "right"): "right" for bins (a, b], "left" for [a, b).
    debias (bool, defaults to False): report the debiased l2 error (needs norm="l2").
    input (str, defaults to "probs"): "probs", "logits" or "logprobs"; never guessed.
    temperature (float, defaults to 1.0): divide logits by this first.
    ignore_index (int, optional): leave out rows with this reference.
    confidence_interval (float, optional): level of a bootstrap interval, for example 0.95.
    interval_method (str, defaults to "inversion"): "inversion", "basic" or "bca".
    null_test (bool, defaults to False): compare with a perfectly calibrated model.
    n_resamples (int, defaults to 1000), seed (int, defaults to 0): of both.
    return_bins (bool, defaults to True): include the per-bin data.

Returns:
    dict of plain Python values: ece, mce, rmsce, ece_debiased, smece, accuracy, mean_confidence, signed_gap, trust,
    brier, nll, brier_decomposition, auroc, aurc, selective_risk, n, ties, ci_low, ci_high, null_mean, null_high,
    p_value, bins, warnings, config.

Examples:
    >>> import evaluate
    >>> ece = evaluate.load("first_trl/metrics/ece")
    >>> result = ece.compute(predictions=[0.25, 0.25, 0.55, 0.75, 0.75], references=[0, 0, 1, 1, 1], n_bins=2)
    >>> round(result["ece"], 6)
    0.29
"""

_CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Ece(evaluate.Metric):
    """Expected calibration error of (N,) confidences or (N, C) class probabilities."""

    def _info(self) -> evaluate.MetricInfo:
        # float64: a float32 column would turn 0.8 into 0.800000012 and move values across bin edges.
        reference = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features(
                    {"predictions": datasets.Sequence(datasets.Value("float64")), "references": reference}
                ),
                datasets.Features({"predictions": datasets.Value("float64"), "references": reference}),
            ],
            reference_urls=["https://arxiv.org/abs/1706.04599", "https://arxiv.org/abs/2408.12168"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch of predictions and references to those that the next `compute` scores."""
        if predictions is not None and references is not None and len(predictions):
            predictions, references = self._checked(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference to those that the next `compute` scores."""
        if prediction is not None and reference is not None:
            (prediction,), (reference,) = self._checked([prediction], [reference])
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _checked(self, predictions: Any, references: Any) -> tuple[Any, Any]:
        """As arrays, before Arrow stores them: it would make integers of booleans and fractions, and float64 of all."""
        values, source = as_numbers(predictions, "predictions")
        labels, _ = as_numbers(references, "references")
        check_references(references, values.ndim)
        same_order(predictions, references, "predictions and references")
        odd = np.flatnonzero(~(labels % 1 == 0)) if labels.dtype.kind == "f" else np.array([], int)
        if odd.size:
            raise ValueError(f"references row {odd[0]} is {labels.flat[odd[0]]}: it must be a whole number.")
        # Arrow hides that values were rounded to bfloat16
        self.__dict__.setdefault("_batch_dtypes", set()).add(source)
        return values, labels

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Score `predictions` against `references`, or everything added since the last call."""
        given = predictions is not None or references is not None
        if given and self.num_process == 1 and self.writer is None:
            # One process and nothing stored: the trip through Arrow would only cost time.
            return self._compute(predictions, references, **kwargs)
        try:
            return super().compute(predictions=predictions, references=references, **kwargs)
        finally:
            self.__dict__.pop("_batch_dtypes", None)

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, Any]:
        if self.__dict__.get("_batch_dtypes") == {"bfloat16"}:
            kwargs.setdefault("edge_dtype", "bfloat16")
        return calibration_report(predictions, references, **kwargs)

    def plot(self, results: dict[str, Any], **kwargs: Any) -> Any:
        """
        Reliability diagram of one result of `compute`, or of a mapping from model names to results. Needs matplotlib;
        returns the figure. Options: `titles`, `layout="overlay"`, `columns`, `null_band`, `counts`, `suptitle`.
        """
        return reliability_diagram(results, **kwargs)
