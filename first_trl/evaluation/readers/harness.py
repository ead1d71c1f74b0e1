"""
Multiple-choice samples of lm-evaluation-harness: `--log_samples` files and in-process results.

A log line is one (document, filter). Numbers in it are strings, the number of choices changes from line to line, and with
`acc_mutual_info` the list of log-likelihoods is twice as long (with the question first, without it second).
"""

import ast
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.tables import Table, file_kind, load_table
from ..confidence import Confidences, answers_to_confidences, choice_scores


# Metric of the harness -> the definition of confidence whose most likely answer it scores.
READINGS = {
    "acc": "renormalized",
    "acc_norm": "length_normalized",
    "acc_bytes": "length_normalized",
    "acc_mutual_info": "unconditional",
}


@dataclass(frozen=True)
class HarnessSamples:
    """
    Checked samples of one task and one filter.

    Attributes:
        task (`str`): name of the task, `filter` (`str`): name of the filter.
        doc_ids (`list[int]`): one per sample.
        logprobs (`list[np.ndarray]`): log-likelihood of each choice, given the question.
        unconditional (`list[np.ndarray | None]`): the same without the question, where logged.
        continuations (`list[list[str]]`): what was scored, as sent to the model.
        gold (`list[list[int]]`): indices of the choices that count as right.
        logged (`list[dict]`): metrics of the sample as logged.
        target_delimiter (`str`): what the task puts between question and choice, where the harness tells; else a space.
    """

    task: str
    filter: str
    doc_ids: list[int]
    logprobs: list[np.ndarray]
    unconditional: list[np.ndarray | None]
    continuations: list[list[str]]
    gold: list[list[int]]
    logged: list[Mapping[str, Any]]
    target_delimiter: str = " "

    def __len__(self) -> int:
        return len(self.doc_ids)

    @property
    def readings(self) -> list[str]:
        """The metrics of [`READINGS`] that were logged; at least `acc`."""
        return [name for name in READINGS if name == "acc" or all(name in metrics for metrics in self.logged)]

    def confidences(
        self, reading: str = "acc", *, definition: str | None = None, target_delimiter: str | None = None
    ) -> Confidences:
        """
        Confidences under one reading of the samples.

        Args:
            reading (`str`, *optional*, defaults to `"acc"`):
                `"acc"`, `"acc_norm"` (log-likelihood per character), `"acc_bytes"` or `"acc_mutual_info"`: the answer is the
                one that this metric scores.
            definition (`str`, *optional*):
                `"choice"` with `reading="acc"` gives the probability of the answer itself, without renormalising over
                the choices. That of the reading by default.
            target_delimiter (`str`, *optional*):
                What the task puts between question and choice; not counted in lengths. By default that of the samples.

        Raises:
            `ValueError`: when the log lacks what the reading needs, or disagrees with the metric logged for a sample.
        """
        if reading not in READINGS:
            raise ValueError(f"Unknown reading {reading!r}, choose one of {list(READINGS)}.")
        definition = READINGS[reading] if definition is None else definition
        if definition != READINGS[reading] and (reading, definition) != ("acc", "choice"):
            raise ValueError(
                f"The answers of {reading!r} are those of the definition {READINGS[reading]!r}, not {definition!r}."
            )
        scores = []
        target_delimiter = self.target_delimiter if target_delimiter is None else target_delimiter
        for i in range(len(self)):
            try:
                lengths = _lengths(self.continuations[i], reading, target_delimiter)
                scores.append(
                    choice_scores(
                        self.logprobs[i], definition=definition, lengths=lengths, unconditional=self.unconditional[i]
                    )
                )
            except ValueError as error:
                raise ValueError(f"{self.task}, doc {self.doc_ids[i]}, reading {reading!r}: {error}") from None
        name = self.task if self.filter == "none" else f"{self.task} ({self.filter})"
        result = answers_to_confidences(f"{name} {reading}", scores, self.gold, definition=definition)
        for i, metrics in enumerate(self.logged):
            if metrics.get(reading) is not None and bool(float(metrics[reading])) != bool(result.correct[i]):
                raise ValueError(
                    f"{self.task}, doc {self.doc_ids[i]}: the log says {reading} = {metrics[reading]}, its log-likelihoods say "
                    f"{int(result.correct[i])}. If the task has another `target_delimiter` than {target_delimiter!r}, give it."
                )
        return result


def _lengths(continuations: Sequence[str], reading: str, delimiter: str) -> list[int] | None:
    if READINGS[reading] != "length_normalized":
        return None
    if len(set(continuations)) == 1 and len(continuations) > 1:
        raise ValueError(
            "all choices have the same continuation (the question differs), so their lengths are not logged."
        )
    bare = [c.removeprefix(delimiter) if delimiter else c for c in continuations]
    return [len(c.encode()) if reading == "acc_bytes" else len(c) for c in bare]


def read_harness_log(path: str | os.PathLike[str], *, filter: str | None = None) -> list[HarnessSamples]:
    """
    Read a `samples_*.jsonl` file written with `--log_samples`, a sample a line or one list of them.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        filter (`str`, *optional*):
            Only this filter; all by default.

    Returns:
        `list[HarnessSamples]`: one per filter.

    Raises:
        `ValueError`: naming file and line for what cannot be read.
    """
    return table_harness_samples(load_table(path), filter=filter)


def table_harness_samples(table: Table, *, filter: str | None = None) -> list[HarnessSamples]:
    """
    [`read_harness_log`] for rows that were read already. The harness writes what it ran beside them, into
    `results_<time>.json`.
    """
    places = [f"{table.path}, sample {number}" for number in range(1, len(table.rows) + 1)]
    # samples_<task>_<2026-01-31T12-00-00.000000>.jsonl
    stem = file_kind(table.path)[0].removeprefix("samples_")
    task, _, time = stem.rpartition("_")
    if not task or "T" not in time:
        return _by_filter(stem, table.rows, places, filter)
    results = Path(table.path).with_name(f"results_{time}.json")
    try:
        delimiter = _delimiter(json.loads(results.read_text(encoding="utf-8")), task) if results.is_file() else " "
    except ValueError as error:
        raise ValueError(f"{results} is no JSON ({error}). Mend it, or move it away from the log.") from None
    return _by_filter(task, table.rows, places, filter, delimiter)


def _delimiter(results: Mapping[str, Any], task: str) -> str:
    config = results.get("configs", {}).get(task, {})
    prefix = config.get("gen_prefix") or ""
    # The answer begins a turn. Versions before 0.4.6 put the delimiter there too; before 0.4.9 none is written down
    if results.get("chat_template") and "lm_eval_version" in results and (not prefix or prefix[-1].isspace()):
        return ""
    return str(config.get("target_delimiter", " "))


def read_harness_results(results: Mapping[str, Any], *, filter: str | None = None) -> dict[str, list[HarnessSamples]]:
    """
    Read what `lm_eval.simple_evaluate(..., log_samples=True)` returned.

    Returns:
        `dict[str, list[HarnessSamples]]`: for each task one entry per filter.
    """
    if not results.get("samples"):
        raise ValueError("The results hold no samples: call `simple_evaluate(..., log_samples=True)`.")
    return {
        task: _by_filter(
            task, samples, [f"{task}, sample {i}" for i in range(len(samples))], filter, _delimiter(results, task)
        )
        for task, samples in results["samples"].items()
    }


def _by_filter(
    task: str,
    samples: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    wanted: str | None,
    delimiter: str = " ",
) -> list[HarnessSamples]:
    if not samples:
        raise ValueError(f"{task}: there are no samples.")
    groups: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
    for sample, place in zip(samples, places, strict=True):
        if not isinstance(sample, Mapping) or "filtered_resps" not in sample or "doc_id" not in sample:
            raise ValueError(
                f"{place}: this is no sample of lm-evaluation-harness (no 'doc_id' and 'filtered_resps')."
            )
        groups.setdefault(str(sample.get("filter", "none")), []).append((sample, place))
    if wanted is not None and wanted not in groups:
        raise ValueError(f"{task} has no filter {wanted!r}; it has {sorted(groups)}.")
    return [_read_group(task, name, rows, delimiter) for name, rows in groups.items() if wanted in (None, name)]


def _read_group(
    task: str, filter_name: str, rows: Iterable[tuple[Mapping[str, Any], str]], delimiter: str
) -> HarnessSamples:
    read = HarnessSamples(task, filter_name, [], [], [], [], [], [], delimiter)
    seen: dict[Any, str] = {}
    targets: list[Any] = []
    places: list[str] = []
    for sample, place in rows:
        doc_id = sample["doc_id"]
        if doc_id in seen:
            raise ValueError(
                f"{place}: doc {doc_id} was already read ({seen[doc_id]}). The file holds several runs (the harness appends); "
                "keep one."
            )
        seen[doc_id] = place
        logprobs = _logprobs(_single(sample["filtered_resps"]), place)
        arguments = _arguments(sample.get("arguments"), len(logprobs), place)
        n_choices = len(logprobs)
        unconditional = None
        # Without the question the context is empty, or what the task names: that or the metric marks the second half, not
        # its position alone. Older versions of the harness log its choices without the delimiter.
        half = n_choices // 2
        unasked = "acc_mutual_info" in sample or all(context == "" for context, _ in arguments[half:])
        texts = [text.strip() for _, text in arguments]
        if n_choices % 2 == 0 and unasked and texts[:half] == texts[half:]:
            n_choices, unconditional, logprobs = half, logprobs[half:], logprobs[:half]
        if n_choices == 1:
            raise ValueError(
                f"{place}: one request a document, as LAMBADA and perplexity tasks make. The log has the probability of "
                "the expected text alone: where the model would have answered something else, how confident it was in "
                "that is not logged, so there is no calibration error to compute. Log a multiple-choice task."
            )
        continuations = [text for _, text in arguments[:n_choices]]
        logged = {name: sample[name] for name in sample.get("metrics", READINGS) if name in sample}
        for name in READINGS:
            if logged.get(name) is not None and float(logged[name]) not in (0.0, 1.0):
                raise ValueError(
                    f"{place}: {name} = {logged[name]} is neither 0 nor 1. The task scores its answers in its own way (as "
                    "TruthfulQA mc2 does), so which choices are right is not logged."
                )
        read.doc_ids.append(doc_id)
        read.logprobs.append(logprobs)
        read.unconditional.append(unconditional)
        read.continuations.append(continuations)
        read.logged.append(logged)
        targets.append(sample.get("target"))
        places.append(place)
    read.gold.extend(_gold(read, targets, places))
    return read


def _single(responses: Any) -> Any:
    """Responses of a document, of which a filter may have taken the only one out of its list."""
    if isinstance(responses, list | tuple) and len(responses) == 2 and str(responses[1]) in ("True", "False"):
        return [responses]
    return responses


def _logprobs(responses: Any, place: str) -> np.ndarray:
    values = []
    for number, response in enumerate(responses if isinstance(responses, list | tuple) else [responses]):
        # One more level of nesting where requests are repeated.
        while isinstance(response, list | tuple) and response and isinstance(response[0], list | tuple):
            response = response[0]
        first = response[0] if isinstance(response, list | tuple) and len(response) == 2 else None
        try:
            value = float(first)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(
                f"{place}: response {number} is {response!r}, not a (log-likelihood, is greedy) pair. Only multiple-choice "
                "tasks hold confidences."
            ) from None
        if np.isnan(value) or value > 1e-6:
            raise ValueError(f"{place}: the log-likelihood of choice {number} is {value}, it must be <= 0.")
        values.append(min(value, 0.0))
    if not values:
        raise ValueError(f"{place}: there are no responses.")
    return np.array(values)


def _arguments(arguments: Any, n: int, place: str) -> list[tuple[str, str]]:
    """(context, continuation) of each request; a log has dictionaries where the results have tuples."""
    if isinstance(arguments, Mapping):
        arguments = [arguments.get(f"gen_args_{i}") for i in range(len(arguments))]
    pairs = []
    for argument in arguments or []:
        if isinstance(argument, Mapping):
            argument = (argument.get("arg_0"), argument.get("arg_1"))
        if (
            not isinstance(argument, list | tuple)
            or len(argument) < 2
            or not all(isinstance(a, str) for a in argument[:2])
        ):
            raise ValueError(f"{place}: the request {argument!r} is not a (context, continuation) pair.")
        pairs.append((argument[0], argument[1]))
    if len(pairs) != n:
        raise ValueError(f"{place}: {len(pairs)} requests but {n} responses.")
    return pairs


def _targets(target: Any, continuations: Sequence[str]) -> dict[str, list[int]]:
    """
    What the target can mean: indices of choices, or the text of one. A log writes both as strings, so "1" can be either.
    """
    meanings = {}
    parsed = target
    if isinstance(target, str):
        try:
            parsed = ast.literal_eval(target)
        except (ValueError, SyntaxError):
            parsed = None
    indices = list(parsed) if isinstance(parsed, list | tuple) else [parsed]
    if indices and all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in indices):
        inside = [int(i) for i in indices if 0 <= int(i) < len(continuations)]
        if inside:
            meanings["index"] = inside
    if isinstance(target, str):
        same = [i for i, text in enumerate(continuations) if text.strip() == target.strip()]
        if len(same) == 1:
            meanings["text"] = same
    return meanings


def _gold(read: HarnessSamples, targets: Sequence[Any], places: Sequence[str]) -> list[list[int]]:
    """Indices of the right choices; one meaning of the target for all samples, which the logged accuracy has to confirm."""
    candidates: list[dict[str, list[int]]] = []
    for i, target in enumerate(targets):
        acc, n_choices = read.logged[i].get("acc"), len(read.logprobs[i])
        if len(set(read.continuations[i])) == 1 < n_choices and acc is not None:
            # The questions differ and the continuation is shared (Winogrande): the target says nothing, the accuracy does.
            answer = int(np.argmax(read.logprobs[i]))
            if float(acc) == 0.0 and n_choices > 2:
                raise ValueError(f"{places[i]}: the right one of {n_choices} questions is not logged.")
            gold = [answer if float(acc) else 1 - answer]
            candidates.append({"index": gold, "text": gold})
            continue
        meanings = _targets(target, read.continuations[i])
        if not meanings:
            raise ValueError(
                f"{places[i]}: the target {target!r} is neither an index nor one of the choices {read.continuations[i]}."
            )
        candidates.append(meanings)
    fitting = []
    for meaning in ("index", "text"):
        gold_by_row = [row.get(meaning) for row in candidates]
        if all(
            gold is not None
            and (
                read.logged[i].get("acc") is None
                or (int(np.argmax(read.logprobs[i])) in gold) == bool(float(read.logged[i]["acc"]))
            )
            for i, gold in enumerate(gold_by_row)
        ):
            fitting.append([gold for gold in gold_by_row if gold is not None])
    if not fitting:
        raise ValueError(
            f"{read.task}: the targets, read as indices or as texts of the choices, disagree with the accuracy logged beside "
            "them. Is the log complete and of one run?"
        )
    if len(fitting) == 2 and fitting[0] != fitting[1]:
        raise ValueError(
            f"{read.task}: the targets are indices and texts of the choices at once, and nothing logged tells which. Log `acc`."
        )
    return fitting[0]
