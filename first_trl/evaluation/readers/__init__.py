"""Confidences from what people already have: harness logs, generation scores, tables."""

from first_trl.evaluation.readers.files import read_confidences
from first_trl.evaluation.readers.generation import (
    generated_token_logprobs,
    token_confidences,
    vllm_prompt_token_confidences,
    vllm_token_logprobs,
)
from first_trl.evaluation.readers.harness import HarnessSamples, read_harness_log, read_harness_results
from first_trl.evaluation.readers.harness_task import add_ece_to_harness_task
from first_trl.evaluation.readers.table import read_table


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
