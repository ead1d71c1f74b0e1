"""Multiple choice by the log-probability of whole answers."""

import math

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from first_trl import evaluate_multiple_choice
from first_trl.evaluation.choice_scoring import score_choices
from first_trl.tasks.word_tokenizer import word_tokenizer


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")
WORDS = ["?", *[f"w{i}" for i in range(20)]]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


def llama(vocab_size, context=64):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.4,
        )
    )  # fmt: skip


def gpt2(vocab_size, context=64):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=context, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def dataset(n=20, longest=4, seed=0):
    rng = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(f"w{j}" for j in rng.integers(0, 20, size=rng.integers(low, high)))

    rows = []
    for i in range(n):
        choices = [f" {words(1, longest + 1)}" for _ in range(int(rng.integers(2, 5)))]
        rows.append(
            {"id": f"q{i}", "prompt": f"{words(1, 6)} ?", "choices": choices, "gold": -1 if i % 7 == 6 else i % 2}
        )
    return Dataset.from_list(rows)


def reference(model, tokenizer, prompt, choice):
    context = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    tokens = tokenizer(choice, add_special_tokens=False)["input_ids"]
    model.eval()
    with torch.no_grad():
        lp = model(torch.tensor([context + tokens])).logits[0].double().log_softmax(-1)
    return sum(float(lp[len(context) - 1 + j, t]) for j, t in enumerate(tokens))


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_agrees_with_one_forward_per_choice(tokenizer, build, prefix_cache, batch_size):
    model, rows = build(len(tokenizer)), dataset()
    scores = score_choices(
        model,
        tokenizer,
        rows,
        batch_size=batch_size,
        prefix_cache=prefix_cache,
        unconditional_prompt="",
        disable_tqdm=True,
    )
    assert scores.ids == rows["id"] and scores.n_truncated == 0
    for i, row in enumerate(rows):
        expected = [reference(model, tokenizer, row["prompt"], c) for c in row["choices"]]
        np.testing.assert_allclose(scores.logprobs[i], expected, atol=1e-4)
        bare = [reference(model, tokenizer, [tokenizer.bos_token_id], c) for c in row["choices"]]
        np.testing.assert_allclose(scores.unconditional[i], bare, atol=1e-4)
        assert scores.lengths["tokens"][i].tolist() == [len(c.split()) for c in row["choices"]]
        assert scores.lengths["characters"][i].tolist() == [len(c) - 1 for c in row["choices"]]


def test_question_is_read_once(tokenizer):
    model = llama(len(tokenizer))
    row = {"prompt": " ".join(["w1"] * 30) + " ?", "choices": [f" w{i} w2 w3" for i in range(4)], "gold": 0}
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    try:
        score_choices(model, tokenizer, Dataset.from_list([row]), disable_tqdm=True)
    finally:
        hook.remove()
    assert seen == [32, 8]


def test_definitions(tokenizer):
    model, rows = llama(len(tokenizer)), dataset(30)
    scores = score_choices(model, tokenizer, rows, unconditional_prompt="w0 ?", disable_tqdm=True)
    known = [i for i, g in enumerate(rows["gold"]) if g >= 0]

    def softmax(v):
        e = np.exp(v - np.max(v))
        return e / e.sum()

    expected = {
        ("renormalized", "characters"): [softmax(scores.logprobs[i]) for i in known],
        ("length_normalized", "tokens"): [softmax(scores.logprobs[i] / scores.lengths["tokens"][i]) for i in known],
        ("length_normalized", "bytes"): [softmax(scores.logprobs[i] / scores.lengths["bytes"][i]) for i in known],
        ("unconditional", "characters"): [softmax(scores.logprobs[i] - scores.unconditional[i]) for i in known],
        ("choice", "characters"): [np.exp(scores.logprobs[i]) for i in known],
    }
    for (definition, unit), values in expected.items():
        result = scores.confidences(definition, unit=unit)
        np.testing.assert_allclose(result.confidence, [v.max() for v in values], rtol=1e-12)
        assert result.correct.tolist() == [v.argmax() == rows[i]["gold"] for v, i in zip(values, known, strict=True)]
        assert result.dropped == {"without a gold answer": 30 - len(known)}
    with pytest.raises(ValueError, match="`unit`"):
        scores.confidences("length_normalized", unit="words")
    plain = score_choices(model, tokenizer, rows, disable_tqdm=True)
    with pytest.raises(ValueError, match="needs `unconditional`"):
        plain.confidences("unconditional")


def test_one_token_choices_agree_with_the_next_token_evaluation(tokenizer):
    model = llama(len(tokenizer))
    rows = Dataset.from_list(
        [{"prompt": f"w{i} w{i + 1} ?", "choices": [" w1", " w2", " w3"], "gold": i % 3} for i in range(15)]
    )
    scores = score_choices(model, tokenizer, rows, disable_tqdm=True)
    result = evaluate_multiple_choice(model, tokenizer, rows, disable_tqdm=True)
    np.testing.assert_allclose(np.stack(scores.logprobs), result.predictions["choice_logprobs"], atol=1e-5)
    options = scores.confidences()
    assert options.report()["ece"] == pytest.approx(result.report["options"]["ece"], abs=1e-5)
    assert options.extras["nll"] == pytest.approx(result.report["options"]["nll"], abs=1e-5)


def test_peft_and_modes(tokenizer):
    model = get_peft_model(llama(len(tokenizer)), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    rows = dataset(6)
    scores = score_choices(model, tokenizer, rows, disable_tqdm=True)
    assert model.training
    expected = reference(model, tokenizer, rows[0]["prompt"], rows[0]["choices"][0])
    assert scores.logprobs[0][0] == pytest.approx(expected, abs=1e-4)


def test_long_questions_lose_their_beginning(tokenizer):
    model = llama(len(tokenizer), context=8)
    row = {"prompt": " ".join(f"w{i}" for i in range(10)) + " ?", "choices": [" w1 w2", " w3"], "gold": 0}
    with pytest.warns(UserWarning, match="1 of 1 prompts do not fit into 8 tokens"):
        scores = score_choices(model, tokenizer, Dataset.from_list([row]), disable_tqdm=True)
    ids = tokenizer(row["prompt"])["input_ids"]
    expected = reference(model, tokenizer, [ids[0], *ids[-5:]], " w1 w2")
    assert scores.n_truncated == 1 and scores.logprobs[0][0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="no room for the question"):
        score_choices(model, tokenizer, Dataset.from_list([row]), max_length=3, disable_tqdm=True)


def flags(rows):
    return rows.remove_columns("gold").add_column("gold", [True] * len(rows))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.remove_columns("choices"), r"lacks the columns \['choices'\]"),
        (lambda d: d.select([]), "dataset is empty"),
        (lambda d: d.map(lambda row: {"gold": 7}), "gold = 7"),
        (flags, "Row 0 has a boolean as `gold`"),
        (
            lambda d: d.map(
                lambda row: {"options": {"label": ["a"], "text": [" w1"]}}, remove_columns="choices"
            ).rename_column("options", "choices"),
            r"the keys \['label', 'text'\]",
        ),
    ],
)
def test_bad_datasets_are_refused(tokenizer, change, match):
    with pytest.raises(ValueError, match=match):
        score_choices(llama(len(tokenizer)), tokenizer, change(dataset(4)), disable_tqdm=True)


def test_broken_weights_are_refused(tokenizer):
    model = llama(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[5, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        score_choices(model, tokenizer, dataset(4), disable_tqdm=True)


SHARED = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
STATE = {"mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
RECURRENT = {
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3},
    "Mamba2": {
        "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1,
        "chunk_size": 8, "initializer_range": 0.3,
    },
    "Lfm2": {**SHARED, "full_attn_idxs": [1], "conv_L_cache": 3},
    "Qwen3Next": {
        **SHARED, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "FalconH1": {**SHARED, **STATE, "mamba_d_ssm": 16},
    "RecurrentGemma": {**SHARED, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 16},
    "Bamba": {**SHARED, **STATE, "attn_layer_indices": [1], "mamba_n_heads": 4},
    "Rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("family", RECURRENT)
def test_models_with_a_state_are_read_anew(family, tokenizer):
    """Their cache cannot be repeated for each choice: by default the question is read with each of them."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **RECURRENT[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    rows = dataset(6)
    by_default = score_choices(model, tokenizer, rows, disable_tqdm=True)
    whole = score_choices(model, tokenizer, rows, prefix_cache=False, disable_tqdm=True)
    single = [score_choices(model, tokenizer, rows.select([i]), batch_size=1, disable_tqdm=True) for i in range(6)]
    for i in range(6):
        np.testing.assert_array_equal(by_default.logprobs[i], whole.logprobs[i])
        np.testing.assert_allclose(by_default.logprobs[i], single[i].logprobs[0], rtol=1e-5, atol=1e-5)
