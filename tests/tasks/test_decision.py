"""A student as a decision model of stock transformers: the same tokens, the same probabilities, or a refusal."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import pipeline
from transformers.decision import DecisionConfig

from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
from first_trl.tasks import encode_prompts, get_task
from first_trl.tasks.decision import decision_config, decision_request, save_decision_config
from first_trl.tasks.multiple_choice import MultipleChoice
from first_trl.tasks.word_tokenizer import word_tokenizer
from tests.support.tiny import tiny_llama


CHOICES = ("red", "green", "blue", "yellow")


class Colours(MultipleChoice):
    """Lettered questions about colours, as a user's own task would be."""

    name = "colours"
    n_choices = (2, 4)


def lettered(task: MultipleChoice, count: int = 40) -> tuple[Dataset, list[tuple[str, list[str]]]]:
    rng = np.random.default_rng(0)
    rows, sources = [], []
    for i in range(count):
        texts = rng.permutation(CHOICES)[: rng.integers(2, 5)].tolist()
        question = f"Which { {0: 'colour', 1: 'shade'}[i % 2] } ?"
        example = task.fill(question, texts, 0)
        rows.append({"id": str(i), "prompt": example.prompt, "choices": list(example.choices), "gold": example.gold})
        sources.append((example.question, texts))
    return Dataset.from_list(rows), sources


@pytest.fixture
def tokenizer():
    letters = ["A", "B", "C", "D", *(f"({letter})" for letter in "ABCD")]
    return word_tokenizer(["Which", "colour", "shade", "?", "Answer", "Choices:", "Answer:", *CHOICES, *letters])


@pytest.mark.parametrize("front", [False, True], ids=["plain", "begin token"])
def test_a_request_of_a_user_renders_the_training_prompt(tokenizer, front):
    if front:
        from tokenizers.processors import TemplateProcessing

        begin = (tokenizer.pad_token, tokenizer.pad_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin[0]} $A", special_tokens=[begin]
        )
    task = Colours()
    rows, sources = lettered(task)
    config = decision_config(task, tokenizer, rows)
    wanted = encode_prompts(tokenizer, rows["prompt"])
    assert all((ids[0] == tokenizer.pad_token_id) == front for ids in wanted)
    for (question, texts), ids in zip(sources, wanted, strict=True):
        for request in (
            {"state": question, "questions": {"q": {"type": "choice", "criteria": dict.fromkeys(texts)}}},
            {"state": "", "questions": {"q": {"type": "score", "instructions": question, "criteria": texts}}},
            {
                "state": {"question": question},
                "questions": {"q": {"type": "choice", "criteria": dict.fromkeys(texts)}},
            },
        ):
            ((inputs, _),) = config.prepare_inputs(request, tokenizer)
            assert inputs["input_ids"][0].tolist() == ids


@pytest.mark.parametrize("lora", [False, True])
def test_probabilities_are_those_of_our_evaluation(tmp_path, lora):
    task = get_task("digits")
    tokenizer, rows = task.tokenizer(), task.load("test", limit=30).dataset
    model = tiny_llama(vocab_size=len(tokenizer))
    base = tmp_path / "base"
    model.save_pretrained(base)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(type(model).from_pretrained(base), LoraConfig(target_modules="all-linear", r=2))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight.data, std=0.5)
    folder = tmp_path / "student"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_decision_config(folder, task, tokenizer, rows, temperature=1.7)
    # The pipeline looks for all three at the base model of an adapter, unless it is told
    decide = pipeline("decision", model=str(folder), tokenizer=str(folder), decision_config=str(folder))
    stock = np.array([list(decide(decision_request(row))["answer"]["probabilities"].values()) for row in rows])
    ours = evaluate_multiple_choice(model.eval(), tokenizer, rows, temperature=1.7, disable_tqdm=True).predictions
    logprobs = np.array(ours["choice_logprobs"])
    expected = np.exp(logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True))
    np.testing.assert_allclose(stock, expected, atol=1e-5)


def test_yes_or_no(tokenizer):
    task = get_task("boolq")
    example = task.example({"passage": "red", "question": "green", "answer": True}, split="train")
    words = word_tokenizer(["red", "green?", "Question:", "Answer:", "yes", "no"])
    rows = Dataset.from_list([{"id": "0", "prompt": example.prompt, "choices": list(example.choices), "gold": 0}])
    config = decision_config(task, words, rows)
    assert config.labels["noul"] == [" yes", " no"] and config.noul_options == ["true", "false"]
    request = {"state": "red", "questions": {"q": {"type": "noul", "instructions": "green"}}}
    ((inputs, (question,)),) = config.prepare_inputs(request, words)
    assert inputs["input_ids"][0].tolist() == encode_prompts(words, [example.prompt])[0]
    assert question.options == ["true", "false"]


def test_saved_and_loaded(tmp_path, tokenizer):
    rows, _ = lettered(Colours())
    saved = save_decision_config(tmp_path, Colours(), tokenizer, rows, temperature=2.0)
    loaded = DecisionConfig.from_pretrained(tmp_path)
    assert loaded == saved and loaded.temperature == {"choice": 2.0, "score": 2.0}


def test_answers_that_differ_from_row_to_row_are_refused(tokenizer):
    task = Colours(completion=" {text}")
    rows, _ = lettered(task)
    with pytest.raises(ValueError, match="one label for each place"):
        decision_config(task, tokenizer, rows)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature(tokenizer, temperature):
    with pytest.raises(ValueError, match="`temperature` must be"):
        decision_config(Colours(), tokenizer, lettered(Colours())[0], temperature=temperature)


def test_free_text_is_refused(tokenizer):
    rows = Dataset.from_list([{"prompt": "red", "choices": []}])
    with pytest.raises(ValueError, match="no choices"):
        decision_config(Colours(), tokenizer, rows)


def test_a_tokenizer_that_reads_letters_differently_is_refused(data_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_folder / "tiny_llama" / "stories260K")
    task = Colours(template="{question}\nAnswer Choices:\n{choices}\nAnswer: (", completion="{letter}")
    with pytest.raises(ValueError, match="no text is this token alone"):
        decision_config(task, tokenizer, lettered(task)[0])
