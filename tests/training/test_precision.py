"""Weights that are loaded in 16 bits move as float32 ones do, and a training whose updates are rounded away says so."""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LNTuningConfig, LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from first_trl import FirstDistillTrainer
from first_trl.experiments.recipe import ModelSpec
from first_trl.experiments.run_folder import TrainingFolder
from first_trl.experiments.stages.training import load_trained, make_model
from first_trl.training.sft import FirstSFTTrainer
from tests.support.tiny import tiny_cache, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)
STEPS = 150


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def cache(tokenizer):
    return tiny_cache(tiny_llama(), tokenizer, tiny_rows(), k=5)


def sft_config(folder, **options):
    return SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=8, lr_scheduler_type="constant", logging_steps=1, **options,
    )  # fmt: skip


def trained(kind, student, cache, tokenizer, folder, **options):
    options = {"max_steps": STEPS, "learning_rate": 1e-5, **options}
    if kind == "distill":
        trainer = FirstDistillTrainer(student, tiny_config(folder, **options), cache, processing_class=tokenizer)
    else:
        rows = Dataset.from_list(tiny_rows())
        trainer = FirstSFTTrainer(
            student, args=sft_config(folder, **options), train_dataset=rows, processing_class=tokenizer
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["distill", "sft"])
def test_a_model_loaded_in_bfloat16_learns_like_a_float32_one(kind, cache, tokenizer, tmp_path):
    """As the pipeline loads it: every weight moves, norm weights too, and the loss is that of float32."""
    tiny_llama(seed=1).bfloat16().save_pretrained(tmp_path / "base")
    losses = {}
    for dtype in ("bfloat16", "float32"):
        spec = ModelSpec(name_or_path=str(tmp_path / "base"), init_kwargs={"dtype": dtype})
        student = make_model(spec, None, 0, "student")
        before = copy.deepcopy(student).float().state_dict()
        trainer = trained(kind, student, cache, tokenizer, tmp_path / dtype)
        losses[dtype] = trainer.evaluate(cache if kind == "distill" else Dataset.from_list(tiny_rows()))["eval_loss"]
        trainer.save_model(str(tmp_path / dtype / "model"))
        saved = load_trained(
            TrainingFolder(tmp_path / dtype), ModelSpec(name_or_path="x", init_kwargs={"dtype": "float32"}), None
        )
        for name, weight in saved.state_dict().items():
            moved = weight != before[name]
            if "embed_tokens" in name:
                # Tokens that nothing is predicted from have no gradient
                moved = moved[sorted({token for row in tiny_rows() for token in row["input_ids"][:-1]})]
            assert moved.float().mean() >= 0.99, name
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    # What is frozen stays in 16 bits: a model that is run is loaded as the recipe says
    spec = ModelSpec(name_or_path="x", init_kwargs={"dtype": "bfloat16"})
    assert load_trained(TrainingFolder(tmp_path / "bfloat16"), spec, None).dtype == torch.bfloat16


ADAPTERS = {
    "lora": {"target_modules": "all-linear"},
    "lora and a norm": {"target_modules": "all-linear", "modules_to_save": ["norm"]},
    "lora and the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_float32_over_a_16_bit_base(adapter, autocast, cache, tokenizer, tmp_path):
    student = tiny_llama(seed=1).bfloat16()
    trainer = FirstDistillTrainer(
        student,
        tiny_config(tmp_path, max_steps=2, bf16=autocast),
        cache,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, **ADAPTERS[adapter]),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert before and all(tensor.dtype == torch.float32 for tensor in before.values())
    whole = not autocast and "modules_to_save" in ADAPTERS[adapter]
    assert trainer.model.get_base_model().model.embed_tokens.weight.dtype == (
        torch.float32 if whole else torch.bfloat16
    )
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all((after[name] != tensor).any() for name, tensor in before.items())


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_alone(autocast, cache, tokenizer, tmp_path):
    trainer = FirstDistillTrainer(
        tiny_llama(seed=1).bfloat16(),
        tiny_config(tmp_path, max_steps=3, learning_rate=1e-5, bf16=autocast),
        cache,
        processing_class=tokenizer,
        peft_config=LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert before and all((after[name] != weight).all() for name, weight in before.items())


@pytest.mark.parametrize("kind", ["distill", "sft"])
@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_a_model_that_was_cast_is_trained_as_it_is_loaded(kind, rope_type, tokenizer, tmp_path):
    """A cast of the whole model rounds its rotary frequencies, and nobody stores them."""
    rows = tiny_rows(longest=400)
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    student = tiny_llama(seed=1, head_dim=64, max_position_embeddings=512, rope_parameters=rope).bfloat16()
    cache = tiny_cache(tiny_llama(max_position_embeddings=512), tokenizer, rows, k=5)
    if kind == "distill":
        args = tiny_config(tmp_path, max_length=None)
        trainer = FirstDistillTrainer(student, args, cache, processing_class=tokenizer)
    else:
        args = sft_config(tmp_path, max_steps=1, max_length=None)
        trainer = FirstSFTTrainer(
            student, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    ids = torch.tensor([max((row["input_ids"] for row in rows), key=len)])
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.eval()(ids).logits, loaded(ids).logits, atol=1e-4, rtol=0)


def test_half_of_a_model_frozen(cache, tokenizer, tmp_path):
    student = tiny_llama(seed=1).bfloat16()
    for parameter in student.model.layers[0].parameters():
        parameter.requires_grad = False
    trainer = trained("distill", student, cache, tokenizer, tmp_path, max_steps=2)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


def test_float16_weights_are_trained_in_float32(cache, tokenizer, tmp_path):
    trainer = trained("sft", tiny_llama(seed=1).half(), cache, tokenizer, tmp_path, max_steps=1)
    assert trainer.model.dtype == torch.float32


def own_optimizer(model, rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.mark.parametrize("kind", ["distill", "sft"])
@pytest.mark.parametrize("rate, rounded", [(1e-5, True), (5e-2, False)])
def test_updates_that_are_rounded_away_are_noticed(kind, rate, rounded, cache, tokenizer, tmp_path):
    """With an optimizer object of one's own the weights stay as they are, and the first steps are watched."""
    student = tiny_llama(seed=1).bfloat16()
    options = {"max_steps": 9, "learning_rate": rate}
    if kind == "distill":
        trainer = FirstDistillTrainer(
            student,
            tiny_config(tmp_path, **options),
            cache,
            processing_class=tokenizer,
            optimizers=own_optimizer(student, rate),
        )
    else:
        trainer = FirstSFTTrainer(
            student,
            args=sft_config(tmp_path, **options),
            train_dataset=Dataset.from_list(tiny_rows()),
            processing_class=tokenizer,
            optimizers=own_optimizer(student, rate),
        )
    assert trainer.model.dtype == torch.bfloat16
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(w.message) for w in caught if "rounded away" in str(w.message)]
    assert len(messages) == rounded
    if rounded:
        share = float(messages[0].split("changes ")[1].split("%")[0])
        assert share < 15
        assert "learning rate of 1e-05" in messages[0] and "bfloat16" in messages[0] and "bf16=True" in messages[0]
