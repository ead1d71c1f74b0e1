"""Calibration errors against values worked out in rational arithmetic."""

import math
import warnings
from fractions import Fraction as F

import numpy as np
import pytest

from first_trl.calibration import CalibrationWarning, calibration_report, expected_calibration_error


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")

# name: confidences, correct, bins, (l1, l2, max) right-closed, (l1, l2, max) left-closed
CASES = {
    "R1": (".25 .25 .55 .75 .75", "00111", 2, (0.29, 0.291833286, 0.316666667), None),
    "R2": (".95 1.0", "10", 10, (0.475, 0.475, 0.475), None),
    "R3": ("0.0 .05", "10", 10, (0.475, 0.475, 0.475), None),
    "R4": (".1 .2 .3 .35", "1010", 10, (0.5375, 0.604669331, 0.9), (0.3625, 0.477297077, 0.9)),
    "R5": (".5 .25 .75", "101", 2, (0.166666667, 0.176776695, 0.25), (0.333333333, 0.3385016, 0.375)),
    "R6": (".6 .59 .61", "100", 5, (0.266666667, 0.360624458, 0.61), (0.266666667, 0.351259638, 0.59)),
    "R7": (
        ".1 .2 .65 .7 .9 .95",
        "011011",
        5,
        (0.2, 0.230036229, 0.35),
        (0.233333333, 0.347011047, 0.8),
    ),
    "R8": (".8 .8 .8 .8 .8 .8 .6 .6", "11100010", 4, (0.25, 0.264575131, 0.3), None),
    "R9": ("1 1 1 1 0", "00111", 2, (0.6, 0.632455532, 1.0), None),
    "R10": (
        ".3 .6 .7 .31 .61 .71",
        "111000",
        10,
        (0.405, 0.465161262, 0.71),
        (0.168333333, 0.174236429, 0.205),
    ),
    "R11": (".25 .25 .75 .75", "0011", 2, (0.25, 0.25, 0.25), None),
}


def exact(confidence: list[F], correct: list[int], n_bins: int, edges: str) -> tuple[float, float, float]:
    """l1, l2 and max error with every number a fraction."""
    bins: dict[int, list[F]] = {}
    for c, y in zip(confidence, correct, strict=True):
        index = math.ceil(c * n_bins) - 1 if edges == "right" else math.floor(c * n_bins)
        bins.setdefault(min(max(index, 0), n_bins - 1), []).append(c - y)
    gaps = [(F(len(r), len(confidence)), abs(sum(r) / len(r))) for r in bins.values()]
    return (
        float(sum(w * g for w, g in gaps)),
        math.sqrt(sum(w * g * g for w, g in gaps)),
        float(max(g for _, g in gaps)),
    )


@pytest.mark.parametrize("edges", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_reference_values(name: str, edges: str) -> None:
    text, outcomes, n_bins, right, left = CASES[name]
    fractions, correct = [F(value) for value in text.split()], [int(c) for c in outcomes]
    want = exact(fractions, correct, n_bins, edges)
    # The oracle itself agrees with the published table, printed to nine digits.
    assert want == pytest.approx(right if edges == "right" or left is None else left, abs=6e-10)
    values = [float(f) for f in fractions]
    got = [
        expected_calibration_error(values, correct, n_bins=n_bins, norm=norm, bin_edges=edges)
        for norm in ("l1", "l2", "max")
    ]
    assert got == pytest.approx(want, abs=1e-12)
    report = calibration_report(values, correct, n_bins=n_bins, bin_edges=edges)
    assert [report["ece"], report["rmsce"], report["mce"]] == pytest.approx(want, abs=1e-12)
    assert report["trust"] == pytest.approx(sum(correct) / len(correct) - want[0], abs=1e-12)


@pytest.mark.parametrize("edges", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_dtype_and_row_order_do_not_move_values_across_edges(name: str, edges: str) -> None:
    torch = pytest.importorskip("torch")
    text, outcomes, n_bins, *_ = CASES[name]
    values, correct = [float(v) for v in text.split()], [int(c) for c in outcomes]
    want = expected_calibration_error(values, correct, n_bins=n_bins, bin_edges=edges)
    single, half = np.array(values, np.float32), np.array(values, np.float16)
    forms = [
        (single, 2.0**-24),
        (single.tolist(), 2.0**-24),
        (half, 2.0**-11),
        (half.astype(np.float64), 2.0**-11),
        (torch.tensor(values, dtype=torch.float32), 2.0**-24),
        (torch.tensor(values, dtype=torch.float16), 2.0**-11),
        (torch.tensor(values, dtype=torch.bfloat16), 2.0**-8),
    ]
    for form, rounding in forms:
        got = expected_calibration_error(form, correct, n_bins=n_bins, bin_edges=edges)
        assert abs(got - want) <= rounding, (type(form), getattr(form, "dtype", None))
    order = np.random.default_rng(0).permutation(len(values))
    shuffled = expected_calibration_error(
        np.array(values)[order], np.array(correct)[order], n_bins=n_bins, bin_edges=edges
    )
    assert shuffled == pytest.approx(want, abs=1e-15)


def test_a_bfloat16_grid_is_recognised_by_type_alone() -> None:
    # 77/256 is bfloat16(0.3) but also an honest vote of 256: as float64 it lies above the edge 0.3.
    votes = [77 / 256, 79 / 256]
    report = calibration_report(votes, [1, 0], n_bins=10)
    assert report["bins"]["count"][3] == 2


MULTICLASS = [[0.25, 0.20, 0.55], [0.55, 0.05, 0.40], [0.10, 0.30, 0.60], [0.90, 0.05, 0.05]]


def test_multiclass_top_label() -> None:
    report = calibration_report(MULTICLASS, [0, 1, 2, 0], n_bins=3)
    assert report["ece"] == pytest.approx(0.2, abs=1e-12)
    assert report["rmsce"] == pytest.approx(0.208166600, abs=1e-9)
    assert report["mce"] == pytest.approx(0.7 / 3, abs=1e-12)
    near_edges = [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.4, 0.1, 0.5]]
    assert expected_calibration_error(near_edges, [0, 1, 2]) == pytest.approx(1 / 6, abs=1e-12)
    documented = [[0.6, 0.2, 0.2], [0, 0.95, 0.05], [0.7, 0.1, 0.2]]
    assert expected_calibration_error(documented, [0, 1, 2]) == pytest.approx(23 / 60, abs=1e-12)


def test_a_tie_counts_the_first_class_and_is_reported() -> None:
    report = calibration_report([[0.5, 0.5], [0.2, 0.8]], [1, 1])
    assert report["ties"] == 1
    assert expected_calibration_error([[0.5, 0.5]], [1]) == pytest.approx(0.5, abs=1e-15)
    assert expected_calibration_error([[0.5, 0.5]], [0]) == pytest.approx(0.5, abs=1e-15)
    many = np.full((3, 40), 1 / 40)  # the wide-row path
    assert calibration_report(many, [0, 1, 39])["accuracy"] == pytest.approx(1 / 3)
    assert calibration_report(many, [0, 1, 39])["ties"] == 3


def test_classwise_and_full() -> None:
    report = calibration_report(MULTICLASS, [0, 1, 2, 0], n_bins=3, mode="classwise")
    assert report["ece"] == pytest.approx(0.575 / 3, abs=1e-9)  # .191666667
    assert [entry["label"] for entry in report["classes"]] == [0, 1, 2]
    assert np.mean([entry["ece"] for entry in report["classes"]]) == pytest.approx(report["ece"], abs=1e-15)
    flat = [F(str(p)) for row in MULTICLASS for p in row]
    outcome = [int(c == y) for y in (0, 1, 2, 0) for c in range(3)]
    full = calibration_report(MULTICLASS, [0, 1, 2, 0], n_bins=3, mode="full")
    assert full["ece"] == pytest.approx(exact(flat, outcome, 3, "right")[0], abs=1e-12)
    assert sum(full["bins"]["count"]) == 12
    assert full["accuracy"] == report["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("values", "correct", "debiased", "plugin"),
    [
        ([0.9] * 5, [1, 0, 0, 0, 0], 0.670820393, 0.7),
        ([0.8] * 4, [1, 1, 1, 0], 0.0, 0.05),
        ([0.9] * 5 + [0.3] * 5, [1, 0, 0, 0, 0, 1, 1, 1, 0, 1], 0.574456265, 0.608276253),
    ],
)
def test_debiased_l2(values: list[float], correct: list[int], debiased: float, plugin: float) -> None:
    report = calibration_report(values, correct, norm="l2", debias=True)
    assert report["ece"] == report["ece_debiased"] == pytest.approx(debiased, abs=1e-9)
    assert report["rmsce"] == pytest.approx(plugin, abs=1e-9)


def test_debiased_is_none_with_a_reason_when_a_bin_holds_one_example() -> None:
    report = calibration_report([0.9, 0.9, 0.2], [1, 0, 0])
    assert report["ece_debiased"] is None
    assert any("bin 1" in text and "holds one" in text for text in report["warnings"])
    with pytest.raises(ValueError, match="at least two examples"):
        expected_calibration_error([0.9, 0.9, 0.2], [1, 0, 0], norm="l2", debias=True)
    asked = calibration_report([0.9, 0.9, 0.2], [1, 0, 0], norm="l2", debias=True, confidence_interval=0.9)
    assert asked["ece"] is None and asked["trust"] is None and asked["ci_low"] is None


def test_equal_mass() -> None:
    values, correct = [0.1, 0.2, 0.65, 0.7, 0.9, 0.95], [0, 1, 1, 0, 1, 1]
    got = expected_calibration_error(values, correct, n_bins=5, strategy="mass")
    assert got == pytest.approx(0.95 / 3, abs=1e-12)
    report = calibration_report(values, correct, n_bins=5, strategy="mass")
    assert report["bins"]["count"] == [2, 1, 1, 1, 1]
    assert report["bins"]["lower"][0] == 0.0 and report["bins"]["upper"][-1] == 1.0


@pytest.mark.parametrize("edges", ["right", "left"])
def test_equal_mass_never_cuts_a_tie(edges: str) -> None:
    values = np.array([0.8] * 6 + [0.6] * 2)
    correct = np.array([1, 1, 1, 0, 0, 0, 1, 0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(8)
        got = expected_calibration_error(values[order], correct[order], n_bins=4, strategy="mass", bin_edges=edges)
        assert got == pytest.approx(0.25, abs=1e-12)
    # Neighbouring doubles: the midpoint rounds onto one of them and must still separate them.
    close = [0.5, float(np.nextafter(0.5, 1))]
    assert calibration_report(close, [0, 1], n_bins=2, strategy="mass", bin_edges=edges)["bins"]["count"] == [1, 1]
    # More bins than examples, all equal, a single row.
    assert calibration_report([0.5] * 3, [0, 1, 1], n_bins=7, strategy="mass")["bins"]["count"] == [3]
    assert expected_calibration_error([0.25], [1], n_bins=7, strategy="mass", bin_edges=edges) == 0.75


@pytest.mark.parametrize(
    ("values", "correct", "want"),
    [
        ([0.25, 0.25, 0.55, 0.75, 0.75], [0, 0, 1, 1, 1], 0.198962),
        ([0.1, 0.2, 0.65, 0.7, 0.9, 0.95], [0, 1, 1, 0, 1, 1], 0.148251),
        ([0.8] * 6 + [0.6] * 2, [1, 1, 1, 0, 0, 0, 1, 0], 0.250115),
        ([0.25, 0.25, 0.75, 0.75], [0, 0, 1, 1], 0.199734),
        ([0.7], [1], 0.299967),
        ([0.0, 1.0], [0, 1], 0.0),
    ],
)
def test_smooth_error(values: list[float], correct: list[int], want: float) -> None:
    assert calibration_report(values, correct)["smece"] == pytest.approx(want, abs=1e-3)


def test_thirty_million_float32_constants() -> None:
    n = 30_000_000
    got = expected_calibration_error(np.full(n, 0.9, np.float32), np.ones(n, np.int8))
    assert got == pytest.approx(0.1, abs=2.0**-24)


def test_edges_of_every_decimal() -> None:
    # linspace and ceil(c * n) both misplace some k / n; a confidence on an edge belongs to the bin below (right) or
    # above (left).
    for n_bins in (3, 5, 7, 10, 15, 20, 50, 100, 1000):
        values = np.arange(1, n_bins) / n_bins
        for dtype in (np.float64, np.float32):
            right = calibration_report(values.astype(dtype), np.ones(n_bins - 1), n_bins=n_bins)["bins"]["count"]
            left = calibration_report(values.astype(dtype), np.ones(n_bins - 1), n_bins=n_bins, bin_edges="left")
            assert right == [1] * (n_bins - 1) + [0]
            assert left["bins"]["count"] == [0] + [1] * (n_bins - 1)


def test_logits_logprobs_and_temperature_agree_with_probabilities() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 5)) * 3, rng.integers(0, 5, 200)

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    for temperature in (0.5, 1.0, 3.0):
        want = calibration_report(softmax(logits / temperature), labels)
        for given, kind in ((logits, "logits"), (np.log(softmax(logits)), "logprobs"), (softmax(logits), "probs")):
            got = calibration_report(given, labels, input=kind, temperature=temperature)
            for key in ("ece", "nll", "brier", "mean_confidence"):
                assert got[key] == pytest.approx(want[key], abs=1e-12), (kind, temperature, key)
    binary = rng.normal(size=50)
    outcome = rng.integers(0, 2, 50)
    got = expected_calibration_error(binary, outcome, input="logits", temperature=2.0)
    assert got == pytest.approx(expected_calibration_error(1 / (1 + np.exp(-binary / 2)), outcome), abs=1e-12)
    got = expected_calibration_error([math.log(0.3), -math.inf], [1, 0], input="logprobs")
    assert got == pytest.approx(0.35, abs=1e-12)


def test_tiny_temperature_and_masked_classes() -> None:
    report = calibration_report([[5.0, -np.inf, 4.0]], [2], input="logits", temperature=1e-310)
    assert report["mean_confidence"] == 1.0 and math.isinf(report["nll"])
    assert any("nll is infinite" in text for text in report["warnings"])


def test_ignore_index_and_weights() -> None:
    values, correct = [0.9, 0.2, 0.7, 0.4], [1, -100, 0, 1]
    assert expected_calibration_error(values, correct, ignore_index=-100) == expected_calibration_error(
        [0.9, 0.7, 0.4], [1, 0, 1]
    )
    doubled = expected_calibration_error([0.9, 0.9, 0.7, 0.4], [1, 1, 0, 1])
    weighted = calibration_report([0.9, 0.7, 0.4], [1, 0, 1], sample_weight=[2, 1, 1], null_test=True)
    assert weighted["ece"] == pytest.approx(doubled, abs=1e-15)
    assert weighted["accuracy"] == pytest.approx(0.75)
    assert weighted["n"] == 3 and weighted["config"]["weighted"] is True


def test_quantile_with_uniform_weights() -> None:
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    correct = np.array([0, 0, 1, 0, 1, 0, 1, 1])
    got = expected_calibration_error(
        values, correct, n_bins=4, strategy="quantile", weighting="uniform", bin_edges="left"
    )
    want = np.mean([abs(values[i : i + 2].mean() - correct[i : i + 2].mean()) for i in range(0, 8, 2)])
    assert got == pytest.approx(want, abs=1e-12)


def test_config_is_echoed_and_everything_is_plain_python() -> None:
    import json

    report = calibration_report(
        np.array(MULTICLASS, np.float32), np.array([0, 1, 2, 0]), null_test=True, confidence_interval=0.9
    )
    assert json.loads(json.dumps(report)) == report
    assert report["config"]["n_bins"] == 10 and report["config"]["edge_dtype"] == "float32"
    assert report["config"]["n_classes"] == 3
    assert "bins" not in calibration_report([0.5], [1], return_bins=False)


def test_hard_predictions_warn() -> None:
    for predictions in ([1.0, 0.0, 1.0], [1, 0, 1], [[1, 0], [0, 1], [1, 0]]):
        with pytest.warns(CalibrationWarning, match="exactly 0 or 1"):
            expected_calibration_error(predictions, [1, 0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected_calibration_error([1.0, 0.5], [1, 0])


def test_small_samples_are_flagged() -> None:
    with pytest.warns(CalibrationWarning, match="below 300"):
        report = calibration_report([0.5, 0.7], [1, 0])
    assert any("below 300" in text for text in report["warnings"])


def test_docstring_examples_run() -> None:
    import doctest

    from first_trl.calibration import accumulator, report

    outcomes = [doctest.testmod(module) for module in (report, accumulator)]
    assert sum(o.attempted for o in outcomes) >= 5 and not any(o.failed for o in outcomes)
