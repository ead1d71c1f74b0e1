"""Invalid input raises a `ValueError` that names the row and the value; nothing malformed yields a number."""

import random
import re
import warnings
from typing import Any

import numpy as np
import pytest

from first_trl.calibration import CalibrationAccumulator, calibration_report, expected_calibration_error
from first_trl.calibration.conditional import fit_option_temperature
from first_trl.calibration.temperature import fit_temperature
from first_trl.calibration.threshold import fit_threshold


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")

GOOD_ROWS = [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]
NAN, INF = float("nan"), float("inf")

INVALID = [
    # predictions, references, options, message
    ([0.5, NAN], [1, 0], {}, r"predictions row 1 \(nan\)"),
    ([0.5, INF], [1, 0], {}, r"predictions row 1 \(inf\)"),
    ([0.5, -0.25], [1, 0], {}, r"predictions row 1 \(-0.25\).*\[0, 1\]"),
    ([55.0, 20.0], [1, 0], {}, r"row 0 \(55.0\).*dividing by 100"),
    ([0.5, 1.1], [1, 0], {}, r"row 1 \(1.1\).*logits"),
    ([0.5, 0.6], [1, 2], {}, r"references row 1 \(2\)"),
    ([0.5, 0.6], [1, NAN], {}, r"references row 1 \(nan\)"),
    ([0.5, 0.6], [1, 0.5], {}, r"references row 1 \(0.5\)"),
    ([0.5, 0.6], [1, -1], {}, r"references row 1 \(-1\)"),
    ([0.5, 0.6], [1], {}, "2 rows but references have 1"),
    ([], [], {}, "empty"),
    ([0.5], None, {}, "references is None"),
    (None, [1], {}, "predictions is None"),
    ("0.5", [1], {}, "predictions is a str"),
    (["0.5", "0.4"], [1, 0], {}, r"row 0 is '0.5' \(str\)"),
    ([0.5, None], [1, 0], {}, r"row 1 is None"),
    ([0.5, 0.4], ["A", "B"], {}, r"references.*row 0 is 'A'"),
    ([[0.5, 0.5], [1.0]], [0, 0], {}, "row 1 has 1 values where row 0 has 2"),
    ([[0.5, "x"]], [0], {}, r"row 0 contains 'x'"),
    ([0.5, 10**400], [1, 0], {}, "predictions"),
    ([0.5 + 1j, 0.5], [1, 0], {}, "row 0 is"),
    ({0.5}, {1}, {}, "predictions is a set"),
    ({"a": 0.5}, [1], {}, "predictions is a dict"),
    (0.5, 1, {}, r"shape \(\)"),
    (iter([0.5, 0.5]), [1, 0], {}, "of type list_iterator: pass a list"),
    (np.array([0.5, None], object), [1, 0], {}, "row 1 is None"),
    (np.ma.masked_array([0.5, 0.5], [False, True]), [1, 0], {}, "row 1 is masked"),
    (np.zeros((2, 3, 4)), [0, 1], {}, r"shape \(2, 3, 4\).*reshape"),
    ([[0.5], [0.5]], [0, 0], {}, "at least two classes"),
    (GOOD_ROWS, [[1, 0, 0], [0, 1, 0], [0, 0, 1]], {}, "argmax"),
    (GOOD_ROWS, [0, 1, 3], {}, r"references row 2 \(3\).*0..2"),
    (GOOD_ROWS, [True, True, False], {}, "row 0 is a boolean.*no class ids.*shape"),
    (GOOD_ROWS, np.array([True, True, False]), {}, "row 0 is a boolean"),
    (GOOD_ROWS, [0, 2, False], {}, "row 2 is a boolean"),
    (GOOD_ROWS, [True, 1.0, 2.0], {}, "row 0 is a boolean"),
    (np.log(GOOD_ROWS), [True, True, False], {"input": "logits"}, "row 0 is a boolean"),
    (GOOD_ROWS, [True, True, False], {"mode": "classwise", "ignore_index": 1}, "row 0 is a boolean"),
    ([0.5, 0.6], [True, False], {"ignore_index": 1}, "ignore_index=1 would leave out every correct answer"),
    ([0.5, 0.6], [1, 0], {"ignore_index": 0}, "ignore_index=0 would leave out every wrong answer"),
    (GOOD_ROWS, [0, -100, 1], {}, r"row 1 \(-100\).*ignore_index=-100"),
    (GOOD_ROWS, [0, 1.5, 1], {}, r"references row 1 \(1.5\)"),
    (GOOD_ROWS, [0, INF, 1], {}, r"references row 1 \(inf\)"),
    ([[0.5, 0.5, 0.0], [0.9, 0.9, 0.1]], [0, 1], {}, r"row 1 .*sums to 1.9.*softmax"),
    ([[0.5, 0.1, 0.1], [0.9, 0.05, 0.05]], [0, 1], {}, r"row 0 .*sums to 0.7"),
    ([[0.5, 0.5], [NAN, 0.5]], [0, 1], {}, r"row 1 \(\[nan, 0.5\]\): not finite"),
    ([[0.5, 0.5], [2.0, -1.0]], [0, 1], {}, r"row 1 \(\[2.0, -1.0\]\).*logits"),
    ([[0.0, 0.0], [0.5, 0.5]], [0, 1], {}, "row 0 .*sums to 0"),
    ([[NAN, 0.5]], [0], {"input": "logits"}, "row 0 .*NaN"),
    ([[INF, 0.5]], [0], {"input": "logits"}, "row 0 .*inf"),
    ([[-INF, -INF]], [0], {"input": "logits"}, "row 0 .*whole row -inf"),
    ([NAN], [1], {"input": "logits"}, "row 0 .*finite"),
    ([[-0.1, -0.2]], [0], {"input": "logprobs"}, "row 0 .*sum to 1.7"),
    ([[0.5, -3.0]], [0], {"input": "logprobs"}, "row 0 .*at most 0"),
    ([0.5], [1], {"input": "logprobs"}, r"row 0 \(0.5\).*at most 0"),
    ([0.5], [1], {"temperature": 2.0}, "temperature=2.0 cannot act"),
    ([0.5], [1], {"mode": "classwise"}, "needs full rows"),
    ([0.5], [1], {"mode": "full"}, "needs full rows"),
    ([0.5], [1], {"n_bins": 0}, "n_bins=0"),
    ([0.5], [1], {"n_bins": 2.5}, "n_bins=2.5"),
    ([0.5], [1], {"n_bins": True}, "n_bins=True"),
    ([0.5], [1], {"norm": "l3"}, "norm='l3'"),
    ([0.5], [1], {"strategy": "equal"}, "strategy='equal'"),
    ([0.5], [1], {"bin_edges": "both"}, "bin_edges='both'"),
    ([0.5], [1], {"mode": "binary"}, "mode='binary'"),
    ([0.5], [1], {"input": "scores"}, "input='scores'"),
    ([0.5], [1], {"weighting": "none"}, "weighting='none'"),
    ([0.5], [1], {"edge_dtype": "int8"}, "edge_dtype='int8'"),
    ([0.5], [1], {"temperature": 0.0}, "temperature=0.0"),
    ([0.5], [1], {"temperature": NAN}, "temperature=nan"),
    ([0.5], [1], {"debias": True}, 'norm="l2"'),
    ([0.5], [1], {"debias": 1, "norm": "l2"}, "debias=1"),
    ([0.5], [1], {"ignore_index": 1}, "nothing is left"),
    ([0.5], [1], {"ignore_index": 0.5}, "ignore_index=0.5"),
    ([0.5], [1], {"sample_weight": [1, 2]}, "sample_weight has shape"),
    ([0.5], [1], {"sample_weight": [-1]}, r"sample_weight row 0 \(-1.0\)"),
    ([0.5], [1], {"sample_weight": [NAN]}, r"sample_weight row 0 \(nan\)"),
    ([0.5], [1], {"sample_weight": [0]}, "sums to 0"),
    ([0.5], [1], {"sample_weight": [1], "strategy": "mass"}, 'strategy="width"'),
]


@pytest.mark.parametrize(("predictions", "references", "options", "message"), INVALID)
def test_invalid_input(predictions: Any, references: Any, options: dict[str, Any], message: str) -> None:
    for function in (expected_calibration_error, calibration_report):
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            function(predictions, references, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence_interval": 95}, "confidence_interval=95"),
        ({"confidence_interval": True}, "confidence_interval=True"),
        ({"interval_method": "percentile"}, "interval_method='percentile'"),
        ({"n_resamples": 10}, "n_resamples=10"),
        ({"seed": -1}, "seed=-1"),
        ({"null_test": "yes"}, "null_test='yes'"),
    ],
)
def test_invalid_report_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_report([0.5], [1], **options)


def test_row_numbers_are_those_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"row 2 \(1.5\)"):
        expected_calibration_error([0.1, 0.2, 1.5], [0, -100, 1], ignore_index=-100)
    rows = np.full((50_000, 4), 0.25)  # several blocks
    rows[43_210, 2] = np.nan
    with pytest.raises(ValueError, match="row 43210 "):
        expected_calibration_error(rows, np.zeros(50_000, int))
    with pytest.raises(ValueError, match="row 43211 "):
        expected_calibration_error(np.vstack([rows[:1], rows]), np.r_[-1, np.zeros(50_000, int)], ignore_index=-1)


def test_rounding_is_tolerated_and_clipped() -> None:
    assert expected_calibration_error([1 + 1e-7, -1e-7], [1, 0]) == 0.0
    assert calibration_report([[1 + 1e-7, -1e-7]], [0])["ece"] == 0.0
    assert calibration_report([[1 + 1e-7, -1e-7]], [0], temperature=2.0)["ece"] == 0.0
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    rows = torch.softmax(torch.randn(500, 6, generator=generator), -1).bfloat16()
    assert (rows.float().sum(-1) - 1).abs().max() > 1e-3  # such rows are rounded, not wrong
    expected_calibration_error(rows, torch.zeros(500, dtype=torch.long))


def test_inputs_of_many_kinds() -> None:
    torch = pytest.importorskip("torch")
    pandas = pytest.importorskip("pandas")
    want = expected_calibration_error([0.25, 0.75, 0.5], [0, 1, 1])
    forms = [
        ((0.25, 0.75, 0.5), (False, True, True)),
        (torch.tensor([0.25, 0.75, 0.5], requires_grad=True), torch.tensor([False, True, True])),
        (pandas.Series([0.25, 0.75, 0.5], index=[7, 8, 9]), pandas.Series([0.0, 1.0, 1.0])),
        ([torch.tensor(0.25), torch.tensor(0.75), torch.tensor(0.5)], np.array([0, 1, 1], np.uint8)),
        ([torch.tensor(p, requires_grad=True) for p in (0.25, 0.75, 0.5)], [torch.tensor(r) for r in (0, 1, 1)]),
        ([torch.tensor(p).bfloat16() for p in (0.25, 0.75, 0.5)], torch.tensor([0, 1, 1]).bfloat16()),
        (np.array([0.25, 0.75, 0.5], np.longdouble), [0, 1, 1]),
        (np.array([0.25, 0.75, 0.5], object), pandas.Series([False, True, True], dtype=object)),
        (np.array([0.25, 0.75, 0.5])[::-1][::-1], [0, 1, 1]),
    ]
    for predictions, references in forms:
        assert expected_calibration_error(predictions, references) == want


def test_lists_of_low_precision_tensors_are_the_tensor() -> None:
    torch = pytest.importorskip("torch")
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)).bfloat16()
    correct = (torch.arange(200) % 2).tolist()
    assert calibration_report(list(values), correct) == calibration_report(values, correct)
    rows = torch.softmax(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), -1).bfloat16()
    assert calibration_report(list(rows), [0] * 50) == calibration_report(rows, [0] * 50)


def test_columns_in_another_order_are_not_paired_by_position() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"confidence": [0.9, 0.8, 0.3], "correct": [1, 1, 0]})
    falling = table["correct"].sort_values()
    for function in (expected_calibration_error, fit_threshold):
        with pytest.raises(ValueError, match="same index in different order"):
            function(table["confidence"], falling)
    with pytest.raises(ValueError, match="predictions and sample_weight have the same index in different order"):
        expected_calibration_error(table["confidence"], table["correct"], sample_weight=falling)
    want = expected_calibration_error(table["confidence"], table["correct"])
    assert expected_calibration_error(table["confidence"], falling.sort_index()) == want
    assert expected_calibration_error(table["confidence"], falling.set_axis([5, 6, 7])) != want


@pytest.mark.filterwarnings("ignore:(Only 3|T = )")
def test_probabilities_in_place_of_logits_are_said() -> None:
    for function in (fit_temperature, fit_option_temperature):
        with pytest.warns(UserWarning, match="look like probabilities"):
            function(np.array(GOOD_ROWS), [0, 1, 2])
    with pytest.warns(UserWarning, match="look like probabilities"):
        calibration_report(GOOD_ROWS, [0, 1, 2], input="logits")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*look like probabilities")
        calibration_report(np.log(GOOD_ROWS), [0, 1, 2], input="logits")
        calibration_report(np.eye(3), [0, 1, 2], input="logits")
        fit_option_temperature(np.log(GOOD_ROWS), [0, 1, 2])


@pytest.mark.parametrize("kind", ["category", "boolean"])
def test_booleans_of_pandas_are_no_class_ids(kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="row 0 is a boolean"):
        expected_calibration_error(GOOD_ROWS, pandas.Series([True, True, False], dtype=kind))


def test_inputs_are_not_changed() -> None:
    rows, labels = np.add(GOOD_ROWS, [0, 1e-8, 0]), np.array([0, 1, 2])
    before = rows.copy(), labels.copy()
    for mode in ("top-label", "classwise", "full"):
        calibration_report(rows, labels, mode=mode, null_test=True, confidence_interval=0.95, n_resamples=100)
    assert (rows == before[0]).all() and (labels == before[1]).all()


def _corrupt(rng: random.Random) -> tuple[Any, Any, dict[str, Any]]:
    """A valid input with one to three things broken."""
    n, classes = rng.randint(2, 12), rng.randint(2, 40)
    full = rng.random() < 0.5
    if full:
        weights = [[rng.random() + 0.01 for _ in range(classes)] for _ in range(n)]
        predictions: list[Any] = [[w / sum(row) for w in row] for row in weights]
        references: list[Any] = [rng.randrange(classes) for _ in range(n)]
    else:
        predictions = [rng.uniform(0.01, 0.99) for _ in range(n)]
        references = [rng.randrange(2) for _ in range(n)]
    options: dict[str, Any] = {}
    odd_values = [NAN, INF, -INF, 1.5, -0.5, 7.0, "0.4", None, "", b"x", [], {}, object(), 1j, 10**500, [0.5, 0.5]]
    odd_labels = [NAN, INF, -1, 0.5, 10**6, "1", None, "yes", -100, [], 2**80, 1e300, object()]
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(9)
        row = rng.randrange(len(predictions)) if predictions else 0
        if kind <= 2 and predictions:
            if full and isinstance(predictions[row], list) and predictions[row]:
                predictions[row][rng.randrange(len(predictions[row]))] = rng.choice(odd_values)
            else:
                predictions[row] = rng.choice(odd_values)
        elif kind <= 4 and references:
            references[rng.randrange(len(references))] = rng.choice(odd_labels)
        elif kind == 5:
            (predictions if rng.random() < 0.5 else references).append(predictions[0] if full and predictions else 1)
        elif kind == 6 and full and predictions and isinstance(predictions[row], list):
            predictions[row] = predictions[row][:-1] if rng.random() < 0.5 else [*predictions[row], 0.5]
        elif kind == 7:
            key, value = rng.choice(
                [("n_bins", 0), ("n_bins", "10"), ("norm", "L1"), ("mode", "top"), ("input", ""), ("temperature", -1),
                 ("bin_edges", None), ("strategy", "widths"), ("sample_weight", [1.0]), ("edge_dtype", "fp32")]
            )  # fmt: skip
            options[key] = value
        else:
            return rng.choice([None, 3.0, "abc", predictions, {}]), rng.choice([None, "abc", 1, {}]), options
    return predictions, references, options


def _is_valid(predictions: Any, references: Any, options: dict[str, Any]) -> bool:
    """Whether an input is well-formed after all, decided without the code under test."""
    if options or not isinstance(predictions, list) or not isinstance(references, list):
        return False
    if not predictions or len(predictions) != len(references):
        return False

    def probability(value: Any) -> bool:
        return isinstance(value, (int, float)) and value == value and -1e-6 <= value <= 1 + 1e-6

    def label(value: Any, size: int) -> bool:
        return isinstance(value, (int, float)) and value == value and 0 <= value < size and value == int(value)

    if all(isinstance(p, list) for p in predictions):
        classes = len(predictions[0])
        return (
            classes >= 2
            and all(len(p) == classes and all(map(probability, p)) for p in predictions)
            and all(abs(sum(p) - 1) <= 1e-3 for p in predictions)
            and all(label(r, classes) for r in references)
        )
    return all(map(probability, predictions)) and all(label(r, 2) for r in references)


def test_two_thousand_malformed_inputs_never_give_a_number() -> None:
    rng = random.Random(20240816)
    rejected = 0
    while rejected < 2000:
        predictions, references, options = _corrupt(rng)
        if _is_valid(predictions, references, options):
            assert 0 <= expected_calibration_error(predictions, references, **options) <= 1
            continue
        function = rng.choice([expected_calibration_error, calibration_report])
        with pytest.raises(ValueError) as caught:
            function(predictions, references, **options)
        assert len(str(caught.value)) > 15
        rejected += 1


def test_an_invalid_batch_leaves_the_accumulator_unchanged() -> None:
    accumulator = CalibrationAccumulator()
    accumulator.add_batch([0.5, 0.7], [1, 0])
    before = accumulator.state
    for predictions, references in (([0.5, NAN], [1, 0]), ([0.5], [1, 0]), (GOOD_ROWS, [0, 1, 2])):
        with pytest.raises(ValueError):
            accumulator.add_batch(predictions, references)
    assert (accumulator.state == before).all()
