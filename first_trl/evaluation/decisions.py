"""Any decision model, ours or not, on questions with gold answers: option probabilities and honest scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.decision import DecisionConfig, label_token_ids

from ..calibration.conditional import OptionTemperature
from ..tasks.system_one import DecisionQuestion
from .distributions import OptionPredictions
from .next_token import evaluation_mode, next_token_logits


def predict_decisions(
    model: Any,
    processing_class: Any,
    questions: Sequence[DecisionQuestion],
    config: DecisionConfig | None = None,
    *,
    temperature: OptionTemperature | None = None,
    batch_size: int = 32,
    disable_tqdm: bool = False,
) -> OptionPredictions:
    """
    Option probabilities of questions, those of stock `pipeline("decision")` but in batches.

    A model with a decision head scores the options itself, one prompt at a time. Any other causal language model is read at
    the logits of the option labels. The probabilities are the softmax over the options; the `confidence` that the
    pipeline reports for a choice is `(p - 1/n) / (1 - 1/n)`, which is no probability and is not used here.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, or an `XxxForDecision`; used where it is.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Two sentinel tokens are added to it, as the pipeline does.
        questions (sequence of [`~first_trl.tasks.system_one.DecisionQuestion`]):
            From [`~first_trl.tasks.system_one.read_requests`]; every one with gold.
        config ([`~transformers.decision.DecisionConfig`], *optional*):
            Template, labels and temperature. Defaults to the model's own, else to the generic prompt.
        temperature ([`~first_trl.calibration.conditional.OptionTemperature`], *optional*):
            Temperatures by type and number of options, instead of those of `config`.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts a forward.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.

    Returns:
        [`OptionPredictions`]: options in the order of each question.

    Raises:
        `ValueError`: a question without gold, a template that asks all questions in one prompt, labels that are no single
            tokens, or logits that are not finite.
    """
    without = [question.id for question in questions if question.gold is None]
    if without:
        raise ValueError(f"{len(without)} questions have no gold answer, the first is {without[0]!r}.")
    has_head = hasattr(model, "decide")
    config = config or getattr(model, "decision_config", None) or DecisionConfig()
    prompts: list[tuple[dict[str, Any], Any]] = []
    for question in tqdm(questions, desc="Reading requests", disable=disable_tqdm):
        try:
            ((inputs, (parsed,)),) = config.prepare_inputs(question.request, processing_class)
        except ValueError as error:
            raise ValueError(f"{question.id}: {error}") from None
        prompts.append((dict(inputs), parsed))
    scores: list[np.ndarray] = [np.empty(0)] * len(prompts)
    if has_head:
        with evaluation_mode(model), torch.no_grad():
            for i, (inputs, parsed) in enumerate(tqdm(prompts, desc="Deciding", disable=disable_tqdm)):
                placed = {
                    key: value.to(model.device) if hasattr(value, "to") else value for key, value in inputs.items()
                }
                plain = DecisionConfig(**{**vars(config), "temperature": {}})
                (found,) = model.decide(**placed, decision_questions=[parsed], decision_config=plain)
                scores[i] = found.cpu().double().numpy()
    else:
        rows = [inputs["input_ids"][0, : int(inputs["marks"][-1])].tolist() for inputs, _ in prompts]
        labels = [label_token_ids(processing_class, tuple(parsed.labels)) for _, parsed in prompts]
        batches = next_token_logits(model, rows, batch_size=batch_size, disable_tqdm=disable_tqdm, desc="Deciding")
        for index, logits in batches:
            for i, row in enumerate(index):
                scores[row] = logits[i, labels[row]].cpu().double().numpy()
    probabilities = []
    for question, (_, parsed), values in zip(questions, prompts, scores, strict=True):
        t = float(config.temperature.get(question.kind, 1.0))
        if temperature is not None:
            t = temperature.temperature(question.kind, len(question.options))
        scaled = values / t
        p = np.exp(scaled - np.logaddexp.reduce(scaled))
        # The template may order yes and no in another way than the gold
        probabilities.append(p[[parsed.options.index(option) for option in question.options]])
    return OptionPredictions(
        [question.id for question in questions],
        [question.kind for question in questions],
        probabilities,
        [question.gold for question in questions if question.gold is not None],
        [question.options for question in questions],
    )
