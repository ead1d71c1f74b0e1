"""Confidence definitions, and readers of harness logs, generation scores and tables."""

import argparse
import gzip
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from first_trl import expected_calibration_error
from first_trl.cli import calibrate
from first_trl.evaluation.confidence import Confidences, choice_scores, sequence_confidence
from first_trl.evaluation.predictions import MultipleChoiceResult, multiple_choice_report
from first_trl.evaluation.readers import (
    add_ece_to_harness_task,
    generated_token_logprobs,
    read_confidences,
    read_harness_log,
    read_harness_results,
    read_table,
    token_confidences,
    vllm_prompt_token_confidences,
    vllm_token_logprobs,
)
from tests.conftest import DATA


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")


# --- definitions -------------------------------------------------------------------------------------------------------


def test_letters_that_hold_half_the_vocabulary():
    lp = np.log([0.30, 0.10, 0.06, 0.04])
    np.testing.assert_allclose(choice_scores(lp, definition="choice"), [0.30, 0.10, 0.06, 0.04], rtol=1e-12)
    np.testing.assert_allclose(choice_scores(lp), [0.60, 0.20, 0.12, 0.08], rtol=1e-12)
    np.testing.assert_allclose(choice_scores(lp, definition="topk"), [0.60, 0.20, 0.12, 0.08], rtol=1e-12)


def test_length_normalisation_changes_the_answer():
    summed = choice_scores([-2.0, -3.0])
    divided = choice_scores([-2.0, -3.0], definition="length_normalized", lengths=[4, 10])
    np.testing.assert_allclose(summed, [0.731, 0.269], atol=5e-4)
    np.testing.assert_allclose(divided, [0.450, 0.550], atol=5e-4)
    assert summed.argmax() == 0 and divided.argmax() == 1


def test_unconditional_correction():
    scores = choice_scores([-2.0, -3.0], definition="unconditional", unconditional=[-1.0, -4.0])
    np.testing.assert_allclose(scores, np.exp([-1.0, 1.0]) / np.exp([-1.0, 1.0]).sum(), rtol=1e-12)


def test_very_unlikely_strings_do_not_underflow():
    np.testing.assert_allclose(choice_scores([-2000.0, -2001.0]), choice_scores([-1.0, -2.0]), rtol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"definition": "verbalised"}, "Unknown confidence definition"),
        ({"definition": "length_normalized"}, "needs `lengths`"),
        ({"definition": "length_normalized", "lengths": [1, 0]}, "above 0"),
        ({"definition": "length_normalized", "lengths": [1]}, "each of the 2 choices"),
        ({"definition": "unconditional"}, "needs `unconditional`"),
        ({"definition": "unconditional", "unconditional": [-1.0]}, "1 entries for 2 choices"),
        ({"logprobs": [-1.0, 0.5]}, "entry 1 is 0.5"),
        ({"logprobs": [-1.0, math.nan]}, "entry 1 is nan"),
        ({"logprobs": []}, "non-empty"),
        ({"logprobs": [-math.inf, -math.inf]}, "nothing to renormalise"),
        ({"logprobs": [-3.0, -1.0], "definition": "topk"}, "sorted to fall"),
    ],
)
def test_bad_choice_scores_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        choice_scores(**{"logprobs": [-1.0, -2.0], **kwargs})


def test_sequence_reductions():
    rows = [np.log([0.5, 0.5]), np.log([0.9, 0.1, 0.9])]
    np.testing.assert_allclose(sequence_confidence(rows), [0.25, 0.081])
    np.testing.assert_allclose(sequence_confidence(rows, reduction="geometric_mean"), [0.5, 0.081 ** (1 / 3)])
    np.testing.assert_allclose(sequence_confidence(rows, reduction="min"), [0.5, 0.1])
    with pytest.raises(ValueError, match="Unknown reduction"):
        sequence_confidence(rows, reduction="max")
    with pytest.raises(ValueError, match=r"token_logprobs\[0\]"):
        sequence_confidence([[]])


# --- harness -----------------------------------------------------------------------------------------------------------

# (question's log-likelihoods, unconditional ones, choices, gold)
DOCS = [
    ([-1.2, -0.3, -2.0, -4.0], [-3.0, -0.2, -2.5, -4.5], ["lime", "salt", "iron ore", "gas"], 1),
    ([-5.0, -4.0, -6.5], [-5.5, -6.0, -6.0], ["a long answer", "no", "maybe"], 0),
    ([-0.1, -3.0, -3.5, -4.0, -9.0], [-1.0, -1.0, -1.0, -1.0, -9.5], ["x", "yy", "zzz", "ü", "w"], 0),
    ([-2.0, -2.5], [-2.0, -3.0], ["left", "right"], 1),
]


def sample(i, doc, *, log=True, mutual=False, filter_name="none", target=None, scale=1.0, metrics=True):
    lls, unconditional, choices, gold = doc
    lls = [scale * value for value in lls]
    requests = [(f"Question {i}\nAnswer:", f" {choice}") for choice in choices]
    values = list(lls)
    if mutual:
        requests += [("", f" {choice}") for choice in choices]
        values += unconditional
    target = gold if target is None else target
    row = {
        "doc_id": i,
        "doc": {"gold": gold},
        "target": str(target) if log else target,
        "filter": filter_name,
        "metrics": [],
    }
    if log:
        row["arguments"] = {f"gen_args_{j}": {"arg_0": c, "arg_1": t} for j, (c, t) in enumerate(requests)}
        row["resps"] = [[[str(v), "False"]] for v in values]
        row["filtered_resps"] = [[str(v), "False"] for v in values]
    else:
        row["arguments"] = requests
        row["resps"] = [[(v, False)] for v in values]
        row["filtered_resps"] = [(v, False) for v in values]
    if metrics:
        scores = {
            "acc": lls,
            "acc_norm": [v / len(c) for v, c in zip(lls, choices, strict=True)],
            "acc_bytes": [v / len(c.encode()) for v, c in zip(lls, choices, strict=True)],
        }
        if mutual:
            scores["acc_mutual_info"] = [a - b for a, b in zip(lls, unconditional, strict=True)]
        row |= {name: float(np.argmax(s) == gold) for name, s in scores.items()}
        row["metrics"] = list(scores)
    return row


def write_log(tmp_path, rows, name="samples_my_task_2026-01-31T12-00-00.123456.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def softmax(values):
    e = np.exp(np.array(values) - max(values))
    return e / e.sum()


def test_log_with_strings_ragged_choices_and_all_readings(tmp_path):
    path = write_log(tmp_path, [sample(i, doc, mutual=True) for i, doc in enumerate(DOCS)])
    (samples,) = read_harness_log(path)
    assert samples.task == "my_task" and len(samples) == 4
    assert samples.readings == ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"]
    expected = {
        "acc": [softmax(lls) for lls, _, _, _ in DOCS],
        "acc_norm": [softmax([v / len(c) for v, c in zip(lls, cs, strict=True)]) for lls, _, cs, _ in DOCS],
        "acc_bytes": [softmax([v / len(c.encode()) for v, c in zip(lls, cs, strict=True)]) for lls, _, cs, _ in DOCS],
        "acc_mutual_info": [softmax([a - b for a, b in zip(lls, u, strict=True)]) for lls, u, _, _ in DOCS],
    }
    for reading, rows in expected.items():
        result = samples.confidences(reading)
        np.testing.assert_allclose(result.confidence, [row.max() for row in rows], rtol=1e-12)
        correct = [row.argmax() == gold for row, (_, _, _, gold) in zip(rows, DOCS, strict=True)]
        assert result.correct.tolist() == correct
        nll = -np.mean([math.log(row[gold]) for row, (_, _, _, gold) in zip(rows, DOCS, strict=True)])
        assert result.extras["nll"] == pytest.approx(nll, rel=1e-12)
        brier = np.mean(
            [np.square(row - np.eye(len(row))[gold]).sum() for row, (_, _, _, gold) in zip(rows, DOCS, strict=True)]
        )
        assert result.extras["brier"] == pytest.approx(brier, rel=1e-12)
        assert result.report()["ece"] == pytest.approx(
            expected_calibration_error([row.max() for row in rows], np.array(correct).astype(int)), abs=1e-15
        )
    raw = samples.confidences("acc", definition="choice")
    np.testing.assert_allclose(raw.confidence, [math.exp(max(lls)) for lls, _, _, _ in DOCS], rtol=1e-12)
    assert "brier" not in raw.extras


@pytest.mark.parametrize(("context", "delimiter"), [("", ""), ("", " "), ("Answer:", " ")])
def test_choices_without_the_question_are_no_further_choices(tmp_path, context, delimiter):
    """Older versions of the harness log them without the delimiter, and a task may put a context of its own there."""
    rows = [sample(i, doc, mutual=True) for i, doc in enumerate(DOCS)]
    (want,) = read_harness_log(write_log(tmp_path, rows))
    for row, (_, _, choices, _) in zip(rows, DOCS, strict=True):
        for j, choice in enumerate(choices, start=len(choices)):
            row["arguments"][f"gen_args_{j}"] = {"arg_0": context, "arg_1": delimiter + choice}
    (found,) = read_harness_log(write_log(tmp_path, rows))
    for reading in want.readings:
        np.testing.assert_array_equal(found.confidences(reading).confidence, want.confidences(reading).confidence)


def test_log_equals_the_results_in_process(tmp_path):
    docs = [sample(i, doc, log=False) for i, doc in enumerate(DOCS)]
    in_process = read_harness_results({"samples": {"my_task": docs}})["my_task"][0].confidences("acc")
    (logged,) = read_harness_log(write_log(tmp_path, [sample(i, doc) for i, doc in enumerate(DOCS)]))
    result = logged.confidences("acc")
    np.testing.assert_array_equal(result.confidence, in_process.confidence)
    np.testing.assert_array_equal(result.correct, in_process.correct)


def test_filters_are_kept_apart(tmp_path):
    rows = [sample(i, doc, filter_name="a") for i, doc in enumerate(DOCS)]
    rows += [sample(i, doc, filter_name="b", scale=2.0) for i, doc in enumerate(DOCS)]
    path = write_log(tmp_path, rows)
    one, two = read_harness_log(path)
    assert (one.filter, two.filter) == ("a", "b")
    assert one.confidences().name == "my_task (a) acc"
    assert (two.confidences().confidence > one.confidences().confidence).all()
    (only,) = read_harness_log(path, filter="b")
    assert only.filter == "b"
    with pytest.raises(ValueError, match=r"no filter 'c'; it has \['a', 'b'\]"):
        read_harness_log(path, filter="c")


def test_targets_as_text_list_or_ambiguous_digit(tmp_path):
    text = [sample(i, doc, target=doc[2][doc[3]]) for i, doc in enumerate(DOCS)]
    (samples,) = read_harness_log(write_log(tmp_path, text))
    assert samples.gold == [[1], [0], [0], [1]]
    several = [sample(0, DOCS[0], target=[1, 2]), sample(1, DOCS[2], target=[0])]
    (samples,) = read_harness_log(write_log(tmp_path, several))
    assert samples.gold == [[1, 2], [0]]
    assert "nll" not in samples.confidences().extras
    # The choices are digits: "1" is index 1 or the first choice. The logged accuracy tells.
    digits = [([-0.1, -2.0, -3.0], [0, 0, 0], ["1", "2", "3"], 0), ([-2.0, -0.1, -3.0], [0, 0, 0], ["1", "2", "3"], 1)]
    as_text = [sample(i, doc, target=doc[2][doc[3]]) for i, doc in enumerate(digits)]
    (samples,) = read_harness_log(write_log(tmp_path, as_text))
    assert samples.gold == [[0], [1]]
    as_index = [sample(i, doc) for i, doc in enumerate(digits)]
    (samples,) = read_harness_log(write_log(tmp_path, as_index))
    assert samples.gold == [[0], [1]]
    for row in as_text:
        del row["acc"]
    with pytest.raises(ValueError, match="indices and texts of the choices at once"):
        read_harness_log(write_log(tmp_path, as_text))


def test_shared_continuation_takes_its_answer_from_the_accuracy(tmp_path):
    rows = []
    for i, (lls, acc) in enumerate([([-3.0, -4.0], 1.0), ([-3.0, -4.0], 0.0)]):
        row = sample(i, (lls, [0, 0], ["a", "b"], 0), metrics=False, target="was heavy")
        row["arguments"] = {f"gen_args_{j}": {"arg_0": f"The {n}", "arg_1": " was heavy"} for j, n in enumerate("ab")}
        rows.append(row | {"acc": acc, "metrics": ["acc"]})
    (samples,) = read_harness_log(write_log(tmp_path, rows))
    assert samples.confidences().correct.tolist() == [True, False]
    with pytest.raises(ValueError, match="same continuation"):
        samples.confidences("acc_norm")


def test_another_delimiter_is_noticed_by_the_logged_accuracy(tmp_path):
    # Without its delimiter the second choice has 2 characters, with it 3: the best choice per character changes.
    row = sample(0, ([-2.2, -3.0], [0, 0], ["abcd", "ef"], 0), metrics=False)
    row["arguments"] = {
        f"gen_args_{j}": {"arg_0": "Q", "arg_1": f"{d}{t}"} for j, (d, t) in enumerate([("", "abcd"), ("", " ef")])
    }
    row |= {"acc_norm": 0.0, "metrics": ["acc_norm"]}
    (samples,) = read_harness_log(write_log(tmp_path, [row | {"target": "1"}]))
    with pytest.raises(ValueError, match="the log says acc_norm"):
        (read_harness_log(write_log(tmp_path, [row | {"target": "0"}]))[0]).confidences("acc_norm")
    assert not samples.confidences("acc_norm", target_delimiter="").correct[0]


@pytest.mark.parametrize(("delimiter", "chat"), [("", False), ("\n", False), (" ", True), (" ", False)])
def test_the_delimiter_is_the_one_that_the_harness_tells_of(tmp_path, delimiter, chat):
    """Where the most likely choice is the same with another one, nothing else tells."""
    task, time = "arc_easy", "2026-01-31T12-00-00.000000"
    row = sample(0, ([-1.0, -30.0], [0, 0], [" abcd", " ef"], 0), metrics=False) | {"target": "0", "acc_norm": 1.0}
    texts = [f"{'' if chat else delimiter}{choice}" for choice in (" abcd", " ef")]
    row["arguments"] = {f"gen_args_{j}": {"arg_0": "Q", "arg_1": text} for j, text in enumerate(texts)}
    results = {"configs": {task: {"target_delimiter": delimiter}}, "chat_template": "{{ messages }}" if chat else None}
    results["lm_eval_version"] = "0.4.9"
    log = tmp_path / f"samples_{task}_{time}.jsonl"
    log.write_text(json.dumps(row) + "\n")
    (tmp_path / f"results_{time}.json").write_text(json.dumps(results))
    right = choice_scores([-1.0, -30.0], definition="length_normalized", lengths=[5, 3])[0]
    (from_log,) = read_confidences(log, reading="acc_norm")
    (in_process,) = read_harness_results({**results, "samples": {task: [row]}})[task]
    assert from_log.confidence.tolist() == in_process.confidences("acc_norm").confidence.tolist() == [right]


@pytest.mark.parametrize("kept", [True, False])
def test_a_chat_template_of_an_old_harness_leaves_the_delimiter(kept):
    """lm-eval 0.4.3 to 0.4.5 scored `" abcd"` in a chat too and 0.4.6 to 0.4.8 `"abcd"`; neither logs its version."""
    row = sample(0, ([-1.0, -30.0], [0, 0], ["abcd", "ef"], 0), metrics=False) | {"target": "0", "acc_norm": 1.0}
    texts = [f"{' ' if kept else ''}{choice}" for choice in ("abcd", "ef")]
    row["arguments"] = {f"gen_args_{j}": {"arg_0": "Q", "arg_1": text} for j, text in enumerate(texts)}
    results = {"configs": {"arc_easy": {"target_delimiter": " "}}, "chat_template": "{{ messages }}"}
    (samples,) = read_harness_results({**results, "samples": {"arc_easy": [row]}})["arc_easy"]
    right = choice_scores([-1.0, -30.0], definition="length_normalized", lengths=[4, 2])[0]
    assert samples.confidences("acc_norm").confidence.tolist() == [right]


def broken(change):
    row = sample(0, DOCS[0])
    change(row)
    return [row]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (broken(lambda r: r.update(filtered_resps=[["nan", "False"]] * 4)), "log-likelihood of choice 0 is nan"),
        (broken(lambda r: r.update(filtered_resps=[["0.5", "False"]] * 4)), "choice 0 is 0.5"),
        (broken(lambda r: r.update(filtered_resps=["The answer is B"])), "Only multiple-choice"),
        (broken(lambda r: r.update(filtered_resps=[])), "no responses"),
        (broken(lambda r: r.update(arguments={})), "0 requests but 4 responses"),
        (broken(lambda r: r.update(target="9")), "neither an index nor one of the choices"),
        (broken(lambda r: r.update(target="None")), "neither an index"),
        (broken(lambda r: r.update(acc=0.0)), "disagree with the accuracy"),
        (broken(lambda r: r.update(acc=0.37)), "acc = 0.37 is neither 0 nor 1"),
        ([sample(0, DOCS[0]), sample(0, DOCS[0])], "doc 0 was already read"),
        ([{"doc_id": 0}], "no sample of lm-evaluation-harness"),
    ],
)
def test_broken_logs_are_refused(tmp_path, rows, match):
    with pytest.raises(ValueError, match=match):
        read_harness_log(write_log(tmp_path, rows))


def test_a_log_may_be_one_list(tmp_path):
    rows = [sample(i, doc) for i, doc in enumerate(DOCS)]
    (lines,) = read_confidences(write_log(tmp_path, rows))[:1]
    for name in ("samples_my_task_2026-01-31T12-00-00.123456.jsonl", "own.json"):
        path = tmp_path / name
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
        (listed,) = read_confidences(path)[:1]
        np.testing.assert_array_equal(listed.confidence, lines.confidence)
        np.testing.assert_array_equal(listed.correct, lines.correct)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("accs", [[1, 1, 1], [1, 0, 1]])
def test_one_request_a_document_is_no_choice(tmp_path, taken, accs):
    rows = [
        {
            "doc_id": i,
            "target": " lantern",
            "arguments": {"gen_args_0": {"arg_0": "She lit the", "arg_1": " lantern"}},
            "filtered_resps": ["-2.3", str(bool(acc))] if taken else [["-2.3", str(bool(acc))]],
            "metrics": ["perplexity", "acc"],
            "perplexity": -2.3,
            "acc": acc,
        }
        for i, acc in enumerate(accs)
    ]
    with pytest.raises(ValueError, match=r"sample 1: one request a document, as LAMBADA .*is not logged"):
        read_confidences(write_log(tmp_path, rows))


def test_results_without_samples_are_refused():
    with pytest.raises(ValueError, match="log_samples=True"):
        read_harness_results({"results": {}})
    (samples,) = read_harness_results({"samples": {"t": [sample(0, DOCS[0], log=False)]}})["t"]
    with pytest.raises(ValueError, match="needs `unconditional`"):
        samples.confidences("acc_mutual_info")
    with pytest.raises(ValueError, match="Unknown reading"):
        samples.confidences("f1")


def test_harness_task_functions_compute_the_ece(tmp_path):
    base = tmp_path / "my_task.yaml"
    base.write_text("task: my_task\noutput_type: multiple_choice\n")
    path = add_ece_to_harness_task(base, gold='doc["gold"]', n_bins=7)
    assert path.name == "my_task_ece.yaml"
    text = path.read_text()
    assert "include: my_task.yaml" in text and "!function my_task_ece_calibration.process_results" in text
    namespace: dict = {}
    exec((tmp_path / "my_task_ece_calibration.py").read_text(), namespace)
    results = [namespace["process_results"]({"gold": gold}, [(v, False) for v in lls]) for lls, _, _, gold in DOCS]
    expected = expected_calibration_error(
        [max(softmax(lls)) for lls, _, _, _ in DOCS], [int(np.argmax(lls) == g) for lls, _, _, g in DOCS], n_bins=7
    )
    assert namespace["ece"]([r["ece"] for r in results]) == pytest.approx(expected, abs=1e-15)
    assert [r["acc"] for r in results] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="no task file"):
        add_ece_to_harness_task(tmp_path / "none.yaml", gold="0")
    with pytest.raises(ValueError, match="Python expression"):
        add_ece_to_harness_task(base, gold="doc[")
    with pytest.raises(ValueError, match="task name"):
        add_ece_to_harness_task(base, gold="0", task="my-task")


# --- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_tables(tmp_path, ending):
    confidence, correct = [0.25, 0.25, 0.55, 0.75, 0.75], [0, 0, 1, 1, 1]
    path = tmp_path / f"model.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"confidence": confidence, "correct": [bool(c) for c in correct]}), path)
    else:
        if "csv" in ending:
            lines = ["correct,confidence", *[f"{c},{p}" for p, c in zip(confidence, correct, strict=True)]]
        else:
            lines = [
                json.dumps({"confidence": p, "correct": bool(c)}) for p, c in zip(confidence, correct, strict=True)
            ]
        with gzip.open(path, "wt") if ending.endswith("gz") else open(path, "w") as file:
            file.write("\n".join(lines) + "\n")
    (result,) = read_confidences(path)
    assert result.name == "model"
    assert result.report(n_bins=2)["ece"] == pytest.approx(0.29, abs=1e-12)


def test_table_with_words_as_outcome(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("p,grade\n0.9,Correct\n0.4,Wrong\n0,Unparseable\n")
    result = read_table(path, confidence_column="p", correct_column="grade", correct_value="Correct")
    assert result.correct.tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"row 1 \(line 2\): 'grade' is 'Correct', neither 0/1"):
        read_table(path, confidence_column="p", correct_column="grade")
    with pytest.raises(ValueError, match="no row has grade = 'right'"):
        read_table(path, confidence_column="p", correct_column="grade", correct_value="right")


@pytest.mark.parametrize("written", ["Yes", "YES", "ye\u017f", "\uff59es"])
def test_an_outcome_written_in_two_ways_is_not_taken_for_wrong(tmp_path, written):
    path = tmp_path / "m.csv"
    path.write_text(f"confidence,correct\n0.9,yes\n0.4,no\n0.8,{written}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 3 \(line 4\): 'correct' is .*'yes' but for case"):
        read_table(path, correct_value="yes")


def test_a_number_is_right_however_it_is_written(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"confidence": 0.9, "correct": {each}}}\n' for each in ("2", "2.0", "1")))
    assert read_table(path, correct_value="2").correct.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("confidence,correct\n", "has no rows"),
        ("confidence,correct\n0.5,1\nnan,0\n", r"row 2 \(line 3\): the confidence is 'nan'"),
        ("confidence,correct\n1.5,1\n", r"row 1 \(line 2\): the confidence is '1.5'"),
        ("confidence,correct\nhigh,1\n", r"row 1 \(line 2\): the confidence is 'high'"),
        ("confidence,correct\n0.5,2\n", r"row 1 \(line 2\): 'correct' is '2'"),
        ("confidence,correct\n0.5,\n", r"row 1 \(line 2\): 'correct' is empty"),
        ("confidence,correct\n0.5\n", r"row 1 \(line 2\) has \d cells? under 2 columns"),
        ("confidence,correct\n0.5,1,3\n", r"row 1 \(line 2\) has \d cells? under 2 columns"),
        ("prob,correct\n0.5,1\n", "no column 'confidence'"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, match):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_confidences(path)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        read_confidences(tmp_path / "none.csv")
    (tmp_path / "m.txt").write_text("0.5")
    with pytest.raises(ValueError, match="must end in"):
        read_confidences(tmp_path / "m.txt")
    (tmp_path / "m.jsonl").write_text('{"confidence": 0.5\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_confidences(tmp_path / "m.jsonl")
    (tmp_path / "m.csv").write_text("confidence,correct\n0.5,1\n")
    with pytest.raises(ValueError, match="neither readings nor filters"):
        read_confidences(tmp_path / "m.csv", reading="acc")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
@pytest.mark.parametrize("model", ["falcon-7b", "gpt-4-turbo"])
def test_published_language_model_confidences(model):
    (result,) = read_confidences(
        DATA / "llm_confidence" / f"{model}.csv.gz", correct_column="grade", correct_value="Correct"
    )
    expected = {"falcon-7b": (0.081798, 0.3190), "gpt-4-turbo": (0.111126, 0.8575)}[model]
    report = result.report()
    assert report["n"] == 42814
    assert report["ece"] == pytest.approx(expected[0], abs=1e-6)
    assert report["accuracy"] == pytest.approx(expected[1], abs=5e-5)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_own_predictions(tmp_path, ending):
    rng = np.random.default_rng(0)
    logprobs = np.log(rng.dirichlet(np.ones(6), size=50))[:, :4]
    gold = np.where(np.arange(50) < 45, rng.integers(4, size=50), -1)
    tokens = np.tile([3, 4, 5, 6], (50, 1))
    predictions = {
        "id": np.array([f"q{i}" for i in range(50)]),
        "gold": gold,
        "n_choices": np.full(50, 4),
        "choice_tokens": tokens,
        "choice_logprobs": logprobs,
        "option_mass": np.exp(logprobs).sum(1),
        "answer": logprobs.argmax(1),
        "top_token": 3 + logprobs.argmax(1),
        "top_prob": np.exp(logprobs.max(1)),
        "top_is_gold": logprobs.argmax(1) == gold,
        "gold_logprob": np.where(gold >= 0, logprobs[np.arange(50), gold], np.nan),
        "sum_squares": np.square(np.exp(logprobs)).sum(1),
        "truncated": np.zeros(50, dtype=bool),
    }
    result = MultipleChoiceResult(predictions, multiple_choice_report(predictions))
    path = tmp_path / f"test.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(result.to_rows()), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in result.to_rows()))
    full, options = read_confidences(path)
    assert (full.name, options.name) == ("test full_vocab", "test renormalized")
    for view, read in (("full_vocab", full), ("options", options)):
        report = read.report()
        for key in ("accuracy", "ece"):
            assert report[key] == pytest.approx(result.report[view][key], abs=1e-12)
        assert report["extras"]["nll"] == pytest.approx(result.report[view]["nll"], abs=1e-12)
        assert report["extras"]["option_mass"] == pytest.approx(result.report["option_mass"], abs=1e-12)
        assert report["dropped"] == {"without a gold answer": 5}
    (choice,) = read_confidences(path, reading="choice")
    np.testing.assert_allclose(choice.confidence, np.exp(logprobs.max(1))[:45])
    assert choice.correct.tolist() == (logprobs.argmax(1) == gold)[:45].tolist()
    with pytest.raises(ValueError, match="Unknown definition 'acc'"):
        read_confidences(path, reading="acc")
    with pytest.raises(ValueError, match="no 'topk_mass'"):
        read_confidences(path, reading="topk")
    # A column that is named comes before what the file looks like
    (own,) = read_confidences(path, confidence_column="option_mass", correct_column="top_is_gold")
    np.testing.assert_allclose(own.confidence, result.predictions["option_mass"])
    assert own.definition == "column 'option_mass'"
    for option in ("filter", "target_delimiter"):
        with pytest.raises(ValueError, match="is no log of lm-evaluation-harness"):
            read_confidences(path, **{option: "none"})


@pytest.mark.parametrize(
    ("probabilities", "gold", "match"),
    [
        ([0.3, 0.7], [1, 1], r"row 2 \(line 2\): 'gold' adds up to 2"),
        ([0.3, 0.5], [1, 0], r"row 2 \(line 2\): 'probabilities' adds up to 0.8"),
        ([0.3, 0.7], 1, r"row 2 \(line 2\): 'gold' must be a list"),
        ([0.3, 0.7], [1, 0, 0], r"row 2 \(line 2\): 2 probabilities and a gold over 3 options"),
    ],
)
def test_options_that_are_no_distribution_are_refused(tmp_path, probabilities, gold, match):
    rows = [{"options": ["a", "b"], "probabilities": [0.9, 0.1], "gold": [1.0, 0.0]}]
    rows += [{"options": ["a", "b"], "probabilities": probabilities, "gold": gold}]
    with pytest.raises(ValueError, match=match):
        read_confidences(write_log(tmp_path, rows, "predictions.jsonl"))


@pytest.mark.parametrize("gold", [True, None, 2, 0.0, "0"])
def test_the_gold_of_a_prediction_is_an_index(gold):
    row = {
        "id": "1", "gold": 0, "n_choices": 2, "choice_logprobs": [-0.1, -2.4], "option_mass": 1.0, "top_prob": 0.9,
        "top_is_gold": True, "gold_logprob": -0.1, "sum_squares": 0.82, "truncated": False,
    }  # fmt: skip
    assert MultipleChoiceResult.from_rows([row, row]).report["n"] == 2
    with pytest.raises(ValueError, match=r"Prediction 1: gold is .*index of the right one of 2 choices"):
        MultipleChoiceResult.from_rows([row, row | {"gold": gold}])


# --- generation --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.6, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[1, 5, 7], [1, 6, 2]])
    output = model.generate(
        prompt, do_sample=True, temperature=0.7, max_new_tokens=5, output_logits=True, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return model, output


def test_generated_tokens_get_the_probability_of_the_model(generated):
    model, output = generated
    rows = generated_token_logprobs(output)
    with torch.no_grad():
        lp = model(output.sequences).logits.log_softmax(-1)
    expected = lp[:, 2:-1].gather(-1, output.sequences[:, 3:, None])[..., 0].numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    tempered = generated_token_logprobs(SimpleNamespace(sequences=output.sequences, scores=output.scores))
    assert np.abs(np.array(tempered) - expected).max() > 0.01


def test_generation_ends_at_the_end_token(generated):
    _, output = generated
    end = int(output.sequences[0, 4])
    rows = generated_token_logprobs(output, end_ids=[end])
    first = output.sequences[0, 3:].tolist().index(end)
    assert len(rows[0]) == first + 1
    with pytest.raises(ValueError, match="output_logits=True"):
        generated_token_logprobs(SimpleNamespace(sequences=output.sequences))
    with pytest.raises(ValueError, match="Beam search"):
        generated_token_logprobs(
            SimpleNamespace(sequences=output.sequences, logits=output.logits, beam_indices=torch.zeros(1))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_level_confidences(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(2, 6, 9) * 2).to(dtype)
    labels = torch.randint(9, (2, 6))
    labels[0, :2] = -100
    result = token_confidences(logits, labels)
    p = logits.double().softmax(-1)
    kept = labels != -100
    np.testing.assert_allclose(result.confidence, p.max(-1).values[kept].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(result.correct, (p.argmax(-1) == labels)[kept].numpy())
    assert result.extras["nll"] == pytest.approx(
        float(-p.log().gather(-1, labels.clamp_min(0)[..., None])[..., 0][kept].mean())
    )
    assert result.dropped == {"label -100": 2}
    with pytest.raises(ValueError, match="do not fit together"):
        token_confidences(logits, labels[:, 1:])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        token_confidences(logits, labels + 5 * (labels != -100))
    with pytest.raises(ValueError, match="no row to score"):
        token_confidences(logits, torch.full_like(labels, -100))
    logits[1, 3, 0] = math.nan
    with pytest.raises(ValueError, match="position 7 hold NaN"):
        token_confidences(logits, labels)


def test_vllm_outputs():
    entry = SimpleNamespace
    completion = entry(
        token_ids=[4, 2], logprobs=[{4: entry(logprob=-0.1)}, {7: entry(logprob=-0.2), 2: entry(logprob=-1.7)}]
    )
    np.testing.assert_allclose(vllm_token_logprobs([completion]), [[-0.1, -1.7]])
    request = entry(
        prompt_token_ids=[1, 4, 2],
        prompt_logprobs=[None, {4: entry(logprob=-0.1)}, {7: entry(logprob=-0.2), 2: entry(logprob=-1.7)}],
    )
    result = vllm_prompt_token_confidences([request])
    np.testing.assert_allclose(result.confidence, np.exp([-0.1, -0.2]))
    assert result.correct.tolist() == [True, False]
    assert result.extras["nll"] == pytest.approx(0.9)
    assert len(vllm_prompt_token_confidences([request], start=2).confidence) == 1
    with pytest.raises(ValueError, match="`start`"):
        vllm_prompt_token_confidences([request], start=0)
    with pytest.raises(ValueError, match="prompt_logprobs=1"):
        vllm_prompt_token_confidences([entry(prompt_token_ids=[1], prompt_logprobs=None)])
    with pytest.raises(ValueError, match="logprobs=1"):
        vllm_token_logprobs([entry(token_ids=[1], logprobs=None)])
    with pytest.raises(ValueError, match="id 3 is not among"):
        vllm_token_logprobs([entry(token_ids=[3], logprobs=[{4: entry(logprob=-0.1)}])])


def test_confidences_check_themselves():
    with pytest.raises(ValueError, match="do not fit together"):
        Confidences("m", np.zeros(3), np.zeros(2, dtype=bool), "full_vocab")
    with pytest.raises(ValueError, match="no row to score"):
        Confidences("m", np.zeros(0), np.zeros(0, dtype=bool), "full_vocab")


# --- the command -------------------------------------------------------------------------------------------------------


def run_calibrate(*argv):
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    return calibrate.main(parser.parse_args([str(a) for a in argv]))


def test_calibrate_command(tmp_path, capsys):
    log = write_log(tmp_path, [sample(i, doc, mutual=True) for i, doc in enumerate(DOCS)])
    table = tmp_path / "table.csv"
    rng = np.random.default_rng(0)
    p = rng.random(1000)
    y = rng.random(1000) < p**2
    table.write_text("confidence,correct\n" + "".join(f"{a!r},{int(b)}\n" for a, b in zip(p.tolist(), y, strict=True)))
    assert run_calibrate(log, table, "--output-dir", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report) == {f"my_task {m}" for m in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")} | {"table"}
    expected = expected_calibration_error(p, y.astype(int))
    assert report["table"]["ece"] == pytest.approx(expected, abs=1e-12)
    assert f"{expected:.6f}" in printed and "10 bins, strategy width" in printed
    assert "caution: 4 examples" in printed
    assert report["table"]["p_value"] < 0.05 and report["table"]["ci_low"] < expected < report["table"]["ci_high"]
    assert (tmp_path / "out" / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_calibrate_command_options(tmp_path, capsys):
    log = write_log(tmp_path, [sample(i, doc) for i, doc in enumerate(DOCS)])
    options = ["--reading", "acc_norm", "--bins", "5", "--resamples", "0", "--output-dir", tmp_path / "out"]
    assert run_calibrate(log, *options) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report) == ["my_task acc_norm"]
    assert report["my_task acc_norm"]["config"]["n_bins"] == 5
    with pytest.raises(ValueError, match="given twice"):
        run_calibrate(log, log, *options)
    (tmp_path / "other").mkdir()
    second = write_log(tmp_path / "other", [sample(i, doc, scale=2.0) for i, doc in enumerate(DOCS)])
    run_calibrate(log, second, *options)
    names = [f"{folder}/my_task acc_norm" for folder in (tmp_path.name, "other")]
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())) == names
    capsys.readouterr()


def test_calibrate_reads_tables_without_torch():
    import subprocess

    code = (
        "import sys, first_trl.cli.calibrate\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
