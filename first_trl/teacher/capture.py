"""Run the teacher once over a dataset and store its top-k next-token log-probabilities."""

import contextlib
import os
import platform
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..cache.folder import load_teacher_cache, shard_path
from ..cache.manifest import Manifest, chat_template_hash, tokenizer_fingerprint
from ..cache.schema import INPUT_IDS, LOGPROB_DTYPES
from ..cache.shards import ShardRows, write_shard
from ..tasks.conversation import check_template_arguments
from ..tasks.encode import front_tokens
from ..utils.in_order import in_order
from ..utils.processes import process_state
from .backends import Scores, TeacherBackend, transformers_backend
from .conversations import is_from_template
from .journal import ShardJournal
from .prepare import prepare_rows
from .progress import close_capture, default_folder, is_finished, open_capture
from .rows import batches_by_length, content_digest, usable_rows


@dataclass(frozen=True)
class CaptureOptions:
    """
    What is kept of every position and how the work is cut, as [`add_teacher_topk`] was told.

    Raises:
        `ValueError`: A value out of its range.
    """

    k: int
    logprob_dtype: str
    num_draws: int
    shard_size: int
    max_tokens_per_batch: int
    max_rows_per_batch: int
    disable_tqdm: bool

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int | np.integer):
            raise ValueError(f"k must be a whole number, got {self.k!r}. The paper keeps 5.")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}. The paper keeps 5.")
        if self.logprob_dtype not in LOGPROB_DTYPES:
            raise ValueError(f"logprob_dtype must be one of {LOGPROB_DTYPES}, got {self.logprob_dtype!r}.")
        if not 0 <= self.num_draws <= np.iinfo(np.uint16).max:
            raise ValueError(f"num_draws must be between 0 and {np.iinfo(np.uint16).max}, got {self.num_draws}.")
        for name in ("shard_size", "max_tokens_per_batch", "max_rows_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def add_teacher_topk(
    dataset: Dataset,
    teacher: str | PreTrainedModel | Sequence[str | PreTrainedModel] | TeacherBackend,
    processing_class: Any,
    *,
    k: int = 5,
    output_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    max_tokens_per_batch: int = 8192,
    max_rows_per_batch: int = 64,
    shard_size: int = 1000,
    logprob_dtype: str = "float16",
    num_draws: int = 0,
    draw_seed: int = 0,
    dtype: Any = "auto",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    dataset_text_field: str = "text",
    chat_template_kwargs: dict[str, Any] | None = None,
    num_proc: int | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    disable_tqdm: bool = False,
) -> Dataset:
    """
    Add a teacher's top-k next-token log-probabilities to a dataset, like a `datasets.map` step: the same inputs give
    the stored result at once, an interrupted call continues where it stopped, and under `accelerate launch` the
    shards are divided among the processes. This is the "concentrated knowledge" of FIRST (arXiv 2408.12168, section 3).

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of any type SFTTrainer accepts, or tokenised rows with `input_ids` and `labels` (-100 = not scored).
            Rows with a `prompt` and no `completion` (or a null one) have no answer: the teacher's distribution over
            the token behind the prompt is kept, the label there is a filler, and `teacher_has_gold` is false.
            Tokenised rows can carry that column too, or `has_gold` as [`~first_trl.tasks.tokenize_rows`] makes it.
        teacher (`str`, [`~transformers.PreTrainedModel`] or [`TeacherBackend`]):
            The fine-tuned teacher: Hub id, folder, model or engine. A list of the first three is a committee with one
            tokenizer: the mean of their distributions is cached, and how far they disagree at each position, see
            [`~first_trl.teacher.backends.CommitteeBackend`]. LoRA adapters of one base share it in memory.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        k (`int`, *optional*, defaults to `5`):
            Entries kept per supervised position.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder of the cache; it can be loaded with [`load_teacher_cache`] and pushed to the Hub. All processes must
            see it (a shared file system when there are several hosts). Defaults to a folder in the datasets cache
            named after the inputs.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split; one folder can hold several.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`), max_rows_per_batch (`int`, *optional*, defaults
        to `64`):
            Size of a forward, padding included. Rows are batched by length within a shard.
        shard_size (`int`, *optional*, defaults to `1000`):
            Rows a shard: the unit of sharing work among processes. An interruption costs the batches under way.
        logprob_dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"` or `"float32"`.
        num_draws (`int`, *optional*, defaults to `0`):
            Draws with replacement from the teacher's softmax (over the tokenizer's ids) stored per position, for the
            `sampled` estimator.
        draw_seed (`int`, *optional*, defaults to `0`):
            Seed of the draws. Those of a row depend on the seed and the row's number, not on how the work is divided.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype the teacher is loaded in, when it is a name.
        completion_only_loss, assistant_only_loss, max_length, truncation_mode, dataset_text_field, num_proc:
            Tokenisation and masks, as in [`~trl.SFTConfig`]. A `completion_mask` of tokenised rows is honoured unless
            `completion_only_loss` is `False`.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the chat template for all conversations, such as `enable_thinking`; a column of that name goes
            before them. Give the same to whoever asks the student.
        model_init_kwargs (`dict`, *optional*):
            Passed to `from_pretrained` when the teacher is a name: `revision`, `quantization_config`, `device_map`,
            `tp_plan`, ... Of a committee, `revision` may be a list.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.

    Returns:
        [`~datasets.Dataset`]: The input's columns, `input_ids`, `labels`, and the cache columns. Rows without a
        supervised position and rows longer than the teacher's context are left out; these and rows cut to
        `max_length` are counted in the manifest and reported in a warning.

    Raises:
        `ValueError`: `k` out of range, an empty dataset, no supervised position anywhere, non-finite logits, or a
            folder that holds a cache of other inputs.

    Example:

    ```python
    >>> from first_trl import add_teacher_topk

    >>> cache = add_teacher_topk(dataset, "my-org/teacher-7b-sft", tokenizer, k=5, output_dir="teacher-cache")
    ```
    """
    state = process_state()
    if processing_class is None:
        raise ValueError("Give the teacher's tokenizer as `processing_class`: the cache is bound to it.")
    options = CaptureOptions(
        k=k,
        logprob_dtype=logprob_dtype,
        num_draws=num_draws,
        shard_size=shard_size,
        max_tokens_per_batch=max_tokens_per_batch,
        max_rows_per_batch=max_rows_per_batch,
        disable_tqdm=disable_tqdm,
    )
    tokenized = prepare_rows(
        dataset,
        processing_class,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        dataset_text_field=dataset_text_field,
        chat_template_kwargs=chat_template_kwargs,
        num_proc=num_proc,
    )
    backend: TeacherBackend
    given: Any = teacher
    if isinstance(given, str | list | tuple) or hasattr(given, "state_dict"):
        backend = transformers_backend(given, dtype, **(model_init_kwargs or {}))
    else:
        backend = given
    head_size = len(processing_class) if backend.head_size is None else backend.head_size
    num_tokens = min(len(processing_class), head_size)
    if k > num_tokens:
        raise ValueError(f"k={k} exceeds the vocabulary of {num_tokens} tokens. Choose k <= {num_tokens}.")
    tokenized, cut_counts = _cut(tokenized, processing_class, max_length, truncation_mode, num_proc)
    rows, counts = usable_rows(tokenized, backend.max_length, num_tokens)

    if watch := getattr(backend, "watch", None):
        # The longest of a few beginnings: cheap beside a batch, and fine-tuning changes a model most there
        first = rows.select(range(min(8, len(rows))))[INPUT_IDS]
        watch(max((list(ids[:128]) for ids in first), key=len))
    teacher_entry, backend_entry = backend.describe()
    manifest = Manifest(
        teacher=teacher_entry,
        backend=backend_entry,
        tokenizer={
            "name": _public_name(getattr(processing_class, "name_or_path", "")),
            "fingerprint": tokenizer_fingerprint(processing_class),
            "chat_template": chat_template_hash(processing_class),
            "size": len(processing_class),
            "front": _front(processing_class),
            "from_template": is_from_template(dataset, dataset_text_field),
            "template_arguments": check_template_arguments(chat_template_kwargs),
        },
        head_size=head_size,
        k=k,
        logprob_dtype=logprob_dtype,
        num_draws=num_draws,
        draw_seed=draw_seed if num_draws else 0,
        source={"name": _source_name(dataset), "fingerprint": content_digest(rows), "rows": len(rows)},
        split=split,
        counts=counts | cut_counts,
        versions={name: version(name) for name in ("datasets", "torch", "transformers")}
        | {"python": platform.python_version()},
        notes=list(backend.notes),
    )
    folder = Path(output_dir) if output_dir is not None else default_folder(manifest)
    if not is_finished(folder, manifest, backend, state):
        with open_capture(folder, manifest, backend, rows, shard_size, state) as capture:
            started = time.perf_counter()
            # A capture that goes on keeps the shards it began with
            options = replace(options, shard_size=capture.shard_size)
            tokens = _score_shards(rows, backend, manifest, folder, capture.missing, options)
            state.wait_for_everyone()
            close_capture(folder, manifest, capture, started, tokens, state)
    state.wait_for_everyone()
    cache = load_teacher_cache(folder, split)
    assert isinstance(cache, Dataset)
    return cache


def _cut(
    rows: Dataset, processing_class: Any, max_length: int | None, truncation_mode: str, num_proc: int | None
) -> tuple[Dataset, dict[str, int]]:
    """Cut rows to `max_length` as SFTTrainer does, and count what that changed."""
    if max_length is None:
        return rows, {}
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a token and the next one), got {max_length}.")
    long = 0
    for table in rows.select_columns([INPUT_IDS]).with_format("arrow").iter(batch_size=1000):
        long += pc.sum(pc.greater(pc.list_value_length(table.column(0)), max_length)).as_py() or 0
    if not long:
        return rows, {"truncated": 0, "dropped_by_truncation": 0}
    cut = prepare_rows(
        rows, processing_class, max_length=max_length, truncation_mode=truncation_mode, num_proc=num_proc
    )
    dropped = len(rows) - len(cut)
    warnings.warn(
        f"{long} of {len(rows)} rows are cut to {max_length} tokens ({truncation_mode}); {dropped} rows without a "
        "supervised position are left out."
    )
    if len(cut) == 0:
        raise ValueError(f"No row keeps a supervised position within max_length={max_length}. Raise it.")
    return cut, {"truncated": long, "dropped_by_truncation": dropped}


def _front(processing_class: Any) -> list[str] | None:
    """Special tokens that stand in front of a text; `None` where the tokenizer does not tell."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    try:
        return list(tokenizer.convert_ids_to_tokens(front_tokens(tokenizer)))
    except ValueError:
        return None


def _public_name(name: str) -> str:
    # A local path is nobody else's business once the cache is shared
    return Path(name).name if os.path.isdir(name) else name


def _source_name(dataset: Dataset) -> str:
    info = dataset.info
    parts = (info.dataset_name, info.config_name, str(dataset.split or ""))
    return "/".join(part for part in parts if part) or "memory"


class _Shard:
    """A shard being scored: its rows, what an earlier run left in its journal, and the scores that are there."""

    def __init__(self, rows: Dataset, span: tuple[int, int], path: Path, manifest: Manifest) -> None:
        self.start = span[0]
        self.rows = ShardRows.read(rows, *span)
        self.path = path
        self.journal = ShardJournal(path, manifest.cache_id)
        self.recorded = self.journal.read()
        self.scores: list[Scores | None] = [None] * len(self.rows)
        self.left = len(self.rows)


def _score_shards(
    rows: Dataset,
    teacher: TeacherBackend,
    manifest: Manifest,
    folder: Path,
    missing: list[int],
    options: CaptureOptions,
) -> int:
    """Score this process's share of the missing shards; returns the number of tokens it ran through the teacher."""
    state, shard_size = process_state(), options.shard_size
    num_tokens = min(manifest.tokenizer["size"], manifest.head_size)
    count = -(-len(rows) // shard_size)
    replica, rank_in_teacher = divmod(state.process_index, teacher.ranks_per_teacher)
    replicas = max(1, state.num_processes // teacher.ranks_per_teacher)
    spans = {
        index: (index * shard_size, min(len(rows), (index + 1) * shard_size)) for index in missing[replica::replicas]
    }

    def work() -> Iterator[tuple[_Shard, list[int]]]:
        for index, span in spans.items():
            shard = _Shard(rows, span, shard_path(folder, manifest.split, index, count), manifest)
            lengths = shard.rows.input_ids
            for batch in batches_by_length(lengths, options.max_tokens_per_batch, options.max_rows_per_batch):
                yield shard, batch

    def score(item: tuple[_Shard, list[int]]) -> list[Scores]:
        shard, batch = item
        if tuple(batch) in shard.recorded:
            return shard.recorded[tuple(batch)]
        uniforms = [_uniforms(manifest, shard.start + i, len(shard.rows.positions[i])) for i in batch]
        return teacher.score(
            [shard.rows.input_ids[i] for i in batch],
            [shard.rows.positions[i] for i in batch],
            manifest.k,
            num_tokens,
            uniforms if manifest.num_draws else None,
        )

    tokens = 0
    pending: deque[Future[None]] = deque()
    # One writer thread: journal and compression of a finished shard run beside the next forwards
    with (
        ThreadPoolExecutor(1) as writer,
        contextlib.closing(in_order(score, work(), getattr(teacher, "concurrency", 1))) as results,
        tqdm(
            total=sum(stop - start for start, stop in spans.values()),
            desc=f"Teacher top-{manifest.k} ({manifest.split})",
            unit=" rows",
            disable=options.disable_tqdm or not state.is_main_process,
        ) as progress,
    ):
        started = time.perf_counter()
        for (shard, batch), scored in results:
            if tuple(batch) not in shard.recorded:
                tokens += sum(len(shard.rows.input_ids[i]) for i in batch)
                if rank_in_teacher == 0 and len(batch) < len(shard.rows):
                    pending.append(writer.submit(shard.journal.append, batch, scored))
            for i, row_scores in zip(batch, scored, strict=True):
                shard.scores[i] = row_scores
            shard.left -= len(batch)
            progress.update(len(batch))
            progress.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
            while pending and pending[0].done():
                pending.popleft().result()
            if shard.left == 0:
                # A slow disk holds at most one finished shard in memory
                while pending:
                    pending.popleft().result()
                if rank_in_teacher == 0:  # the other processes hold parts of the same teacher
                    pending.append(writer.submit(_finish_shard, shard, manifest))
        while pending:
            pending.popleft().result()
    return tokens if rank_in_teacher == 0 else 0


def _finish_shard(shard: _Shard, manifest: Manifest) -> None:
    write_shard(shard.rows, shard.scores, manifest, shard.path)
    shard.journal.remove()


def _uniforms(manifest: Manifest, row: int, positions: int) -> np.ndarray:
    return np.random.default_rng([manifest.draw_seed, row]).random((positions, manifest.num_draws))
