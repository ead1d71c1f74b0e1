"""
What a temperature by novelty costs `answer_pipeline`: the time of a prompt with and without it, and the bytes stored.

The model has the shape of SmolLM2-135M and random weights; 10,000 reference rows and those that fit into 5 MB. Runs with and
without are interleaved. `python -m tests.benchmarks.novelty [--device cuda] [--batch 1 16]`
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from first_trl import answer_pipeline
from first_trl.calibration.novelty import NoveltyTemperature
from first_trl.evaluation.novelty import MAX_BYTES, fit_reference
from first_trl.evaluation.novelty_scaling import NoveltyScaling
from first_trl.tasks.word_tokenizer import word_tokenizer


WIDTH, LAYERS, VOCABULARY = 576, 30, 49152


def model(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device)


def scaling(rows: int, max_bytes: int) -> NoveltyScaling:
    states = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))
    reference = fit_reference(states, layer=20, max_rows=rows, max_bytes=max_bytes)
    return NoveltyScaling(
        "distance", NoveltyTemperature(0.3, (0.2,), 1.3, False, 1000, 0.0), reference, None, None, {}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    words = [f"w{i}" for i in range(200)]
    tokenizer, rng = word_tokenizer(words), np.random.default_rng(0)
    prompts = [" ".join(rng.choice(words, args.tokens - 1)) for _ in range(args.prompts)]
    student = model(args.device)
    given = {"one": 1.3, "10,000 rows": scaling(10_000, 10**9), "5 MB": scaling(10_000, MAX_BYTES)}
    for batch in args.batch:
        pipes = {
            name: answer_pipeline(
                student, tokenizer=tokenizer, temperature=each, batch_size=batch, choices=[" w1", " w2", " w3"]
            )
            for name, each in given.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in pipes}
        for repeat in range(args.repeats + 1):
            for name, pipe in pipes.items():
                start = time.perf_counter()
                pipe(prompts)
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if repeat:
                    seconds[name].append((time.perf_counter() - start) / len(prompts))
        for name, measured in seconds.items():
            # Pairs of neighbouring runs, since the machine drifts
            more = np.median(np.array(measured) / np.array(seconds["one"]) - 1.0)
            print(
                f"batch {batch:3d}  {name:12s} {1e3 * np.median(measured):8.2f} ms a prompt  {100 * more:+.1f} %",
                flush=True,
            )
        # By itself, which a busy machine blurs less
        states = {20: torch.randn(batch, WIDTH, device=args.device)}
        for name, each in given.items():
            if isinstance(each, NoveltyScaling):
                alone = []
                for _ in range(20):
                    start = time.perf_counter()
                    each.of_states(states, torch.zeros(batch, 1))
                    alone.append((time.perf_counter() - start) / batch)
                share = np.median(alone) / np.median(seconds["one"])
                print(
                    f"batch {batch:3d}  {name:12s} distances alone {1e3 * np.median(alone):.2f} ms, {100 * share:.1f} %"
                )
    for name, each in given.items():
        if isinstance(each, NoveltyScaling) and each.reference is not None:
            with tempfile.TemporaryDirectory() as folder:
                each.save(folder)
                size = (Path(folder) / "novelty.safetensors").stat().st_size
            print(f"{name}: {len(each.reference.rows):,} rows, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
