"""Answers of the pipeline by whole texts and over several orders of the options."""

from itertools import permutations

import numpy as np
import pytest
import torch
from datasets import Dataset

from first_trl import answer_pipeline, get_task
from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
from first_trl.evaluation.whole_answers import evaluate_whole_answers
from first_trl.tasks.word_tokenizer import word_tokenizer
from tests.support.tiny import tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")
THINGS = ["cork", "anvil", "brick", "red cork", "red brick"]
WORDS = ["which", "floats", "?", "Answer", "Choices:", "Answer:", "red", "cork", "anvil", "brick", *"ABCD"]
WORDS += [f"({letter})" for letter in "ABCD"] + [f"item{i}" for i in range(30)]
LAYOUT = get_task("custom")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(2, vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    made = []
    for i in range(10):
        options = rng.permutation(THINGS)[: rng.integers(2, 5)].tolist()
        prompt = f"which item{i} floats ? Answer:"
        made.append({"id": f"q{i}", "prompt": prompt, "choices": [f" {o}" for o in options], "gold": i % len(options)})
    return Dataset.from_list(made)


@pytest.mark.parametrize("length", ["none", "tokens", "bytes", "unconditional"])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_whole_texts_are_the_evaluations(model, tokenizer, rows, length, batch_size):
    wanted = evaluate_whole_answers(model, tokenizer, rows, length=length, temperature=1.4, disable_tqdm=True)
    pipe = answer_pipeline(
        model, tokenizer=tokenizer, scoring="choices", length=length, temperature=1.4, batch_size=batch_size
    )
    for definition, evaluated in (("full_vocab", "choice"), ("choice", "choice"), ("renormalized", "renormalized")):
        answers = pipe(rows, confidence=definition)
        np.testing.assert_allclose(
            [a["confidence"] for a in answers], wanted.confidences(evaluated).confidence, atol=1e-6
        )
        assert [a["index"] for a in answers] == wanted.predictions["answer"].tolist()
        assert [a["answer"] for a in answers] == [r["choices"][a["index"]] for r, a in zip(rows, answers, strict=True)]
    for i, answer in enumerate(answers):
        known = np.exp(wanted.predictions["choice_logprobs"][i][: len(answer["choices"])])
        np.testing.assert_allclose(answer["choices"], known, atol=1e-6)
        assert answer["option_mass"] == pytest.approx(known.sum(), abs=1e-6)


@pytest.mark.parametrize("scoring", ["token", "choices"])
def test_averaging_over_all_orders_of_three_is_exactly_invariant(model, tokenizer, scoring):
    question, options = "which item3 floats ?", ["cork", "anvil", "brick"]
    pipe = answer_pipeline(model, tokenizer=tokenizer, layout=LAYOUT, permutations=6, scoring=scoring)
    for confidence in ("choice", "renormalized"):
        found = []
        for order in permutations(range(3)):
            row = {"question": question, "options": [options[i] for i in order]}
            answer = pipe(row, confidence=confidence)
            found.append((answer["confidence"], order[answer["index"]], answer["option_mass"]))
            shown = [answer["choices"][order.index(i)] for i in range(3)]
            found[-1] += (*shown,)
            assert answer["answer"] == f" {'ABC'[answer['index']]}"
        assert len(set(found)) == 1
    # Not by chance: one order at a time the probabilities differ
    alone = {
        pipe({"question": question, "options": [options[i] for i in order]}, permutations=0)["option_mass"]
        for order in permutations(range(3))
    }
    assert len(alone) > 1


def test_the_average_is_that_of_the_orders(model, tokenizer):
    row = {"question": "which item5 floats ?", "options": ["brick", "anvil", "cork"], "gold": 1}
    asked = [LAYOUT.reorder(row, order) for order in permutations(range(3))]
    prompts = [
        {"id": str(i), "prompt": e.prompt, "choices": list(e.choices), "gold": e.gold} for i, e in enumerate(asked)
    ]
    single = evaluate_multiple_choice(model, tokenizer, Dataset.from_list(prompts), disable_tqdm=True).predictions
    logprobs = np.array(
        [values[np.argsort(o)] for values, o in zip(single["choice_logprobs"], permutations(range(3)), strict=True)]
    )
    shares = (np.exp(logprobs) / np.exp(logprobs).sum(axis=1, keepdims=True)).mean(axis=0)
    pipe = answer_pipeline(model, tokenizer=tokenizer, layout="custom", permutations=6)
    answer = pipe(row, confidence="renormalized")
    np.testing.assert_allclose(answer["choices"], np.exp(logprobs).mean(axis=0), atol=1e-6)
    assert answer["confidence"] == pytest.approx(shares.max(), abs=1e-6) and answer["index"] == shares.argmax()
    # Fewer orders than there are: still the same in whatever order the options come
    few = {}
    for order in permutations(range(3)):
        turned = {**row, "options": [row["options"][i] for i in order]}
        few[order] = pipe(turned, permutations=2, confidence="renormalized")
    assert len({(a["confidence"], turned[a["index"]]) for turned, a in few.items()}) == 1
    # Rows of a task, prompts and all, in one list
    both = pipe([{**row, "prompt": "which"}, row], permutations=6, confidence="renormalized", batch_size=2)
    assert both[0]["confidence"] == pytest.approx(answer["confidence"], abs=1e-6)
    # One order is the layout's prompt itself
    plain = pipe({"prompt": LAYOUT.reorder(row, range(3)).prompt, "choices": [" A", " B", " C"]}, permutations=0)
    assert pipe(row, permutations=0) == plain


def test_one_drawn_order_is_read_in_the_order_given(tokenizer):
    model = tiny_llama(2, vocab_size=len(tokenizer))
    with torch.no_grad():  # a letter is the most likely of all tokens
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(list("ABC"))] *= 6
    pipe = answer_pipeline(model, tokenizer=tokenizer, layout=LAYOUT, permutations=1)
    given = ["cork", "anvil", "brick"]
    for i in range(6):
        found = []
        for order in permutations(range(3)):
            row = {"question": f"which item{i} floats ?", "options": [given[j] for j in order]}
            answer = pipe(row)
            assert answer == pipe(row, confidence="choice")
            assert answer["confidence"] == answer["choices"][answer["index"]] == max(answer["choices"])
            found.append((row["options"][answer["index"]], answer["confidence"]))
        assert len(set(found)) == 1
    with pytest.raises(ValueError, match="about answers in the order given"):
        pipe(row, abstain_below="max_error=0.05")


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        ("which ?", {"scoring": "words"}, "`scoring` must be one of token, choices"),
        ("which ?", {"scoring": "choices"}, "give `choices`"),
        ("which ?", {"length": "words"}, "`length` must be one of none"),
        (
            "which ?",
            {"choices": [" cork"], "permutations": 3},
            "`permutations` needs rows with `question` and `options`",
        ),
        ("which ?", {"permutations": -1}, "`permutations` must be a whole number from 0"),
        ({"question": "which ?", "options": ["cork", "brick"]}, {}, "the task that asks it"),
        ({"question": "which ?", "options": ["cork"]}, {"layout": LAYOUT}, "1 choices, expected 2 to 26"),
        ("which ?", {"layout": "digits"}, "`layout` must be a task with lettered options"),
        ("which ?", {"layout": "costom"}, "Did you mean 'custom'"),
        ("which ?", {"choices": [" ", " red"], "scoring": "choices"}, "this prompt: the choice ' ' merges"),
    ],
)
def test_mistakes_are_refused(model, tokenizer, call, options, message):
    with pytest.raises(ValueError, match=message):
        answer_pipeline(model, tokenizer=tokenizer)(call, **options)
