"""Confidences from what people already have: harness logs, generation scores, tables."""

from .files import read_confidences
from .generation import (
    generated_token_logprobs,
    token_confidences,
    vllm_prompt_token_confidences,
    vllm_token_logprobs,
)
from .harness import HarnessSamples, read_harness_log, read_harness_results
from .harness_task import add_ece_to_harness_task
from .table import read_table


__all__ = [
    "HarnessSamples",
    "add_ece_to_harness_task",
    "generated_token_logprobs",
    "read_confidences",
    "read_harness_log",
    "read_harness_results",
    "read_table",
    "token_confidences",
    "vllm_prompt_token_confidences",
    "vllm_token_logprobs",
]
