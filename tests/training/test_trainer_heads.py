"""The fused loss of the trainer equals the dense reference on the model's own logits, whatever the head does."""

import copy
import types

import pytest
import torch
import transformers
from datasets import Dataset

from first_trl import FirstDistillTrainer, Recalibration, add_teacher_topk
from first_trl.losses import sparse_kl_reference
from first_trl.losses.head import head_transform
from first_trl.training.sft import FirstSFTTrainer
from tests.support.tiny import VOCAB, run, tiny_cache, tiny_config, tiny_gpt2, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)

COMMON = {"vocab_size": VOCAB, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEADS = {
    "softcap": ("Gemma2", {**SIZES, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "logit_scale": ("Cohere", {**SIZES, "logit_scale": 0.3}),
    "logits_scaling": ("Granite", {**SIZES, "logits_scaling": 4.0}),
    "bias": ("Phi", SIZES),
    "bias and learned positions": (
        "GPTJ",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4, "resid_pdrop": 0.0},
    ),
    "padded rows": ("Llama", {**SIZES, "vocab_size": VOCAB + 8}),
    "tied": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "multiplier": (
        "FalconH1",
        {
            **SIZES, "lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8,
            "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
        },
    ),
    "cap by another name": (
        "RecurrentGemma",
        {**SIZES, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 16, "logits_soft_cap": 2.0},
    ),
    "a base by another name": (
        "Llama4",
        {
            **SIZES, "head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "use_qk_norm": False, "router_aux_loss_coef": 0.0, "attention_chunk_size": 16,
        },
    ),
    "a scale that is text": (
        "Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "logit_scale": "inv_sqrt_d_model"},
    ),
    "a scale that is not read": (
        "Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "logit_scale": 0.25},
    ),
}  # fmt: skip


def student_of(name):
    architecture, options = HEADS[name]
    suffix = "TextConfig" if architecture == "Llama4" else "Config"
    config = getattr(transformers, architecture + suffix)(**(COMMON | options))
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        torch.nn.init.normal_(head.bias)
    return model


def dense_loss(model, cache, recalibration, args):
    """Mean over all supervised tokens, one row at a time, from the model's own logits."""
    total, tokens = torch.zeros(()), 0
    for row in cache:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        positions = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        target, tail = recalibration.apply(
            row["teacher_topk_logprobs"], row["teacher_tail_logprob"], estimator=args.estimator
        )
        total = (
            total
            + sparse_kl_reference(
                logits[[t - 1 for t in positions]],
                torch.tensor(row["teacher_topk_ids"]),
                # An entry of probability 0 is an entry: `-inf` would make padding of it
                torch.from_numpy(target).clamp(min=-100.0),
                tail_log_target=None if tail is None else torch.from_numpy(tail),
                labels=torch.tensor([row["labels"][t] for t in positions]),
                estimator=args.estimator,
                ce_weight=args.ce_weight,
                student_temperature=args.student_temperature,
            ).loss
        )
        tokens += len(positions)
    return total / tokens


def compare(student, cache, tokenizer, tmp_path, **options):
    reference = copy.deepcopy(student).train()
    args = tiny_config(tmp_path, **options)
    recalibration = Recalibration(args.recalibration, args.recalibration_value)
    expected = dense_loss(reference, cache, recalibration, args)
    expected.backward()
    _, recorded = run(student, args, cache, tokenizer)
    # Logged values are rounded to four digits
    assert recorded.logs[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert set(recorded.gradients[0]) == set(gradients)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert scale > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(recorded.gradients[0][name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def cache(tokenizer):
    return tiny_cache(tiny_llama(), tokenizer, tiny_rows(), k=5)


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, cache, tokenizer, tmp_path):
    compare(student_of(head), cache, tokenizer, tmp_path, estimator="bucket")


OBJECTIVES = {
    "topk": {"estimator": "topk"},
    "bucket": {"estimator": "bucket"},
    "renormalized": {"estimator": "renormalized"},
    "mixed with hard labels": {"estimator": "bucket", "ce_weight": 0.3},
    "hard labels only": {"estimator": "topk", "ce_weight": 1.0},
    "renormalized, mixed": {"estimator": "renormalized", "ce_weight": 0.5},
    "paper": {"recalibration": "probability_temperature", "recalibration_value": 0.4},
    "log-space": {"estimator": "bucket", "recalibration": "logit_temperature", "recalibration_value": 2.0},
    "authors' code, both sides": {
        "estimator": "probability_softmax", "student_temperature": 0.28, "recalibration": "probability_temperature",
        "recalibration_value": 0.28,
    },
    "authors' code, mixed": {"estimator": "probability_softmax", "ce_weight": 0.3},
    "authors' code, smoothed": {"recalibration": "log_label_smoothing", "recalibration_value": 0.5},
    "smoothed": {"estimator": "bucket", "recalibration": "label_smoothing", "recalibration_value": 0.1},
    "all of rank 1 smoothed away, bucket": {
        "estimator": "bucket", "recalibration": "label_smoothing", "recalibration_value": 0.5,
    },
    "all of rank 1 smoothed away, renormalized": {
        "estimator": "renormalized", "recalibration": "label_smoothing", "recalibration_value": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective, cache, tokenizer, tmp_path):
    compare(tiny_gpt2(seed=1), cache, tokenizer, tmp_path, **OBJECTIVES[objective])


def test_small_chunks_change_nothing(cache, tokenizer, tmp_path):
    compare(tiny_llama(seed=1), cache, tokenizer, tmp_path, loss_chunk_size=3)


def test_an_unknown_head_is_refused(cache, tokenizer, tmp_path):
    """A model that does more after its backbone than its output head would train on logits it never produces."""

    class Sharpened(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 2
            return outputs

    student = Sharpened(tiny_llama().config)
    trainer = FirstDistillTrainer(student, tiny_config(tmp_path), cache, processing_class=tokenizer)
    with pytest.raises(ValueError, match="Its head does something this trainer does not know"):
        trainer.train()


SEQ2SEQ = {
    "Bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    "Pegasus": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "LED": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "attention_window": 4},
}  # fmt: skip


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_encoder_decoders_are_refused_at_construction(architecture, cache, tokenizer, tmp_path):
    """As student of a cache or of labels, and as a teacher."""
    config = getattr(transformers, f"{architecture}Config")(**COMMON, **SEQ2SEQ[architecture])
    model = getattr(transformers, f"{architecture}ForConditionalGeneration")(config)
    rows = Dataset.from_list(tiny_rows())
    for build in (
        lambda: FirstDistillTrainer(model, tiny_config(tmp_path), cache, processing_class=tokenizer),
        lambda: FirstSFTTrainer(model, train_dataset=rows, processing_class=tokenizer),
        lambda: add_teacher_topk(rows, model, tokenizer, k=2, output_dir=tmp_path / "cache", disable_tqdm=True),
    ):
        with pytest.raises(ValueError, match=f"{architecture}ForConditionalGeneration is an encoder-decoder"):
            build()


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_model_that_sees_the_next_token_is_refused(is_decoder, cache, tokenizer, tmp_path):
    """A BERT with a language-model head is causal only when its configuration says so; its head is unknown then."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        is_decoder=is_decoder, initializer_range=0.3,
    )  # fmt: skip
    trainer = FirstDistillTrainer(
        transformers.BertLMHeadModel(config), tiny_config(tmp_path), cache, processing_class=tokenizer
    )
    message = "Its head does something" if is_decoder else "sees the tokens that it is to predict"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_scale_that_is_no_number_is_refused():
    text = types.SimpleNamespace(model_type="another", logit_scale="inv_sqrt_d_model")
    with pytest.raises(ValueError, match=r"`config\.logit_scale` is 'inv_sqrt_d_model'"):
        head_transform(types.SimpleNamespace(get_text_config=lambda: text))
