"""Parameters, memory and steps of a plan, against real models, optimisers and data loaders."""

import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

import first_trl
from first_trl import FirstDistillTrainer
from first_trl.experiments.plan.memory import capture_memory, training_memory
from first_trl.experiments.plan.models import Shape, UnknownModel, config_of, lora_parameters, shape_of
from first_trl.experiments.plan.schema import MemoryPlan, Plan, SettingPlan
from first_trl.experiments.plan.steps import device_batch, optimizer_steps
from first_trl.experiments.recipe import ModelSpec
from first_trl.training.precision import cast_to_master_weights
from tests.support.tiny import VOCAB, tiny_cache, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


CONFIGS = Path(first_trl.__file__).parent / "experiments" / "plan" / "model_configs"

# Totals that the Hub shows for the checkpoints (safetensors metadata) and, for Llama-1, that the paper's parameter
# table gives (6.7 and 32.5 billion); in billions
TOTALS = {
    "huggyllama/llama-30b": 32.529,
    "huggyllama/llama-7b": 6.738,
    "meta-llama/Llama-2-13b-hf": 13.016,
    "meta-llama/Llama-2-7b-hf": 6.738,
    "openlm-research/open_llama_13b": 13.016,
    "openlm-research/open_llama_7b": 6.738,
    "Qwen/Qwen1.5-7B": 7.721,
    "Qwen/Qwen1.5-1.8B": 1.837,
    "Qwen/Qwen2.5-1.5B": 1.544,
    "Qwen/Qwen2.5-0.5B": 0.494,
    "Qwen/Qwen3-32B": 32.762,
    "Qwen/Qwen3-14B": 14.768,
    "Qwen/Qwen3-14B-Base": 14.768,
    "Qwen/Qwen3-8B": 8.191,
    "Qwen/Qwen3-8B-Base": 8.191,
    "Qwen/Qwen3-4B": 4.022,
    "Qwen/Qwen3-4B-Base": 4.022,
    "Qwen/Qwen3-1.7B": 1.721,
    "Qwen/Qwen3-1.7B-Base": 1.721,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-0.6B-Base": 0.596,
    "meta-llama/Llama-3.1-8B": 8.030,
    "meta-llama/Llama-3.2-3B": 3.213,
    "meta-llama/Llama-3.2-1B": 1.236,
    "HuggingFaceTB/SmolLM3-3B": 3.075,
    "HuggingFaceTB/SmolLM3-3B-Base": 3.075,
    "HuggingFaceTB/SmolLM2-1.7B": 1.711,
    "HuggingFaceTB/SmolLM2-360M": 0.362,
    "HuggingFaceTB/SmolLM2-135M": 0.1345,
    "google/gemma-3-4b-pt": 4.300,
    "google/gemma-3-1b-pt": 1.000,
    "google/gemma-3-270m": 0.268,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def shape(name: str, **init_kwargs) -> Shape:
    spec = ModelSpec(name_or_path=name, init_kwargs=init_kwargs)
    return shape_of(spec, config_of(spec, "teacher", None, CONFIGS))


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_are_those_of_the_real_model(name):
    assert shape(name).parameters == pytest.approx(TOTALS[name] * 1e9, rel=0.002)


def test_every_fixture_is_checked():
    assert {path.name.replace("--", "/") for path in CONFIGS.iterdir()} == set(TOTALS)


def test_a_model_from_scratch_counts_as_built():
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    for tied in (True, False):
        spec = ModelSpec(architecture="llama", config={**config, "tie_word_embeddings": tied})
        found = shape_of(spec, config_of(spec, "student", 77))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=77, **spec.config))
        assert found.parameters == model.num_parameters()
        assert found.largest_layer == sum(weight.numel() for weight in model.model.layers[0].parameters())
        assert (found.vocabulary, found.layers, found.dtype) == (77, 3, "float32")


def test_lora_counts_are_exact():
    spec = ModelSpec(name_or_path="meta-llama/Llama-2-7b-hf")
    config = config_of(spec, "student", None, CONFIGS)
    # Two matrices of rank 8 on each 4096 x 4096 query and value projection of 32 layers
    lora = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    assert lora_parameters(config, lora) == 32 * 2 * 2 * 8 * 4096 == 4_194_304
    model = tiny_llama()
    wanted = get_peft_model(
        tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=["norm"])
    ).get_nb_trainable_parameters()[0]
    options = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["norm"]}
    assert lora_parameters(model.config, options) == wanted


def test_an_unknown_model_says_how_to_mend_it():
    spec = ModelSpec(name_or_path="nobody/nothing-7b")
    with pytest.raises(UnknownModel, match=r"nobody/nothing-7b.*student\.name_or_path=FOLDER"):
        config_of(spec, "student", None, CONFIGS)
    with pytest.raises(UnknownModel, match=r"student\.config\.vocab_size=SIZE"):
        config_of(ModelSpec(architecture="llama"), "student", None)


def test_dtype_and_quantisation_decide_the_bytes_of_a_weight():
    assert (shape("Qwen/Qwen3-4B").dtype, shape("Qwen/Qwen3-4B").weight_bytes) == ("bfloat16", 2.0)
    assert shape("Qwen/Qwen3-4B", dtype="float32").weight_bytes == 4.0
    assert shape("Qwen/Qwen3-4B", quantization_config={"load_in_4bit": True}).weight_bytes < 0.6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_weights_gradients_and_adamw_are_those_of_a_real_step(tmp_path, dtype, lora):
    tiny_llama().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    spec = ModelSpec(name_or_path=str(tmp_path), init_kwargs={"dtype": dtype})
    config = config_of(spec, "student", None)
    trainable = None if lora is None else lora_parameters(config, lora)
    parts = training_memory(shape_of(spec, config), {}, tokens=None, trainable=trainable)
    if lora is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    cast_to_master_weights(model, "adamw_torch")
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned)
    ids = torch.tensor([[3, 4, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert parts["weights"] == sum(weight.nbytes for weight in model.parameters())
    assert parts["gradients"] == sum(weight.grad.nbytes for weight in learned)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    assert parts["optimizer"] == sum(value.nbytes for value in moments)


LORA = {"r": 8, "target_modules": "all-linear"}
STEPS = {
    "plain": {},
    "checkpoints": {"gradient_checkpointing": True},
    "autocast": {"bf16": True},
    "tied, autocast, checkpoints": {"tied": True, "bf16": True, "gradient_checkpointing": True},
    "large vocabulary": {"vocabulary": 8000, "bf16": True},
    "LoRA": {"lora": LORA},
    "LoRA on 16 bits, autocast": {"lora": LORA, "dtype": "bfloat16", "bf16": True},
}


@pytest.mark.parametrize(
    "case", ["autocast", *(pytest.param(case, marks=pytest.mark.slow) for case in STEPS if case != "autocast")]
)
def test_a_plan_is_what_a_step_takes_from_the_allocator(case, tmp_path):
    """Every byte that the CPU allocator gives in a step of two micro-batches, at its peak."""
    options = {"tied": False, "vocabulary": 1000, "lora": None, "dtype": "float32"} | STEPS[case]
    training = {name: options.get(name, False) for name in ("gradient_checkpointing", "bf16")}
    config = LlamaConfig(
        vocab_size=options["vocabulary"], hidden_size=64, intermediate_size=176, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, tie_word_embeddings=options["tied"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, options["dtype"]))
    ids = np.random.default_rng(0).integers(3, VOCAB, (32, 64)).tolist()
    cache = tiny_cache(tiny_llama(), tiny_tokenizer(), [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids])
    peak = Peak()
    trainer = FirstDistillTrainer(
        model,
        tiny_config(
            tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=2, **training
        ),
        cache,
        processing_class=tiny_tokenizer(),
        callbacks=[peak],
        peft_config=None if options["lora"] is None else LoraConfig(task_type="CAUSAL_LM", **options["lora"]),
    )  # fmt: skip
    trainer.train()
    spec = ModelSpec(architecture="llama", init_kwargs={"dtype": options["dtype"]})
    parts = training_memory(
        shape_of(spec, config), training, tokens=8 * 64, device="cpu",
        trainable=None if options["lora"] is None else lora_parameters(config, options["lora"]),
    )  # fmt: skip
    assert 0.93 < sum(parts.values()) / peak.bytes < 1.07


class Peak(TrainerCallback):
    """Bytes of weights and moments, and the most that the second step adds to them."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 1:
            moments = [value for each in optimizer.state.values() for value in each.values()]
            self.bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *moments])
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.profile.stop()
            events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            given = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
            assert given[-1] < 1000  # whatever the step took, it gave back
            self.bytes += int(given.max())


def test_what_does_not_fit_is_said_with_what_helps():
    parts = training_memory(shape("Qwen/Qwen3-8B"), {}, tokens=4096)
    training = MemoryPlan("student, distillation", parts, "4 rows of up to 1024 tokens")
    capture = MemoryPlan("teacher, capture", capture_memory(shape("Qwen/Qwen3-8B"), 8192))
    setting = SettingPlan({}, [], [], [training, capture, MemoryPlan("unknown")], [], [])
    plan = Plan("p", "", 1, "none", [setting, setting], [])
    assert plan.too_large_for(200e9) == []
    (said,) = plan.too_large_for(80e9)
    assert said.startswith("student, distillation (4 rows of up to 1024 tokens) needs about 15")
    assert "there are 80.0 GB. Most of it is optimizer: LoRA, `optim: adamw_bnb_8bit`" in said
    assert len(plan.too_large_for(16e9)) == 2 and "serve it" in plan.too_large_for(16e9)[1]


def test_sharding_divides_and_checkpointing_saves():
    model = shape("Qwen/Qwen3-8B")

    def total(training=(), **options):
        parts = training_memory(model, dict(training), tokens=4096, **options)
        return sum(value for name, value in parts.items() if name != "head")

    # 4 bytes a weight and gradient, 2 x 4 of AdamW, and 2 of the copy that autocast makes; the gradient of the head
    # and the activations of 4,096 tokens are small beside it
    assert 18 * 8.19e9 < total() < 19 * 8.19e9
    # 2 bytes each with an optimizer for 16-bit weights, which needs no copy
    assert 8 * 8.19e9 < total({"optim": "stable_adamw"}.items()) < 9 * 8.19e9
    head = training_memory(model, {}, tokens=None)["head"]
    assert head == 4 * model.vocabulary * model.hidden > 2e9
    assert training_memory(model, {}, tokens=None, sharding="zero3", processes=8)["head"] == 1.5 * head
    assert training_memory(model, {}, tokens=None, sharding="fsdp2", processes=8)["head"] == 2 * head
    assert training_memory(model, {}, tokens=None, trainable=1000)["head"] == 0
    assert total(processes=8) > total()  # buckets of gradients
    for sharding in ("fsdp2", "zero3"):
        assert total(processes=16, sharding=sharding) < 0.65 * total(processes=8, sharding=sharding)
    assert total({"gradient_checkpointing": False}.items()) > total() + 5e9
    assert total({"optim": "adamw_bnb_8bit"}.items()) < total() - 2e10
    assert total(trainable=40_000_000) < 0.35 * total()
    capture = capture_memory(model, 8192)
    assert capture["weights"] == 2 * model.parameters
    assert capture["activations"] > 8192 * model.vocabulary * 2


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 33])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"num_train_epochs": 2.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 4, "dataloader_drop_last": True},
        {"max_steps": 11},
    ],
)
def test_steps_are_those_of_the_trainer(tmp_path, rows, training):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None, **training)
    if args.dataloader_drop_last and rows < args.per_device_train_batch_size:
        pytest.skip("no batch is left")
    dataset = Dataset.from_list(tiny_rows(rows))
    trainer = SFTTrainer(tiny_llama(), args, train_dataset=dataset, processing_class=tiny_tokenizer())
    values = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert optimizer_steps(rows, training, 1) == values[6]


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_the_batches_as_accelerate_shares_them(drop_last):
    for rows in range(48, 140, 7):
        for processes in (2, 3, 8):
            batches = BatchSampler(SequentialSampler(range(rows)), 4, drop_last)
            shard = BatchSamplerShard(batches, processes, 0)
            training = {
                "num_train_epochs": 1, "per_device_train_batch_size": 4, "dataloader_drop_last": drop_last
            }  # fmt: skip
            assert optimizer_steps(rows, training, processes) == len(shard)


def test_the_global_batch_is_divided():
    training = {"global_batch_size": 32, "gradient_accumulation_steps": 2}
    assert [device_batch(training, processes) for processes in (1, 2, 8)] == [16, 8, 2]
    assert optimizer_steps(1000, {**training, "num_train_epochs": 3}, 2) == 3 * 32
    with pytest.raises(ValueError, match="global_batch_size=32 does not divide by 6"):
        optimizer_steps(1000, training, 3)


def test_fixtures_hold_facts_only():
    for path in CONFIGS.glob("*/config.json"):
        assert {"model_type", "architectures"} <= set(json.loads(path.read_text()))


def test_without_network_the_recipes_own_models_are_known_at_once(monkeypatch):
    """One question to the Hub, not one a file until the retries are used up."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []

        def hang_up():
            while True:
                try:
                    asked.append(server.accept()[0].close())
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        config = config_of(ModelSpec(name_or_path="openlm-research/open_llama_13b"), "teacher", None)
        with pytest.raises(UnknownModel, match="no configuration of 'someone/else'"):
            config_of(ModelSpec(name_or_path="someone/else"), "student", None)
        server.shutdown(socket.SHUT_RDWR)
    assert (config.hidden_size, config.num_hidden_layers) == (5120, 40)
    assert len(asked) == 1 and constants.HF_HUB_OFFLINE is False
