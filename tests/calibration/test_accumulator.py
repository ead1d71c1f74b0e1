"""The accumulator: streams, merging, state."""

import numpy as np
import pytest

from first_trl.calibration import CalibrationAccumulator, calibration_report


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")


def test_rows_in_batches_equal_one_shot() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(1000, 6)) * 2, rng.integers(0, 6, 1000)
    labels[::7] = -100
    options = {"input": "logits", "temperature": 1.7, "ignore_index": -100, "norm": "l2", "bin_edges": "left"}
    whole = calibration_report(logits, labels, n_bins=15, **options)
    accumulator = CalibrationAccumulator(15, **options)
    for start in range(0, 1000, 33):
        accumulator.add_batch(logits[start : start + 33], labels[start : start + 33])
    accumulator.add_batch(logits[:3], [-100, -100, -100])  # padding only
    accumulator.add_batch(logits[:0], labels[:0])
    result = accumulator.result()
    for key in ("ece", "mce", "rmsce", "ece_debiased", "accuracy", "brier", "nll", "trust", "n", "ties"):
        assert result[key] == pytest.approx(whole[key], abs=1e-12), key
    for column in ("count", "confidence", "accuracy", "gap", "null_low", "null_high"):
        assert result["bins"][column] == pytest.approx(whole["bins"][column], abs=1e-12), column
    assert result["ece"] == result["rmsce"]


def test_state_adds_like_an_all_reduce() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.random(300).astype(np.float32)
    correct = rng.integers(0, 2, 300)
    ranks = [CalibrationAccumulator(10) for _ in range(3)]
    for rank, accumulator in enumerate(ranks):
        accumulator.add_batch(confidence[rank::3], correct[rank::3])
    assert all(rank.state.dtype == np.float64 and rank.state.ndim == 1 for rank in ranks)
    total = sum(rank.state for rank in ranks)
    restored = CalibrationAccumulator(10).load_state(total)
    assert restored.result()["ece"] == pytest.approx(calibration_report(confidence, correct)["ece"], abs=1e-12)


def test_bfloat16_batches() -> None:
    torch = pytest.importorskip("torch")
    values = torch.tensor([0.1, 0.2, 0.3, 0.35], dtype=torch.bfloat16)
    accumulator = CalibrationAccumulator(10)
    accumulator.add_batch(values, [1, 0, 1, 0])
    assert accumulator.result()["bins"]["count"] == calibration_report(values, [1, 0, 1, 0])["bins"]["count"]
    assert accumulator.result()["ece"] == pytest.approx(0.5375, abs=2**-8)


def test_references_of_any_precision() -> None:
    torch = pytest.importorskip("torch")
    accumulator = CalibrationAccumulator()
    accumulator.add_batch([0.25, 0.75], torch.tensor([0.0, 1.0], requires_grad=True).bfloat16())
    assert accumulator.result()["accuracy"] == 0.5
    with pytest.raises(ValueError, match="row 0 is masked"):
        CalibrationAccumulator(ignore_index=-100).add_batch([0.5], np.ma.masked_array([-100], [True]))


def test_thirty_million_constants_in_batches() -> None:
    accumulator = CalibrationAccumulator(10)
    values, ones = np.full(1_000_000, 0.9, np.float32), np.ones(1_000_000, np.int8)
    for _ in range(3):
        accumulator.add_batch(values, ones)
    for _ in range(4):  # merging with itself doubles: 48 million rows
        accumulator.merge(accumulator)
    result = accumulator.result()
    assert result["n"] == 48_000_000
    assert result["ece"] == pytest.approx(0.1, abs=2.0**-24)


def test_errors() -> None:
    accumulator = CalibrationAccumulator(10)
    with pytest.raises(ValueError, match="Nothing was added"):
        accumulator.result()
    accumulator.add_batch([0.5], [1])
    with pytest.raises(ValueError, match="keep one accumulator for each kind"):
        accumulator.add_batch([[0.5, 0.5]], [1])
    rows = CalibrationAccumulator(10)
    rows.add_batch([[0.5, 0.5]], [1])
    with pytest.raises(ValueError, match="keep one accumulator for each kind"):
        accumulator.merge(rows)
    with pytest.raises(ValueError, match="differ in their options"):
        accumulator.merge(CalibrationAccumulator(15))
    with pytest.raises(ValueError, match="Can merge"):
        accumulator.merge({"ece": 0.1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float64 array of shape"):
        accumulator.load_state(np.zeros(3))
    with pytest.raises(ValueError, match="float64"):
        accumulator.load_state(accumulator.state.astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or negative"):
        accumulator.load_state(-accumulator.state)
    with pytest.raises(ValueError, match="rows but references"):
        accumulator.add_batch([0.5], [])


@pytest.mark.parametrize("ignore_index", [None, 1, -100])
def test_correctness_flags_are_no_class_ids(ignore_index: int | None) -> None:
    accumulator = CalibrationAccumulator(ignore_index=ignore_index)
    for flags in ([True, True], [0, True]):
        with pytest.raises(ValueError, match=r"row \d is a boolean"):
            accumulator.add_batch([[0.9, 0.1], [0.2, 0.8]], flags)
    assert len(accumulator) == 0
