"""Adapters that act on the text itself, by virtual tokens before it or from a token in it, are read where the text is."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from first_trl.evaluation.choice_scoring import score_choices
from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
from tests.support.tiny import tiny_llama, tiny_tokenizer


CONFIGS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "from a token on": LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[9]
    ),
}
CHOICES = [" w5", " w6", " w9 w8"]


def rows(choices):
    words = [[f"w{3 + (7 * i + 5 * j) % 20}" for j in range(3 + i % 3)] for i in range(6)]
    return Dataset.from_list(
        [
            {"id": str(i), "prompt": " ".join([*some, "w9"]), "completion": " w5", "choices": choices, "gold": 0}
            for i, some in enumerate(words)
        ]
    )


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    made = get_peft_model(tiny_llama(), CONFIGS[request.param]).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    return made


def expected(model, choices):
    """One text at a time, all of it, read from its end."""
    tokenizer, found = tiny_tokenizer(), []
    for row in rows(choices):
        prompt = tokenizer(row["prompt"])["input_ids"]
        found.append([])
        for choice in choices:
            tokens = tokenizer(choice)["input_ids"]
            ids = torch.tensor([prompt + tokens])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(tokens) - 1 : -1]
            found[-1].append(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum().item())
    return np.array(found)


def test_answers_of_one_token(model):
    result = evaluate_multiple_choice(model, tiny_tokenizer(), rows(CHOICES[:2]), disable_tqdm=True)
    np.testing.assert_allclose(result.predictions["choice_logprobs"], expected(model, CHOICES[:2]), atol=1e-4)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_whole_answers(model, prefix_cache):
    scored = score_choices(model, tiny_tokenizer(), rows(CHOICES), prefix_cache=prefix_cache, disable_tqdm=True)
    np.testing.assert_allclose(np.array(scored.scores()), expected(model, CHOICES), atol=1e-4)
