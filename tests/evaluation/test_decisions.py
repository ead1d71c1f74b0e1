"""Requests are read or refused by line, and our option probabilities are those of stock transformers."""

import json

import numpy as np
import pytest
from transformers import pipeline
from transformers.decision import DecisionConfig

from first_trl.evaluation.decisions import predict_decisions
from first_trl.evaluation.distributions import distribution_scores
from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
from first_trl.tasks import get_task
from first_trl.tasks.decision import decision_config
from first_trl.tasks.system_one import read_requests
from first_trl.tasks.word_tokenizer import word_tokenizer
from tests.support.tiny import tiny_llama


CASES = [
    {
        "id": "one",
        "state": "charged twice",
        "questions": {
            "refund": {"type": "noul", "instructions": "refund ?"},
            "tone": {"type": "choice", "criteria": {"calm": None, "angry": None, "sad": None}},
            "urgency": {"type": "score", "criteria": ["later", "week", "today"]},
        },
        "gold": {"refund": True, "tone": {"calm": 0.7, "angry": 0.2, "sad": 0.1}, "urgency": 2},
    },
    {
        "id": "two",
        "state": "thank you",
        "questions": {
            "refund": {"type": "noul", "instructions": "refund ?"},
            "tone": {"type": "choice", "criteria": {"angry": None, "calm": None}},
            "urgency": {"type": "score", "criteria": ["later", "week", "today"]},
        },
        "gold": {"refund": 0.2, "tone": "calm", "urgency": [0.5, 0.25, 0.25]},
    },
]
TEMPLATE = (
    "{{ state }} {{ question.instructions or '' }} {% for option in question.options %}{{ question.labels[loop.index0] }} "
    "{{ question.descriptions[loop.index0] or option }} {% endfor %} Answer:"
)


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def tokenizer():
    words = "charged twice thank you refund ? calm angry sad later week today Answer: A B C Yes No true false"
    return word_tokenizer([*words.split(), "<unk>"], unknown="<unk>")


def test_requests_are_rows_that_a_student_trains_on(tmp_path):
    """Their prompts are those that stock transformers renders of the same requests with the student's own template."""
    described = {
        "id": "three",
        "state": {"message": "thank you", "urgent": False},
        "questions": {
            "tone": {"type": "choice", "instructions": "refund ? ", "criteria": {"calm": "thank", "angry": None}},
            "refund": {"type": "noul", "instructions": "refund ?", "criteria": {"true": "charged twice"}},
        },
        "gold": {"tone": {"calm": 0.5, "angry": 0.5}, "refund": False},
    }
    path = write(tmp_path / "cases.jsonl", [*CASES, described])
    task = get_task("system_one")
    rows = task.load("train", path=path).dataset
    assert rows["id"][:] == [question.id for question in read_requests(path)]
    assert rows["kind"][:3] == ["noul", "choice", "score"] and rows["group"][:4] == ["one"] * 3 + ["two"]
    assert rows["target_probs"][3:5] == [[0.2, 0.8], [0.0, 1.0]] and rows["gold"][3:] == [1, 1, 0, 0, 1]
    assert rows["prompt"][6] == (
        '{"message": "thank you", "urgent": false}\nrefund ?\nAnswer Choices:\n(A) calm: thank\n(B) angry\nAnswer:'
    )
    letters = [f"{mark}{letter}" for letter in "ABC" for mark in ("", "(")]
    words = {word for prompt in rows["prompt"] for word in prompt.split()} | set(letters)
    tokenizer = word_tokenizer([*sorted(words), "<unk>"], unknown="<unk>")
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128)
    config = decision_config(task, tokenizer, rows)
    ours = evaluate_multiple_choice(model, tokenizer, rows, disable_tqdm=True).predictions["choice_logprobs"]
    for found, expected in zip(
        predict_decisions(model, tokenizer, read_requests(path), config).probabilities, ours, strict=True
    ):
        expected = expected[: len(found)]
        np.testing.assert_allclose(found, np.exp(expected - np.logaddexp.reduce(expected)), atol=1e-6)


def test_gold_in_every_form(tmp_path):
    questions = read_requests(write(tmp_path / "cases.jsonl", CASES))
    assert [question.id for question in questions[:3]] == ["one/refund", "one/tone", "one/urgency"]
    gold = {question.id: question.gold.tolist() for question in questions}
    assert gold["one/refund"] == [1.0, 0.0] and gold["two/refund"] == [0.2, 0.8]
    assert gold["one/tone"] == pytest.approx([0.7, 0.2, 0.1]) and gold["two/tone"] == [0.0, 1.0]
    assert gold["one/urgency"] == [0.0, 0.0, 1.0] and gold["two/urgency"] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("noul_options", [["true", "false"], ["false", "true"]])
def test_probabilities_are_those_of_the_pipeline(tmp_path, tokenizer, noul_options):
    model = tiny_llama(vocab_size=len(tokenizer))
    labels = {"noul": ["Yes", "No"], "choice": list("ABC"), "score": list("ABC")}
    config = DecisionConfig(
        labels=labels, temperature={"choice": 2.0, "noul": 0.5}, chat_template=TEMPLATE, noul_options=noul_options
    )
    questions = read_requests(write(tmp_path / "cases.jsonl", CASES))
    found = predict_decisions(model, tokenizer, questions, config, batch_size=4, disable_tqdm=True)
    decide = pipeline("decision", model=model, tokenizer=tokenizer, decision_config=config)
    answers = {f"{case['id']}/{name}": answer for case in CASES for name, answer in decide(case).items()}
    for name, kind, p in zip(found.ids, found.kinds, found.probabilities, strict=True):
        answer = answers[name]
        if kind == "noul":
            assert p[0] == pytest.approx(answer["noul"], abs=1e-6)
            continue
        np.testing.assert_allclose(p, list(answer["probabilities"].values()), atol=1e-6)
        # What the pipeline calls confidence is no probability: it is never what we score
        assert answer["confidence"] != pytest.approx(p.max(), abs=1e-3)
    assert distribution_scores(found)["mean_confidence"] == pytest.approx(
        np.mean([p.max() for p in found.probabilities])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": {"refund": True}}, "line 1, question 'tone' has no gold answer"),
        ({"gold": {"nothing": 1}}, "gold names 'nothing'"),
        ({"questions": {}}, "asks no question"),
        ({"questions": {"q": {"type": "rank"}}, "gold": {}}, "the type must be one of"),
        ({"questions": {"q": {"type": "choice"}}, "gold": {"q": "a"}}, "criteria map options"),
        ({"questions": {"q": {"type": "score", "criteria": {}}}, "gold": {"q": 0}}, "criteria list the levels"),
        ({"questions": {"q": {"type": "choice", "criteria": {"a": None}}}, "gold": {"q": "b"}}, "is none of a"),
        ({"questions": {"q": {"type": "score", "criteria": ["a"]}}, "gold": {"q": True}}, "is none of 0"),
        ({"questions": {"q": {"type": "noul"}}, "gold": {"q": 1.5}}, "is no distribution"),
        ({"questions": {"q": {"type": "score", "criteria": ["a", "b"]}}, "gold": {"q": [1]}}, "1 gold prob"),
        (
            {"questions": {"q": {"type": "choice", "criteria": {"a": None, "b": None}}}, "gold": {"q": {"a": 0.5}}},
            "no distribution",
        ),
        ({"gold": [1]}, '"gold" maps the names'),
    ],
)
def test_bad_requests_are_refused_by_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_requests(write(tmp_path / "cases.jsonl", [{**CASES[0], **change}]))


def test_what_is_no_request_is_refused(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(CASES[0]) + "\n{broken\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_requests(path)
    with pytest.raises(ValueError, match="line 1 is no request"):
        read_requests(write(path, [[1, 2]]))
    with pytest.raises(ValueError, match="stands twice"):
        read_requests(write(path, [CASES[0], CASES[0]]))
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no request"):
        read_requests(path)
