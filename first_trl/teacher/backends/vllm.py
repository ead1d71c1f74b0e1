"""Teacher scoring by a running vLLM server, over HTTP: the engine is scaled, sharded and quantised on its own."""

import hashlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import numpy as np

from ...utils.retry import GaveUp, RetryPolicy, retry
from .base import Scores


logger = logging.getLogger(__name__)

# Answers that say "not now": the server starts, restarts, or is overloaded
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE = 30.0
# Ids below 97: every vocabulary has them, and an id beyond it would stop the engine
_PROBE = [(61 * i) % 97 for i in range(1, 17)]
# Mean difference of the probe's log-probabilities, in nats: the same weights in bfloat16 stay well below, another
# model is above one
_PROBE_TOLERANCE = 0.1


class _NotNow(Exception):
    """The server is away or busy; it may have said for how many seconds."""

    def __init__(self, problem: str, retry_after: str = "") -> None:
        super().__init__(problem)
        self.retry_after = retry_after


class VLLMBackend:
    """
    Score rows with a vLLM server (`vllm serve`, OpenAI protocol).

    The server tells neither its weights nor when it was restarted with others. Every request therefore carries a
    short probe, and its log-probabilities must be those that the capture began with: a batch and the proof of who
    scored it come in the same answer. The tail is derived from the kept values, which the manifest notes.

    Several requests are under way at a time, so that the server always has rows to put into its next forward. What
    shares a forward depends on when requests arrive, and so may the last digits of a log-probability; a server started
    with `VLLM_BATCH_INVARIANT=1` gives the same bits each time.

    Args:
        url (`str`):
            Address of the server, e.g. `"http://127.0.0.1:8000"`.
        model (`str`, *optional*):
            Served name. Defaults to the only model the server has.
        head_size (`int`, *optional*):
            Rows of the teacher's head, which the protocol does not tell. Defaults to the tokenizer's size.
        api_key (`str`, *optional*):
            Key of the server. Defaults to the environment variable `VLLM_API_KEY`. It enters no manifest and no
            message.
        retry_seconds (`float`, *optional*, defaults to `900.0`):
            How long a server that does not answer is waited for: long enough to restart it.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds one request may take.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests under way at a time.
    """

    ranks_per_teacher = 1

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        head_size: int | None = None,
        api_key: str | None = None,
        retry_seconds: float = 900.0,
        timeout: float = 600.0,
        concurrency: int = 8,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {concurrency}.")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("Give the vLLM server's address as 'http://host:port'.")
        if parts.username or parts.password:
            raise ValueError("Leave credentials out of the vLLM address; pass `api_key` or set VLLM_API_KEY.")
        self._url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._api_key = api_key if api_key is not None else os.environ.get("VLLM_API_KEY")
        self._retry_seconds, self._timeout = retry_seconds, timeout
        self.head_size, self.concurrency = head_size, concurrency
        served = self._request("/v1/models")["data"]
        names = [entry["id"] for entry in served]
        if model is None and len(names) != 1:
            raise ValueError(f"The vLLM server at {self._url} serves {names}: choose one with `model`.")
        if model is not None and model not in names:
            raise ValueError(f"The vLLM server at {self._url} serves {names}, not {model!r}.")
        self._model = model or names[0]
        entry = served[names.index(self._model)]
        self._root = str(entry.get("root") or self._model)
        # One token must be generated for a prompt to be scored
        context = entry.get("max_model_len")
        self.max_length = None if context is None else int(context) - 1
        self._version = str(self._request("/version").get("version"))
        self._watched: tuple[list[int], list[float]] | None = None
        self._probe: list[float] | None = None
        self._probe = _own_logprobs(_PROBE, self._complete([_PROBE], 1)[0])
        self.notes = [
            "The tail is derived from the kept log-probabilities (log1p of minus their sum) because the engine "
            "returns no others."
        ]

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # A folder on the server's disk is nobody's business, but tells one checkpoint from another
        local = self._root.startswith(("/", ".", "~"))
        teacher = {
            "name": self._root.rstrip("/").rsplit("/", 1)[-1] if local else self._root,
            "revision": None,
            "weights_digest": "served:" + hashlib.blake2b(self._root.encode(), digest_size=8).hexdigest(),
            "probe_logprobs": [*(self._probe or []), *(self._watched[1] if self._watched else [])],
        }
        backend = {"name": "vllm", "version": self._version, "dtype": None, "quantization": None}
        return teacher, backend

    def confirm(self, teacher: dict[str, Any]) -> None:
        """Raises `ValueError` unless the server answers the probe as it did when the capture began."""
        found = teacher.get("probe_logprobs") or []
        probe, row = found[: len(_PROBE) - 1], found[len(_PROBE) - 1 :]
        self._check_probe(probe)
        if row and self._watched:  # an earlier version noted the probe alone
            self._check_same(self._watched[1], row)

    def watch(self, row: list[int]) -> None:
        # Beside the probe: on arbitrary ids, two fine-tunings of a model, such as an adapter and that of an earlier epoch,
        # may be too near each other to be told apart
        self._watched = row, self.token_logprobs([row])[0]

    def token_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probability of every token but the first of each prompt, in nats."""
        answers = self._complete(prompts, 1)
        return [_own_logprobs(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def score(
        self,
        rows: list[np.ndarray],
        positions: list[np.ndarray],
        k: int,
        num_tokens: int,
        uniforms: list[np.ndarray] | None = None,
    ) -> list[Scores]:
        if uniforms is not None:
            raise ValueError(
                "vLLM returns the most likely tokens only, so nothing can be drawn from its full softmax. Set "
                "`num_draws=0`, or capture with the transformers backend."
            )
        prompts = [row.tolist() for row in rows]
        row, before = self._watched or (None, None)
        answers = self._complete([*prompts, *([] if row is None else [row]), _PROBE], k)
        self._check_probe(_own_logprobs(_PROBE, answers.pop()))
        if row is not None and before is not None:
            self._check_same(_own_logprobs(row, answers.pop()), before)
        scores = []
        for prompt, wanted, answer in zip(prompts, positions, answers, strict=True):
            entries = [_top_k(answer[t], k, k, num_tokens) for t in wanted]
            if any(len(entry) < k for entry in entries):
                # Padded ids of the head took places: ask for enough to fill them
                entries = self._more(prompt, wanted, k, num_tokens)
            scores.append(_scores(entries, k))
        return scores

    def _more(self, prompt: list[int], wanted: np.ndarray, k: int, num_tokens: int) -> list[list[tuple[float, int]]]:
        asked = k
        while True:
            asked *= 2
            answer = self._complete([prompt], asked)[0]
            entries = [_top_k(answer[t], asked, k, num_tokens) for t in wanted]
            if all(len(entry) == k for entry in entries):
                return entries

    def _complete(self, prompts: list[list[int]], k: int) -> list[list[dict[str, Any] | None]]:
        """`prompt_logprobs` of each prompt."""
        answer = self._request(
            "/v1/completions",
            {"model": self._model, "prompt": prompts, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k},
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found = [choice.get("prompt_logprobs") or [] for choice in choices]
        if [len(entries) for entries in found] != [len(prompt) for prompt in prompts]:
            raise ValueError(
                f"The server at {self._url} returned log-probabilities of other lengths than the prompts: it does not "
                "speak vLLM's `prompt_logprobs`, or cut a prompt."
            )
        return found

    def _check_probe(self, expected: list[float]) -> None:
        assert self._probe is not None
        self._check_same(expected, self._probe)

    def _check_same(self, found: list[float], expected: list[float]) -> None:
        if len(found) != len(expected) or np.abs(np.subtract(found, expected)).mean() > _PROBE_TOLERANCE:
            raise ValueError(
                f"Another model answers at {self._url} than the one this capture began with: its log-probabilities of "
                "a fixed probe differ. Start the first teacher again, or capture into another folder."
            )

    def _request(self, path: str, data: dict[str, Any] | None = None) -> Any:
        """One request, repeated with growing pauses while the server is away. Scoring is idempotent."""
        body = None if data is None else json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        policy = RetryPolicy(
            None, base_seconds=0.5, max_wait_seconds=_LONGEST_PAUSE, max_total_seconds=self._retry_seconds
        )

        def attempt() -> Any:
            request = urllib.request.Request(self._url + path, body, headers)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                raise _NotNow(self._explain(error, data), error.headers.get("Retry-After") or "") from None
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                raise _NotNow(str(error) or type(error).__name__) from None

        def wait_seconds(failure: Exception, number: int) -> float:
            asked = getattr(failure, "retry_after", "")
            return max(policy.wait_seconds(number), float(asked) if asked.isdigit() else 0.0)

        def before_wait(failure: Exception, number: int, wait: float) -> None:
            logger.warning("vLLM at %s: %s; next try in %.1f s.", self._url, failure, wait)

        try:
            return retry(
                attempt,
                policy,
                is_transient=lambda failure: isinstance(failure, _NotNow),
                wait_seconds=wait_seconds,
                before_wait=before_wait,
            )
        except GaveUp as error:
            raise ConnectionError(
                f"The vLLM server at {self._url} did not answer within {self._retry_seconds:.0f} s ({error.failure}). "
                "Start it and run the capture again: it continues where it stopped."
            ) from None

    def _explain(self, error: urllib.error.HTTPError, data: dict[str, Any] | None) -> str:
        """What went wrong if it can pass; `ValueError` with the mend if it cannot."""
        try:
            text = json.loads(error.read())["error"]["message"]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            text = error.reason
        if error.code in _RETRIED:
            return f"{error.code} {text}"
        mend = "Check the request and the server's version."
        if error.code in (401, 403):
            mend = "Pass `api_key` or set VLLM_API_KEY."
        elif error.code == 404:
            mend = "Another model may have been started at this address; start the first one again."
        elif "logprobs" in str(text) and data is not None:
            mend = f"Start the server with `--max-logprobs {data['prompt_logprobs']}` or more, or lower `k`."
        elif "context length" in str(text) or "max_tokens" in str(text):
            mend = "Raise the server's `--max-model-len`, or set `max_length`."
        raise ValueError(f"The vLLM server at {self._url} refused: {error.code} {text} {mend}") from error


def _own_logprobs(prompt: list[int], answer: list[dict[str, Any] | None]) -> list[float]:
    """Log-probability of each prompt token but the first."""
    return [entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], answer[1:], strict=True) if entry]


def _top_k(entry: dict[str, Any] | None, asked: int, k: int, num_tokens: int) -> list[tuple[float, int]]:
    """
    The k most likely of an answer's entries as (log-probability, id). The answer holds the `asked` most likely tokens
    and the prompt's own, whatever its rank.
    """
    assert entry is not None
    values = ((float(value["logprob"]), int(token)) for token, value in entry.items())
    ranked = sorted(values, key=lambda pair: (-pair[0], pair[1]))[:asked]
    return [pair for pair in ranked if pair[1] < num_tokens][:k]


def _scores(entries: list[list[tuple[float, int]]], k: int) -> Scores:
    logprobs = np.array([[value for value, _ in entry] for entry in entries]).reshape(-1, k)
    ids = np.array([[token for _, token in entry] for entry in entries], np.int32).reshape(-1, k)
    if np.isnan(logprobs).any() or (logprobs > 1e-4).any():
        raise ValueError("The vLLM server returned NaN or positive log-probabilities. Check the teacher's weights.")
    logprobs = np.minimum(logprobs, 0.0)
    rest = 1 - np.exp(logprobs).sum(-1)
    # Values rounded to float32 can add up to a little more than one: then the tail is below what they resolve
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(rest, np.finfo(np.float32).eps))
    return Scores(ids, logprobs.astype(np.float32), tail.astype(np.float32))
