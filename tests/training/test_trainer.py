"""The trainer through its public path: identity, adapters, refusals."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from first_trl import FirstDistillTrainer, add_teacher_topk, fit_recalibration, verify_teacher_cache
from first_trl.training.sft import FirstSFTTrainer
from tests.support.tiny import VOCAB, run, tiny_cache, tiny_config, tiny_gpt2, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama()


@pytest.fixture(scope="module")
def cache(teacher, tokenizer):
    return tiny_cache(teacher, tokenizer, tiny_rows())


def largest(gradients):
    return max(float(gradient.abs().max()) for gradient in gradients.values())


BATCHES = {
    "padded": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "multiple_of": {"pad_to_multiple_of": 8},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 24},
    "packed_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 24},
    "keep_start": {"max_length": 6},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("estimator", ["topk", "bucket", "renormalized"])
@pytest.mark.parametrize("batches", BATCHES)
def test_identity(batches, estimator, teacher, tokenizer, cache, tmp_path):
    """Student = teacher and k = vocabulary: loss and every gradient element vanish."""
    args = tiny_config(tmp_path, estimator=estimator, **BATCHES[batches])
    _, recorded = run(copy.deepcopy(teacher), args, cache, tokenizer)
    assert abs(recorded.logs[0]["loss"]) < 1e-6
    assert len(recorded.gradients[0]) == len(list(teacher.parameters()))
    assert largest(recorded.gradients[0]) < 1e-6


def test_equal_temperatures_on_both_sides_keep_the_raw_teacher(teacher, tokenizer, tmp_path):
    """At any k: what the authors' code trains towards with one temperature on both sides is no recalibrated teacher."""
    cache = tiny_cache(teacher, tokenizer, tiny_rows(), k=5)
    options = {"recalibration": "probability_temperature", "recalibration_value": 0.28}
    args = tiny_config(tmp_path, estimator="probability_softmax", student_temperature=0.28, **options)
    _, recorded = run(copy.deepcopy(teacher), args, cache, tokenizer)
    assert abs(recorded.logs[0]["loss"]) < 1e-6
    assert largest(recorded.gradients[0]) < 1e-6
    _, recorded = run(copy.deepcopy(teacher), tiny_config(tmp_path, **options), cache, tokenizer)
    assert largest(recorded.gradients[0]) > 1e-2


def test_identity_of_gpt2_from_the_capture(tokenizer, tmp_path):
    """Learned positions, tied embeddings, and a cache from the public capture."""
    teacher = tiny_gpt2()
    rows = Dataset.from_list(tiny_rows())
    cache = add_teacher_topk(
        rows, teacher, tokenizer, k=VOCAB, logprob_dtype="float32", output_dir=tmp_path / "cache", disable_tqdm=True
    )
    _, recorded = run(copy.deepcopy(teacher), tiny_config(tmp_path), cache, tokenizer)
    assert abs(recorded.logs[0]["loss"]) < 1e-6
    assert largest(recorded.gradients[0]) < 1e-6


def test_identity_when_the_start_is_cut(teacher, tokenizer, tmp_path):
    """`keep_end` shortens the student's context, so the cut text must be the cached one for the test to be exact."""
    rows = tiny_rows()
    cut = [{name: values[-6:] for name, values in row.items()} for row in rows]
    short = iter(tiny_cache(teacher, tokenizer, cut))

    def transplant(row):
        """The teacher's view of the short text, stored under the long one: only `keep_end` brings them together."""
        view = next(short)
        for name in ("teacher_topk_ids", "teacher_topk_logprobs", "teacher_tail_logprob"):
            count = len(view[name])
            row[name] = row[name][: len(row[name]) - count] + view[name]

    cache = tiny_cache(teacher, tokenizer, rows, edit=transplant)
    args = tiny_config(tmp_path, max_length=6, truncation_mode="keep_end")
    _, recorded = run(copy.deepcopy(teacher), args, cache, tokenizer)
    assert abs(recorded.logs[0]["loss"]) < 1e-6
    assert largest(recorded.gradients[0]) < 1e-6


@pytest.mark.parametrize("batches", ["padded", "packed", "padding_free"])
def test_a_cache_shifted_by_one_position_fails_the_identity(batches, teacher, tokenizer, tmp_path):
    def shift(row):
        for name in ("teacher_topk_ids", "teacher_topk_logprobs", "teacher_tail_logprob"):
            row[name] = row[name][1:] + row[name][:1]

    shifted = tiny_cache(teacher, tokenizer, tiny_rows(), edit=shift)
    _, recorded = run(copy.deepcopy(teacher), tiny_config(tmp_path, **BATCHES[batches]), shifted, tokenizer)
    assert recorded.logs[0]["loss"] > 0.1
    assert largest(recorded.gradients[0]) > 1e-2


def test_edited_rows_are_refused(teacher, tokenizer, cache, tmp_path):
    def shift(row):
        for name in ("teacher_topk_ids", "teacher_topk_logprobs"):
            row[name] = row[name][1:] + row[name][:1]
        return row

    edited = cache.map(shift, features=cache.features)
    with pytest.raises(ValueError, match="digest mismatch"):
        FirstDistillTrainer(teacher, tiny_config(tmp_path), edited, processing_class=tokenizer)


def weights_hash(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora" not in name:
            digest.update(name.replace("base_layer.", "").encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("estimator", ["topk", "bucket", "renormalized"])
def test_lora_trains_only_the_adapter_and_reloads(estimator, tokenizer, cache, tmp_path):
    student = tiny_llama(seed=1)
    original = copy.deepcopy(student)
    before = weights_hash(student)
    args = tiny_config(tmp_path, estimator=estimator, max_steps=3, learning_rate=1e-2)
    trainer, recorded = run(student, args, cache, tokenizer, peft_config=LoraConfig(target_modules="all-linear"))
    trainer.save_model(str(tmp_path / "adapter"))
    assert all("lora" in name for gradients in recorded.gradients for name in gradients)
    assert recorded.logs[2]["loss"] < recorded.logs[0]["loss"]
    assert weights_hash(trainer.model.get_base_model()) == before

    reloaded = PeftModel.from_pretrained(original, tmp_path / "adapter").eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        trained = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(reloaded(input_ids=ids).logits, trained, rtol=0, atol=0)
        with reloaded.disable_adapter():
            assert not torch.allclose(reloaded(input_ids=ids).logits, trained)


@pytest.mark.parametrize("trainer_class", [FirstDistillTrainer, FirstSFTTrainer])
def test_full_weights_saved_over_an_adapter_are_the_ones_that_are_loaded(trainer_class, tokenizer, cache, tmp_path):
    """`from_pretrained` takes the adapter and its base where a folder has both."""
    tiny_llama(1).save_pretrained(tmp_path / "base")
    rows = cache if trainer_class is FirstDistillTrainer else cache.select_columns(["input_ids", "labels"])
    for peft_config in (LoraConfig(target_modules="all-linear"), None):
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            tiny_config(tmp_path / "out"),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        trainer.save_model()
        assert (tmp_path / "out" / "adapter_config.json").is_file() == (peft_config is not None)
    trained = trainer.model.state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert weight.equal(trained[name]), name


def test_modules_to_save_trains_a_copy_of_the_head(tokenizer, cache, tmp_path):
    """The fused loss must read the trainable copy of the head, not the frozen original."""
    peft_config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    student = tiny_llama(seed=1)
    original = student.lm_head.weight.detach().clone()
    trainer, recorded = run(student, tiny_config(tmp_path), cache, tokenizer, peft_config=peft_config)
    [name] = [name for name in recorded.gradients[0] if "lm_head" in name]
    assert float(recorded.gradients[0][name].abs().max()) > 1e-3
    wrapper = trainer.model.get_base_model().lm_head
    assert torch.equal(wrapper.original_module.weight, original)
    assert not torch.equal(wrapper.weight, original)


LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
HEADS_AND_ADAPTERS = {
    "all weights": None,
    "embeddings": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "embeddings and head": LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "both, kept tied": LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "some tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "low rank embeddings": LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", HEADS_AND_ADAPTERS)
def test_the_loss_is_of_the_logits_the_adapted_model_answers_with(adapter, tied, teacher, tokenizer, cache, tmp_path):
    """A tied head moves with its embeddings, and a copy of it without them."""
    peft_config = copy.deepcopy(HEADS_AND_ADAPTERS[adapter])
    student = tiny_llama(seed=1, tie_word_embeddings=tied)
    args = tiny_config(tmp_path, max_steps=3, learning_rate=3e-2)
    trainer, recorded = run(student, args, cache, tokenizer, peft_config=peft_config)
    loss = trainer.evaluate(cache)["eval_kl"]
    assert abs(loss - recorded.logs[0]["kl"]) > 1e-3
    model, total, count = trainer.model.eval(), 0.0, 0
    for row in cache:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        positions = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        target = torch.tensor(row["teacher_topk_logprobs"]).log_softmax(-1)
        ids = torch.tensor(row["teacher_topk_ids"])
        own = logprobs[[t - 1 for t in positions]].gather(1, ids)
        total += float((target.exp() * (target - own)).sum())
        count += len(positions)
    assert loss == pytest.approx(total / count, rel=1e-5)


REFUSED_ADAPTERS = {
    "prompt learning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "Prompt-learning PEFT"),
    "lm_head": (LoraConfig(target_modules=["q_proj", "lm_head"]), "adapter to `lm_head` is not supported"),
}


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_refused_adapters(case, teacher, tokenizer, cache, tmp_path):
    peft_config, message = REFUSED_ADAPTERS[case]
    with pytest.raises(ValueError, match=message):
        FirstDistillTrainer(
            copy.deepcopy(teacher), tiny_config(tmp_path), cache, processing_class=tokenizer, peft_config=peft_config
        )


def edit_entries(name, change):
    def edit(row):
        values = np.array(row[name], dtype=np.float64)
        change(values)
        row[name] = values.tolist()

    return edit


def set_nan(values):
    values.flat[0] = np.nan


def set_positive(values):
    values.flat[0] = 0.5


def double(values):
    values *= 2


BROKEN = {
    "NaN": (edit_entries("teacher_topk_logprobs", set_nan), "holds NaN"),
    "positive": (edit_entries("teacher_topk_logprobs", set_positive), "positive value"),
    "tempered": (edit_entries("teacher_topk_logprobs", double), "full-vocabulary softmax at temperature 1"),
    "NaN tail": (edit_entries("teacher_tail_logprob", set_nan), "`teacher_tail_logprob` is NaN"),
    "labels": (lambda row: row["labels"].__setitem__(-1, -100), "Labels changed after the capture"),
    "wrong label": (lambda row: row["labels"].__setitem__(-1, 3 + row["labels"][-1] % 3), "differs from the token"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_refused(case, teacher, tokenizer, tmp_path):
    edit, message = BROKEN[case]
    cache = tiny_cache(teacher, tokenizer, tiny_rows(), k=5, edit=edit)
    with pytest.raises(ValueError, match=message):
        FirstDistillTrainer(teacher, tiny_config(tmp_path), cache, processing_class=tokenizer)


def mask_all(row):
    row["labels"] = [-100] * len(row["labels"])
    for name in ("teacher_topk_ids", "teacher_topk_logprobs", "teacher_tail_logprob"):
        row[name] = []


def test_refused_datasets(teacher, tokenizer, cache, tmp_path):
    def build(dataset, processing_class=tokenizer, student=teacher, **options):
        return FirstDistillTrainer(
            student, tiny_config(tmp_path, **options), dataset, processing_class=processing_class
        )

    with pytest.raises(ValueError, match="`train_dataset` is required: a teacher cache"):
        build(None)
    with pytest.raises(ValueError, match="Missing teacher cache columns"):
        build(cache.select_columns(["input_ids", "labels"]))
    with pytest.raises(ValueError, match=r"Missing teacher cache columns \['teacher_tail_logprob'\]"):
        build(cache.remove_columns("teacher_tail_logprob"))
    with pytest.raises(ValueError, match="cache is empty"):
        build(cache.select([]))
    with pytest.raises(ValueError, match=r"All labels are masked \(-100\)"):
        build(tiny_cache(teacher, tokenizer, tiny_rows(), edit=mask_all))
    with pytest.raises(ValueError, match="the same ids would mean other tokens"):
        build(cache, processing_class=tiny_tokenizer(prefix="v"))
    with pytest.raises(ValueError, match="do not exist in the student's head of 20 rows"):
        build(cache, student=tiny_llama(vocab_size=20))
    with pytest.raises(ValueError, match="No row of the train dataset keeps a supervised position"):
        build(cache, max_length=1)
    with pytest.raises(ValueError, match="num_draws"):
        build(cache, estimator="sampled")
    with pytest.raises(ValueError, match="carries no fitted"):
        build(cache, recalibration="probability_temperature")
    with pytest.raises(ValueError, match="`top_k` must be an integer from 1 to the 24 tokens"):
        build(cache, top_k=25).train()


def test_a_student_loaded_by_name_needs_all_cached_ids(teacher, tokenizer, cache, tmp_path):
    tiny_llama(vocab_size=20).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"Cached id 2[0-3] does not exist in the student's head of 20 rows"):
        FirstDistillTrainer(str(tmp_path / "small"), tiny_config(tmp_path), cache, processing_class=tokenizer)


@pytest.mark.parametrize("name", ["compute_loss_func", "data_collator", "formatting_func"])
def test_refused_arguments(name, teacher, tokenizer, cache, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        FirstDistillTrainer(teacher, tiny_config(tmp_path), cache, processing_class=tokenizer, **{name: print})


def test_args_of_another_trainer_are_refused(teacher, tokenizer, cache, tmp_path):
    from trl import SFTConfig

    with pytest.raises(TypeError, match="must be a `FirstDistillConfig`"):
        FirstDistillTrainer(teacher, SFTConfig(str(tmp_path), bf16=False, use_cpu=True), cache)


def test_renormalized_warns_about_the_tail(teacher, tokenizer, cache, tmp_path):
    with pytest.warns(UserWarning, match="constrains only the ratios"):
        FirstDistillTrainer(
            teacher, tiny_config(tmp_path, estimator="renormalized"), cache, processing_class=tokenizer
        )


def test_probability_softmax_warns_that_it_is_for_replication(teacher, tokenizer, cache, tmp_path):
    with pytest.warns(UserWarning, match="for replication of the authors' code"):
        FirstDistillTrainer(
            teacher, tiny_config(tmp_path, estimator="probability_softmax"), cache, processing_class=tokenizer
        )


def test_a_cache_under_a_transform_is_refused(teacher, tokenizer, cache, tmp_path):
    """The stored columns are read, and the transform would be passed over; also where rows are captured and fitted."""
    under = cache.with_transform(lambda batch: batch)
    rows = Dataset.from_list(tiny_rows()).with_transform(lambda batch: batch)
    for build in (
        lambda: FirstDistillTrainer(teacher, tiny_config(tmp_path), under, processing_class=tokenizer),
        lambda: FirstDistillTrainer(
            teacher, tiny_config(tmp_path), cache, eval_dataset=under, processing_class=tokenizer
        ),
        lambda: add_teacher_topk(rows, teacher, tokenizer, k=2, output_dir=tmp_path / "cache", disable_tqdm=True),
        lambda: verify_teacher_cache(under, tokenizer),
        lambda: fit_recalibration(under, method="logit_temperature"),
    ):
        with pytest.raises(ValueError, match=r"has a transform .* would be ignored here. Apply it with `dataset.map"):
            build()


def test_an_adapter_on_a_resized_head_is_refused(tokenizer, cache, tmp_path):
    """It names the model that was resized as its base, and would not load on it again."""
    tiny_llama(seed=1).save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2)
    resized = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(VOCAB, pad_to_multiple_of=64)
    rows = Dataset.from_list(tiny_rows())
    for build in (
        lambda: FirstDistillTrainer(
            resized, tiny_config(tmp_path / "out"), cache, processing_class=tokenizer, peft_config=lora
        ),
        lambda: FirstSFTTrainer(resized, train_dataset=rows, processing_class=tokenizer, peft_config=lora),
    ):
        with pytest.raises(
            ValueError, match=r"embeddings of the student have 64 rows.* have 24. Save the resized model"
        ):
            build()
    # As the message says
    resized.save_pretrained(tmp_path / "padded")
    padded = LlamaForCausalLM.from_pretrained(tmp_path / "padded")
    trainer, _ = run(padded, tiny_config(tmp_path / "out"), cache, tokenizer, peft_config=lora)
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "padded"), tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


class Suppressed(LlamaForCausalLM):
    """A teacher that never says some tokens, and is nearly certain of one."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits[..., 5:9] = -torch.inf
        outputs.logits[..., 11] += 600
        return outputs


@pytest.mark.parametrize("k", [4, VOCAB - 4, VOCAB])
@pytest.mark.parametrize("estimator", ["topk", "bucket", "renormalized", "sampled"])
def test_suppressed_tokens_and_near_certainty_keep_losses_finite(estimator, k, tokenizer, tmp_path):
    """Log-probabilities of -600 and -inf are what float16 holds of such a teacher."""
    teacher = Suppressed(tiny_llama().config).eval()
    cache = add_teacher_topk(
        Dataset.from_list(tiny_rows()), teacher, tokenizer, k=k, num_draws=5, output_dir=tmp_path / "cache",
        disable_tqdm=True,
    )  # fmt: skip
    lowest = min(min(entry) for row in cache["teacher_topk_logprobs"] for entry in row)
    assert lowest < -500
    student = tiny_llama(seed=1)
    trainer, recorded = run(
        student, tiny_config(tmp_path, estimator=estimator, max_steps=2), cache, tokenizer, eval_dataset=cache
    )
    for values in (*recorded.logs, trainer.evaluate()):
        assert all(np.isfinite(value) for value in values.values() if isinstance(value, float)), values
    assert all(torch.isfinite(gradient).all() for gradient in recorded.gradients[0].values())
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
