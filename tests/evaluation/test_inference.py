"""Answers of a student with their confidence: the evaluation's numbers, by every way of loading and calling."""

import json

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from first_trl import answer_pipeline, evaluate_multiple_choice, expected_calibration_error
from first_trl.inference import TASK, AnswerPipeline
from first_trl.tasks.word_tokenizer import word_tokenizer
from tests.support.tiny import tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore:.*(n < 300|noise|fewer than|bin).*:UserWarning")

WORDS = ["A", "B", "C", "D", "?", *[f"w{i}" for i in range(16)]]
PROMPT, CHOICES = "w1 w2 w3 ?", [" A", " B"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(3, vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def rows():
    """Prompts of many lengths with 2 to 4 choices."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(80):
        n = int(rng.integers(2, 5))
        words = [f"w{j}" for j in rng.integers(0, 16, size=rng.integers(1, 12))]
        made.append({"id": f"q{i}", "prompt": " ".join([*words, "?"]), "choices": [f" {c}" for c in "ABCD"[:n]]})
        made[-1]["gold"] = int(rng.integers(n))
    return Dataset.from_list(made)


@pytest.fixture(scope="module")
def expected(model, tokenizer, rows):
    return evaluate_multiple_choice(model, tokenizer, rows, disable_tqdm=True)


@pytest.mark.parametrize("confidence", ["full_vocab", "choice", "renormalized"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_answers_are_the_evaluations(model, tokenizer, rows, expected, confidence, batch_size):
    pipe = answer_pipeline(model, tokenizer=tokenizer, confidence=confidence, batch_size=batch_size)
    answers = pipe(rows)
    assert len(answers) == len(rows)
    wanted = expected.confidences(confidence)
    np.testing.assert_allclose([a["confidence"] for a in answers], wanted.confidence, atol=1e-6)
    correct = [a["index"] == gold for a, gold in zip(answers, rows["gold"], strict=True)]
    assert correct == wanted.correct.astype(bool).tolist()
    for i, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        assert answer["answer"] == (None if answer["index"] is None else row["choices"][answer["index"]])
        assert answer["abstained"] is False
        logprobs = expected.predictions["choice_logprobs"][i, : len(row["choices"])]
        np.testing.assert_allclose(answer["choices"], np.exp(logprobs), atol=1e-6)
        assert answer["option_mass"] == pytest.approx(expected.predictions["option_mass"][i], abs=1e-6)
    assert json.loads(json.dumps(answers)) == answers
    if confidence == "full_vocab":
        # Both cases are there: an answer that is a choice, and a most likely token that is none
        assert {answer["index"] is None for answer in answers} == {True, False}
        ece = expected_calibration_error([a["confidence"] for a in answers], np.array(correct, dtype=int))
        assert ece == pytest.approx(expected.report["full_vocab"]["ece"], abs=1e-6)


def test_temperature_is_that_of_the_evaluation(model, tokenizer, rows):
    expected = evaluate_multiple_choice(model, tokenizer, rows, temperature=2.5, disable_tqdm=True)
    wanted = expected.confidences("full_vocab").confidence
    fixed = answer_pipeline(model, tokenizer=tokenizer, temperature=2.5)(rows)
    called = answer_pipeline(model, tokenizer=tokenizer)(rows, temperature=2.5)
    for answers in (fixed, called):
        np.testing.assert_allclose([a["confidence"] for a in answers], wanted, atol=1e-6)


def test_abstaining(model, tokenizer, rows):
    pipe = answer_pipeline(model, tokenizer=tokenizer, confidence="choice", batch_size=16)
    free = pipe(rows)
    median = float(np.median([answer["confidence"] for answer in free]))
    careful = pipe(rows, abstain_below=median)
    for before, after in zip(free, careful, strict=True):
        assert after["abstained"] is (before["confidence"] < median)
        assert after["answer"] == (None if after["abstained"] else before["answer"])
        assert {**after, "answer": 0, "abstained": 0} == {**before, "answer": 0, "abstained": 0}
    assert sum(answer["abstained"] for answer in careful) == len(rows) // 2


def test_abstaining_below_the_median_of_a_calibrated_model_raises_accuracy(tokenizer):
    # A word tells how sure the answer A can be, from 50 to 98 %
    rng = np.random.default_rng(0)
    words = rng.integers(0, 16, size=2000)
    gold = (rng.random(2000) >= np.linspace(0.5, 0.98, 16)[words]).astype(int)
    student = tiny_llama(0, vocab_size=len(tokenizer), initializer_range=0.05)
    ids = torch.tensor(tokenizer([f"w{w} ?" for w in words])["input_ids"])
    target = torch.tensor(tokenizer.convert_tokens_to_ids(["A", "B"]))[torch.tensor(gold)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(60):
        torch.nn.functional.cross_entropy(student(ids).logits[:, -1], target).backward()
        optimizer.step()
        optimizer.zero_grad()
    dataset = Dataset.from_dict({"prompt": [f"w{w} ?" for w in words], "choices": [[" A", " B"]] * 2000, "gold": gold})
    answers = answer_pipeline(student, tokenizer=tokenizer, batch_size=500)(dataset)
    confidence = np.array([answer["confidence"] for answer in answers])
    right = np.array([answer["index"] for answer in answers]) == gold
    kept = confidence >= np.median(confidence)
    assert right[kept].mean() > right.mean() + 0.08
    report = evaluate_multiple_choice(student, tokenizer, dataset, disable_tqdm=True).report["full_vocab"]
    assert expected_calibration_error(confidence, right.astype(int)) == pytest.approx(report["ece"], abs=1e-6)
    assert report["ece"] < 0.08


def test_every_kind_of_input_gives_the_same_answer(model, tokenizer):
    pipe = answer_pipeline(model, tokenizer=tokenizer)
    single = pipe(PROMPT, choices=CHOICES)
    row = {"prompt": PROMPT, "choices": CHOICES}
    assert pipe(row) == single == pipe({"prompt": PROMPT}, choices=CHOICES)
    assert pipe([PROMPT, row], choices=CHOICES) == [single, single]
    rows = Dataset.from_list([row])
    assert pipe((row,)) == pipe(rows) == pipe(rows.with_format("numpy")) == [single]
    assert pipe(rows["prompt"], choices=CHOICES) == pipe(np.array([PROMPT]), choices=CHOICES) == [single]
    assert answer_pipeline(model, tokenizer=tokenizer, choices=CHOICES)(PROMPT) == single
    streamed = pipe(Dataset.from_list([row, row]).to_iterable_dataset())
    assert not isinstance(streamed, list) and list(streamed) == [single, single]
    assert list(pipe(iter([row]))) == [single]
    assert pipe([]) == []
    # The row's own choices come first
    assert len(pipe({"prompt": PROMPT, "choices": [" A", " B", " C"]}, choices=CHOICES)["choices"]) == 3


def test_without_choices_the_answer_is_the_most_likely_token(model, tokenizer):
    answer = answer_pipeline(model, tokenizer=tokenizer)(PROMPT)
    with torch.no_grad():
        p = model(torch.tensor([tokenizer(PROMPT)["input_ids"]])).logits[0, -1].softmax(-1)
    assert answer["answer"] == tokenizer.decode([int(p.argmax())])
    assert answer["confidence"] == pytest.approx(float(p.max()), abs=1e-6)
    assert (answer["index"], answer["choices"], answer["option_mass"]) == (None, None, None)


def test_a_tokenizer_without_a_padding_token_batches(model, rows):
    tokenizer = word_tokenizer(WORDS)
    wanted = answer_pipeline(model, tokenizer=tokenizer)(rows)
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    answers = answer_pipeline(model, tokenizer=tokenizer, batch_size=9)(rows)
    np.testing.assert_allclose([a["confidence"] for a in answers], [a["confidence"] for a in wanted], atol=1e-6)
    assert tokenizer.pad_token is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model, tokenizer):
    """A full model, an adapter whose folder holds the tokenizer, and one whose folder does not."""
    root = tmp_path_factory.mktemp("models")
    model.save_pretrained(root / "full")
    tokenizer.save_pretrained(root / "full")
    base = LlamaForCausalLM.from_pretrained(root / "full")
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    adapter = get_peft_model(base, lora)
    for name in ("adapter", "bare_adapter"):
        adapter.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "adapter")
    return root


@pytest.mark.parametrize("name", ["full", "adapter", "bare_adapter"])
def test_folders_of_models_and_adapters(folders, model, tokenizer, rows, name):
    pipe = answer_pipeline(str(folders / name), device="cpu")
    assert type(pipe) is AnswerPipeline
    reference = evaluate_multiple_choice(pipe.model, tokenizer, rows, disable_tqdm=True).confidences().confidence
    answers = pipe(rows, batch_size=16)
    np.testing.assert_allclose([a["confidence"] for a in answers], reference, atol=1e-6)
    plain = [a["confidence"] for a in answer_pipeline(model, tokenizer=tokenizer)(rows)]
    # The adapter is in use, and the full model is the one that was saved
    assert np.allclose(reference, plain, atol=1e-6) is (name == "full")
    # A loaded model finds the tokenizer where it came from
    if name == "full":
        loaded = LlamaForCausalLM.from_pretrained(folders / name)
        assert answer_pipeline(loaded)(PROMPT, choices=CHOICES) == pipe(PROMPT, choices=CHOICES)


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_the_registered_task(folders, name):
    pipe = transformers.pipeline(TASK, model=str(folders / name), device="cpu", abstain_below=0.999)
    assert type(pipe) is AnswerPipeline
    wanted = answer_pipeline(folders / name, device="cpu", abstain_below=0.999)(PROMPT, choices=CHOICES)
    answer = pipe(PROMPT, choices=CHOICES)
    assert answer["abstained"] and answer["choices"] == pytest.approx(wanted["choices"], abs=1e-6)


def test_saved_pipelines_are_plain_models(folders, tmp_path):
    answer_pipeline(folders / "full").save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 24


def test_long_prompts_are_cut_as_in_the_evaluation(model, tokenizer):
    prompt = " ".join(["w1"] * 30 + ["w2", "?"])
    pipe = answer_pipeline(model, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="longer than 8 tokens"):
        answer = pipe(prompt, choices=CHOICES, max_length=8)
    dataset = Dataset.from_list([{"prompt": prompt, "choices": CHOICES, "gold": 0}])
    with pytest.warns(UserWarning, match="longer than 8 tokens"):
        wanted = evaluate_multiple_choice(model, tokenizer, dataset, max_length=8, disable_tqdm=True)
    assert answer["confidence"] == pytest.approx(float(wanted.predictions["top_prob"][0]), abs=1e-6)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (PROMPT, {"choices": [" A B", " C"]}, "' A B' is 2 tokens behind the prompt"),
        (PROMPT, {"choices": [" A", " A"]}, "are the same token"),
        (PROMPT, {"choices": " A"}, "`choices` must be a list of texts"),
        ({"prompt": PROMPT, "choices": {"label": ["A"], "text": ["w1"]}}, {}, r"the keys \['label', 'text'\]"),
        (PROMPT, {"choices": [1, 2]}, "`choices` must be a list of texts"),
        (PROMPT, {"temperature": np.float32(-1.0)}, "above 0, got -1"),
        (PROMPT, {"temperature": "2"}, "above 0, got str '2'"),
        (PROMPT, {"permutations": 2.0}, "whole number from 0, got 2.0"),
        ("", {"choices": CHOICES}, "The prompt is empty"),
        ([PROMPT, {"question": "?"}], {}, "needs a 'prompt'; this one has question"),
        (3, {}, "A prompt is a text, got int"),
        ([{"role": "user", "content": "w1"}], {}, "chat template"),
        (PROMPT, {"confidence": "choice"}, "is about choices; give `choices`"),
        (PROMPT, {"confidence": "best"}, "must be one of full_vocab, choice, renormalized"),
        (PROMPT, {"abstain_below": 60}, "a probability from 0 to 1, got 60"),
        (PROMPT, {"temperature": 0.0}, "finite number above 0"),
    ],
)
def test_errors_say_what_to_do(model, tokenizer, inputs, options, message):
    pipe = answer_pipeline(model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=message):
        pipe(inputs, **options)


def test_errors_of_loading(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="loaded already, so dtype, revision cannot be applied"):
        answer_pipeline(model, tokenizer=tokenizer, revision="main", dtype="float32")
    with pytest.raises(ValueError, match="pass its `tokenizer`"):
        answer_pipeline(tiny_llama())
    with pytest.raises(TypeError):
        answer_pipeline(model, tokenizer=tokenizer)(PROMPT, chioces=CHOICES)
