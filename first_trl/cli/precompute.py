"""`first-trl precompute`: run a teacher once over a dataset and store its top-k."""

import argparse
import json
import os
from typing import Any

from transformers import AutoTokenizer, BitsAndBytesConfig

from ..cache.folder import cache_size, load_manifest
from ..teacher.backends import TeacherBackend, VLLMBackend
from ..teacher.capture import add_teacher_topk
from ..utils.dataset_rows import load_rows
from ..utils.processes import process_state
from .inspect import template_arguments


QUANTIZATIONS = ("8bit", "4bit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("teacher and data")
    source.add_argument(
        "--teacher",
        action="append",
        help="Hub id or folder of the fine-tuned teacher; given several times, a committee whose mean distribution is stored",
    )
    source.add_argument(
        "--teacher-revision",
        action="append",
        help="branch, tag or commit of the teacher; of a committee, one for each",
    )
    source.add_argument("--tokenizer", help="Hub id or folder of the tokenizer; default: the teacher's")
    source.add_argument(
        "--dataset",
        required=True,
        help="Hub id, folder saved by datasets, or a file (csv, tsv, json, jsonl, parquet, arrow, xlsx; also compressed)",
    )
    source.add_argument("--config", help="configuration of a Hub dataset")
    source.add_argument("--dataset-revision", help="branch, tag or commit of the dataset")
    source.add_argument("--split", default="train", help="split to score (default: train)")
    source.add_argument("--max-rows", type=int, help="score the first rows only")
    source.add_argument("--output-dir", required=True, help="folder of the cache; run the same command to continue")

    kept = parser.add_argument_group("what is kept")
    kept.add_argument("--k", type=int, default=5, help="entries kept per position (default: 5)")
    kept.add_argument("--logprob-dtype", choices=("float16", "float32"), default="float16")
    kept.add_argument("--num-draws", type=int, default=0, help="draws per position, for the sampled estimator")
    kept.add_argument("--draw-seed", type=int, default=0)

    rows = parser.add_argument_group("rows (as in SFTConfig)")
    rows.add_argument("--max-length", type=int, help="cut longer rows")
    rows.add_argument("--truncation-mode", choices=("keep_start", "keep_end"), default="keep_start")
    rows.add_argument("--dataset-text-field", default="text")
    rows.add_argument("--completion-only-loss", action=argparse.BooleanOptionalAction, default=None)
    rows.add_argument("--assistant-only-loss", action="store_true")
    rows.add_argument(
        "--chat-template-kwargs",
        type=template_arguments,
        metavar="JSON",
        help="arguments of the chat template, e.g. '{\"enable_thinking\": false}'",
    )
    rows.add_argument("--num-proc", type=int, help="processes for tokenisation")

    run = parser.add_argument_group("how the teacher runs")
    run.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    run.add_argument("--quantization", choices=QUANTIZATIONS, help="load the teacher quantised by bitsandbytes")
    run.add_argument("--device-map", help="e.g. auto: spread one teacher over the devices of this process")
    run.add_argument("--tp-plan", help="e.g. auto: tensor parallelism, one teacher over all processes")
    run.add_argument("--attn-implementation")
    run.add_argument("--trust-remote-code", action="store_true")
    run.add_argument("--max-tokens-per-batch", type=int, default=8192)
    run.add_argument("--max-rows-per-batch", type=int, default=64)
    run.add_argument("--shard-size", type=int, default=1000, help="rows a file")
    run.add_argument("--vllm-url", help="score with the vLLM server at this address instead")
    run.add_argument("--vllm-model", help="served name; default: the only one")
    run.add_argument(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="requests that wait for the vLLM server at a time; more keep a large server busy (default: 8)",
    )
    run.add_argument("--head-size", type=int, help="rows of the vLLM teacher's head, where it is padded")


def main(args: argparse.Namespace) -> int:
    state = process_state()
    if (args.teacher is None) == (args.vllm_url is None):
        raise ValueError("Give either `--teacher` or `--vllm-url`.")
    if args.teacher_revision is not None and len(args.teacher_revision) != len(args.teacher or ()):
        raise ValueError("Give `--teacher-revision` as often as `--teacher`, or leave it out.")
    tokenizer_name = args.tokenizer or (args.teacher or [None])[0]
    if tokenizer_name is None:
        raise ValueError("Give the teacher's tokenizer with `--tokenizer`: the vLLM protocol does not tell it.")
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_name,
        revision=args.teacher_revision[0] if args.teacher_revision and args.tokenizer is None else None,
        trust_remote_code=args.trust_remote_code,
    )
    rows = load_rows(
        args.dataset, split=args.split, config=args.config, revision=args.dataset_revision, max_rows=args.max_rows
    )
    cache = add_teacher_topk(
        rows,
        _teacher(args),
        tokenizer,
        k=args.k,
        output_dir=args.output_dir,
        split=args.split.split("[")[0],
        max_tokens_per_batch=args.max_tokens_per_batch,
        max_rows_per_batch=args.max_rows_per_batch,
        shard_size=args.shard_size,
        logprob_dtype=args.logprob_dtype,
        num_draws=args.num_draws,
        draw_seed=args.draw_seed,
        dtype=args.dtype,
        completion_only_loss=args.completion_only_loss,
        assistant_only_loss=args.assistant_only_loss,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        dataset_text_field=args.dataset_text_field,
        chat_template_kwargs=args.chat_template_kwargs,
        num_proc=args.num_proc,
        model_init_kwargs=None if args.vllm_url else _init_kwargs(args),
    )
    if state.is_main_process:
        manifest = load_manifest(args.output_dir, args.split.split("[")[0])
        counts, size = manifest.counts, cache_size(args.output_dir, manifest.split)
        prompts = counts.get("rows_without_gold", 0)
        dropped = {
            name: value for name, value in counts.items() if name.startswith(("dropped", "truncated")) and value
        }
        print(
            f"{args.output_dir}: {len(cache)} rows"
            + (f" ({prompts} without an answer)" if prompts else "")
            + f", {counts['positions']} positions, k={manifest.k}, kept mass "
            f"{manifest.kept_mass[-1]:.4f}, {size['teacher_bytes'] / counts['positions']:.1f} bytes a position"
            + (f", {json.dumps(dropped)}" if dropped else "")
        )
    return 0


def _teacher(args: argparse.Namespace) -> list[str] | TeacherBackend:
    if args.vllm_url is None:
        return [os.fspath(teacher) for teacher in args.teacher]
    return VLLMBackend(args.vllm_url, args.vllm_model, head_size=args.head_size, concurrency=args.concurrency)


def _init_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """What `from_pretrained` gets. Only what was asked for, so that its own defaults hold."""
    options: dict[str, Any] = {
        "revision": args.teacher_revision,
        "device_map": args.device_map,
        "tp_plan": args.tp_plan,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code or None,
    }
    if args.quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=args.quantization == "8bit", load_in_4bit=args.quantization == "4bit"
        )
        # A quantised model cannot be moved afterwards: it is loaded where this process works
        options["device_map"] = args.device_map or {"": process_state().device}
    return {name: value for name, value in options.items() if value is not None}
