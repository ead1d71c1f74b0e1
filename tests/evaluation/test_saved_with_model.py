"""What is saved with a student (temperature, temperature by number of options, thresholds) and read when it answers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, pipeline

from first_trl import answer_pipeline, evaluate_multiple_choice, fit_threshold
from first_trl.calibration.conditional import KindTemperature, OptionTemperature
from first_trl.evaluation.loading import load_model
from first_trl.tasks.decision import decision_request, save_decision_config
from first_trl.tasks.decision_extras import (
    DECISION_EXTRAS_NAME,
    read_decision_extras,
    read_temperature,
    save_thresholds,
    write_decision_extras,
)
from first_trl.tasks.multiple_choice import MultipleChoice
from first_trl.tasks.word_tokenizer import word_tokenizer
from tests.support.tiny import tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore:.*(n < 300|noise|fewer than|bin).*:UserWarning")

WORDS = [f"w{i}" for i in range(12)]
BY_OPTIONS = OptionTemperature(1.3, {"choice": KindTemperature(np.log(1.5), 0.4, 3.0, 500)})


class Words(MultipleChoice):
    """Lettered questions, as a user's own task would be."""

    name = "words"
    n_choices = (2, 4)


@pytest.fixture(scope="module")
def tokenizer():
    letters = [f"({letter})" for letter in "ABCD"]
    return word_tokenizer(["Which", "?", "Answer", "Choices:", "Answer:", *"ABCD", *letters, *WORDS])


@pytest.fixture(scope="module")
def rows() -> Dataset:
    rng, made = np.random.default_rng(0), []
    for i in range(120):
        example = Words().fill(f"Which {WORDS[i % 12]} ?", rng.permutation(WORDS)[: rng.integers(2, 5)].tolist(), 0)
        gold = int(rng.integers(len(example.choices)))
        made.append({"id": str(i), "prompt": example.prompt, "choices": list(example.choices), "gold": gold})
    return Dataset.from_list(made)


@pytest.fixture
def student(tokenizer, tmp_path) -> Path:
    tiny_llama(3, vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def shares(answers: list[dict]) -> list[np.ndarray]:
    return [np.array(answer["choices"]) / answer["option_mass"] for answer in answers]


def stock(folder: Path, rows: Dataset, **names: str) -> list[np.ndarray]:
    decide = pipeline("decision", model=str(folder), **names)
    return [np.array(list(decide(decision_request(row))["answer"]["probabilities"].values())) for row in rows]


def assert_close(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), atol=1e-5)


def test_the_temperature_lives_with_the_model(student, tokenizer, rows):
    save_decision_config(student, Words(), tokenizer, rows, temperature=1.7)
    asked = rows.select(range(20))
    ours = answer_pipeline(student, batch_size=8)(asked)
    assert_close(shares(ours), stock(student, asked))
    ignoring, given = (answer_pipeline(student, temperature=t)(asked) for t in (1.0, 1.7))
    assert_close(shares(given), shares(ours))
    assert max(a["confidence"] - b["confidence"] for a, b in zip(ignoring, ours, strict=True)) > 0.05
    # A model in memory comes from nowhere in particular
    loaded, _ = load_model(str(student))
    assert_close(shares(answer_pipeline(loaded, tokenizer=tokenizer)(asked)), shares(ignoring))


def test_a_temperature_by_number_of_options(student, tokenizer, rows):
    with pytest.warns(UserWarning, match="stock transformers divides by 1.5 for choice, 1.3 for score"):
        save_decision_config(student, Words(), tokenizer, rows, temperature=BY_OPTIONS)
    assert read_temperature(student) == BY_OPTIONS
    answers = answer_pipeline(student, batch_size=7)(rows)
    for n in (2, 3, 4):
        places = [i for i, choices in enumerate(rows["choices"]) if len(choices) == n]
        wanted = answer_pipeline(student, temperature=BY_OPTIONS.temperature("choice", n))(rows.select(places))
        assert_close(shares([answers[i] for i in places]), shares(wanted))
    three = [i for i, choices in enumerate(rows["choices"]) if len(choices) == 3]
    assert_close(stock(student, rows.select(three)), shares([answers[i] for i in three]))
    with pytest.raises(ValueError, match="takes one temperature"):
        answer_pipeline(student, scoring="choices")(rows[0])
    # A later export with one temperature leaves nothing of it
    save_decision_config(student, Words(), tokenizer, rows, temperature=2.0)
    assert read_temperature(student) == 2.0 and not (student / DECISION_EXTRAS_NAME).exists()


def test_an_adapter_beside_the_weights_of_its_base(student, tokenizer, rows):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(student), LoraConfig(target_modules="all-linear", r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.5)
    model.save_pretrained(student / "lora")
    save_decision_config(student, Words(), tokenizer, rows, temperature=1.2, adapter="lora")
    asked = rows.select(range(12))
    wanted = shares(answer_pipeline(model.eval(), tokenizer=tokenizer, temperature=1.2)(asked))
    assert_close(stock(student, asked), wanted)
    assert_close(shares(answer_pipeline(student)(asked)), wanted)


@pytest.mark.parametrize("reading", ["full_vocab", "renormalized"])
def test_a_promised_error_rate(student, tokenizer, rows, reading):
    result = evaluate_multiple_choice(load_model(str(student))[0], tokenizer, rows, temperature=1.4, disable_tqdm=True)
    given = result.confidences(reading)
    # An untrained model is never right: say that the surer half is, but for its first
    correct = (given.confidence > np.median(given.confidence)) & (given.confidence < given.confidence.max())
    kept, none = (fit_threshold(given.confidence, correct, max_error=e, delta=0.5) for e in (0.3, 0.001))
    assert kept.threshold is not None and none.threshold is None
    save_decision_config(student, Words(), tokenizer, rows, temperature=1.4)
    save_thresholds(student, {reading: [kept, none]}, temperature=1.4)
    pipe = answer_pipeline(student, confidence=reading, abstain_below="max_error=0.3", batch_size=16)
    abstained = [answer["abstained"] for answer in pipe(rows)]
    assert abstained == (given.confidence < kept.threshold).tolist()
    assert sum(not each for each in abstained) == round(kept.coverage * len(rows))
    # The same batches: the row at the border is refused by a last bit
    plain = answer_pipeline(student, confidence=reading, batch_size=16)
    assert [answer["abstained"] for answer in plain(rows, abstain_below="max_error=0.3")] == abstained
    other = "renormalized" if reading == "full_vocab" else "full_vocab"
    for options, message in (
        ({"abstain_below": "max_error=0.001"}, "No threshold keeps max_error=0.001"),
        ({"abstain_below": "max_error=0.2"}, "but for 0.001, 0.3"),
        ({"abstain_below": "five percent"}, "A promise is written max_error=0.05"),
        ({"abstain_below": "max_error=0.3", "confidence": other}, "brings no threshold for confidence="),
        ({"abstain_below": "max_error=0.3", "temperature": 1.0}, "fitted at temperature 1.4"),
    ):
        with pytest.raises(ValueError, match=message):
            answer_pipeline(student, **{"confidence": reading, **options})
    with pytest.raises(ValueError, match="scored by scoring='token' and length='none'"):
        plain(rows[0], abstain_below="max_error=0.3", scoring="choices")


def test_entries_of_others_are_kept(tmp_path):
    write_decision_extras(tmp_path, novelty={"file": "novelty.safetensors"}, thresholds={"readings": {}})
    write_decision_extras(tmp_path, thresholds=None)
    assert read_decision_extras(tmp_path) == {"novelty": {"file": "novelty.safetensors"}}
    path = tmp_path / DECISION_EXTRAS_NAME
    path.write_text(json.dumps({"version": 2}))
    with pytest.raises(ValueError, match="has version 2"):
        read_decision_extras(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_decision_extras(tmp_path)


def test_a_hub_that_is_not_reached_is_said(tmp_path, monkeypatch):
    commit = "0" * 40
    model = tmp_path / "models--some--model"
    for place in (model / "refs", model / "snapshots" / commit, model / ".no_exist" / commit):
        place.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="they are not used here. `hf download some/model`"):
        assert read_decision_extras("some/model") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (model / ".no_exist" / commit / DECISION_EXTRAS_NAME).touch()
        assert read_decision_extras("some/model") == {}
        assert read_decision_extras(tmp_path) == {}
        (model / ".no_exist" / commit / DECISION_EXTRAS_NAME).unlink()
        (model / "snapshots" / commit / DECISION_EXTRAS_NAME).write_text('{"version": 1, "temperature": 2.0}')
        assert read_decision_extras("some/model") == {"temperature": 2.0}
