"""The `evaluate` module: everything a metric of that library is expected to do."""

import doctest
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from first_trl.calibration import calibration_report, expected_calibration_error


evaluate = pytest.importorskip("evaluate", reason="needs evaluate")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "first_trl" / "metrics" / "ece"
CONFIDENCE, CORRECT = [0.1, 0.2, 0.65, 0.7, 0.9, 0.95], [0, 1, 1, 0, 1, 1]
ROWS, LABELS = [[0.6, 0.2, 0.2], [0.0, 0.95, 0.05], [0.7, 0.1, 0.2]], [0, 1, 2]


@pytest.fixture
def ece(tmp_path: Path) -> Any:
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path))


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Equal results; the summation order may differ in the last digit."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            same(value, right[key])
        elif isinstance(value, (float, list)) and key != "warnings":
            assert value == pytest.approx(right[key], abs=1e-12), key
        else:
            assert value == right[key], key


def test_load_by_folder_by_file_and_offline(tmp_path: Path) -> None:
    for path in (FOLDER, FOLDER / "ece.py"):
        module = evaluate.load(str(path), cache_dir=str(tmp_path))
        assert module.compute(predictions=CONFIDENCE, references=CORRECT, n_bins=5)["ece"] == pytest.approx(0.2)
    script = f"""
        import evaluate
        module = evaluate.load("first_trl/metrics/ece", cache_dir={str(tmp_path)!r})
        print(module.compute(predictions={CONFIDENCE}, references={CORRECT}, n_bins=5)["ece"])
    """
    run = python(script, HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1", USE_TORCH="0")
    assert float(run.stdout) == pytest.approx(0.2)


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


@pytest.mark.parametrize("options", [{}, {"n_bins": 15, "norm": "l2", "null_test": True, "confidence_interval": 0.9}])
@pytest.mark.parametrize(("predictions", "references"), [(CONFIDENCE, CORRECT), (ROWS, LABELS)])
def test_fast_path_stored_path_and_function_agree(
    ece: Any, predictions: list[Any], references: list[int], options: dict[str, Any]
) -> None:
    want = calibration_report(predictions, references, **options)
    same(ece.compute(predictions=predictions, references=references, **options), want)
    ece.add_batch(predictions=predictions[:2], references=references[:2])
    for prediction, reference in zip(predictions[2:], references[2:], strict=True):
        ece.add(prediction=prediction, reference=reference)
    same(ece.compute(**options), want)
    # And again with the other shape: the features are chosen anew.
    other = (ROWS, LABELS) if predictions is CONFIDENCE else (CONFIDENCE, CORRECT)
    ece.add_batch(predictions=other[0], references=other[1])
    same(ece.compute(), calibration_report(*other))


def test_stored_examples_join_those_of_compute(ece: Any) -> None:
    ece.add_batch(predictions=CONFIDENCE[:3], references=CORRECT[:3])
    result = ece.compute(predictions=CONFIDENCE[3:], references=CORRECT[3:], n_bins=5)
    assert result["n"] == 6 and result["ece"] == pytest.approx(0.2)


@pytest.mark.parametrize("stored", [False, True])
def test_input_kinds(ece: Any, stored: bool) -> None:
    torch = pytest.importorskip("torch")
    values, correct, want = [0.1, 0.2, 0.3, 0.35], [1, 0, 1, 0], 0.5375
    kinds = [
        (values, correct, 1e-12),
        (np.array(values), np.array(correct), 1e-12),
        (np.array(values, np.float32), np.array(correct, np.int32), 2e-8),
        (np.array(values, np.float16), np.array(correct, np.int8), 2**-11),
        (torch.tensor(values, dtype=torch.float64), torch.tensor(correct), 1e-12),
        (torch.tensor(values), torch.tensor(correct), 2e-8),
        (torch.tensor(values, dtype=torch.float16), torch.tensor(correct), 2**-11),
        (torch.tensor(values, dtype=torch.bfloat16), torch.tensor(correct), 2**-8),
    ]
    for predictions, references, tolerance in kinds:
        if stored:
            ece.add_batch(predictions=predictions, references=references)
            result = ece.compute()
        else:
            result = ece.compute(predictions=predictions, references=references)
        assert result["ece"] == pytest.approx(want, abs=tolerance), getattr(predictions, "dtype", list)
    rows = torch.softmax(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), -1).bfloat16()
    labels = torch.arange(50) % 6
    if stored:
        ece.add_batch(predictions=rows, references=labels)
        result = ece.compute()
    else:
        result = ece.compute(predictions=rows, references=labels)
    assert result["ece"] == pytest.approx(expected_calibration_error(rows, labels), abs=1e-12)


def test_pickle_keep_in_memory_and_reuse(tmp_path: Path) -> None:
    module = evaluate.load(str(FOLDER), keep_in_memory=True, cache_dir=str(tmp_path))
    for _ in range(2):
        module.add_batch(predictions=CONFIDENCE, references=CORRECT)
        assert module.compute(n_bins=5)["ece"] == pytest.approx(0.2)
    restored = pickle.loads(pickle.dumps(evaluate.load(str(FOLDER), cache_dir=str(tmp_path))))
    assert restored.compute(predictions=CONFIDENCE, references=CORRECT, n_bins=5)["ece"] == pytest.approx(0.2)


def test_combine_and_save(tmp_path: Path) -> None:
    second = tmp_path / "accuracy01"
    second.mkdir()
    (second / "accuracy01.py").write_text(
        textwrap.dedent(
            '''
            import datasets
            import evaluate


            class Accuracy01(evaluate.Metric):
                """Share of confidences on the right side of one half."""

                def _info(self):
                    features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
                    return evaluate.MetricInfo(
                        description="", citation="", inputs_description="", features=datasets.Features(features)
                    )

                def _compute(self, predictions, references):
                    return {"side": sum((p > 0.5) == r for p, r in zip(predictions, references)) / len(references)}
            '''
        )
    )
    both = evaluate.combine([evaluate.load(str(FOLDER)), evaluate.load(str(second))])
    result = both.compute(predictions=CONFIDENCE, references=CORRECT)
    assert result["side"] == pytest.approx(4 / 6) and result["n"] == 6
    prefixed = evaluate.combine(
        {"a": evaluate.load(str(FOLDER)), "b": evaluate.load(str(FOLDER))}, force_prefix=True
    ).compute(predictions=CONFIDENCE, references=CORRECT)
    assert prefixed["a_ece"] == prefixed["b_ece"]
    path = evaluate.save(str(tmp_path / "results"), **result)
    assert json.loads(Path(path).read_text())["ece"] == result["ece"]


# Quick: batches of one process, in test_properties.py
@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.dirichlet([1, 1, 1], 40), rng.integers(0, 3, 40)
    cases = {"one": (rows.max(1), (labels == rows.argmax(1)).astype(int)), "two": (rows, labels)}
    for name, (predictions, references) in cases.items():
        np.savez(tmp_path / f"{name}.npz", p=predictions, r=references)
    script = """
        import json, sys
        import evaluate, numpy as np
        rank, folder = int(sys.argv[1]), sys.argv[2]
        for name in ("one", "two"):
            data = np.load(f"{folder}/{name}.npz")
            module = evaluate.load(
                "first_trl/metrics/ece", num_process=2, process_id=rank, experiment_id=name, cache_dir=folder
            )
            module.add_batch(predictions=data["p"][rank::2], references=data["r"][rank::2])
            print("RESULT", json.dumps(module.compute()))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(rank), str(tmp_path)],
            cwd=REPOSITORY,
            env={**os.environ, "USE_TORCH": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    main, other = ([json.loads(part) for part in out.split("RESULT")[1:]] for out, _ in outputs)
    assert other == [None, None]
    for found, (predictions, references) in zip(main, cases.values(), strict=True):
        same(found, calibration_report(predictions, references))


@pytest.mark.parametrize("stored", [False, True])
def test_errors_name_the_row(ece: Any, stored: bool) -> None:
    for predictions, references, message in (
        ([0.5, float("nan")], [1, 0], r"row 1 \(nan\)"),
        ([0.5, 0.5], [1, 7], r"references row 1 \(7\)"),
        ([[0.5, 0.2], [0.5, 0.5]], [1, 0], "row 0 .*sums to 0.7"),
    ):
        with pytest.raises(ValueError, match=message):
            if stored:
                ece.add_batch(predictions=predictions, references=references)
                ece.compute()
            else:
                ece.compute(predictions=predictions, references=references)
        # The module can be used again.
        assert ece.compute(predictions=CONFIDENCE, references=CORRECT, n_bins=5)["ece"] == pytest.approx(0.2)


def test_misuse(ece: Any) -> None:
    with pytest.raises(TypeError, match="bins"):
        ece.compute(predictions=CONFIDENCE, references=CORRECT, bins=5)
    with pytest.raises(ValueError, match="references is None"):
        ece.compute(predictions=CONFIDENCE)
    with pytest.raises(ValueError, match="empty"):
        ece.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="6 rows but references have 5"):
        ece.compute(predictions=CONFIDENCE, references=CORRECT[:5])
    with pytest.warns(UserWarning, match="exactly 0 or 1"):
        ece.compute(predictions=[1, 0, 1], references=[1, 1, 0])


def test_plot(ece: Any) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    result = ece.compute(predictions=CONFIDENCE, references=CORRECT)
    figure = ece.plot({"a": result, "b": result}, layout="overlay")
    assert len(figure.axes) == 2


def test_card_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (FOLDER / "README.md").read_text().replace("first_trl/metrics/ece", str(FOLDER))
    card = tmp_path / "README.md"
    card.write_text(text)
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testfile(str(card), module_relative=False)
    assert outcome.attempted >= 15 and outcome.failed == 0
    assert (tmp_path / "reliability.png").stat().st_size > 10_000


def test_card_front_matter_and_arguments() -> None:
    yaml = pytest.importorskip("yaml")
    _, front, body = (FOLDER / "README.md").read_text().split("---\n", 2)
    matter = yaml.safe_load(front)
    assert (
        matter["sdk"] == "gradio" and matter["app_file"] == "app.py" and {"evaluate", "metric"} <= set(matter["tags"])
    )
    import inspect

    options = [p for p in inspect.signature(calibration_report).parameters if p != "sample_weight"]
    assert [option for option in options if f"`{option}`" not in body] == []
    keys = calibration_report(CONFIDENCE, CORRECT)
    assert [key for key in keys if f"`{key}`" not in body] == []


def test_test_cases(ece: Any) -> None:
    spec = importlib.util.spec_from_file_location("ece_tests", FOLDER / "tests.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for case in module.test_cases:
        result = ece.compute(predictions=case["predictions"], references=case["references"], **case["kwargs"])
        for key, value in case["result"].items():
            assert result[key] == pytest.approx(value, abs=1e-12)


def test_correctness_flags_are_no_class_ids(ece: Any) -> None:
    rows, flags = np.array([[0.9, 0.1], [0.2, 0.8]]), [True, False]
    for given in (flags, np.array(flags), [1, False]):
        with pytest.raises(ValueError, match=r"row \d is a boolean"):
            ece.compute(predictions=rows, references=given)
        with pytest.raises(ValueError, match=r"row \d is a boolean"):
            ece.add_batch(predictions=rows, references=given)
    with pytest.raises(ValueError, match="row 0 is a boolean"):
        ece.add(prediction=rows[0], reference=True)
    ece.add_batch(predictions=[0.9, 0.8], references=flags)
    ece.add(prediction=0.7, reference=True)
    assert ece.compute()["accuracy"] == pytest.approx(2 / 3)


def test_batches_are_checked_before_they_are_stored(ece: Any) -> None:
    torch, pandas = pytest.importorskip("torch"), pytest.importorskip("pandas")
    for references, message in (
        ([1.0, 0.4], "references row 1 is 0.4"),
        ([1.0, float("nan")], "references row 1 is nan"),
        (np.ma.masked_array([1, 0], [False, True]), "references row 1 is masked"),
        (["1", "0"], "row 0 is '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            ece.add_batch(predictions=[0.9, 0.8], references=references)
        assert ece.compute(predictions=CONFIDENCE, references=CORRECT)["n"] == len(CORRECT)
    with pytest.raises(ValueError, match=r"references row 0 is 0\.4"):
        ece.add(prediction=0.9, reference=0.4)
    ece.add_batch(predictions=pandas.Series([0.9, 0.8], index=[7, 8]), references=pandas.Series([1, 0]))
    assert ece.compute()["accuracy"] == 0.5
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)).bfloat16()
    for value in values:
        ece.add(prediction=value, reference=1)
    assert ece.compute()["ece"] == pytest.approx(expected_calibration_error(values, [1] * 100), abs=1e-12)
