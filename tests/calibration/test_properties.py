"""Properties that hold for any input, and agreement with other packages on random ones."""

import math

import numpy as np
import pytest


hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from first_trl.calibration import CalibrationAccumulator, calibration_report, expected_calibration_error  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")
many = settings(max_examples=500, deadline=None, derandomize=True)

# Free doubles, and decimals that fall on edges and make ties.
confidences = st.one_of(st.floats(0, 1), st.integers(0, 100).map(lambda k: k / 100))
pairs = st.lists(st.tuples(confidences, st.integers(0, 1)), min_size=1, max_size=60)
bin_counts = st.integers(1, 30)
edges = st.sampled_from(["right", "left"])


def split(data: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([c for c, _ in data]), np.array([y for _, y in data])


def rows_of(data: list[tuple[float, int]], classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(data) * 1000 + classes)
    return rng.dirichlet([0.5] * classes, len(data)), rng.integers(0, classes, len(data))


@many
@given(pairs, bin_counts, st.sampled_from(["l1", "l2"]))
def test_agrees_with_uncertainty_calibration(data: list[tuple[float, int]], n_bins: int, norm: str) -> None:
    ucal = pytest.importorskip("calibration", reason="needs the package uncertainty-calibration")
    from calibration.utils import get_equal_bins, get_equal_prob_bins, lower_bound_scaling_ce

    assert ucal
    confidence, correct = split(data)
    # Between two neighbouring floats there is no middle: their edge rounds onto one of them, ours keeps them apart
    assume(np.diff(np.unique(confidence)).min(initial=1.0) > 1e-12)
    for strategy, scheme in (("width", get_equal_prob_bins), ("mass", get_equal_bins)):
        theirs = lower_bound_scaling_ce(
            confidence, correct, p=1 if norm == "l1" else 2, debias=False, num_bins=n_bins, binning_scheme=scheme
        )
        ours = expected_calibration_error(confidence, correct, n_bins=n_bins, strategy=strategy, norm=norm)
        assert ours == pytest.approx(float(theirs), abs=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 20))
def test_agrees_with_uncertainty_calibration_on_classes(seed: int, classes: int, n_bins: int) -> None:
    pytest.importorskip("calibration", reason="needs the package uncertainty-calibration")
    from calibration.utils import get_equal_prob_bins, lower_bound_scaling_ce

    rng = np.random.default_rng(seed)
    rows, labels = rng.dirichlet([0.5] * classes, 80), rng.integers(0, classes, 80)
    labels[:classes] = np.arange(classes)
    top = lower_bound_scaling_ce(
        rows, labels, p=1, debias=False, num_bins=n_bins, binning_scheme=get_equal_prob_bins, mode="top-label"
    )
    assert expected_calibration_error(rows, labels, n_bins=n_bins) == pytest.approx(float(top), abs=1e-9)
    marginal = lower_bound_scaling_ce(
        rows, labels, p=1, debias=False, num_bins=n_bins, binning_scheme=get_equal_prob_bins, mode="marginal"
    )
    ours = expected_calibration_error(rows, labels, n_bins=n_bins, mode="classwise")
    assert ours == pytest.approx(float(marginal), abs=1e-9)


@many
@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 1)), min_size=1, max_size=60), bin_counts)
def test_agrees_with_torchmetrics_away_from_edges(data: list[tuple[float, int]], n_bins: int) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    functional = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    confidence, correct = split(data)
    # torchmetrics places its edges with a float32 linspace.
    away = np.abs(confidence * n_bins - np.round(confidence * n_bins)) > 1e-4
    confidence, correct = confidence[away], correct[away]
    if not len(confidence):
        return
    for norm in ("l1", "l2", "max"):
        theirs = functional.binary_calibration_error(
            torch.from_numpy(confidence), torch.from_numpy(correct), n_bins=n_bins, norm=norm
        )
        ours = expected_calibration_error(confidence, correct, n_bins=n_bins, norm=norm, bin_edges="left")
        assert ours == pytest.approx(float(theirs), abs=2e-6)


@many
@given(pairs, bin_counts, edges, st.sampled_from(["width", "mass", "quantile"]), st.randoms(use_true_random=False))
def test_bounds_order_and_row_order(
    data: list[tuple[float, int]], n_bins: int, side: str, strategy: str, rng: object
) -> None:
    confidence, correct = split(data)
    options = {"n_bins": n_bins, "bin_edges": side, "strategy": strategy}
    report = calibration_report(confidence, correct, **options)
    assert 0 <= report["ece"] <= report["rmsce"] + 1e-12 <= report["mce"] + 2e-12 <= 1 + 3e-12
    # The overall gap is a mean of the per-bin gaps, so it cannot exceed the mean of their sizes.
    assert abs(report["signed_gap"]) <= report["ece"] + 1e-12
    assert report["ece_debiased"] is None or report["ece_debiased"] <= report["rmsce"] + 1e-12
    assert 0 <= report["smece"] <= 1
    assert sum(report["bins"]["count"]) == len(data)
    lower, upper = report["bins"]["lower"], report["bins"]["upper"]
    assert lower[0] == 0 and upper[-1] == 1 and lower[1:] == upper[:-1]
    for low, high, mean in zip(lower, upper, report["bins"]["confidence"], strict=True):
        assert mean is None or low - 1e-12 <= mean <= high + 1e-12
    rng.shuffle(data)  # type: ignore[attr-defined]
    shuffled = calibration_report(*split(data), **options)
    for key in ("ece", "mce", "rmsce", "smece", "brier", "aurc", "accuracy"):
        assert shuffled[key] == pytest.approx(report[key], abs=1e-12)


@many
@given(pairs, bin_counts, st.sampled_from(["width", "mass"]))
def test_mirror_symmetry(data: list[tuple[float, int]], n_bins: int, strategy: str) -> None:
    # Swapping right and wrong and p and 1 - p mirrors the bins: (a, b] becomes [1 - b, 1 - a).
    data = [(round(c * 2**20) / 2**20, y) for c, y in data]  # 1 - p is then exact
    confidence, correct = split(data)
    on_edge = np.abs(confidence * n_bins - np.round(confidence * n_bins)) < 1e-9
    inner = ~on_edge | (confidence == 0) | (confidence == 1)  # k / n is not exact, its mirror image may differ
    if strategy == "mass":
        if len(data) % n_bins:
            return  # the larger bins come first
        inner[:] = True
    confidence, correct = confidence[inner], correct[inner]
    if not len(confidence):
        return
    options = {"n_bins": n_bins, "strategy": strategy}
    right = expected_calibration_error(confidence, correct, bin_edges="right", **options)
    left = expected_calibration_error(1 - confidence, 1 - correct, bin_edges="left", **options)
    assert right == pytest.approx(left, abs=1e-12)


@many
@given(pairs, st.integers(1, 12), st.integers(2, 5), edges)
def test_merging_bins_never_raises_the_error(
    data: list[tuple[float, int]], n_bins: int, times: int, side: str
) -> None:
    # |sum| <= sum of ||: coarser bins let gaps cancel. k / n and (k t) / (n t) are the same double.
    confidence, correct = split(data)
    for norm in ("l1", "l2"):
        fine = expected_calibration_error(confidence, correct, n_bins=n_bins * times, norm=norm, bin_edges=side)
        coarse = expected_calibration_error(confidence, correct, n_bins=n_bins, norm=norm, bin_edges=side)
        assert coarse <= fine + 1e-12
    one = expected_calibration_error(confidence, correct, n_bins=1)
    assert one == pytest.approx(abs(confidence.mean() - correct.mean()), abs=1e-12)


@many
@given(
    pairs,
    bin_counts,
    edges,
    st.integers(1, 5),
    st.sampled_from([np.float64, np.float32, np.float16]),
    st.sampled_from([np.float64, np.float32, np.float16]),
)
def test_merged_batches_equal_one_shot(
    data: list[tuple[float, int]], n_bins: int, side: str, parts: int, first: type, second: type
) -> None:
    confidence, correct = split(data)
    chunks = np.array_split(np.arange(len(data)), parts)
    formats = [(first, second)[i % 2] for i in range(parts)]
    rounded = [confidence[chunk].astype(kind) for chunk, kind in zip(chunks, formats, strict=True)]
    whole = calibration_report(
        np.concatenate([part.astype(np.float64) for part in rounded]), correct, n_bins=n_bins, bin_edges=side
    )
    accumulators = []
    for part, chunk in zip(rounded, chunks, strict=True):
        accumulators.append(CalibrationAccumulator(n_bins, bin_edges=side))
        accumulators[-1].add_batch(part, correct[chunk])
    total = accumulators[0]
    for other in accumulators[1:]:
        total.merge(other)
    merged = total.result()
    assert len(total) == merged["n"] == len(data)
    assert merged["config"]["edge_dtype"] == whole["config"]["edge_dtype"]
    assert merged["bins"]["count"] == whole["bins"]["count"]
    for key in ("ece", "mce", "rmsce", "accuracy", "mean_confidence", "signed_gap", "trust", "brier"):
        assert merged[key] == pytest.approx(whole[key], abs=1e-12), key


@many
@given(pairs, bin_counts)
def test_brier_decomposition_adds_up(data: list[tuple[float, int]], n_bins: int) -> None:
    confidence, correct = split(data)
    report = calibration_report(confidence, correct, n_bins=n_bins)
    parts = report["brier_decomposition"]
    assert parts["brier"] == pytest.approx(np.mean((confidence - correct) ** 2), abs=1e-12)
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within_bin"]
    assert total == pytest.approx(report["brier"], abs=1e-12)
    assert parts["reliability"] == pytest.approx(report["rmsce"] ** 2, abs=1e-12)
    assert parts["resolution"] <= parts["uncertainty"] + 1e-12 <= 0.25 + 2e-12


@settings(max_examples=200, deadline=None, derandomize=True)
@given(pairs)
def test_selective_risk_against_all_orders_of_ties(data: list[tuple[float, int]]) -> None:
    confidence, correct = split(data)
    report = calibration_report(confidence, correct)
    rng = np.random.default_rng(0)
    risks = []
    for _ in range(200):
        order = np.lexsort((rng.random(len(data)), -confidence))
        risks.append((np.cumsum(1 - correct[order]) / np.arange(1, len(data) + 1)).mean())
    spread = np.std(risks) / math.sqrt(len(risks))
    assert abs(report["aurc"] - np.mean(risks)) <= 6 * spread + 1e-9
    assert report["selective_risk"]["risk"][-1] == pytest.approx(1 - correct.mean(), abs=1e-12)
    assert report["selective_risk"]["threshold"][-1] == confidence.min()
