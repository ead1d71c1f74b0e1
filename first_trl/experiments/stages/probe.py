"""What a fine-tuned teacher says of a few of its rows: the proof that a server serves it and not its base."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...teacher.backends import VLLMBackend
from ...utils.files import write_json


_ROWS, _TOKENS = 8, 128
# Mean difference in nats: another precision and another engine stay well below
_TOLERANCE = 0.1


def probe_rows(rows: Any) -> list[list[int]]:
    """The beginnings of a few training rows, where fine-tuning changes a model most."""
    found = [ids[:_TOKENS] for ids in rows.select(range(min(_ROWS, len(rows))))["input_ids"]]
    return [ids for ids in found if len(ids) > 1]


@torch.inference_mode()
def token_logprobs(model: Any, rows: list[list[int]]) -> list[list[float]]:
    """Log-probability of every token but the first of each row, in nats."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    found = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    model.train(was_training)
    return found


def write_probe(path: Path, rows: list[list[int]], base: list[list[float]], trained: list[list[float]]) -> None:
    write_json(path, {"input_ids": rows, "base_logprobs": base, "logprobs": trained})


def check_served(probe: dict[str, Any], server: VLLMBackend, url: str, how: str) -> None:
    """
    Raises `ValueError` unless the server's log-probabilities are those of the trained teacher: near them, and nearer
    to them than to those of its base; of a teacher that is used as it is, both are the same.
    """
    longest = server.max_length or _TOKENS
    rows = [row[:longest] for row in probe["input_ids"]]
    served = np.concatenate(server.token_logprobs(rows))
    base, trained = (
        np.concatenate([values[: longest - 1] for values in probe[name]]) for name in ("base_logprobs", "logprobs")
    )
    to_trained, to_base = (float(np.abs(served - values).mean()) for values in (trained, base))
    # How far from the base to the trained model the server stands: 0 and 1, and rounding averages out over the tokens
    change = trained - base
    way = float((served - base) @ change / (change @ change)) if change.any() else 1.0
    if not (to_trained <= _TOLERANCE and way > 0.8):
        if not change.any():
            raise ValueError(
                f"The server at {url} does not hold the teacher of the recipe: on {len(rows)} training rows its "
                f"log-probabilities differ by {to_trained:.2g} nats a token. Serve this one:\n  {how}"
            )
        raise ValueError(
            f"The server at {url} does not hold the teacher that this run has trained: on {len(rows)} training rows its "
            f"log-probabilities differ from the trained teacher's by {to_trained:.2g} nats a token, from those of the "
            f"model before training by {to_base:.2g}. Serve the trained one:\n  {how}"
        )
