"""Models, tokenizers and caches of a few kilobytes, built in code, for tests of the trainer."""

import copy
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from first_trl import FirstDistillConfig, FirstDistillTrainer
from first_trl.cache.manifest import tokenizer_fingerprint
from first_trl.cache.schema import CacheBatch, cache_features


VOCAB = 24


def tiny_tokenizer(vocab_size: int = VOCAB, prefix: str = "w") -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"{prefix}{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny_llama(seed: int = 0, vocab_size: int = VOCAB, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(options | overrides))).eval()


def tiny_gpt2(seed: int = 0, vocab_size: int = VOCAB) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def tiny_rows(count: int = 8, vocab_size: int = VOCAB, longest: int = 12, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of different lengths, with prompts masked, supervised spans interrupted and one label on the first token."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ids = rng.integers(3, vocab_size, rng.integers(4, longest + 1)).tolist()
        prompt = int(rng.integers(1, len(ids)))
        labels = [-100] * prompt + ids[prompt:]
        if i % 3 == 0:
            labels[0] = ids[0]  # nothing predicts it: never scored
        if i % 4 == 1 and len(ids) - prompt > 2:
            labels[prompt + 1] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def tiny_cache(
    teacher: PreTrainedModel,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    *,
    k: int = VOCAB,
    dtype: str = "float32",
    num_draws: int = 0,
    edit: Callable[[dict[str, Any]], None] | None = None,
) -> Dataset:
    """
    A cache written without the capture code: full log-softmax, one row at a time, in float64. `edit` changes a row
    before its digest is computed, which is what a wrong capture would do.
    """
    model = copy.deepcopy(teacher).double().eval()
    rng = np.random.default_rng(0)
    cache_id = f"0123456789abcdef:{tokenizer_fingerprint(tokenizer)}"
    built = []
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).numpy()
        positions = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        entries = logprobs[[t - 1 for t in positions]]
        order = np.argsort(-entries, axis=1, kind="stable")
        kept = np.take_along_axis(entries, order, 1)
        with np.errstate(divide="ignore"):
            tail = np.log(np.exp(kept[:, k:]).sum(1))
        built.append(
            {
                **row,
                "teacher_topk_ids": order[:, :k].tolist(),
                "teacher_topk_logprobs": kept[:, :k].astype(dtype).tolist(),
                "teacher_tail_logprob": tail.tolist(),
                "teacher_cache": cache_id,
                "teacher_row_digest": 0,
            }
        )
        if num_draws:
            draws = [
                np.unique(rng.choice(len(p), num_draws, p=p / p.sum()), return_counts=True) for p in np.exp(entries)
            ]
            built[-1]["teacher_draw_ids"] = [ids.tolist() for ids, _ in draws]
            built[-1]["teacher_draw_counts"] = [counts.tolist() for _, counts in draws]
        if edit is not None:
            edit(built[-1])
    return with_digests(Dataset.from_list(built, features=cache_features(dtype, draws=num_draws > 0)))


def with_digests(dataset: Dataset) -> Dataset:
    table = dataset.with_format("arrow")[:]
    digests = CacheBatch.from_arrow(table).row_digests()
    index = table.column_names.index("teacher_row_digest")
    return Dataset(table.set_column(index, "teacher_row_digest", pa.array(digests)))


def tiny_config(output_dir: Any, **overrides: Any) -> FirstDistillConfig:
    """One step on the CPU in float32 without clipping, so that what is measured is the loss and its gradient."""
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    return FirstDistillConfig(**(options | overrides))


class GradientRecorder(TrainerCallback):
    """Keeps the gradients and losses of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(
            {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def run(
    student: Any, args: FirstDistillConfig, cache: Any, tokenizer: Any, **kwargs: Any
) -> tuple[FirstDistillTrainer, GradientRecorder]:
    """Train, and return the trainer with what was recorded."""
    recorder = GradientRecorder()
    trainer = FirstDistillTrainer(
        model=student, args=args, train_dataset=cache, processing_class=tokenizer, callbacks=[recorder], **kwargs
    )
    trainer.train()
    return trainer, recorder


class StopAt(TrainerCallback):
    """Kills the process at the end of a step, as a lost machine would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
