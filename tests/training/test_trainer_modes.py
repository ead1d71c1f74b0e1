"""What SFTTrainer supports, with the teacher entries kept on their tokens: masks, MoE, streams, evaluation, resume."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from first_trl import FirstDistillTrainer, add_teacher_topk
from first_trl.training.sft import FirstSFTTrainer
from tests.support.tiny import (
    VOCAB,
    run,
    tiny_cache,
    tiny_config,
    tiny_gpt2,
    tiny_llama,
    tiny_rows,
    tiny_tokenizer,
    with_digests,
)


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama()


@pytest.fixture(scope="module")
def cache(teacher, tokenizer):
    return tiny_cache(teacher, tokenizer, tiny_rows(), k=5)


def assert_same_gradients(first, second, rtol=1e-6):
    """Relative error of every gradient, in norm; no single element is further off than float32 sums explain."""
    assert set(first) == set(second)
    scale = max(float(gradient.abs().max()) for gradient in second.values())
    assert scale > 1e-3
    for name in first:
        error = float((first[name] - second[name]).norm() / second[name].norm())
        assert error < rtol, (name, error)
        torch.testing.assert_close(first[name], second[name], rtol=2 * rtol, atol=2 * rtol * scale, msg=name)


BATCHES = {
    "2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "3 + 3 + 2": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 32},
    "packed, 1 x n": {
        "packing": True, "max_length": 32, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
    },
    "checkpointed": {"gradient_checkpointing": True},
    "one worker": {"dataloader_num_workers": 1},
    "chunked": {"loss_chunk_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("estimator", ["topk", "bucket", "sampled"])
def test_batch_shapes_are_equivalent(estimator, teacher, tokenizer, tmp_path):
    """One optimizer step over the same rows gives the same loss and gradients, however they are batched."""
    cache = tiny_cache(teacher, tokenizer, tiny_rows(), k=5, num_draws=20 if estimator == "sampled" else 0)
    # float64, so that the tolerance is about the batching and not about the order of float32 sums
    student = tiny_llama(seed=1).double()
    _, reference = run(copy.deepcopy(student), tiny_config(tmp_path, estimator=estimator), cache, tokenizer)
    for name, options in BATCHES.items():
        args = tiny_config(tmp_path, estimator=estimator, num_train_epochs=1, **(options | {"max_steps": -1}))
        _, recorded = run(copy.deepcopy(student), args, cache, tokenizer)
        assert len(recorded.gradients) == 1, name
        assert_same_gradients(recorded.gradients[0], reference.gradients[0], rtol=1e-6)
        for metric in ("loss", "kl", "cross_entropy", "teacher_entropy", "entropy", "mean_token_accuracy"):
            assert recorded.logs[0][metric] == pytest.approx(reference.logs[0][metric], rel=1e-5), (name, metric)
        assert recorded.logs[0]["num_tokens"] == sum(len(row["input_ids"]) for row in cache), name


class Legacy(type(tiny_gpt2())):
    """A forward that takes no further keywords, as older remote-code models have."""

    accepts_loss_kwargs = False


def test_accumulation_does_not_depend_on_the_forward_signature(cache, tokenizer, tmp_path):
    student = tiny_gpt2(seed=1)
    legacy = Legacy(student.config)
    legacy.load_state_dict(student.state_dict())
    args = tiny_config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    _, reference = run(student, tiny_config(tmp_path), cache, tokenizer)
    _, recorded = run(legacy, args, cache, tokenizer)
    assert_same_gradients(recorded.gradients[0], reference.gradients[0], rtol=1e-6)


def test_draws_give_the_gradient_of_their_counts(teacher, tokenizer, tmp_path):
    """`sampled` from end to end: the target is the empirical distribution of the stored draws."""
    cache = tiny_cache(teacher, tokenizer, tiny_rows(), k=5, num_draws=7)
    student = tiny_llama(seed=1)
    reference = copy.deepcopy(student).train()
    total, tokens = torch.zeros(()), 0
    for row in cache:
        logprobs = reference(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        positions = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        for t, ids, counts in zip(positions, row["teacher_draw_ids"], row["teacher_draw_counts"], strict=True):
            total = total - (logprobs[t - 1, ids] * torch.tensor(counts) / 7).sum()
        tokens += len(positions)
    (total / tokens).backward()
    _, recorded = run(student, tiny_config(tmp_path, estimator="sampled"), cache, tokenizer)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    assert_same_gradients(recorded.gradients[0], gradients, rtol=2e-5)
    assert recorded.logs[0]["teacher_cross_entropy"] == pytest.approx((total / tokens).item(), rel=1e-4)


def test_a_different_number_of_labels_a_row_does_not_weigh_rows(cache, tokenizer, tmp_path):
    """Every supervised token counts alike: the loss is the total over tokens, not a mean of row means."""
    _, recorded = run(tiny_llama(seed=1), tiny_config(tmp_path), cache, tokenizer)
    losses, counts = [], []
    for i in range(len(cache)):
        _, single = run(tiny_llama(seed=1), tiny_config(tmp_path), cache.select([i]), tokenizer)
        losses.append(single.logs[0]["kl"])
        counts.append(len(cache[i]["teacher_tail_logprob"]))
    assert recorded.logs[0]["kl"] == pytest.approx(np.average(losses, weights=counts), rel=1e-5)
    assert abs(recorded.logs[0]["kl"] - np.mean(losses)) > 1e-3


MOE = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM, {"num_local_experts": 4}),
    "phimoe": (PhimoeConfig, PhimoeForCausalLM, {"num_local_experts": 4}),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, {"num_local_experts": 4, "head_dim": 8}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
}


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("padding_free", [False, True])
def test_moe_auxiliary_loss(family, padding_free, cache, tokenizer, tmp_path):
    if family == "gpt_oss" and padding_free:
        pytest.skip("its attention lets rows see each other, which is refused")
    config_class, model_class, options = MOE[family]
    torch.manual_seed(0)
    student = model_class(
        config_class(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_experts_per_tok=2, router_aux_loss_coef=0.1, output_router_logits=True,
            pad_token_id=0, **options,
        )
    )  # fmt: skip
    batching = {"padding_free": True, "max_length": None} if padding_free else {}
    _, with_aux = run(copy.deepcopy(student), tiny_config(tmp_path, **batching), cache, tokenizer)
    _, without = run(
        copy.deepcopy(student), tiny_config(tmp_path, router_aux_loss_coef=0.0, **batching), cache, tokenizer
    )
    log = with_aux.logs[0]
    assert log["aux_loss"] > 0.5
    assert log["loss"] == pytest.approx(log["kl"] + 0.1 * log["aux_loss"], rel=1e-4)
    assert without.logs[0]["loss"] == pytest.approx(without.logs[0]["kl"], rel=1e-4)
    assert log["kl"] == pytest.approx(without.logs[0]["kl"], rel=1e-6)
    routers = ("gate.weight", "router.weight", "router.layer.weight")
    [router] = [n for n in with_aux.gradients[0] if "layers.0" in n and n.endswith(routers) and "expert" not in n][:1]
    assert not torch.allclose(with_aux.gradients[0][router], without.gradients[0][router])
    _, accumulated = run(
        copy.deepcopy(student),
        tiny_config(tmp_path, **batching, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        cache,
        tokenizer,
    )
    assert accumulated.logs[0]["kl"] == pytest.approx(log["kl"], rel=1e-5)
    assert accumulated.logs[0]["aux_loss"] == pytest.approx(log["aux_loss"], rel=0.2)


class WithoutRouterLogits(MixtralModel):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.router_logits = None
        return outputs


def test_experts_that_tell_nothing_of_their_load_are_trained_as_the_message_says(cache, tokenizer, tmp_path):
    torch.manual_seed(0)
    student = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=4, router_aux_loss_coef=0.1,
        )
    )  # fmt: skip
    student.model.__class__ = WithoutRouterLogits
    with pytest.raises(ValueError, match=r"MixtralForCausalLM: its load-balancing loss .*`router_aux_loss_coef=0`"):
        run(copy.deepcopy(student), tiny_config(tmp_path), cache, tokenizer)
    _, recorded = run(student, tiny_config(tmp_path, router_aux_loss_coef=0.0), cache, tokenizer)
    assert recorded.logs[0]["loss"] == pytest.approx(recorded.logs[0]["kl"], rel=1e-4)


def test_a_stream_trains_like_the_dataset(cache, tokenizer, tmp_path):
    student = tiny_llama(seed=1)
    _, reference = run(copy.deepcopy(student), tiny_config(tmp_path), cache, tokenizer)
    for options in ({}, {"packing": True, "max_length": 32}, {"max_length": None, "padding_free": True}):
        stream = cache.to_iterable_dataset(num_shards=2)
        _, recorded = run(copy.deepcopy(student), tiny_config(tmp_path, **options), stream, tokenizer)
        assert_same_gradients(recorded.gradients[0], reference.gradients[0], rtol=2e-6)


def test_a_stream_is_verified_as_it_passes(cache, teacher, tokenizer, tmp_path):
    table = cache.with_format("arrow")[:].to_pydict()
    table["teacher_topk_logprobs"][5][0][0] -= 0.01
    damaged = Dataset.from_dict(table, features=cache.features)

    def train(dataset, processing_class=tokenizer, student=teacher):
        args = tiny_config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        run(copy.deepcopy(student), args, dataset.to_iterable_dataset(), processing_class)

    with pytest.raises(ValueError, match=r"Row 5 of the teacher cache"):
        train(damaged)
    with pytest.raises(ValueError, match="Missing teacher cache columns"):
        train(cache.remove_columns("teacher_row_digest"))
    with pytest.raises(ValueError, match="the same ids would mean other tokens"):
        train(cache, tiny_tokenizer(prefix="v"))
    with pytest.raises(ValueError, match="do not exist in the student's head of 20 rows"):
        train(cache, student=tiny_llama(vocab_size=20))
    with pytest.raises(ValueError, match="teacher cache is empty"):
        empty = IterableDataset.from_generator(lambda: iter(()), features=cache.features)
        FirstDistillTrainer(teacher, tiny_config(tmp_path), empty, processing_class=tokenizer)


def test_evaluation_reports_the_held_out_loss_and_its_parts(teacher, tokenizer, cache, tmp_path):
    """The parts, from dense logits of the student on the held-out rows."""
    held_out = tiny_cache(teacher, tokenizer, tiny_rows(10, seed=4), k=5)
    student = tiny_llama(seed=1)
    kl, entropy, outside, correct, hard, student_entropy, tokens = (0.0,) * 7
    for row in held_out:
        with torch.no_grad():
            logprobs = student(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        positions = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        entries = zip(positions, row["teacher_topk_ids"], row["teacher_topk_logprobs"], strict=True)
        for t, ids, teacher_logprobs in entries:
            target = torch.tensor(teacher_logprobs).softmax(-1)
            kl += float((target * (target.log() - logprobs[t - 1, ids])).sum())
            entropy -= float((target * target.log()).sum())
            outside += float(1 - logprobs[t - 1, ids].exp().sum())
            hard -= float(logprobs[t - 1, row["labels"][t]])
            correct += float(logprobs[t - 1].argmax() == row["labels"][t])
            student_entropy -= float((logprobs[t - 1].exp() * logprobs[t - 1]).sum())
            tokens += 1
    args = tiny_config(tmp_path, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    trainer, recorded = run(student, args, cache, tokenizer, eval_dataset=held_out)
    expected = {
        "kl": kl,
        "teacher_entropy": entropy,
        "teacher_cross_entropy": kl + entropy,
        "cross_entropy": hard,
        "entropy": student_entropy,
        "student_mass_outside": outside,
        "mean_token_accuracy": correct,
    }
    [log] = [log for log in recorded.logs if "eval_loss" in log]
    again = trainer.evaluate()
    direct = trainer.evaluate(held_out)
    prepared = trainer.evaluate(trainer.eval_dataset)
    for name, value in expected.items():
        assert log[f"eval_{name}"] == pytest.approx(value / tokens, rel=1e-4, abs=1e-6), name
        assert again[f"eval_{name}"] == direct[f"eval_{name}"] == prepared[f"eval_{name}"] == log[f"eval_{name}"]
    assert "kl" in recorded.logs[0] and "eval_kl" not in recorded.logs[0]


def test_evaluation_on_several_datasets_keeps_them_apart(teacher, tokenizer, cache, tmp_path):
    other = tiny_cache(tiny_llama(seed=5), tokenizer, tiny_rows(6, seed=5), k=5)
    plain = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in tiny_rows()])
    text = Dataset.from_list([{"prompt": "w3 w4", "completion": " w5 w6"}, {"prompt": "w7", "completion": " w8"}])
    trainer = FirstDistillTrainer(
        copy.deepcopy(teacher),
        tiny_config(tmp_path),
        cache,
        eval_dataset={"same": cache, "other": other, "train": plain, "text": text},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    alone = {name: trainer.evaluate(data) for name, data in (("same", cache), ("other", other))}
    for name in alone:
        assert metrics[f"eval_{name}_kl"] == pytest.approx(alone[name]["eval_kl"], rel=1e-6)
    assert metrics["eval_other_kl"] > 2 * metrics["eval_same_kl"]
    # Without teacher columns: SFTTrainer's negative log-likelihood
    sft = SFTTrainer(
        copy.deepcopy(teacher),
        SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, disable_tqdm=True
        ),
        train_dataset=plain,
        processing_class=tokenizer,
    )
    assert metrics["eval_train_loss"] == pytest.approx(sft.evaluate(plain)["eval_loss"], rel=1e-5)
    assert metrics["eval_text_loss"] == pytest.approx(sft.evaluate(text)["eval_loss"], rel=1e-5)
    assert "eval_train_kl" not in metrics


def test_compute_metrics_sees_the_models_own_logits(teacher, tokenizer, cache, tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"rows": len(prediction.predictions)}

    student = tiny_llama(seed=1)
    trainer = FirstDistillTrainer(
        student, tiny_config(tmp_path), cache, eval_dataset=cache, processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == len(cache)
    row = cache[2]
    with torch.no_grad():
        expected = student(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    np.testing.assert_allclose(seen["logits"][2][: len(expected)], expected, rtol=1e-4, atol=1e-4)
    assert seen["labels"][2][1 : len(row["labels"])].tolist() == row["labels"][1:]
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == len(cache)


def test_renormalized_logs_no_nan(cache, tokenizer, tmp_path):
    args = tiny_config(tmp_path, estimator="renormalized", eval_strategy="steps", eval_steps=1)
    _, recorded = run(tiny_llama(seed=1), args, cache, tokenizer, eval_dataset=cache)
    values = {name: value for log in recorded.logs for name, value in log.items()}
    assert all(not math.isnan(value) for value in values.values())
    assert {"kl", "eval_cross_entropy", "eval_mean_token_accuracy"} <= set(values)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_resume_equals_the_uninterrupted_run(peft, teacher, cache, tokenizer, tmp_path):
    def train(folder, steps, resume=None):
        args = tiny_config(
            tmp_path / folder, per_device_train_batch_size=2, max_steps=steps, save_strategy="steps", save_steps=3,
            train_sampling_strategy="random", learning_rate=1e-2,
        )  # fmt: skip
        trainer = FirstDistillTrainer(
            tiny_llama(seed=1), args, cache, processing_class=tokenizer,
            peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.1) if peft else None,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = train("whole", 6)
    train("parts", 3)
    resumed = train("parts", 6, resume=str(tmp_path / "parts" / "checkpoint-3"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_bfloat16_autocast(cache, tokenizer, tmp_path):
    student = tiny_llama(seed=1)
    _, exact = run(copy.deepcopy(student), tiny_config(tmp_path), cache, tokenizer)
    _, rounded = run(copy.deepcopy(student), tiny_config(tmp_path, bf16=True), cache, tokenizer)
    assert rounded.logs[0]["loss"] == pytest.approx(exact.logs[0]["loss"], rel=3e-2)
    assert_same_gradients(rounded.gradients[0], exact.gradients[0], rtol=5e-2)


def test_assistant_and_completion_masks_survive_the_capture(tokenizer, teacher, tmp_path):
    """Masks are made by the capture, by SFTTrainer's own code; the trainer scores exactly what it cached."""
    rows = Dataset.from_list(
        [{"prompt": "w3 w4 w5", "completion": " w6 w7"}, {"prompt": "w8", "completion": " w9 w10 w11 w12"}]
    )
    options = {"k": VOCAB, "logprob_dtype": "float32", "disable_tqdm": True}
    for completion_only, scored in ((True, 8), (False, 10)):
        cached = add_teacher_topk(
            rows, teacher, tokenizer, completion_only_loss=completion_only,
            output_dir=tmp_path / str(completion_only), **options,
        )  # fmt: skip
        assert sum(len(row["teacher_tail_logprob"]) for row in cached) == scored
        _, recorded = run(copy.deepcopy(teacher), tiny_config(tmp_path / "out"), cached, tokenizer)
        assert abs(recorded.logs[0]["loss"]) < 1e-6

    chat = tiny_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>"
        "{% endgeneration %} {% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "w3 w4"},
        {"role": "assistant", "content": "w5"},
        {"role": "user", "content": "w6"},
        {"role": "assistant", "content": "w7 w8"},
    ]
    cached = add_teacher_topk(
        Dataset.from_list([{"messages": messages}] * 2), teacher, chat, assistant_only_loss=True,
        output_dir=tmp_path / "chat", **options,
    )  # fmt: skip
    assert [label for label in cached[0]["labels"] if label != -100] == [5, 1, 7, 8, 1]
    # The rows are tokenised already, so the option has done its work and stays off in the trainer
    _, recorded = run(copy.deepcopy(teacher), tiny_config(tmp_path / "out"), cached, chat)
    assert abs(recorded.logs[0]["loss"]) < 1e-6
    assert max(float(g.abs().max()) for g in recorded.gradients[0].values()) < 1e-6


TEMPLATES = {
    "no template": (None, "has no chat template"),
    "no marks": (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}",
        r"has a chat template \(`\{% for m in messages %\}.*`\) without marks",
    ),
    "marks of something else": (
        "{% for m in messages %}{{ m.content }}{# generation #} {% endfor %}",
        r"has a chat template \(`\{% for m in messages %\}.*`\) without marks",
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_marks_no_assistant_is_named(template, teacher, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "some-org/some-model"
    tokenizer.chat_template, which = TEMPLATES[template]
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]}]
    )
    with pytest.raises(ValueError, match=f"the tokenizer some-org/some-model {which} of it. Put `{{% generation %}}`"):
        add_teacher_topk(
            rows, teacher, tokenizer, k=2, assistant_only_loss=True, output_dir=tmp_path, disable_tqdm=True
        )


def test_rows_sharing_a_batch_do_not_see_each_other(teacher, tokenizer, cache, tmp_path):
    """Packed documents are separate: exchanging a neighbour leaves a document's own gradient as it was."""
    rows = tiny_rows(2, seed=7)
    for other in (3, 9):
        neighbour = {"input_ids": [other] * 6, "labels": [-100] * 6}
        pair = tiny_cache(teacher, tokenizer, [neighbour, rows[0]], k=5)
        args = tiny_config(tmp_path, packing=True, max_length=32, shuffle_dataset=False)
        _, recorded = run(tiny_llama(seed=1), args, pair, tokenizer)
        alone = tiny_cache(teacher, tokenizer, [rows[0]], k=5)
        _, reference = run(tiny_llama(seed=1), tiny_config(tmp_path), alone, tokenizer)
        assert_same_gradients(recorded.gradients[0], reference.gradients[0], rtol=1e-6)


def test_quantization_config_reaches_the_model_loader(teacher, cache, tokenizer, tmp_path, monkeypatch):
    """QLoRA's way in; the 4-bit kernels themselves need a GPU library."""
    from transformers import BitsAndBytesConfig

    teacher.save_pretrained(tmp_path / "student")
    seen = {}

    def load(path, **kwargs):
        seen.update(kwargs)
        return copy.deepcopy(teacher)

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", load)
    config = BitsAndBytesConfig(load_in_4bit=True)
    trainer = FirstDistillTrainer(
        str(tmp_path / "student"), tiny_config(tmp_path), cache, processing_class=tokenizer,
        quantization_config=config, peft_config=LoraConfig(target_modules=["q_proj"]),
    )  # fmt: skip
    assert seen["quantization_config"] is config
    trainer.train()


def test_the_trainer_leaves_generation_as_it_was(teacher, tokenizer, cache, tmp_path):
    student = copy.deepcopy(teacher)
    prompt = torch.tensor([[3, 4, 5]])
    expected = teacher.generate(prompt, max_new_tokens=5, do_sample=False)
    FirstDistillTrainer(student, tiny_config(tmp_path), cache, processing_class=tokenizer)
    assert torch.equal(student.eval().generate(prompt, max_new_tokens=5, do_sample=False), expected)


def test_shuffled_and_partial_caches(teacher, tokenizer, cache, tmp_path):
    """Any subset or order of a sound cache trains, with its own rows."""
    student = tiny_llama(seed=1)
    part = cache.shuffle(seed=3).select(range(5))
    _, recorded = run(copy.deepcopy(student), tiny_config(tmp_path), part, tokenizer)
    _, reference = run(copy.deepcopy(student), tiny_config(tmp_path), with_digests(part.flatten_indices()), tokenizer)
    assert_same_gradients(recorded.gradients[0], reference.gradients[0])


def test_logs_are_means_since_the_last_log(cache, tokenizer, tmp_path):
    """Two steps in one log are weighted by their tokens."""
    frozen = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "max_steps": 2}
    _, each = run(tiny_llama(seed=1), tiny_config(tmp_path, logging_steps=1, **frozen), cache, tokenizer)
    _, both = run(tiny_llama(seed=1), tiny_config(tmp_path, logging_steps=2, **frozen), cache, tokenizer)
    counts = [sum(len(row["teacher_tail_logprob"]) for row in cache.select(range(i, i + 4))) for i in (0, 4)]
    expected = np.average([log["kl"] for log in each.logs[:2]], weights=counts)
    assert both.logs[0]["kl"] == pytest.approx(expected, rel=1e-5)
    assert [log["num_tokens"] for log in each.logs[:2]][1] == both.logs[0]["num_tokens"]


def see_each_other(family):
    torch.manual_seed(0)
    options = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 1}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    config: Any
    if family == "GptOss":
        config = GptOssConfig(**options, **attention, num_local_experts=2, num_experts_per_tok=1)
    elif family == "Mamba":
        config = transformers.MambaConfig(**options, state_size=4, initializer_range=0.3)
    else:
        config = transformers.GPTBigCodeConfig(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("layout", [{"padding_free": True}, {"packing": True, "max_length": 24}])
@pytest.mark.parametrize("family, apart", [("GptOss", False), ("Mamba", False), ("GPTBigCode", True)])
def test_rows_without_padding_that_see_each_other_are_refused(family, apart, layout, cache, tokenizer, tmp_path):
    """Some families take no notice of `position_ids` in their mask, or carry a state from row to row."""
    options = {"max_length": None, "router_aux_loss_coef": None, **layout}
    labelled = Dataset.from_list(tiny_rows())
    sft = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no",
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    for trainer in (
        FirstDistillTrainer(
            see_each_other(family), tiny_config(tmp_path, **options), cache, processing_class=tokenizer
        ),
        FirstSFTTrainer(see_each_other(family), args=sft, train_dataset=labelled, processing_class=tokenizer),
    ):
        if apart:
            trainer.train()
            continue
        with pytest.raises(ValueError, match="lets the rows of a batch without padding see each other"):
            trainer.train()
