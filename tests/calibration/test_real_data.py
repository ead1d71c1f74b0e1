"""Published confidences of language models and a CIFAR-10 network."""

import csv
import gzip
from typing import Any

import numpy as np
import pytest

from first_trl.calibration import calibration_report, expected_calibration_error
from tests.conftest import DATA


LLM, CIFAR = DATA / "llm_confidence", DATA / "cifar10_vgg_probs" / "cifar10_vgg16.npz"
MODELS = ["falcon-7b", "llama-7b", "llama-13b", "llama-70b", "mistral", "yi-6b", "gpt-4-turbo"]
pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")


def read(model: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    if not LLM.is_dir():
        pytest.skip(f"no llm_confidence in {DATA}; set FIRST_TRL_TEST_DATA to a copy")
    with gzip.open(LLM / f"{model}.csv.gz", "rt") as file:
        rows = [(float(row["confidence"]), row["grade"] == "Correct") for row in csv.DictReader(file)]
    with open(LLM / "reference_values.csv") as file:
        reference = next(row for row in csv.DictReader(file) if row["file"] == f"{model}.csv.gz")
    return np.array([c for c, _ in rows]), np.array([y for _, y in rows]), reference


@pytest.mark.parametrize("model", MODELS)
def test_language_models(model: str) -> None:
    confidence, correct, reference = read(model)
    for n_bins in (10, 15):
        report = calibration_report(confidence, correct, n_bins=n_bins)
        assert report["ece"] == pytest.approx(float(reference[f"ece_equal_width_{n_bins}"]), abs=1e-6)
    assert report["n"] == int(reference["rows"])
    assert report["accuracy"] == pytest.approx(float(reference["accuracy"]), abs=6e-5)
    assert report["mean_confidence"] == pytest.approx(float(reference["mean_confidence"]), abs=6e-5)
    assert report["brier"] == pytest.approx(float(reference["brier_top_label"]), abs=6e-7)
    published = expected_calibration_error(
        confidence, correct, n_bins=10, strategy="quantile", weighting="uniform", bin_edges="left"
    )
    assert round(published, 2) == float(reference["published_calibration_error"])
    # The authors' bins leave out a confidence of exactly 1; without such rows the estimators are the same.
    tolerance = 1e-6 if not (confidence == 1).any() else 5e-4
    assert published == pytest.approx(float(reference["quantile10_calibration_error"]), abs=tolerance)


def test_cifar10() -> None:
    if not CIFAR.is_file():
        pytest.skip(f"no cifar10_vgg_probs in {DATA}; set FIRST_TRL_TEST_DATA to a copy")
    data = np.load(CIFAR)
    for n_bins, want in ((10, 0.03990714), (15, 0.03978007), (20, 0.04001563)):
        report = calibration_report(data["probs"], data["labels"], n_bins=n_bins)
        assert report["ece"] == pytest.approx(want, abs=5e-8)
    assert report["accuracy"] == pytest.approx(0.9359, abs=1e-12)
    assert report["mean_confidence"] == pytest.approx(0.975573, abs=6e-7)
    assert report["nll"] == pytest.approx(0.257065, abs=6e-7)
    assert report["brier"] == pytest.approx(0.105446, abs=6e-7)
