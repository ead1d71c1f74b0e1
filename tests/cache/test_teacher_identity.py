"""The digest of a teacher: all that changes its logits changes it, and nothing else does."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import (
    FourierFTConfig,
    HRAConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
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


def soft_cap(model):
    model.config.output_logit_soft_cap = 5.0


def frequencies(model):
    model.model.rotary_emb.inv_freq *= 0.5


CHANGES = [three_rows, one_unit_in_the_last_place, exchanged_rows, sign_of_zero, rope, epsilon, soft_cap, frequencies]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_counts(change):
    assert weights_digest(large(change)) != weights_digest(large())


def test_adapters_count_with_their_weights_scale_and_state():
    first = adapted()
    other_scale, off = adapted(lora_alpha=32), adapted()
    off.base_model.disable_adapter_layers()
    digests = [weights_digest(model) for model in (first, adapted(), adapted(seed=1), other_scale, off, tiny_llama())]
    assert digests[0] == digests[1] and len(set(digests)) == 5


# What an adapter of the same weights does by its settings alone
SETTINGS = {
    "places by a seed": (FourierFTConfig, {"n_frequency": 10}, {"random_loc_seed": 1}, {"random_loc_seed": 2}),
    "scaled otherwise": (FourierFTConfig, {"n_frequency": 10}, {"scaling": 150.0}, {"scaling": 10.0}),
    "projection by a key": (
        VeraConfig,
        {"r": 4, "save_projection": False},
        {"projection_prng_key": 1},
        {"projection_prng_key": 2},
    ),
    "random bases by a key": (
        RandLoraConfig,
        {"r": 4, "save_projection": False},
        {"projection_prng_key": 1},
        {"projection_prng_key": 2},
    ),
    "another series": (OFTConfig, {"oft_block_size": 4}, {"use_cayley_neumann": True}, {"use_cayley_neumann": False}),
    "orthogonal": (HRAConfig, {"r": 4}, {"apply_GS": True}, {"apply_GS": False}),
    "fewer vectors": (VBLoRAConfig, {"r": 4, "num_vectors": 8, "vector_length": 4}, {"topk": 2}, {"topk": 1}),
    "begins at a token": (LoraConfig, {"r": 4}, {"alora_invocation_tokens": [5]}, {"alora_invocation_tokens": [9]}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_an_adapter_count(case, tmp_path):
    cls, common, first, second = SETTINGS[case]
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11]])

    def make(options):
        torch.manual_seed(0)
        config = cls(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **common, **options)
        model = get_peft_model(tiny_llama(), config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.normal_()
        return model.eval()

    one, other = make(first), make(second)
    with torch.no_grad():
        assert (one(ids).logits - other(ids).logits).abs().max() > 0.1
    assert weights_digest(one) != weights_digest(other)
    one.save_pretrained(tmp_path)
    assert weights_digest(PeftModel.from_pretrained(tiny_llama(), tmp_path)) == weights_digest(one)


def test_a_head_of_another_adapter_counts():
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    digest = weights_digest(model)
    model.base_model.model.lm_head.set_adapter("other")
    assert weights_digest(model) != digest


def test_a_cast_that_rounds_the_frequencies_is_another_model(tmp_path):
    model = tiny_llama(head_dim=64)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([list(range(3, 23)) * 3])
    loaded, cast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.bfloat16()
    with torch.no_grad():
        assert not torch.equal(loaded(ids).logits, cast(ids).logits)
    assert weights_digest(loaded) != weights_digest(cast)


def test_frequencies_that_follow_the_text_do_not_count():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_llama(max_position_embeddings=8, rope_parameters=rope)
    digest = weights_digest(model)
    with torch.no_grad():
        model(torch.tensor([list(range(3, 23))]))
    assert weights_digest(model) == digest


PROMPTS = [
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
]


@pytest.mark.parametrize("config", PROMPTS, ids=lambda config: type(config).__name__)
def test_a_teacher_with_virtual_tokens_is_read_behind_them(config, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), config).eval()
    rows = Dataset.from_list(tiny_rows(3))
    cache = add_teacher_topk(rows, model, tiny_tokenizer(), output_dir=tmp_path, logprob_dtype="float32")
    for row in cache:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        places = [t - 1 for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        expected = logits.log_softmax(-1)[places].topk(5, -1).values
        torch.testing.assert_close(torch.tensor(row["teacher_topk_logprobs"]), expected, atol=1e-4, rtol=0)


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
