"""Using a calibrated student: the answer to a question, how sure the model is, and no answer below a confidence."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .evaluation.loading import load_model
from .evaluation.next_token import context_length, cut_to_length, next_token_logits
from .tasks.answers import answer_token_ids
from .tasks.encode import encode_texts, prompt_texts


TASK = "calibrated-multiple-choice"
CONFIDENCES = ("full_vocab", "choice", "renormalized")


class AnswerPipeline(Pipeline):
    """
    A [`~transformers.Pipeline`] that answers by the token behind the prompt, with the probability of the answer.

    Importing this module registers it: `transformers.pipeline("calibrated-multiple-choice", model=...)`. Shorter, and
    also for adapters of any revision, is [`answer_pipeline`].

    Call it with a prompt (`str`, or a conversation: a list of messages), a row (`dict` with `prompt` and, where they
    differ from row to row, `choices` and `tools`), a list of these, or a dataset of rows; a list or [`~datasets.Dataset`] gives a list, an iterator or streamed dataset
    gives an iterator. `batch_size` changes the speed only: prompts are padded on the right and read at their last
    token.

    | `confidence` | answer | its confidence |
    | --- | --- | --- |
    | `"full_vocab"` | most likely of all tokens; no answer when it is none of the choices | its probability |
    | `"choice"` | most likely choice | its probability among all tokens |
    | `"renormalized"` | most likely choice | its share of the choices' probability |

    These are the readings of [`~first_trl.evaluation.multiple_choice.evaluate_multiple_choice`]: over the same rows,
    the calibration error of these confidences is the one in its report. Without choices the answer is the most likely
    token.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            Logits are divided by it: a post-hoc temperature that was fitted for this model.
        choices (`list[str]`, *optional*):
            Answers exactly as they are appended to the prompt (`" A"`), one token each.
        confidence (`str`, *optional*, defaults to `"full_vocab"`):
            One of the above.
        abstain_below (`float`, *optional*):
            Below this confidence there is no answer.
        max_length (`int`, *optional*):
            Longer prompts lose tokens at the front, with a warning. Defaults to the context length of the model.

        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template for conversations, such as `enable_thinking`: those that the student was
            trained with.

    All of these can be given when the pipeline is made or when it is called. The result of one prompt is a `dict`:

    - **answer** (`str` or `None`): the chosen text as it was given; `None` when the model abstains, or when its most
      likely token is none of the choices.
    - **index** (`int` or `None`): place of the most likely answer among the choices, also when the model abstains.
    - **confidence** (`float`).
    - **abstained** (`bool`): whether the confidence is below `abstain_below`.
    - **choices** (`list[float]` or `None`): probability of every choice among all tokens.
    - **option_mass** (`float` or `None`): their sum. Far below 1, the model would rather say something else.
    """

    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]

    def _sanitize_parameters(  # type: ignore[override]
        self,
        choices: Sequence[str] | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        abstain_below: float | None = None,
        confidence: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if temperature is not None and not (temperature > 0.0 and np.isfinite(temperature)):
            raise ValueError(f"`temperature` must be a finite number above 0, got {temperature}.")
        if abstain_below is not None and not 0.0 <= abstain_below <= 1.0:
            raise ValueError(f"`abstain_below` must be a probability from 0 to 1, got {abstain_below}.")
        if confidence is not None and confidence not in CONFIDENCES:
            raise ValueError(f"`confidence` must be one of {', '.join(CONFIDENCES)}; got {confidence!r}.")
        steps = (
            {"choices": choices, "max_length": max_length, "chat_template_kwargs": chat_template_kwargs},
            {"temperature": temperature},
            {"abstain_below": abstain_below, "confidence": confidence},
        )
        preprocess, forward, postprocess = (
            {name: value for name, value in step.items() if value is not None} for step in steps
        )
        return preprocess, forward, postprocess

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers of the inputs, see the class."""
        if isinstance(inputs, Dataset | tuple):
            inputs = list(inputs)
        if _is_conversation(inputs):
            inputs = {"prompt": inputs}
        elif isinstance(inputs, list):
            inputs = [{"prompt": entry} if _is_conversation(entry) else entry for entry in inputs]
        elif isinstance(inputs, IterableDataset) or (isinstance(inputs, Iterable) and hasattr(inputs, "__next__")):
            # Generators are what the base class streams
            inputs = ({"prompt": row} if _is_conversation(row) else row for row in inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, *args, **kwargs)

    def get_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Batches of rows; nothing is padded here, so a tokenizer without a padding token will do."""
        tokenizer, self.tokenizer = self.tokenizer, cast(Any, _Unpadded())
        try:
            return super().get_iterator(*args, **kwargs)
        finally:
            self.tokenizer = tokenizer

    def preprocess(  # type: ignore[override]
        self,
        row: str | Mapping[str, Any],
        choices: Sequence[str] | None = None,
        max_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Tokens of a prompt and of its choices."""
        assert self.tokenizer is not None
        prompt: Any = row
        if isinstance(row, Mapping):
            if "prompt" not in row:
                raise ValueError(f"A row needs a 'prompt'; this one has {', '.join(row) or 'nothing'}.")
            prompt, choices = row["prompt"], row.get("choices") or choices
        if not isinstance(prompt, str):
            if not _is_conversation(prompt):
                raise ValueError(
                    f"A prompt is a text, got {type(prompt).__name__}. A conversation is a list of messages with `role` and "
                    "`content`."
                )
            tools = row.get("tools") if isinstance(row, Mapping) else None
            (prompt,) = prompt_texts(
                self.tokenizer, [prompt], tools=[tools], chat_template_kwargs=chat_template_kwargs
            )
        if not prompt:
            raise ValueError("The prompt is empty: there is nothing to answer.")
        if isinstance(choices, str):
            raise ValueError(f"`choices` is a list of texts, got the text {choices!r}.")
        tokens = None if not choices else answer_token_ids(self.tokenizer, prompt, list(choices))
        limit = context_length(self.model) if max_length is None else max_length
        (ids,), (cut,) = cut_to_length(encode_texts(self.tokenizer, [prompt]), limit, self.tokenizer.all_special_ids)
        if cut:
            warnings.warn(
                f"A prompt is longer than {limit} tokens and loses its beginning: {prompt[:40]!r}... Shorten it.",
                UserWarning,
                stacklevel=2,
            )
        # One entry, so that a batch is a list of rows whatever their lengths
        return {"row": {"ids": ids, "tokens": tokens, "choices": None if not choices else list(choices)}}

    def _forward(self, inputs: dict[str, Any], temperature: float = 1.0) -> dict[str, Any]:  # type: ignore[override]
        rows = inputs["row"] if isinstance(inputs["row"], list) else [inputs["row"]]
        answered: list[dict[str, Any]] = [{} for _ in rows]
        batches = next_token_logits(
            self.model, [row["ids"] for row in rows], batch_size=len(rows), disable_tqdm=True, desc=""
        )
        for index, logits in batches:
            lp = torch.log_softmax(logits / temperature, dim=-1)
            best = lp.max(dim=-1)
            for i, number in enumerate(index):
                row = rows[number]
                tokens = row["tokens"]
                answered[number] = {
                    "choices": row["choices"],
                    "tokens": tokens,
                    "logprobs": None if tokens is None else lp[i, tokens].double().tolist(),
                    "top_token": int(best.indices[i]),
                    "top_logprob": float(best.values[i].double()),
                }
        return {"row": answered if isinstance(inputs["row"], list) else answered[0]}

    def postprocess(  # type: ignore[override]
        self, outputs: dict[str, Any], abstain_below: float | None = None, confidence: str = "full_vocab"
    ) -> dict[str, Any]:
        """Answer and confidence of one prompt."""
        assert self.tokenizer is not None
        row = outputs["row"]
        index = answer = probabilities = mass = None
        if row["tokens"] is None:
            if confidence != "full_vocab":
                raise ValueError(f"confidence={confidence!r} is about choices; give `choices`.")
            answer, sure = self.tokenizer.decode([row["top_token"]]), float(np.exp(row["top_logprob"]))
        else:
            logprobs = np.array(row["logprobs"])
            probabilities, mass = np.exp(logprobs).tolist(), float(np.exp(logprobs).sum())
            if confidence == "full_vocab":
                index = row["tokens"].index(row["top_token"]) if row["top_token"] in row["tokens"] else None
                sure = float(np.exp(row["top_logprob"]))
            else:
                index = int(logprobs.argmax())
                share = np.logaddexp.reduce(logprobs) if confidence == "renormalized" else 0.0
                sure = float(np.exp(logprobs[index] - share))
            answer = None if index is None else row["choices"][index]
        abstained = abstain_below is not None and sure < abstain_below
        return {
            "answer": None if abstained else answer,
            "index": index,
            "confidence": sure,
            "abstained": abstained,
            "choices": probabilities,
            "option_mass": mass,
        }


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and bool({"role", "from"} & set(value[0]))
    )


class _Unpadded:
    """Stands for the tokenizer where batches are collated, which asks for a padding token and pads nothing here."""

    pad_token_id = 0
    padding_side = "right"


PIPELINE_REGISTRY.register_pipeline(TASK, AnswerPipeline, pt_model=AutoModelForCausalLM, type="text")
# Registering marks a class as code that belongs into every folder it saves. This one comes with the package.
del AnswerPipeline._registered_impl  # type: ignore[attr-defined]


def answer_pipeline(
    model: Any,
    *,
    revision: str | None = None,
    tokenizer: Any = None,
    temperature: float = 1.0,
    confidence: str = "full_vocab",
    choices: Sequence[str] | None = None,
    abstain_below: float | None = None,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    device: Any = None,
    dtype: Any = "auto",
    token: str | bool | None = None,
    **model_kwargs: Any,
) -> AnswerPipeline:
    """
    A ready [`AnswerPipeline`]: answers with a confidence that can be trusted as far as the model is calibrated.

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id or folder of a model or of a LoRA adapter, or a loaded model.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        tokenizer (`str` or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the one saved with the model. For a loaded model, to the one of the place it was loaded from.
        temperature, confidence, choices, abstain_below, max_length, chat_template_kwargs:
            Defaults of every call, see [`AnswerPipeline`].
        batch_size (`int`, *optional*, defaults to `1`):
            Prompts per forward.
        device (`int`, `str` or `torch.device`, *optional*):
            Defaults to the first accelerator, else the CPU; a loaded model stays where it is.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Precision to load in: by default that of the weights.
        token (`str` or `bool`, *optional*):
            Access token for private repositories.
        model_kwargs:
            Further arguments of `from_pretrained`, such as `device_map` or `quantization_config`.

    Returns:
        [`AnswerPipeline`]

    Raises:
        `ValueError`: when loading arguments stand beside a loaded model, or a loaded model has no tokenizer to be
            found.

    Example:

    ```python
    >>> from first_trl import answer_pipeline
    >>> pipe = answer_pipeline("my-name/my-student")
    >>> prompt = "Which is a tool?\\nAnswer Choices:\\n(A) hammer\\n(B) cloud\\nAnswer:"
    >>> pipe(prompt, choices=[" A", " B"], abstain_below=0.6)
    {'answer': ' A', 'index': 0, 'confidence': 0.83, 'abstained': False, 'choices': [0.83, 0.15], 'option_mass': 0.98}
    ```
    """
    if isinstance(model, str | Path):
        source = str(model)
        loaded, home = load_model(source, revision=revision, token=token, dtype=dtype, **model_kwargs)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(home, revision=revision if home == source else None, token=token)
    else:
        given = [
            *model_kwargs,
            *(["revision"] if revision is not None else []),
            *(["dtype"] if dtype != "auto" else []),
        ]
        if given:
            raise ValueError(
                f"`model` is loaded already, so {', '.join(sorted(given))} cannot be applied; pass its name instead."
            )
        loaded = model
        if tokenizer is None:
            tokenizer = getattr(getattr(model, "config", None), "_name_or_path", None)
            if not tokenizer:
                raise ValueError("This model was not loaded from a folder or the Hub: pass its `tokenizer`.")
        if device is None and getattr(model, "hf_device_map", None) is None:
            device = model.device
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, token=token)
    defaults: dict[str, Any] = {
        "choices": choices,
        "abstain_below": abstain_below,
        "max_length": max_length,
        "chat_template_kwargs": chat_template_kwargs,
    }
    return AnswerPipeline(
        model=loaded,
        tokenizer=tokenizer,
        task=TASK,
        device=device,
        batch_size=batch_size,
        temperature=temperature,
        confidence=confidence,
        **{name: value for name, value in defaults.items() if value is not None},
    )
