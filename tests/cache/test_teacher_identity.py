"""The digest of a teacher: all that changes its logits changes it, and nothing else does."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from first_trl import add_teacher_topk
from first_trl.teacher.backends.transformers import weights_digest
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_rows, tiny_tokenizer


def adapted(seed=0, **options):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    return model


def large(change=None):
    """2,048 tokens of 16 numbers each: of 1,024 samples, none would fall on most rows."""
    model = tiny_llama(vocab_size=2048)
    if change is not None:
        with torch.no_grad():
            change(model)
    return model


def three_rows(model):
    model.model.embed_tokens.weight[[301, 777, 1501]] += 0.5


def one_unit_in_the_last_place(model):
    weight = model.lm_head.weight[1001]
    weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))


def exchanged_rows(model):
    model.lm_head.weight[[7, 8]] = model.lm_head.weight[[8, 7]]


def sign_of_zero(model):
    model.lm_head.weight[3, 3] = 0.0


def rope(model):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}


def epsilon(model):
    model.config.rms_norm_eps = 1e-2


CHANGES = [three_rows, one_unit_in_the_last_place, exchanged_rows, sign_of_zero, rope, epsilon]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_counts(change):
    assert weights_digest(large(change)) != weights_digest(large())


def test_adapters_count_with_their_weights_scale_and_state():
    first = adapted()
    other_scale, off = adapted(lora_alpha=32), adapted()
    off.base_model.disable_adapter_layers()
    digests = [weights_digest(model) for model in (first, adapted(), adapted(seed=1), other_scale, off, tiny_llama())]
    assert digests[0] == digests[1] and len(set(digests)) == 5


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_what_leaves_the_logits_as_they_are_does_not_count(make, tmp_path):
    model = make()
    digest = weights_digest(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert weights_digest(again) == digest
    again.config.use_cache, again.config.pad_token_id = False, 5
    again.train()
    assert weights_digest(again) == digest == weights_digest(copy.deepcopy(model))
    assert weights_digest(again.to(torch.bfloat16)) != digest


def test_a_teacher_changed_in_three_rows_is_refused(tmp_path):
    rows, tokenizer = Dataset.from_list(tiny_rows(4)), tiny_tokenizer()
    add_teacher_topk(rows, large(), tokenizer, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"holds a capture of other inputs .*teacher:"):
        add_teacher_topk(rows, large(three_rows), tokenizer, output_dir=tmp_path)
    add_teacher_topk(rows, adapted(), tokenizer, output_dir=tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds a capture of other inputs .*teacher:"):
        add_teacher_topk(rows, adapted(seed=1), tokenizer, output_dir=tmp_path / "adapter")
