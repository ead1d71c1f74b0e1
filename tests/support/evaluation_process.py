"""
Evaluations and a fit on all processes of a launch; the main one writes what came out:

    python -m torch.distributed.run --nproc_per_node 2 -m tests.support.evaluation_process OUTPUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
from first_trl.evaluation.posthoc import fit_posthoc_temperature
from first_trl.evaluation.token_level import evaluate_token_level
from first_trl.evaluation.whole_answers import evaluate_whole_answers
from first_trl.tasks import get_task, tokenize_rows
from first_trl.utils.processes import process_state
from tests.support.tiny import tiny_llama


def results(distributed: bool) -> dict:
    task = get_task("digits")
    tokenizer, rows = task.tokenizer(), task.load("test", limit=37).dataset
    model = tiny_llama(vocab_size=len(tokenizer))
    tokens = tokenize_rows(rows, tokenizer, supervise="all").dataset
    pairs = rows.map(lambda row: {"choices": [choice * 2 for choice in row["choices"]]})
    options = {"disable_tqdm": True, "distributed": distributed, "batch_size": 5}
    return {
        "choices": evaluate_multiple_choice(model, tokenizer, rows, **options).to_rows(),
        "texts": evaluate_whole_answers(model, tokenizer, pairs, length="unconditional", **options).to_rows(),
        "tokens": evaluate_token_level(model, tokenizer, tokens, **options).to_rows(),
        "temperature": fit_posthoc_temperature(model, tokenizer, rows, **options).temperature,
    }


if __name__ == "__main__":
    found = results(distributed=True)
    # How long processes wait for one another, in minutes: enough for one that reads data, and no day
    found["minutes"] = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60
    if process_state().is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
