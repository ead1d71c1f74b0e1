"""`first-trl inspect`: rows token by token, with what is supervised."""

import argparse
import json
import os
import sys
from typing import Any, TextIO

from ..utils.dataset_rows import load_rows


_SUPERVISED, _CONTEXT, _SPECIAL, _RESET = "\033[1;32m", "\033[2m", "\033[33m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl inspect` to a parser."""
    parser.add_argument("dataset", help="Hub id, folder saved by datasets, or a file; also a teacher cache")
    parser.add_argument("--tokenizer", required=True, help="Hub id or folder of the tokenizer")
    parser.add_argument("--rows", type=int, default=2, help="rows to show (default: 2)")
    parser.add_argument("--split", default="train", help="split to read (default: train)")
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--dataset-text-field", default="text")
    parser.add_argument("--completion-only-loss", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--assistant-only-loss", action="store_true")
    parser.add_argument(
        "--chat-template-kwargs", type=template_arguments, metavar="JSON", help="e.g. '{\"enable_thinking\": false}'"
    )


def template_arguments(text: str) -> dict[str, Any]:
    """JSON text of an object, for `argparse`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected an object such as {{"enable_thinking": false}}, got {text!r}')
    return value


def main(args: argparse.Namespace) -> int:
    """Print rows as a teacher reads them at the capture and a student is trained on them."""
    if args.rows < 1:
        raise ValueError(f"`--rows` must be at least 1, got {args.rows}.")
    rows = load_rows(args.dataset, split=args.split, config=args.config, max_rows=args.rows)
    # Imported once the rows are there: torch and TRL take seconds
    import datasets
    from transformers import AutoTokenizer

    from ..teacher.prepare import prepare_rows

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    datasets.disable_progress_bars()
    prepared = prepare_rows(
        rows,
        tokenizer,
        completion_only_loss=args.completion_only_loss,
        assistant_only_loss=args.assistant_only_loss,
        dataset_text_field=args.dataset_text_field,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    colour = has_colour(sys.stdout)
    for number in range(len(prepared)):
        row = prepared[number]
        print(show_row(tokenizer, number, row["input_ids"], row["labels"], colour))
    return 0


def has_colour(stream: TextIO) -> bool:
    """Whether colours may be written: a terminal that can, and no `NO_COLOR` (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def show_row(tokenizer: Any, number: int, input_ids: list[int], labels: list[int], colour: bool) -> str:
    """
    One line a token: its place, `>` where it is supervised, its id and its text.

    The first token is never a target, since nothing predicts it.
    """
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    supervised = [label != -100 and place > 0 for place, label in enumerate(labels)]
    lines = [f"row {number}: {len(input_ids)} tokens, {sum(supervised)} supervised (>)"]
    for place, (token, target) in enumerate(zip(input_ids, supervised, strict=True)):
        line = f"{place:5d} {'>' if target else ' '} {token:7d}  {tokenizer.decode([token])!r}"
        if token in special:
            line += "  special"
        if colour:
            paint = _SUPERVISED if target else _SPECIAL if token in special else _CONTEXT
            line = f"{paint}{line}{_RESET}"
        lines.append(line)
    return "\n".join(lines)
