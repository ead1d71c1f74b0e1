"""`first-trl calibrate`: the bins, figures and paired differences that are asked for."""

import json
from pathlib import Path

import numpy as np
import pytest

from first_trl.__main__ import main
from first_trl.calibration import calibration_report, expected_calibration_error
from first_trl.calibration.intervals import mover_difference, paired_shares_interval
from first_trl.evaluation.confidence import Confidences
from first_trl.evaluation.paired import paired_differences


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")


def write(path: Path, confidence: np.ndarray, correct: np.ndarray) -> str:
    lines = [f"{c},{int(y)}" for c, y in zip(confidence, correct, strict=True)]
    path.write_text("\n".join(["confidence,correct", *lines]) + "\n")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    confidence, chance = np.round(rng.beta(5, 1.5, 400), 4), rng.random(400)
    right = chance < confidence - 0.1
    shifted = np.round(np.clip(confidence - 0.1, 0, 1), 4)
    return [
        write(tmp_path / "a.csv", confidence, right),
        write(tmp_path / "b.csv", shifted, right),
        write(tmp_path / "short.csv", confidence[:300], right[:300]),
    ]


def calibrate(files: list[str], folder: Path, *options: str) -> dict:
    assert main(["calibrate", *files, "--output-dir", str(folder), "--resamples", "200", *options]) == 0
    return json.loads((folder / "report.json").read_text())


def test_two_files_are_compared_row_by_row(files, tmp_path, capsys):
    found = calibrate(files, tmp_path / "out")
    text = capsys.readouterr().out
    assert found["a"]["paired_difference"] is None and found["short"]["paired_difference"] is None
    difference = found["b"]["paired_difference"]
    assert difference["minus"] == "a"
    assert difference["ece"]["difference"] == pytest.approx(found["b"]["ece"] - found["a"]["ece"])
    assert difference["ece"]["low"] <= -0.05 <= difference["ece"]["high"] < 0.05
    assert difference["accuracy"]["difference"] == 0 and difference["accuracy"]["low"] < 0
    assert "b minus a" in text and "paired by their order" in text
    assert "short is not compared with a: 300 and 400 rows." in text


def test_other_bins_and_figures_on_request(files, tmp_path, capsys):
    options = ("--weighting", "uniform", "--strategy", "quantile", "--bin-edges", "left", "--format", "pdf")
    found = calibrate(files[:1], tmp_path / "out", *options)["a"]
    assert found["config"]["weighting"] == "uniform" and "weighting uniform" in capsys.readouterr().out
    rows = np.loadtxt(files[0], delimiter=",", skiprows=1)
    expected = expected_calibration_error(
        rows[:, 0], rows[:, 1].astype(int), weighting="uniform", strategy="quantile", bin_edges="left"
    )
    assert found["ece"] == pytest.approx(expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "reliability.pdf", "reliability.png", "report.json",
    ]  # fmt: skip
    assert b"/Type3" not in (tmp_path / "out" / "reliability.pdf").read_bytes()


def test_shares_over_the_same_rows():
    low, high = paired_shares_interval(9, 1, 44)
    assert low < 8 / 44 < high
    # Where nothing differs the score test has a closed form
    z = 1.959964**2
    assert paired_shares_interval(0, 0, 50) == pytest.approx((-z / (50 + z), z / (50 + z)), abs=1e-6)
    low, high = paired_shares_interval(3, 9, 60)
    assert (-high, -low) == pytest.approx(paired_shares_interval(9, 3, 60))
    assert -1 <= paired_shares_interval(0, 5, 5)[0] < paired_shares_interval(0, 5, 5)[1] < 1


def test_an_interval_from_two_is_that_of_a_difference_of_normal_numbers():
    low, high = mover_difference((3.0, 1.0, 5.0), (1.0, -0.5, 2.5))
    assert (low, high) == pytest.approx((2 - 2.5, 2 + 2.5))
    low, high = mover_difference((3.0, 1.0, 5.0), (1.0, -0.5, 2.5), 0.5)
    assert high - 2 == pytest.approx((2**2 + 1.5**2 - 2 * 1.5) ** 0.5) and low == pytest.approx(4 - high)


def test_pure_bins_do_not_make_a_difference_certain():
    sure = Confidences("a", np.full(100, 0.99), np.ones(100, bool), "column 'confidence'")
    surer = Confidences("b", np.full(100, 0.999), np.ones(100, bool), "column 'confidence'")
    found = paired_differences(sure, surer, n_resamples=200)
    for name in ("accuracy", "ece"):
        assert found[name]["low"] < -0.01 and found[name]["high"] > 0.01, name
    assert paired_differences(sure, surer, n_resamples=0)["ece"]["low"] is None
    with pytest.raises(ValueError, match="a has 100 rows and c 99"):
        paired_differences(sure, Confidences("c", np.full(99, 0.9), np.ones(99, bool), "x"))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "shift"), [(100, 0.1), (500, 0.1), (100, 0.0), (300, 0.0)])
def test_interval_of_the_difference_covers_it(n, shift):
    rng, covered, runs = np.random.default_rng([7, n]), 0, 150
    for run in range(runs):
        confidence, u = rng.beta(5, 1.5, n), rng.random(n)
        v = np.where(rng.random(n) < 0.7, u, rng.random(n))
        chance = np.clip(confidence - 0.1, 0, 1)
        first = Confidences("a", confidence, u < chance, "x")
        second = Confidences("b", np.clip(confidence - shift, 0, 1), v < chance, "x")
        ece = paired_differences(first, second, n_resamples=200, seed=run)["ece"]
        # Shifted down by what it is over-confident by, the second is calibrated
        covered += ece["low"] <= -shift <= ece["high"]
    assert covered / runs > 0.95 - 3 * (0.05 * 0.95 / runs) ** 0.5, covered


def test_the_reports_of_both_stand_beside_their_difference(files, tmp_path):
    found = calibrate(files[:2], tmp_path / "out", "--format", "svg", "--format", "pdf")
    rows = np.loadtxt(files[1], delimiter=",", skiprows=1)
    report = calibration_report(
        rows[:, 0], rows[:, 1].astype(int), confidence_interval=0.95, null_test=True, n_resamples=200
    )
    assert {key: found["b"][key] for key in ("ece", "ci_low", "ci_high")} == pytest.approx(
        {key: report[key] for key in ("ece", "ci_low", "ci_high")}
    )
    assert (tmp_path / "out" / "reliability.svg").is_file()


def fresh(path: Path, error: float, n: int = 400) -> str:
    """Confidences of which a quarter lie below .6, and a share of wrong answers above it."""
    rng = np.random.default_rng(0)
    confidence = np.r_[np.full(n // 4, 0.5), np.full(n - n // 4, 0.9)]
    return write(path, confidence, np.where(confidence < 0.6, rng.random(n) < 0.5, rng.random(n) >= error))


@pytest.mark.parametrize(("error", "status"), [(0.05, 0), (0.2, 1)])
def test_a_threshold_that_no_longer_holds_fails(tmp_path, capsys, error, status):
    file, folder = fresh(tmp_path / "fresh.csv", error), tmp_path / "out"
    options = ["--output-dir", str(folder), "--resamples", "0", "--threshold", "0.6", "--max-error", "0.1"]
    assert main(["calibrate", file, *options]) == status
    text, found = capsys.readouterr().out, json.loads((folder / "report.json").read_text())["fresh"]["threshold"]
    assert found["holds"] == (status == 0) and found["n_answered"] == 300 and found["max_error"] == 0.1
    assert f"at most 10 % {'holds' if status == 0 else 'is BROKEN'}" in text and "300 of 400 rows answered" in text


def test_the_threshold_that_a_student_brings(tmp_path, capsys):
    from first_trl.calibration.threshold import fit_threshold
    from first_trl.tasks.decision_extras import save_thresholds

    confidence = np.linspace(0, 1, 2000)
    made = [fit_threshold(confidence, confidence > limit, max_error=0.1) for limit in (0.5, 0.8)]
    save_thresholds(tmp_path / "student", {"full_vocab": made[:1], "renormalized": made[1:]}, temperature=1.4)
    options = ["--output-dir", str(tmp_path / "out"), "--resamples", "0", "--threshold", str(tmp_path / "student")]
    assert main(["calibrate", fresh(tmp_path / "fresh.csv", 0.2), *options, "--max-error", "0.1"]) == 1
    found = json.loads((tmp_path / "out" / "report.json").read_text())["fresh"]["threshold"]
    said = capsys.readouterr().out
    # A file does not tell the temperature of its confidences
    assert found["threshold"] == made[0].threshold and "for full_vocab at temperature 1.4 (which" in said
    # What `first-trl evaluate` writes is compared with the threshold for its reading
    rows = [{"probabilities": [0.9, 0.1], "gold": [1.0, 0.0], "options": ["a", "b"]}] * 40
    rows += [{"probabilities": [0.9, 0.1], "gold": [0.6, 0.4], "options": ["a", "b"]}]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["calibrate", str(tmp_path / "predictions.jsonl"), *options, "--max-error", "0.1"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())["predictions renormalized"]
    assert report["threshold"]["threshold"] == made[1].threshold and report["threshold"]["n_answered"] == 40
    assert report["dropped"] == {"gold is a distribution": 1}
    assert main(["calibrate", str(tmp_path / "predictions.jsonl"), *options]) == 2
    assert "brings no threshold for max_error=0.05, but for 0.1" in capsys.readouterr().err
