"""Using a calibrated student: the answer to a question, how sure the model is, and no answer below a confidence."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Column, Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .calibration.conditional import OptionTemperature
from .calibration.temperature import check_temperature
from .evaluation.choice_scoring import bare_context, check_length, choice_lengths, choice_logprobs
from .evaluation.loading import load_model
from .evaluation.next_token import context_length, cut_to_length, next_token_states
from .evaluation.novelty_scaling import NoveltyScaling
from .tasks import get_task
from .tasks.answers import answer_token_ids, choice_texts, choice_token_ids
from .tasks.decision_extras import read_decision_extras, read_temperature, stored_threshold
from .tasks.encode import encode_texts, prompt_texts, template_columns
from .tasks.multiple_choice import MultipleChoice
from .tasks.option_orders import has_free_order, option_orders
from .vocabulary import NEW_ABOVE


TASK = "calibrated-multiple-choice"
CONFIDENCES = ("full_vocab", "choice", "renormalized")
SCORINGS = ("token", "choices")
# Prompts a forward, where one row asks several
_LEAST_BATCH = 8


Temperature = float | OptionTemperature | NoveltyScaling


class AnswerPipeline(Pipeline):
    """
    A [`~transformers.Pipeline`] that answers by the token behind the prompt, with the probability of the answer.

    Importing this module registers it: `transformers.pipeline("calibrated-multiple-choice", model=...)`. Shorter, and
    also for adapters of any revision, is [`answer_pipeline`].

    Call it with a prompt (`str`, or a conversation: a list of messages), a row (`dict` with `prompt` and, where they
    differ from row to row, `choices`, `tools`, `chat_template_kwargs` and, for a temperature by type of question, `kind`; or with `question` and `options`, see `layout`), a list of these, or a dataset of rows; a list or [`~datasets.Dataset`] gives a list, an iterator or streamed dataset
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
        temperature (`float`, [`~first_trl.calibration.conditional.OptionTemperature`] or [`~first_trl.evaluation.novelty_scaling.NoveltyScaling`], *optional*, defaults to `1.0`):
            Logits are divided by it: a post-hoc temperature that was fitted for this model. [`answer_pipeline`] takes the
            one that was saved with the model.
        new_above (`float`, *optional*, defaults to 0.99):
            Novelty above which a prompt is called new, where the temperature is one by novelty.
        choices (`list[str]`, *optional*):
            Answers exactly as they are appended to the prompt (`" A"`), one token each unless `scoring="choices"`.
        confidence (`str`, *optional*, defaults to `"full_vocab"`):
            One of the above.
        abstain_below (`float` or `str`, *optional*):
            Below this confidence there is no answer. `"max_error=0.05"`: the threshold that was fitted and saved with the
            model, above which at most 5 % of the answers are wrong (see [`~first_trl.fit_threshold`] for what that means);
            for pipelines made by [`answer_pipeline`].
        max_length (`int`, *optional*):
            Longer prompts lose tokens at the front, with a warning. Defaults to the context length of the model.
        scoring (`str`, *optional*, defaults to `"token"`):
            `"choices"` compares the probabilities of the choices' whole texts, of any number of tokens, as
            [`~first_trl.evaluation.whole_answers.evaluate_whole_answers`] does.
        length (`str`, *optional*, defaults to `"none"`):
            With `scoring="choices"`, what log-probabilities are divided by: `"none"`, `"tokens"`, `"characters"`, `"bytes"`,
            or `"unconditional"`, which takes off those without the question.
        layout ([`~first_trl.tasks.multiple_choice.MultipleChoice`] or `str`, *optional*):
            Task that writes the prompts of rows with `question` and `options` (texts, without letters).
        permutations (`int`, *optional*, defaults to `0`):
            Ask rows with `question` and `options` in this many orders of the options, and average. The orders depend on the
            texts alone, so the answer is the same in whatever order the options are given.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template for conversations, such as `enable_thinking`: those that the student was
            trained with.

    With `permutations` or `scoring="choices"`, the most likely of all tokens says nothing of the answer, and `"full_vocab"`
    means the same as `"choice"`; the answer is the option with the largest (mean) share.

    All of these can be given when the pipeline is made or when it is called. The result of one prompt is a `dict`:

    - **answer** (`str` or `None`): the chosen text as it was given; `None` when the model abstains, or when its most
      likely token is none of the choices.
    - **index** (`int` or `None`): place of the most likely answer among the choices, also when the model abstains.
    - **confidence** (`float`).
    - **abstained** (`bool`): whether the confidence is below `abstain_below`.
    - **choices** (`list[float]` or `None`): probability of every choice among all tokens.
    - **option_mass** (`float` or `None`): their sum. Far below 1, the model would rather say something else.

    And with a temperature by novelty:

    - **novelty** (`float`): share of the training rows that are no farther from the others than this prompt is from them.
    - **new** (`bool`): whether this is above `new_above`.
    """

    _load_tokenizer = True  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    # What was saved with the model beside its decision.json
    extras: Mapping[str, Any] = {}

    def _sanitize_parameters(  # type: ignore[override]
        self,
        choices: Sequence[str] | None = None,
        max_length: int | None = None,
        temperature: Temperature | None = None,
        abstain_below: float | str | None = None,
        confidence: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        scoring: str | None = None,
        length: str | None = None,
        layout: Any = None,
        permutations: int | None = None,
        new_above: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if temperature is not None and not isinstance(temperature, OptionTemperature | NoveltyScaling):
            temperature = check_temperature(temperature)
        if not (abstain_below is None or isinstance(abstain_below, str) or 0.0 <= abstain_below <= 1.0):
            raise ValueError(f"`abstain_below` must be a probability from 0 to 1, got {abstain_below}.")
        if new_above is not None and not 0.0 <= new_above <= 1.0:
            raise ValueError(f"`new_above` must be a share from 0 to 1, got {new_above}.")
        if confidence is not None and confidence not in CONFIDENCES:
            raise ValueError(f"`confidence` must be one of {', '.join(CONFIDENCES)}; got {confidence!r}.")
        if scoring is not None and scoring not in SCORINGS:
            raise ValueError(f"`scoring` must be one of {', '.join(SCORINGS)}; got {scoring!r}.")
        check_length(length or "none")
        if isinstance(layout, str):
            layout = get_task(layout)
        if layout is not None and not isinstance(layout, MultipleChoice):
            raise ValueError(f"`layout` must be a task with lettered options, such as commonsense_qa; got {layout!r}.")
        if permutations is not None and not (type(permutations) is int and permutations >= 0):
            raise ValueError(f"`permutations` must be a whole number from 0, got {permutations}.")
        steps = (
            {
                "choices": choices,
                "max_length": max_length,
                "chat_template_kwargs": chat_template_kwargs,
                "scoring": scoring,
                "length": length,
                "layout": layout,
                "permutations": permutations,
            },
            {"temperature": temperature},
            {"abstain_below": abstain_below, "confidence": confidence, "new_above": new_above},
        )
        preprocess, forward, postprocess = (
            {name: value for name, value in step.items() if value is not None} for step in steps
        )
        return preprocess, forward, postprocess

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers of the inputs, see the class."""
        if isinstance(inputs, Dataset | Column | np.ndarray | tuple):
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
        scoring: str = "token",
        length: str = "none",
        layout: MultipleChoice | None = None,
        permutations: int = 0,
    ) -> dict[str, Any]:
        """Tokens of a prompt and of its choices, for each order in which the options are shown."""
        assert self.tokenizer is not None
        kind = (row.get("kind") if isinstance(row, Mapping) else None) or "choice"
        scored: dict[str, Any] = {"max_length": max_length, "scoring": scoring, "length": length, "kind": kind}
        if isinstance(row, Mapping) and "options" in row and (permutations or "prompt" not in row):
            if layout is None or "question" not in row:
                raise ValueError(
                    "A row with `options` needs a `question`, and the pipeline `layout`, the task that asks it."
                )
            given: dict[str, Any] = {
                "question": str(row["question"]),
                "options": list(row["options"]),
                "group": row.get("group"),
            }
            asked = []
            several = permutations if has_free_order(kind) else 0
            for order in _orders(given["question"], given["options"], several):
                example = layout.reorder(given, order)
                asked.append({**self._encode(example.prompt, example.choices, **scored), "order": order})
            shown = layout.reorder(given, range(len(given["options"])))
            return {"row": {"asked": asked, "choices": list(shown.choices), "reordered": bool(several)}}
        if permutations:
            raise ValueError("`permutations` needs rows with `question` and `options`, whose prompts `layout` writes.")
        prompt: Any = row
        if isinstance(row, Mapping):
            if "prompt" not in row:
                raise ValueError(f"A row needs a 'prompt'; this one has {', '.join(row) or 'nothing'}.")
            own = row.get("choices")
            # Rows of free text have an empty list
            prompt, choices = row["prompt"], choices if own is None or not len(own) else own
        if not isinstance(prompt, str):
            if not _is_conversation(prompt):
                raise ValueError(
                    f"A prompt is a text, got {type(prompt).__name__}. A conversation is a list of messages with `role` and "
                    "`content`."
                )
            own = {name: [value] for name, value in row.items()} if isinstance(row, Mapping) else {}
            (prompt,) = prompt_texts(
                self.tokenizer, [prompt], chat_template_kwargs=chat_template_kwargs, **template_columns(own)
            )
        if not prompt:
            raise ValueError("The prompt is empty: there is nothing to answer.")
        choices = None if choices is None else choice_texts(choices, "this prompt") or None
        # One entry, so that a batch is a list of rows whatever their lengths
        return {
            "row": {
                "asked": [self._encode(prompt, choices, **scored)],
                "choices": choices,
                "reordered": False,
            }
        }

    def _encode(
        self,
        prompt: str,
        choices: Sequence[str] | None,
        *,
        max_length: int | None,
        scoring: str,
        length: str,
        kind: str,
    ) -> dict[str, Any]:
        """Tokens of a prompt and of its choices; what the log-probabilities of whole choices are divided by."""
        assert self.tokenizer is not None
        tokens: Any = None
        limit = context_length(self.model) if max_length is None else max_length
        whole: dict[str, Any] = {}
        if scoring == "choices":
            if not choices:
                raise ValueError('scoring="choices" compares texts; give `choices`.')
            _, (tokens,) = choice_token_ids(self.tokenizer, [prompt], [choices], ["this prompt"])
            limit = None if limit is None else limit - max(map(len, tokens))
            lengths = {name: values[0] for name, values in choice_lengths([choices], [tokens]).items()}
            if not lengths.get(length, np.ones(1)).all():
                raise ValueError(f"A choice has no {length}, so nothing can be divided by its length.")
            bare = bare_context(self.tokenizer, "") if length == "unconditional" else None
            whole = {"lengths": lengths.get(length), "bare": bare}
        elif choices:
            tokens = answer_token_ids(self.tokenizer, prompt, choices)
        (ids,), (cut,) = cut_to_length(encode_texts(self.tokenizer, [prompt]), limit, self.tokenizer.all_special_ids)
        if cut:
            warnings.warn(
                f"A prompt is longer than {limit} tokens and loses its beginning: {prompt[:40]!r}... Shorten it.",
                UserWarning,
                stacklevel=2,
            )
        return {"ids": ids, "tokens": tokens, "scoring": (scoring, length), "kind": kind, **whole}

    def _forward(  # type: ignore[override]
        self, inputs: dict[str, Any], temperature: Temperature = 1.0
    ) -> dict[str, Any]:
        rows = inputs["row"] if isinstance(inputs["row"], list) else [inputs["row"]]
        flat = [asked for row in rows for asked in row["asked"]]
        batch_size = max(len(rows), min(len(flat), _LEAST_BATCH))
        if "lengths" in flat[0]:
            scores = iter(_whole_scores(self.model, flat, batch_size, temperature))
        else:
            scores = iter(_token_scores(self.model, flat, batch_size, temperature))
        answered = [
            {
                **row,
                "temperature": temperature,
                "asked": [{**asked, **next(scores)} for asked in row["asked"]],
            }
            for row in rows
        ]
        return {"row": answered if isinstance(inputs["row"], list) else answered[0]}

    def postprocess(  # type: ignore[override]
        self,
        outputs: dict[str, Any],
        abstain_below: float | str | None = None,
        confidence: str = "full_vocab",
        new_above: float = NEW_ABOVE,
    ) -> dict[str, Any]:
        """Answer and confidence of one prompt."""
        assert self.tokenizer is not None
        choices, asked = outputs["row"]["choices"], outputs["row"]["asked"]
        # One order that was drawn is not the one given either
        row, reordered = asked[0], outputs["row"]["reordered"]
        if isinstance(abstain_below, str):
            if reordered or row["tokens"] is None:
                raise ValueError(
                    f"abstain_below={abstain_below!r} is about answers in the order given: the threshold was fitted on such. "
                    "Leave `permutations` out and give `choices`, or give a number."
                )
            used = outputs["row"]["temperature"]
            abstain_below = stored_threshold(self.extras, abstain_below, confidence, used, row["scoring"]).threshold
        index = answer = probabilities = mass = None
        if row["tokens"] is None:
            if confidence != "full_vocab":
                raise ValueError(f"confidence={confidence!r} is about choices; give `choices`.")
            answer, sure = self.tokenizer.decode([row["top_token"]]), float(np.exp(row["top_logprob"]))
        else:
            # The choice at place j of an order is choice order[j] as they were given
            places = [np.argsort(one.get("order", range(len(choices)))) for one in asked]
            logprobs, scores = (np.array([one[name] for one in asked]) for name in ("logprobs", "scores"))
            # Summed as they were shown, and the mass without rounding: equal to the last bit in whatever order they came
            shares = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
            probabilities, shares = (
                np.take_along_axis(values, np.array(places), axis=1).mean(axis=0)
                for values in (np.exp(logprobs), shares)
            )
            mass = math.fsum(probabilities)
            if confidence == "full_vocab" and not reordered and "top_token" in row:
                index = row["tokens"].index(row["top_token"]) if row["top_token"] in row["tokens"] else None
                sure = float(np.exp(row["top_logprob"]))
            else:
                index = int(shares.argmax())
                sure = float((shares if confidence == "renormalized" else probabilities)[index])
            probabilities = probabilities.tolist()
            answer = None if index is None else choices[index]
        abstained = abstain_below is not None and bool(sure < abstain_below)
        return {
            "answer": None if abstained else answer,
            "index": index,
            "confidence": sure,
            "abstained": abstained,
            "choices": probabilities,
            "option_mass": mass,
            **({"novelty": row["novelty"], "new": row["novelty"] > new_above} if "novelty" in row else {}),
        }


def _orders(question: str, options: Sequence[str], permutations: int) -> list[tuple[int, ...]]:
    """Orders in which options are shown, the same ones in whatever order they are given."""
    if not permutations:
        return [tuple(range(len(options)))]
    by_text = sorted(range(len(options)), key=lambda i: str(options[i]))
    key = "\x1f".join([question, *(str(options[i]) for i in by_text)])
    return [tuple(by_text[i] for i in order) for order in option_orders(len(options), permutations, key=key)]


def _token_scores(
    model: Any, asked: list[dict[str, Any]], batch_size: int, temperature: Temperature
) -> list[dict[str, Any]]:
    """Log-probabilities of the choices' tokens, and the most likely of all tokens."""
    found: list[dict[str, Any]] = [{} for _ in asked]
    prompts = [one["ids"] for one in asked]
    scaling = temperature if isinstance(temperature, NoveltyScaling) else None
    layers = scaling.layers if scaling is not None else []
    for index, logits, states in next_token_states(
        model, prompts, layers, batch_size=batch_size, disable_tqdm=True, desc=""
    ):
        more: list[dict[str, Any]] = [{} for _ in index]
        if scaling is not None:
            given, novelty = scaling.of_states(dict(zip(layers, states, strict=True)), logits)
            divisors, more = given.tolist(), [{"novelty": float(each)} for each in novelty]
        else:
            divisors = [_divisor(temperature, asked[number]) for number in index]
        lp = torch.log_softmax(
            logits / torch.tensor(divisors, dtype=logits.dtype, device=logits.device)[:, None], dim=-1
        )
        best = lp.max(dim=-1)
        for i, number in enumerate(index):
            tokens = asked[number]["tokens"]
            logprobs = None if tokens is None else lp[i, tokens].tolist()
            found[number] = {
                "logprobs": logprobs,
                "scores": logprobs,
                "top_token": int(best.indices[i]),
                "top_logprob": float(best.values[i]),
                **more[i],
            }
    return found


def _saved_novelty(source: str, temperature: Any, extras: Mapping[str, Any], **where: Any) -> NoveltyScaling:
    if temperature is not None:
        raise ValueError("`novelty` brings temperatures of its own. Leave `temperature` or `novelty` out.")
    return NoveltyScaling.load(source, digest=(extras.get("novelty") or {}).get("sha256"), **where)


def _divisor(temperature: Any, asked: Mapping[str, Any]) -> float:
    if isinstance(temperature, OptionTemperature):
        choices = asked["tokens"]
        return temperature.common if choices is None else temperature.temperature(asked["kind"], len(choices))
    return temperature


def _whole_scores(
    model: Any, asked: list[dict[str, Any]], batch_size: int, temperature: Temperature
) -> list[dict[str, Any]]:
    """Log-probabilities of whole choices, and the same under the normalisation that was asked for."""
    if not isinstance(temperature, int | float):
        on = "the prompt" if isinstance(temperature, NoveltyScaling) else "the number of options"
        raise ValueError(f'scoring="choices" takes one temperature, and this one depends on {on}. Give `temperature`.')
    contexts, tokens = [one["ids"] for one in asked], [one["tokens"] for one in asked]
    options: dict[str, Any] = {"batch_size": batch_size * len(tokens[0]), "temperature": temperature}
    names = [f"{i}" for i in range(len(asked))]
    logprobs = choice_logprobs(model, contexts, tokens, names, **options)
    scores = logprobs
    if asked[0]["bare"] is not None:
        bare = choice_logprobs(model, [one["bare"] for one in asked], tokens, names, **options)
        scores = [values - without for values, without in zip(logprobs, bare, strict=True)]
    elif asked[0]["lengths"] is not None:
        scores = [values / one["lengths"] for values, one in zip(logprobs, asked, strict=True)]
    return [{"logprobs": a, "scores": b} for a, b in zip(logprobs, scores, strict=True)]


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
    temperature: Temperature | None = None,
    confidence: str = "full_vocab",
    choices: Sequence[str] | None = None,
    abstain_below: float | str | None = None,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    scoring: str | None = None,
    length: str | None = None,
    layout: Any = None,
    permutations: int = 0,
    novelty: bool = False,
    new_above: float = NEW_ABOVE,
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
        temperature (`float` or [`~first_trl.calibration.conditional.OptionTemperature`], *optional*):
            Defaults to the one that was saved with the model (`decision.json` and `first_trl_decision.json`), and to 1 where
            there is none or the model is loaded already; 1 ignores it.
        novelty (`bool`, *optional*, defaults to `False`):
            Use the temperature by novelty that was saved with the model (`novelty.safetensors`): the answer stays, the
            confidence falls where a prompt is unlike the training rows, and the result says how new it is.
        scoring (`str`, *optional*), length (`str`, *optional*):
            Default to those that were saved with the model, whose answers have several tokens, else to `"token"`.
        confidence, choices, abstain_below, max_length, chat_template_kwargs, layout, permutations, new_above:
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
        `ValueError`: when loading arguments stand beside a loaded model, a loaded model has no tokenizer to be found, or
            the model brings no threshold for what `abstain_below` promises.

    Example:

    ```python
    >>> from first_trl import answer_pipeline
    >>> pipe = answer_pipeline("my-name/my-student")
    >>> prompt = "Which is a tool?\\nAnswer Choices:\\n(A) hammer\\n(B) cloud\\nAnswer:"
    >>> pipe(prompt, choices=[" A", " B"], abstain_below=0.6)
    {'answer': ' A', 'index': 0, 'confidence': 0.83, 'abstained': False, 'choices': [0.83, 0.15], 'option_mass': 0.98}
    ```
    """
    extras: dict[str, Any] = {}
    if isinstance(model, str | Path):
        source = str(model)
        extras = read_decision_extras(source, revision=revision, token=token)
        if novelty:
            temperature = _saved_novelty(source, temperature, extras, revision=revision, token=token)
        elif temperature is None:
            temperature = read_temperature(source, revision=revision, token=token)
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
        if novelty:
            raise ValueError(
                "`model` is loaded already, so what was saved with it is not known. Pass its name, or "
                "`temperature=NoveltyScaling.load(folder)`."
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
        "layout": layout,
    }
    temperature = 1.0 if temperature is None else temperature
    saved = extras.get("scoring", {}) if scoring is None else {}
    scoring, length = scoring or saved.get("scoring", "token"), length or saved.get("length", "none")
    if isinstance(abstain_below, str):
        stored_threshold(extras, abstain_below, confidence, temperature, (scoring, length))
    pipe = AnswerPipeline(
        model=loaded,
        tokenizer=tokenizer,
        task=TASK,
        device=device,
        batch_size=batch_size,
        temperature=temperature,
        confidence=confidence,
        scoring=scoring,
        length=length,
        permutations=permutations,
        new_above=new_above,
        **{name: value for name, value in defaults.items() if value is not None},
    )
    pipe.extras = extras
    return pipe
