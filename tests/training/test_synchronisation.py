"""A step of training never waits for the device: what the host must know of a batch, the collator's worker finds out."""

import sys
from collections import Counter

import pytest
import torch
from datasets import Dataset
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trl import SFTConfig

from first_trl import FirstSFTTrainer
from first_trl.losses.head import add_distill_head
from first_trl.training.collator import label_targets, place_targets
from tests.support.tiny import VOCAB, run, tiny_cache, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)
# On a GPU, the host waits until their result, or its size, is known
WAITS = {
    "_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "bincount", "isin",
}  # fmt: skip
OTHERS = ("transformers", "trl", "accelerate", "peft")


def count(found, name):
    """Under the line that the operation comes from, where it is ours or, in a backward pass, nobody's."""
    frame = sys._getframe(1)
    while frame is not None:
        room = frame.f_globals.get("__name__", "").split(".")[0]
        if room in OTHERS:
            return
        if room == "first_trl":
            break
        frame = frame.f_back
    place = "backward" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
    found[f"{name} at {place}"] += 1


class Reads(TorchFunctionMode):
    """Counts what reads a tensor on a CPU without an operation."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "__contains__"):
            count(self.found, name)
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """
    Counts the operations of a step that wait, those that other libraries call aside. A step of transformers has some of
    its own: the look for NaN losses (`logging_nan_inf_filter`), the count of labels, attention masks.
    """

    def __init__(self):
        super().__init__()
        self.ours = Counter()
        self.reads = Reads(self.ours)

    def __enter__(self):
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # A tensor made of Python numbers is moved to the device while the host waits
        if name in WAITS or masks or name == "lift_fresh":
            count(self.ours, name)
        return func(*args, **(kwargs or {}))


def watched(cls):
    """The trainer, counting from its second step on: the first one checks the student."""

    class Watched(cls):
        waits = Waits()
        steps = 0

        def training_step(self, *args, **kwargs):
            type(self).steps += 1
            if self.steps == 1:
                return super().training_step(*args, **kwargs)
            with self.waits:
                return super().training_step(*args, **kwargs)

    return Watched


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def cache(tokenizer):
    return tiny_cache(tiny_llama(1), tokenizer, tiny_rows(9, longest=20), k=4, num_draws=5)


MODES = {
    "padded": {},
    "bucket": {"estimator": "bucket", "ce_weight": 0.3},
    "renormalized": {"estimator": "renormalized"},
    "sampled": {"estimator": "sampled"},
    "padding free": {"padding_free": True, "max_length": None},
    "token dropout": {"token_dropout": 0.3},
    "checkpointed, accumulated": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*renormalized")
def test_distillation(mode, cache, tokenizer, tmp_path, monkeypatch):
    options = {"max_steps": 3, "logging_steps": 3, "per_device_train_batch_size": 3, **MODES[mode]}
    trainer = watch(monkeypatch)
    run(tiny_llama(), tiny_config(tmp_path, **options), cache, tokenizer)
    assert trainer.steps >= 3
    assert not trainer.waits.ours


def watch(monkeypatch):
    from tests.support import tiny

    trainer = watched(tiny.FirstDistillTrainer)
    monkeypatch.setattr(tiny, "FirstDistillTrainer", trainer)
    return trainer


def test_experts(cache, tokenizer, tmp_path, monkeypatch):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    student = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        )
    )  # fmt: skip
    trainer = watch(monkeypatch)
    _, recorder = run(student, tiny_config(tmp_path, max_steps=3, router_aux_loss_coef=0.1), cache, tokenizer)
    assert recorder.logs[-2]["aux_loss"] > 0.5
    assert not trainer.waits.ours


@pytest.mark.parametrize("layout", [{}, {"padding_free": True, "max_length": None}])
def test_labels(layout, tokenizer, tmp_path):
    trainer = watched(FirstSFTTrainer)
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 3,
        "save_strategy": "no", "per_device_train_batch_size": 3, "logging_steps": 3,
    }  # fmt: skip
    trainer(
        tiny_llama(),
        args=SFTConfig(str(tmp_path), **settings, **layout),
        train_dataset=Dataset.from_list(tiny_rows(9, longest=20)),
        processing_class=tokenizer,
        fused_loss=True,
        token_dropout=0.2,
    ).train()
    assert trainer.steps == 3
    assert not trainer.waits.ours


def test_without_positions_the_step_waits():
    """The count sees what it is to see: without the collator's help, the head looks for the positions itself."""
    student = tiny_llama()
    add_distill_head(student, "topk", 0.0, None)
    batch = {"input_ids": torch.tensor([[4, 5, 6]]), "labels": torch.tensor([[-100, 5, 6]])}
    batch |= label_targets(batch["labels"])
    waits = Waits()
    with waits:
        student(**batch)
    assert [entry.split(" at ")[0] for entry in waits.ours] == ["nonzero", "tolist"]
    place_targets(batch, VOCAB)
    waits = Waits()
    with waits:
        student(**batch)
    assert not waits.ours
