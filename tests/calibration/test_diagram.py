"""Reliability diagrams: what is drawn is what the report says."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from first_trl.calibration import calibration_report, reliability_data, reliability_diagram, save_figure


matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")


def report(seed: int = 0, n: int = 500, power: float = 1.5, **options: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.3, 1, n)
    return calibration_report(confidence, rng.random(n) < confidence**power, **options)


def rectangles(axis: Any) -> list[tuple[float, float, float, float]]:
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axis.patches]


def pixels(figure: Any) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=50)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def test_bars_are_the_bins_of_the_report() -> None:
    given = report(n_bins=10)
    figure = reliability_diagram(given, null_band=False)
    axis, strip = figure.axes
    bins = given["bins"]
    used = [i for i, count in enumerate(bins["count"]) if count]
    assert used == list(range(3, 10))  # the empty bins stay blank
    bars = rectangles(axis)
    assert len(bars) == 2 * len(used)
    gaps = {round(left, 6): rest for left, *rest in bars[len(used) :]}
    for bar, i in zip(bars, used, strict=False):
        low, high = sorted((bins["accuracy"][i], bins["confidence"][i]))
        assert bar == pytest.approx((bins["lower"][i], 0, 0.1, low))
        assert gaps[round(bins["lower"][i], 6)] == pytest.approx([low, 0.1, high - low])
    (marks,) = (line.get_xydata() for line in axis.lines if line.get_label() == "accuracy of the bin")
    for position, i in enumerate(used):
        start, end, lifted = marks[3 * position : 3 * position + 3]
        assert start == pytest.approx((bins["lower"][i], bins["accuracy"][i]))
        assert end == pytest.approx((bins["upper"][i], bins["accuracy"][i])) and np.isnan(lifted).all()
    assert [height for *_, height in rectangles(strip)] == pytest.approx([c / 500 for c in bins["count"]])
    lines = {line.get_label(): line.get_xdata()[0] for line in strip.lines}
    assert lines == pytest.approx({"overall accuracy": given["accuracy"], "mean confidence": given["mean_confidence"]})


def test_gaps_are_coloured_by_their_sign() -> None:
    over = calibration_report([0.85] * 10, [1] * 5 + [0] * 5)
    under = calibration_report([0.55] * 10, [1] * 9 + [0])
    colours = []
    for given in (over, under):
        axis = reliability_diagram(given, null_band=False).axes[0]
        labels = axis.get_legend_handles_labels()[1]
        colours.append((axis.patches[1].get_facecolor(), "over-confident" in labels, "under-confident" in labels))
    assert colours[0][0] != colours[1][0]
    assert colours[0][1:] == (True, False) and colours[1][1:] == (False, True)


def test_null_band_is_where_a_calibrated_model_lies() -> None:
    given = report(n=2000, power=1.0)
    bins = given["bins"]
    for i, count in enumerate(bins["count"]):
        if count:
            mean, half = (
                bins["confidence"][i],
                1.96 * np.sqrt(bins["confidence"][i] * (1 - bins["confidence"][i]) / count),
            )
            assert bins["null_low"][i] == pytest.approx(max(mean - half, 0), abs=2e-3)
            assert bins["null_high"][i] == pytest.approx(min(mean + half, 1), abs=2e-3)
    with_band, without = reliability_diagram(given), reliability_diagram(given, null_band=False)
    spans = [r for r in rectangles(with_band.axes[0]) if r[2] == pytest.approx(0.02)]
    assert len(spans) == 7 and len(rectangles(without.axes[0])) == 14
    assert spans[0][1] == pytest.approx(bins["null_low"][3])
    # Over many calibrated samples the band holds 95 % of the accuracies.
    inside = []
    for seed in range(60):
        b = report(seed, n=2000, power=1.0)["bins"]
        inside += [b["null_low"][i] <= b["accuracy"][i] <= b["null_high"][i] for i in range(3, 10)]
    assert 0.92 <= np.mean(inside) <= 0.98


def test_no_text_overlaps_and_nothing_leaves_the_page() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    reports = {f"model {i}": report(i, confidence_interval=0.95, n_resamples=100) for i in range(10)}
    long = {
        f"{name}, distilled from a teacher selected by the NLL of its validation rows": r
        for name, r in reports.items()
    }
    name = "a_recipe_with_a_long_name_of_its_own_and_a_role, test: accuracy against confidence"
    for given, options in itertools.product(
        (
            reports,
            long,
            dict(list(long.items())[:1]),
            {"model 0": reports["model 0"]},
            dict(list(reports.items())[:3]),
        ),
        ({}, {"counts": False}, {"columns": 2}, {"min_count": 70}),
    ):
        figure = reliability_diagram(given, suptitle=name if len(given) < 4 else "Students", **options)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer, page = canvas.get_renderer(), figure.bbox
        texts = [figure.legends[0].get_window_extent(renderer), figure._suptitle.get_window_extent(renderer)]
        for axis in figure.axes:
            extra = [axis.title, *axis.texts, axis.xaxis.label, axis.yaxis.label]
            texts += [text.get_window_extent(renderer) for text in extra if text.get_text()]
        for i, first in enumerate(texts):
            assert page.x0 <= first.x0 and first.x1 <= page.x1 and page.y0 <= first.y0 and first.y1 <= page.y1
            assert not any(first.overlaps(second) for second in texts[i + 1 :])


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (3, (1, 3)), (6, (2, 3)), (7, (2, 4)), (10, (2, 5))])
def test_grid(count: int, shape: tuple[int, int]) -> None:
    figure = reliability_diagram({str(i): report(i, n=50) for i in range(count)}, counts=False)
    assert len(figure.axes) == count
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape
    assert [axis.get_title() for axis in figure.axes] == [str(i) for i in range(count)]


def test_overlay() -> None:
    reports = {"teacher": report(0, power=1.0), "student": report(1, power=3.0)}
    figure = reliability_diagram(reports, layout="overlay")
    axis = figure.axes[0]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == [f"{name} (ECE {r['ece']:.3f})" for name, r in reports.items()]
    drawn = [line for line in axis.lines if len(line.get_xdata()) > 2]
    for line, given in zip(drawn, reports.values(), strict=True):
        assert list(line.get_ydata()) == pytest.approx([a for a in given["bins"]["accuracy"] if a is not None])


def test_long_and_broken_names_stay_on_the_page() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"student {i}, distilled from a teacher that was selected by its validation rows" for i in (0, 1)]
    figure = reliability_diagram({name: report() for name in names}, layout="overlay", suptitle=names[0])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for artist in (figure.axes[0].get_legend(), figure._suptitle):
        box = artist.get_window_extent(canvas.get_renderer())
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert reliability_diagram({"a\nb": report(), "c": report()}).axes[0].get_title() == "a\nb"


def test_given_axes_and_titles() -> None:
    from matplotlib.figure import Figure

    own = Figure()
    pair = own.subplots(1, 2)
    assert reliability_diagram({"a": report(), "b": report(1)}, axes=pair, titles=["A", "B"]) is own
    assert [axis.get_title() for axis in pair] == ["A", "B"]
    single = Figure().subplots()
    assert reliability_diagram(report(), axes=single) is single.figure
    assert (pixels(own) != 255).any()


def test_classwise_reports_draw_one_panel_per_class() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.dirichlet([1, 1, 1], 200), rng.integers(0, 3, 200)
    given = calibration_report(rows, labels, mode="classwise")
    with pytest.raises(ValueError, match='"classes"'):
        reliability_diagram(given)
    panels = {f"class {entry['label']}": entry for entry in given["classes"]}
    assert len(reliability_diagram(panels, counts=False).axes) == 3


def test_data_is_json_and_complete() -> None:
    reports = {"a": report(confidence_interval=0.9, n_resamples=100), "b": report(1, strategy="mass")}
    data = reliability_data(reports)
    assert json.loads(json.dumps(data)) == data
    assert [panel["title"] for panel in data["panels"]] == ["a", "b"]
    assert data["panels"][0]["ci_low"] == reports["a"]["ci_low"]
    assert data["panels"][0]["n"] == 500
    assert data["panels"][1]["bins"] == reports["b"]["bins"]
    assert data["panels"][0]["bins"]["accuracy"][0] is None
    assert reliability_data(reports["a"])["panels"][0]["title"] == ""


@pytest.mark.parametrize(
    ("reports", "options", "message"),
    [
        ({}, {}, "non-empty"),
        ([1, 2], {}, "must be a report"),
        ({"a": 3}, {}, r"reports\['a'\] is a int"),
        ({"a": {"ece": 0.1}}, {}, "return_bins=True"),
        ("report", {"titles": ["a", "b"]}, "2 titles for 1"),
        ("report", {"layout": "grid"}, "layout='grid'"),
        ("report", {"columns": 0}, "columns=0"),
        ("report", {"axes": []}, "0 axes for 1"),
    ],
)
def test_errors(reports: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reliability_diagram(report() if reports == "report" else reports, **options)


def test_the_core_imports_neither_matplotlib_nor_torch() -> None:
    script = (
        "import sys, first_trl.calibration as c; c.calibration_report([0.5, 0.7], [1, 0]);"
        "print([m for m in ('matplotlib', 'torch', 'transformers', 'datasets', 'evaluate', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_reading_of_an_evaluation_is_taken_as_it_is() -> None:
    inner = report()
    reading = {"accuracy": inner["accuracy"], "ece": inner["ece"], "nll": 1.0, "calibration": inner}
    assert reliability_data(reading) == reliability_data(inner)
    assert reliability_data({"a": reading, "b": inner}) == reliability_data({"a": inner, "b": inner})
    whole = {"n": 500, "n_rows": 500, "full_vocab": reading, "options": reading}
    readings = reliability_data({"full_vocab": reading, "options": reading})["panels"]
    assert [panel["title"] for panel in readings] == ["full_vocab", "options"]
    for given in (whole, {"student": whole}):
        with pytest.raises(ValueError, match=r"report\['full_vocab'\] or report\['options'\]"):
            reliability_diagram(given)


def test_shares_of_compared_panels_are_drawn_on_one_scale() -> None:
    even = calibration_report(np.linspace(0.01, 1, 100), [1, 0] * 50)
    steep = calibration_report([0.95] * 90 + [0.05] * 10, [1, 0] * 50)
    strips = reliability_diagram({"even": even, "steep": steep}).axes[1::2]
    assert strips[0].get_ylim() == strips[1].get_ylim() and strips[0].get_ylim()[1] > 0.9


def test_figures_are_saved_without_type_3_fonts_and_always_alike(tmp_path: Path) -> None:
    figure = reliability_diagram(report())
    files = save_figure(figure, tmp_path / "one.png", formats=("png", "pdf", "svg"))
    assert [file.name for file in files] == ["one.png", "one.pdf", "one.svg"]
    pdf = (tmp_path / "one.pdf").read_bytes()
    assert b"/Type3" not in pdf and b"/FontFile2" in pdf
    again = save_figure(reliability_diagram(report()), tmp_path / "two.png", formats=("pdf", "svg"))
    for first, second in zip(files, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
