"""
A training step of a real model on one-token answers, against a loop written by hand with the same maths.

The hand-written loop runs the layers in bfloat16 under autocast on float32 weights, takes the hidden state at the answer
position, projects that alone onto the vocabulary, and makes the loss (cross-entropy of the label, or KL divergence from the
cached top k), the gradient, its clipping and the AdamW step. `FirstSFTTrainer(fused_loss=True)` and `FirstDistillTrainer` do
the same behind `Trainer.training_step`. Steps are interleaved; medians. Run from the repository root:

    python -m tests.benchmarks.pretrained_step                  # shape of SmolLM2-135M, ten of its layers
    python -m tests.benchmarks.pretrained_step --layers 30
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from first_trl import FirstDistillConfig, FirstDistillTrainer
from first_trl.cache.manifest import tokenizer_fingerprint
from first_trl.cache.schema import cache_features
from first_trl.training.sft import FirstSFTTrainer
from tests.support.tiny import tiny_tokenizer, with_digests


VOCABULARY = 49_152
K = 5


def build_model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def build_rows(rows: int, length: int, tokenizer: Any) -> Dataset:
    """Prompts of one length with one answer token; what a step costs does not depend on what is in it."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(rows):
        ids = rng.integers(3, VOCABULARY, length)
        logprobs = np.log(-np.sort(-rng.dirichlet(np.ones(K + 1)))).astype(np.float32)
        made.append(
            {
                "input_ids": ids.tolist(),
                "labels": [-100] * (length - 1) + [int(ids[-1])],
                "teacher_topk_ids": [rng.choice(VOCABULARY, K, replace=False).tolist()],
                "teacher_topk_logprobs": [logprobs[:K].tolist()],
                "teacher_tail_logprob": [float(logprobs[K])],
                "teacher_cache": f"0123456789abcdef:{tokenizer_fingerprint(tokenizer)}",
                "teacher_row_digest": 0,
            }
        )
    return with_digests(Dataset.from_list(made, features=cache_features("float32")))


def by_trainer(kind: str, args: argparse.Namespace, tokenizer: Any, rows: Dataset) -> Callable[[], None]:
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": args.rows, "max_length": None, "max_steps": 1,
        "learning_rate": 1e-5, "report_to": "none", "use_cpu": True, "bf16": True, "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    trainer: Any
    if kind == "sft":
        plain = rows.select_columns(["input_ids", "labels"])
        trainer = FirstSFTTrainer(
            build_model(args.layers),
            SFTConfig(**options),
            train_dataset=plain,
            processing_class=tokenizer,
            fused_loss=True,
        )
    else:
        trainer = FirstDistillTrainer(build_model(args.layers), FirstDistillConfig(**options), rows, None, tokenizer)
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)

    def step() -> None:
        model.train()
        trainer.training_step(model, dict(batch), items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_hand(kind: str, args: argparse.Namespace, rows: Dataset) -> Callable[[], None]:
    model = build_model(args.layers).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.tensor(rows["input_ids"][:])
    labels = ids[:, -1]
    kept = torch.tensor(rows["teacher_topk_ids"][:])[:, 0]
    target = torch.log_softmax(torch.tensor(rows["teacher_topk_logprobs"][:])[:, 0], dim=-1)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -2]
            logits = model.lm_head(states)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        if kind == "sft":
            loss = torch.nn.functional.nll_loss(logprobs, labels)
        else:
            loss = (target.exp() * (target - logprobs.gather(1, kept))).sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    tokenizer = tiny_tokenizer(VOCABULARY)
    rows = build_rows(args.rows, args.length, tokenizer)
    print(
        f"{args.rows} rows of {args.length} tokens, {args.layers} layers of SmolLM2-135M's shape, float32 weights under "
        f"bfloat16 autocast, {args.threads} threads, torch {torch.__version__}; medians of {args.repeats} steps"
    )
    print("| step | trainer, s | by hand, s | ratio |\n| --- | --- | --- | --- |")
    for kind in ("sft", "distill"):
        steps = {"trainer": by_trainer(kind, args, tokenizer, rows), "hand": by_hand(kind, args, rows)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(args.repeats + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if repeat:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
        trainer, hand = (statistics.median(seconds[name]) for name in ("trainer", "hand"))
        print(f"| {kind} | {trainer:.2f} | {hand:.2f} | {trainer / hand:.2f} |", flush=True)


if __name__ == "__main__":
    main()
