"""A saved student with a temperature by novelty: the same confidences in any batch, in a fresh process, as an adapter."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from first_trl import answer_pipeline
from first_trl.calibration.novelty import NoveltyTemperature
from first_trl.evaluation.answer_states import collect_answer_states
from first_trl.evaluation.novelty import fit_reference
from first_trl.evaluation.novelty_scaling import NoveltyScaling
from first_trl.tasks.decision_extras import write_decision_extras
from tests.support.tiny import tiny_llama, tiny_tokenizer


pytestmark = pytest.mark.filterwarnings("ignore:.*(n < 300|noise|fewer than|bin|below 300).*:UserWarning")

CHOICES = [" w3", " w4", " w5"]
SCRIPT = """
import json, sys
from first_trl import answer_pipeline
folder, prompts, batch = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
pipe = answer_pipeline(folder, novelty=True, choices=[" w3", " w4", " w5"], batch_size=batch, device="cpu")
print(json.dumps([[row["confidence"], row["novelty"]] for row in pipe(prompts)]))
"""


def prompts(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{j}" for j in rng.integers(6, 24, size=rng.integers(1, 9))) for _ in range(n)]


def rows(n: int, seed: int) -> Dataset:
    return Dataset.from_list([{"prompt": text, "choices": CHOICES, "gold": 0} for text in prompts(n, seed)])


def fitted(model, tokenizer, feature: str = "distance") -> NoveltyScaling:
    train = collect_answer_states(model, tokenizer, rows(60, 0), [1, 2], disable_tqdm=True)
    reference = fit_reference(train.states[1], layer=1, k=5)
    both = feature != "distance"
    temperature = NoveltyTemperature(0.3, (0.4, 0.2) if both else (0.4,), 1.2, False, 100, 0.0)
    return NoveltyScaling(feature, temperature, reference, (-1.0, 0.7) if both else None, None, {})


@pytest.fixture(scope="module", params=["distance", "distance_and_max_probability", "lora"])
def student(request, tmp_path_factory):
    """Folder, and the confidences that its states lead to."""
    folder = tmp_path_factory.mktemp("student")
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    lora = request.param == "lora"
    if lora:
        model.save_pretrained(folder / "base")
        model = get_peft_model(
            type(model).from_pretrained(folder / "base"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        ).eval()
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    scaling = fitted(model, tokenizer, "distance" if lora else request.param)
    digest = scaling.save(folder)
    write_decision_extras(folder, novelty={"file": "novelty.safetensors", "sha256": digest})
    states = collect_answer_states(model, tokenizer, rows(20, 7), [1, 2], disable_tqdm=True)
    return folder, states.result(np.arange(20).astype(str), scaling.of(states)).predictions


def test_confidences_are_those_of_the_states_in_any_batch(student):
    folder, expected = student
    given = {}
    for batch in (1, 3, 20):
        pipe = answer_pipeline(folder, novelty=True, choices=CHOICES, batch_size=batch, device="cpu")
        given[batch] = pipe(prompts(20, 7))
    sure = {batch: np.array([row["confidence"] for row in found]) for batch, found in given.items()}
    novelty = {batch: np.array([row["novelty"] for row in found]) for batch, found in given.items()}
    assert sure[1] == pytest.approx(sure[20], abs=1e-6) and sure[3] == pytest.approx(sure[20], abs=1e-6)
    assert novelty[1] == pytest.approx(novelty[20], abs=1e-6)
    # The states were kept in 16 bits
    assert sure[1] == pytest.approx(expected["top_prob"], abs=2e-3)
    plain = answer_pipeline(folder, choices=CHOICES, batch_size=20, device="cpu", temperature=1.0)(prompts(20, 7))
    assert [row["index"] for row in plain] == [row["index"] for row in given[1]] and "novelty" not in plain[0]
    flagged = answer_pipeline(folder, novelty=True, choices=CHOICES, device="cpu", new_above=0.5)(prompts(20, 7))
    assert [row["new"] for row in flagged] == (novelty[1] > 0.5).tolist() and 0 < sum(novelty[1] > 0.5) < 20


@pytest.mark.parametrize("student", ["lora"], indirect=True)
def test_a_fresh_process_gives_the_same(student):
    folder, _ = student
    here = answer_pipeline(folder, novelty=True, choices=CHOICES, batch_size=4, device="cpu")(prompts(20, 7))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(prompts(20, 7)), "7"],
        capture_output=True, text=True, check=True, env=os.environ,
    )  # fmt: skip
    there = np.array(json.loads(done.stdout.strip().splitlines()[-1]))
    assert there == pytest.approx(np.array([[row["confidence"], row["novelty"]] for row in here]), abs=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"brings no novelty\.safetensors"):
        answer_pipeline(tmp_path, novelty=True)
    scaling = fitted(model, tokenizer)
    scaling.save(tmp_path)
    assert answer_pipeline(tmp_path, novelty=True, device="cpu")("w7 w8")["novelty"] <= 1.0
    with pytest.raises(ValueError, match="Leave `temperature` or `novelty` out"):
        answer_pipeline(tmp_path, novelty=True, temperature=1.3)
    with pytest.raises(ValueError, match="loaded already"):
        answer_pipeline(model, tokenizer=tokenizer, novelty=True)
    with pytest.raises(ValueError, match="depends on the prompt"):
        answer_pipeline(tmp_path, novelty=True, scoring="choices", choices=[" w3 w4", " w5"], device="cpu")("w7 w8")
    with pytest.raises(ValueError, match="`new_above` must be a share"):
        answer_pipeline(tmp_path, novelty=True, new_above=2.0)
    write_decision_extras(tmp_path, novelty={"file": "novelty.safetensors", "sha256": "0" * 64})
    with pytest.raises(ValueError, match="SHA-256 differs"):
        answer_pipeline(tmp_path, novelty=True)
    other = tiny_llama(hidden_size=32)
    pipe = answer_pipeline(other, tokenizer=tokenizer, temperature=scaling)
    with pytest.raises(ValueError, match="another model"):
        pipe("w7 w8")
    with pytest.raises(ValueError, match="for comparison, not for use"):
        NoveltyScaling("max_probability", scaling.temperature, None, (0.0, 1.0), None, {}).save(tmp_path)
