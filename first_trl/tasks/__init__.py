"""Benchmarks as rows of prompt, completion, choices and gold, and their tokenization."""

from .answers import answer_token_ids, answer_token_ids_of_rows
from .base import Example, Task, TaskSplit, get_task, list_tasks
from .encode import encode_prompts
from .tokenize import TokenizedSplit, tokenize_rows


__all__ = [
    "Example",
    "Task",
    "TaskSplit",
    "TokenizedSplit",
    "answer_token_ids",
    "answer_token_ids_of_rows",
    "encode_prompts",
    "get_task",
    "list_tasks",
    "tokenize_rows",
]
