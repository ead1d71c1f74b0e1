"""Orders of options: in training rows, and what answers owe to them."""

import json
import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.decision import DecisionConfig

from first_trl import add_option_probs
from first_trl.cli import main
from first_trl.evaluation.decisions import predict_decisions
from first_trl.evaluation.option_order import evaluate_decision_order, evaluate_option_order, option_order_scores
from first_trl.inference import AnswerPipeline
from first_trl.tasks import get_task
from first_trl.tasks.option_orders import option_orders
from first_trl.tasks.system_one import DecisionQuestion
from first_trl.tasks.word_tokenizer import word_tokenizer
from tests.support.tiny import tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")
THINGS = ["cork", "anvil", "brick", "feather"]
WORDS = ["Which", "floats", "?", "Answer", "Choices", ":", "Answer:", "Choices:", *THINGS]
WORDS += [f"({letter})" for letter in "ABCD"] + list("ABCD") + [f"item{i}" for i in range(40)]


def test_orders_are_different_seeded_and_balanced():
    for n_options, n_orders in ((2, 2), (3, 6), (3, 99), (4, 8), (5, 11), (26, 30)):
        orders = option_orders(n_options, n_orders, seed=3, key="q")
        assert len(orders) == len(set(orders)) == min(n_orders, math.factorial(n_options))
        assert all(sorted(order) == list(range(n_options)) for order in orders)
        assert orders == option_orders(n_options, n_orders, seed=3, key="q")
    assert option_orders(5, 4, seed=1, key="q") != option_orders(5, 4, seed=2, key="q")
    assert option_orders(5, 4, seed=1, key="q") != option_orders(5, 4, seed=1, key="r")
    # Every option once in every place
    assert all(sorted(place) == [0, 1, 2, 3, 4] for place in zip(*option_orders(5, 5), strict=True))
    with pytest.raises(ValueError, match="at least 1"):
        option_orders(3, 0)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    rows = [f"Which item{i} floats ?,{','.join(THINGS[: 3 + i % 2])},{'ABC'[i % 3]}" for i in range(24)]
    header = "question,A,B,C,D,answer\n"
    rows = [row if row.count(",") == 5 else row.replace(f",{row[-1]}", f",,{row[-1]}") for row in rows]
    (folder / "test.csv").write_text(header + "\n".join(rows))
    (folder / "train.csv").write_text(header + "\n".join(rows))
    return str(folder)


def test_training_rows_in_several_orders(questions):
    plain = get_task("custom").load("train", path=questions).dataset
    split = get_task("custom", permutations=4, permutation_seed=1).load("train", path=questions, limit=10)
    rows = split.dataset
    assert len(rows) == 40 and split.n_added == 30 and split.n_read == 24 and split.n_not_selected == 14
    assert len(set(rows["id"])) == 40
    first = {row["id"]: row for row in plain}
    for row in rows:
        source = first[row["id"].split("-order-")[0]]
        assert sorted(row["options"]) == sorted(source["options"]) and row["question"] == source["question"]
        assert row["options"][row["gold"]] == source["options"][source["gold"]]
        assert row["completion"] == row["choices"][row["gold"]] == f" {'ABCD'[row['gold']]}"
        shown = [line.partition(") ")[2] for line in row["prompt"].splitlines() if line.startswith("(")]
        assert shown == row["options"]
    for start in range(0, 40, 4):
        assert len({tuple(options) for options in rows["options"][start : start + 4]}) == 4
    # Copies in other orders do not contradict each other, and the draw is the same again
    assert len({split.answers[name] for name in rows["id"][:4]}) == 1
    again = get_task("custom", permutations=4, permutation_seed=1).load("train", path=questions, limit=10).dataset
    assert again["prompt"][:] == rows["prompt"][:]
    # No more than there are
    assert len(get_task("custom", permutations=30).load("train", path=questions).dataset) == 12 * 6 + 12 * 24
    assert get_task("custom", permutations=0).load("train", path=questions).dataset[:] == plain[:]
    with pytest.raises(ValueError, match="`permutations` must be a whole number from 0"):
        get_task("custom", permutations=-1)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


class ByText(torch.nn.Module):
    """Answers the option with the highest value, wherever it stands: blind to the order."""

    values = {"cork": 3.0, "anvil": 1.0, "brick": 2.0, "feather": 0.5}

    def __init__(self, tokenizer, answer):
        super().__init__()
        self.tokenizer, self.answer = tokenizer, answer
        self.embedding = torch.nn.Embedding(len(tokenizer), 2)
        self.head = torch.nn.Linear(2, len(tokenizer), bias=False)
        self.config = None

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for i, row in enumerate(input_ids):
            words = self.tokenizer.convert_ids_to_tokens(row.tolist())
            for place, word in enumerate(words):
                if word.startswith("("):
                    letter = self.tokenizer.convert_tokens_to_ids(word[1])
                    logits[i, :, letter] = self.values[words[place + 1]] if self.answer == "text" else -ord(word[1])
        return type("Output", (), {"logits": logits})()


def rows_of(task, questions, n_options):
    rows = task.load("test", path=questions).dataset
    return rows.filter(lambda row: len(row["options"]) == n_options)


@pytest.mark.parametrize("n_options", [3, 4])
def test_known_flip_rates(questions, tokenizer, n_options):
    task = get_task("custom")
    rows = rows_of(task, questions, n_options)
    everything = math.factorial(n_options)
    options = {"permutations": everything, "disable_tqdm": True}
    blind = evaluate_option_order(ByText(tokenizer, "text"), tokenizer, task, rows, **options).report
    assert blind["flip_rate"] == blind["any_flip"] == 0.0 and blind["n"] == len(rows) == 12
    assert blind["confidence_spread"] == pytest.approx(0.0, abs=1e-7) and blind["n_orders"] == everything
    hidden = rows.map(lambda row: {"gold": -1})
    assert evaluate_option_order(ByText(tokenizer, "text"), tokenizer, task, hidden, **options).report == blind
    always_a = evaluate_option_order(ByText(tokenizer, "letter"), tokenizer, task, rows, **options)
    # Of all orders but the first, those that do not begin with the same option
    known = (everything - everything / n_options) / (everything - 1)
    assert always_a.report["flip_rate"] == pytest.approx(known, abs=1e-12) and always_a.report["any_flip"] == 1.0
    assert always_a.report["confidence_spread"] == pytest.approx(0.0, abs=1e-7)
    # What is left of a preference for a place when all places are averaged
    np.testing.assert_allclose(always_a.averaged, 1 / n_options, atol=1e-6)
    assert all(own[0] == tuple(range(n_options)) and len(set(own)) == everything for own in always_a.orders)


@pytest.mark.parametrize("scoring", ["token", "choices"])
def test_probabilities_belong_to_the_options_of_the_rows(questions, tokenizer, scoring):
    """Each entry again from the prompt of its order, and the average over all orders the same however they are given."""
    completion = " {letter}" if scoring == "token" else " {letter} {text}"
    task = get_task("custom", completion=completion)
    model = tiny_llama(vocab_size=len(tokenizer))
    rows = rows_of(task, questions, 3).select(range(3))
    options = {"permutations": 6, "scoring": scoring, "temperature": 1.5, "disable_tqdm": True}
    found = evaluate_option_order(model, tokenizer, task, rows, **options)
    for row, orders, probabilities in zip(rows, found.orders, found.probabilities, strict=True):
        assert sorted(orders) == sorted(permutations(range(3)))
        for order, given in zip(orders, probabilities, strict=True):
            example = task.fill(row["question"], [row["options"][i] for i in order], 0)
            scores = np.empty(3)
            for place, choice in enumerate(example.choices):
                ids = tokenizer(example.prompt)["input_ids"]
                start, ids = len(ids), tokenizer(example.prompt + choice)["input_ids"]
                with torch.no_grad():
                    lp = (model(torch.tensor([ids])).logits[0] / 1.5).double().log_softmax(-1)
                scores[order[place]] = sum(float(lp[t - 1, ids[t]]) for t in range(start, len(ids)))
            np.testing.assert_allclose(given, np.exp(scores) / np.exp(scores).sum(), atol=1e-5)
    turned = rows.map(lambda row: {"options": [row["options"][i] for i in (2, 0, 1)], "gold": [1, 2, 0][row["gold"]]})
    again = evaluate_option_order(model, tokenizer, task, turned, **options)
    for one, two in zip(found.averaged, again.averaged, strict=True):
        np.testing.assert_allclose(two, one[[2, 0, 1]], atol=1e-6)


def test_decision_models_are_asked_in_other_orders(tokenizer):
    template = (
        "{{ state }} {% for option in question.options %} ({{ question.labels[loop.index0] }}) "
        "{{ question.descriptions[loop.index0] or option }} {% endfor %} Answer:"
    )
    config = DecisionConfig(chat_template=template, labels={"choice": list("ABCD"), "score": list("ABCD")})
    things = ["cork", "anvil", "brick"]
    questions = [
        DecisionQuestion(
            f"{i}/what",
            "choice",
            {"state": f"item{i}", "questions": {"what": {"type": "choice", "criteria": dict.fromkeys(things)}}},
            "what",
            tuple(things),
            np.eye(3)[i % 3],
        )
        for i in range(4)
    ]
    levels = {"type": "score", "criteria": ["brick", "cork"]}
    request = {"state": "item9", "questions": {"how": levels}}
    questions.append(DecisionQuestion("9/how", "score", request, "how", ("0", "1"), np.array([0.5, 0.5])))
    options = {"permutations": 6, "disable_tqdm": True}
    always_a = evaluate_decision_order(ByText(tokenizer, "letter"), tokenizer, questions, config, **options)
    assert always_a.report["flip_rate"] == pytest.approx(4 / 5) and always_a.report["n"] == 4
    blind = evaluate_decision_order(ByText(tokenizer, "text"), tokenizer, questions, config, **options)
    assert blind.report["flip_rate"] == 0.0 and [len(own) for own in blind.orders] == [6, 6, 6, 6, 1]
    assert all(values.argmax() == 0 for values in blind.averaged[:4])  # cork, wherever it stands
    # The order of a row is that of the plain prediction
    model = tiny_llama(vocab_size=len(tokenizer))
    found = evaluate_decision_order(model, tokenizer, questions, config, **options)
    plain = predict_decisions(model, tokenizer, questions, config, disable_tqdm=True)
    for values, expected in zip(found.probabilities, plain.probabilities, strict=True):
        np.testing.assert_allclose(values[0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="No question was asked in two orders"):
        _ = evaluate_decision_order(model, tokenizer, questions[4:], config, **options).report


def test_levels_of_a_score_keep_their_order(tmp_path):
    """Of the rows of a request only those of its choice are asked, trained on and averaged in several orders."""
    questions = {
        "what": {"type": "choice", "criteria": dict.fromkeys(["cork", "anvil", "brick"])},
        "how": {"type": "score", "criteria": ["cork", "anvil", "brick"]},
        "is": {"type": "noul", "instructions": "floats ?"},
    }
    request = {"state": "item1", "questions": questions, "gold": {"what": "cork", "how": [0.2, 0.3, 0.5], "is": 0.9}}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(request))
    task = get_task("system_one")
    rows = task.load("test", path=str(path)).dataset
    tokenizer = word_tokenizer([*WORDS, "<unk>"], unknown="<unk>")
    trained = get_task("system_one", permutations=6).load("test", path=str(path)).dataset
    assert Counter(trained["kind"]) == {"choice": 6, "score": 1, "noul": 1}
    kept = {row["id"]: row for row in trained}
    assert [kept[row["id"]] for row in rows if row["kind"] != "choice"] == [
        row for row in rows if row["kind"] != "choice"
    ]

    model = tiny_llama(vocab_size=len(tokenizer))
    found = evaluate_option_order(model, tokenizer, task, rows, permutations=6, disable_tqdm=True)
    assert [len(own) for own in found.orders] == [6, 1, 1] and found.report["n"] == 1
    pipe = AnswerPipeline(model=model, tokenizer=tokenizer, layout=task)
    for row, several in zip(rows, (6, 1, 1), strict=True):
        asked = {name: row[name] for name in ("question", "options", "kind")}
        assert len(pipe.preprocess(asked, layout=task, permutations=6)["row"]["asked"]) == several


def test_scores_of_an_example_by_hand():
    probabilities = [np.array([[0.6, 0.4], [0.2, 0.8]]), np.array([[0.9, 0.1], [0.7, 0.3]]), np.array([[1.0]])]
    report = option_order_scores(probabilities)
    assert report["n"] == 2 and report["flip_rate"] == report["any_flip"] == 0.5
    assert report["confidence_spread"] == pytest.approx((0.1 + 0.1) / 2)
    with pytest.raises(ValueError, match="No question was asked in two orders"):
        option_order_scores(probabilities[2:])


def test_what_has_no_options_to_permute_is_refused(questions, tokenizer):
    task = get_task("custom")
    rows = task.load("test", path=questions).dataset
    with pytest.raises(ValueError, match="needs rows of a task with lettered options"):
        evaluate_option_order(None, tokenizer, task, rows.remove_columns("options"))
    with pytest.raises(ValueError, match="at least 2"):
        evaluate_option_order(None, tokenizer, task, rows, permutations=1)


def test_evaluate_prints_flips_and_the_average(questions, tokenizer, tmp_path, capsys):
    model = tiny_llama(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), "--task", "custom", "--path", questions, "--device", "cpu"]
    assert main([*command, "--permutations", "5", "--output-dir", str(tmp_path / "out")]) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "out" / "report.json").read_text())
    task = get_task("custom")
    rows = task.load("test", path=questions).dataset
    found = evaluate_option_order(model, tokenizer, task, rows, permutations=5, disable_tqdm=True)
    assert report["option_order"] == pytest.approx(found.report)
    assert f"another one in {100 * found.report['flip_rate']:.1f} % of cases" in out
    right = [values.argmax() == gold for values, gold in zip(found.averaged, rows["gold"], strict=True)]
    assert report["scores"]["mean of 5 orders"]["accuracy"] == pytest.approx(np.mean(right))
    soft = tmp_path / "soft" / "rows.parquet"
    assert (
        main([*command, "--permutations", "5", "--target-probs", str(soft), "--output-dir", str(tmp_path / "out")])
        == 0
    )
    written = Dataset.from_parquet(str(soft))
    assert written["id"][:] == rows["id"][:] and written["choices"][:] == rows["choices"][:]
    wanted = add_option_probs(rows, model, tokenizer, task=task, permutations=5, disable_tqdm=True)
    for one, two in zip(written["target_probs"], wanted["target_probs"], strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert main([*command, "--permutations", "1", "--output-dir", str(tmp_path / "out")]) == 2
