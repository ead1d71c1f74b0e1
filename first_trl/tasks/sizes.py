"""How large the published splits of a benchmark are, for whoever wants to know before anything is downloaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitSize:
    """
    Size of one published split at the task's default template.

    Lengths are means over the rows and were measured on the original files, tokens with the GPT-2 tokenizer. `None`
    where no copy could be measured.

    Attributes:
        rows (`int`): Rows.
        prompt_chars (`float`, *optional*): Characters of the prompt.
        completion_chars (`float`, *optional*): Characters of the completion.
        prompt_tokens (`float`, *optional*): Tokens of the prompt.
        completion_tokens (`float`, *optional*): Tokens of the completion.
        longest (`int`, *optional*): Tokens of the longest row.
        key_bytes (`float`): Bytes that the row's `id` and `group` take in a compressed Parquet file.
    """

    rows: int
    prompt_chars: float | None = None
    completion_chars: float | None = None
    prompt_tokens: float | None = None
    completion_tokens: float | None = None
    longest: int | None = None
    key_bytes: float = 3.0
