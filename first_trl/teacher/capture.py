"""Run the teacher once over a dataset and store its top-k next-token log-probabilities."""

import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset, Features
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .backends import Scores, TeacherBackend, TransformersBackend
from .cache import complete_shards, load_manifest, load_teacher_cache, manifest_path, shard_path, write_atomically
from .prepare import prepare_rows
from .schema import (
    CACHE_ID,
    IGNORE_INDEX,
    INPUT_IDS,
    LABELS,
    LOGPROB_DTYPES,
    ROW_DIGEST,
    TAIL_LOGPROB,
    TEACHER_COLUMNS,
    TOPK_IDS,
    TOPK_LOGPROBS,
    Manifest,
    cache_features,
    chat_template_hash,
    row_digest,
    tokenizer_fingerprint,
)


def add_teacher_topk(
    dataset: Dataset,
    teacher: str | PreTrainedModel | TeacherBackend,
    processing_class: Any,
    *,
    k: int = 5,
    output_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    max_tokens_per_batch: int = 8192,
    max_rows_per_batch: int = 64,
    shard_size: int = 1000,
    logprob_dtype: str = "float16",
    dtype: Any = "auto",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
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
        teacher (`str`, [`~transformers.PreTrainedModel`] or [`TeacherBackend`]):
            The fine-tuned teacher: Hub id, folder, model or engine.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        k (`int`, *optional*, defaults to `5`):
            Entries kept per supervised position.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder of the cache; it can be loaded with [`load_teacher_cache`] and pushed to the Hub. Defaults to a
            folder in the datasets cache named after the inputs.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split; one folder can hold several.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`), max_rows_per_batch (`int`, *optional*, defaults
        to `64`):
            Size of a forward, padding included. Rows are batched by length within a shard.
        shard_size (`int`, *optional*, defaults to `1000`):
            Rows a shard: the unit of resuming and of sharing work among processes.
        logprob_dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"` or `"float32"`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype the teacher is loaded in, when it is a name.
        completion_only_loss, assistant_only_loss, max_length, truncation_mode, num_proc:
            Tokenisation and masks, as in [`~trl.SFTConfig`].
        model_init_kwargs (`dict`, *optional*):
            Passed to `from_pretrained` when the teacher is a name.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.

    Returns:
        [`~datasets.Dataset`]: The input's columns, `input_ids`, `labels`, and the cache columns. Rows without a
        supervised position and rows longer than the teacher's context are left out, counted in the manifest and
        reported in a warning.

    Raises:
        `ValueError`: `k` out of range, an empty dataset, no supervised position anywhere, non-finite logits, or a
            folder that holds a cache of other inputs.

    Example:

    ```python
    >>> from first_trl import add_teacher_topk

    >>> cache = add_teacher_topk(dataset, "my-org/teacher-7b-sft", tokenizer, k=5, output_dir="teacher-cache")
    ```
    """
    state = PartialState()
    _check_options(k, logprob_dtype, processing_class, shard_size, max_tokens_per_batch, max_rows_per_batch)
    rows = prepare_rows(
        dataset,
        processing_class,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        max_length=max_length,
        truncation_mode=truncation_mode,
        num_proc=num_proc,
    )
    backend: TeacherBackend
    if isinstance(teacher, str) or hasattr(teacher, "state_dict"):
        backend = TransformersBackend(teacher, dtype, **(model_init_kwargs or {}))
    else:
        backend = teacher
    rows, counts = _usable_rows(rows, backend.max_length)
    num_tokens = min(len(processing_class), backend.head_size)
    if k > num_tokens:
        raise ValueError(f"k={k} exceeds the vocabulary of {num_tokens} tokens. Choose k <= {num_tokens}.")

    teacher_entry, backend_entry = backend.describe()
    manifest = Manifest(
        teacher=teacher_entry,
        backend=backend_entry,
        tokenizer={
            "name": getattr(processing_class, "name_or_path", ""),
            "fingerprint": tokenizer_fingerprint(processing_class),
            "chat_template": chat_template_hash(processing_class),
            "size": len(processing_class),
        },
        head_size=backend.head_size,
        k=k,
        logprob_dtype=logprob_dtype,
        source={"name": _source_name(dataset), "fingerprint": _content_digest(rows), "rows": len(rows)},
        split=split,
        counts=counts,
        versions={name: version(name) for name in ("datasets", "torch", "transformers")}
        | {"python": platform.python_version()},
    )
    folder = Path(output_dir) if output_dir is not None else _default_folder(manifest)
    if not _finished(folder, manifest):
        shard_size = _open_capture(folder, manifest, shard_size, state)
        started = time.perf_counter()
        tokens = _capture_shards(
            rows, backend, manifest, folder, shard_size, num_tokens, max_tokens_per_batch, max_rows_per_batch, state,
            disable_tqdm,
        )  # fmt: skip
        state.wait_for_everyone()
        if state.is_main_process:
            _close_capture(folder, manifest, time.perf_counter() - started, tokens)
    state.wait_for_everyone()
    return load_teacher_cache(folder, split)


def _check_options(
    k: int, logprob_dtype: str, processing_class: Any, shard_size: int, max_tokens: int, max_rows: int
) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}. The paper keeps 5.")
    if logprob_dtype not in LOGPROB_DTYPES:
        raise ValueError(f"logprob_dtype must be one of {LOGPROB_DTYPES}, got {logprob_dtype!r}.")
    for name, value in (
        ("shard_size", shard_size),
        ("max_tokens_per_batch", max_tokens),
        ("max_rows_per_batch", max_rows),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if processing_class is None:
        raise ValueError("Give the teacher's tokenizer as `processing_class`: the cache is bound to it.")


def _usable_rows(rows: Dataset, max_length: int | None) -> tuple[Dataset, dict[str, Any]]:
    """Leave out what cannot be scored and count it; keep the order."""
    lengths, supervised = [], []
    for batch in rows.select_columns([INPUT_IDS, LABELS]).with_format("arrow").iter(batch_size=1000):
        for ids, labels in zip(batch[INPUT_IDS], batch[LABELS], strict=True):
            values = np.asarray(labels.values)
            lengths.append(len(ids))
            supervised.append(int((values[1:] != IGNORE_INDEX).sum()))
    length, count = np.array(lengths), np.array(supervised)
    too_long = length > max_length if max_length is not None else np.zeros(len(length), bool)
    masked = (count == 0) & ~too_long
    keep = np.flatnonzero(~too_long & ~masked)
    if len(keep) == 0:
        raise ValueError(
            "No row has a supervised position"
            + (f" within the teacher's context of {max_length} tokens" if too_long.any() else "")
            + f": {int(masked.sum())} rows have all labels masked (-100), {int(too_long.sum())} are too long. Unmask "
            "the completion's labels, or set `max_length`."
        )
    counts = {
        "rows": len(keep),
        "positions": int(count[keep].sum()),
        "tokens": int(length[keep].sum()),
        "dropped_without_supervised_position": int(masked.sum()),
        "dropped_longer_than_context": int(too_long.sum()),
    }
    if len(keep) < len(rows):
        warnings.warn(
            f"{len(rows) - len(keep)} of {len(rows)} rows are left out of the cache: {int(masked.sum())} without a "
            f"supervised position, {int(too_long.sum())} longer than the teacher's context of {max_length} tokens."
        )
        rows = rows.select(keep)
    return rows, counts


def _source_name(dataset: Dataset) -> str:
    info = dataset.info
    return (
        "/".join(part for part in (info.dataset_name, info.config_name, str(dataset.split or "")) if part) or "memory"
    )


def _content_digest(rows: Dataset) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for table in rows.select_columns([INPUT_IDS, LABELS]).with_format("arrow").iter(batch_size=1000):
        for name in (INPUT_IDS, LABELS):
            column = table.column(name).combine_chunks()
            digest.update(np.diff(np.asarray(column.offsets)).astype(np.int64).tobytes())
            digest.update(np.asarray(column.flatten()).astype(np.int32).tobytes())
    return digest.hexdigest()


def _default_folder(manifest: Manifest) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "first_trl" / manifest.id


def _finished(folder: Path, manifest: Manifest) -> bool:
    if not manifest_path(folder, manifest.split).is_file():
        return False
    stored = load_manifest(folder, manifest.split)
    if stored.id != manifest.id:
        _refuse(folder, stored.identity, manifest)
    complete_shards(folder, manifest.split)
    return True


def _refuse(folder: Path, stored: dict[str, Any], manifest: Manifest) -> None:
    differing = [key for key, value in manifest.identity.items() if stored.get(key) != value]
    details = "; ".join(f"{key}: {stored.get(key)} there, {manifest.identity[key]} now" for key in differing)
    raise ValueError(
        f"{folder} holds a capture of other inputs ({details}). Two captures must not be mixed: choose another "
        "output folder, or delete this one."
    )


def _open_capture(folder: Path, manifest: Manifest, shard_size: int, state: PartialState) -> int:
    """Note what is being captured before the first shard, and continue with the shard size it was begun with."""
    path = folder / "manifest" / f".{manifest.split}.in-progress.json"
    if state.is_main_process and not path.is_file():
        write_atomically(path, json.dumps({"identity": manifest.identity, "shard_size": shard_size}, sort_keys=True))
    state.wait_for_everyone()
    begun = json.loads(path.read_text(encoding="utf-8"))
    if begun["identity"] != json.loads(json.dumps(manifest.identity)):
        _refuse(folder, begun["identity"], manifest)
    return begun["shard_size"]


def _capture_shards(
    rows: Dataset,
    teacher: TeacherBackend,
    manifest: Manifest,
    folder: Path,
    shard_size: int,
    num_tokens: int,
    max_tokens: int,
    max_rows: int,
    state: PartialState,
    disable_tqdm: bool,
) -> int:
    """Score this process's unfinished shards; returns the number of tokens it ran through the teacher."""
    count = -(-len(rows) // shard_size)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    mine = [
        index
        for index in range(state.process_index, count, state.num_processes)
        if not shard_path(folder, manifest.split, index, count).is_file()
    ]
    tokens = 0
    pending: Future[None] | None = None
    # One writer thread: compression of a finished shard runs beside the next shard's forwards, and a slow disk holds
    # at most one shard in memory.
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(
            total=sum(min(shard_size, len(rows) - index * shard_size) for index in mine),
            desc=f"Teacher top-{manifest.k} ({manifest.split})",
            unit=" rows",
            disable=disable_tqdm or not state.is_main_process,
        ) as progress,
    ):
        started = time.perf_counter()
        for index in mine:
            shard = rows.select(range(index * shard_size, min(len(rows), (index + 1) * shard_size)))
            input_ids = [np.asarray(ids, np.int32) for ids in shard[INPUT_IDS]]
            labels = [np.asarray(values, np.int32) for values in shard[LABELS]]
            positions = [np.flatnonzero(values[1:] != IGNORE_INDEX) + 1 for values in labels]
            scores: list[Scores | None] = [None] * len(input_ids)
            for batch in _batches_by_length(input_ids, max_tokens, max_rows):
                scored = teacher.score(
                    [input_ids[i] for i in batch], [positions[i] for i in batch], manifest.k, num_tokens
                )
                for i, score in zip(batch, scored, strict=True):
                    scores[i] = score
                tokens += sum(len(input_ids[i]) for i in batch)
                progress.update(len(batch))
                progress.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
            if pending is not None:
                pending.result()
            pending = writer.submit(
                _write_shard, shard, input_ids, labels, scores, manifest,
                shard_path(folder, manifest.split, index, count),
            )  # fmt: skip
        if pending is not None:
            pending.result()
    return tokens


def _batches_by_length(rows: list[np.ndarray], max_tokens: int, max_rows: int) -> Iterator[list[int]]:
    """Rows of similar length together, longest first, so that an out-of-memory error comes at the start."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == max_rows or len(rows[batch[0]]) * (len(batch) + 1) > max_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _write_shard(
    shard: Dataset,
    input_ids: list[np.ndarray],
    labels: list[np.ndarray],
    scores: list[Scores | None],
    manifest: Manifest,
    path: Path,
) -> None:
    cache_id = manifest.cache_id
    features = cache_features(manifest.logprob_dtype)
    extra = [name for name in shard.column_names if name not in (INPUT_IDS, LABELS, *TEACHER_COLUMNS)]
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for ids, label, score in zip(input_ids, labels, scores, strict=True):
        assert score is not None
        logprobs = score.logprobs.astype(manifest.logprob_dtype)
        tail = score.tail_logprob.astype(np.float32)
        columns[INPUT_IDS].append(ids)
        columns[LABELS].append(label)
        columns[TOPK_IDS].append(list(score.ids))
        columns[TOPK_LOGPROBS].append(list(logprobs))
        columns[TAIL_LOGPROB].append(tail)
        columns[CACHE_ID].append(cache_id)
        columns[ROW_DIGEST].append(row_digest(ids, label, score.ids.ravel(), logprobs.ravel(), tail, cache_id))
    carried = shard.select_columns(extra).with_format("arrow")[:] if extra else None
    all_features = Features({**{name: shard.features[name] for name in extra}, **features})
    arrays = {name: pa.array(columns[name], type=features.arrow_schema.field(name).type) for name in features}
    table = pa.table(
        {
            name: carried.column(name) if carried is not None and name in extra else arrays[name]
            for name in all_features
        },
    ).cast(all_features.arrow_schema)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def _close_capture(folder: Path, manifest: Manifest, seconds: float, tokens: int) -> None:
    """Write the manifest: from here on the cache is complete."""
    kept = np.zeros(manifest.k)
    positions = 0
    shards = {}
    for path in complete_shards(folder, manifest.split):
        column = pq.read_table(path, columns=[TOPK_LOGPROBS]).column(0).combine_chunks()
        logprobs = np.asarray(column.flatten().flatten()).reshape(-1, manifest.k).astype(np.float64)
        kept += np.exp(logprobs).sum(axis=0)
        positions += len(logprobs)
        shards[path.name] = {"rows": len(column), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest.kept_mass = np.cumsum(kept / positions).tolist()
    manifest.counts["shards"] = shards
    manifest.timing = {"seconds": round(seconds, 3), "tokens_per_second_main_process": round(tokens / seconds, 1)}
    write_atomically(manifest_path(folder, manifest.split), manifest.to_json())
    (folder / "manifest" / f".{manifest.split}.in-progress.json").unlink(missing_ok=True)
