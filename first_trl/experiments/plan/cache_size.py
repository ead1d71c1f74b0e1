"""
Size of a teacher cache before it exists.

Bytes of the compressed Parquet columns, fitted to caches of real rows (CommonsenseQA, OpenBookQA, ARC, BoolQ questions
and Alpaca, GPT-2 tokenizer, k of 2 to 10). Low bytes of ids and log-probabilities are noise, so each takes about what
its entropy is. Rows with one or two supervised positions, all behind the same template, repeat themselves
and take less. The figures are of a teacher whose kept ids are spread out; one that always
keeps the same letters takes less.
"""

import math


# Footer and schema of one shard
_SHARD = 4_700
# Digest and cache id of a row
_ROW = 9.6
# Per token: `input_ids`; per position: `labels` and the tail; per kept entry: ids and log-probabilities
_ANSWERS = {"token": 1.2, "label": 2.7, "tail": 2.9, "id": 0.6, "float16": 1.05, "float32": 2.4}
_TEXT = {"token": 1.62, "label": 1.95, "tail": 2.9, "id": 1.66, "float16": 1.34, "float32": 2.8}
# Longest rows, in supervised positions, that are answers rather than text
_ANSWER_POSITIONS = 2.5
# A distinct draw: its id and its count
_DRAW = 1.7


def cache_bytes(
    rows: int,
    tokens: int,
    positions: int,
    *,
    k: int,
    logprob_dtype: str = "float16",
    num_draws: int = 0,
    shard_size: int = 1000,
    key_bytes: float = 3.0,
) -> int:
    """
    Bytes of one split of a cache.

    Args:
        rows (`int`): Rows.
        tokens (`int`): Tokens of all rows.
        positions (`int`): Supervised positions of all rows.
        k (`int`), logprob_dtype (`str`), num_draws (`int`), shard_size (`int`): As in [`add_teacher_topk`]. Draws are
            taken to be distinct, the most that they can take.
        key_bytes (`float`): Bytes of a row's `id` and `group`.
    """
    size = _ANSWERS if positions <= _ANSWER_POSITIONS * rows else _TEXT
    position = size["label"] + size["tail"] + k * (size["id"] + size[logprob_dtype]) + num_draws * _DRAW
    return round(
        math.ceil(rows / shard_size) * _SHARD
        + rows * (_ROW + key_bytes)
        + tokens * size["token"]
        + positions * position
    )
