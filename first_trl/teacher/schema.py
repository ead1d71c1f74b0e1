"""The teacher cache's columns, its manifest, and the digests that bind rows, teacher and tokenizer together.

One row is one training sequence. Entry `i` of a teacher column is the teacher's distribution over the token at the
`i`-th position `t >= 1` with `labels[t] != -100`, computed from `input_ids[:t]`. Raw full-vocabulary log-probabilities
at temperature 1 are stored: recalibration and estimators are applied at training time.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value


FORMAT_VERSION = 1

INPUT_IDS = "input_ids"
LABELS = "labels"
TOPK_IDS = "teacher_topk_ids"
TOPK_LOGPROBS = "teacher_topk_logprobs"
TAIL_LOGPROB = "teacher_tail_logprob"
CACHE_ID = "teacher_cache"
ROW_DIGEST = "teacher_row_digest"
DRAW_IDS = "teacher_draw_ids"
DRAW_COUNTS = "teacher_draw_counts"

TEACHER_COLUMNS = (TOPK_IDS, TOPK_LOGPROBS, TAIL_LOGPROB, CACHE_ID, ROW_DIGEST)
REQUIRED_COLUMNS = (INPUT_IDS, LABELS, *TEACHER_COLUMNS)
DRAW_COLUMNS = (DRAW_IDS, DRAW_COUNTS)
LOGPROB_DTYPES = ("float16", "float32")
IGNORE_INDEX = -100


def cache_features(logprob_dtype: str = "float16", draws: bool = False) -> Features:
    """Types of the cache columns (`datasets.Features`)."""
    features = {
        INPUT_IDS: List(Value("int32")),
        LABELS: List(Value("int32")),
        TOPK_IDS: List(List(Value("int32"))),
        TOPK_LOGPROBS: List(List(Value(logprob_dtype))),
        TAIL_LOGPROB: List(Value("float32")),
        CACHE_ID: Value("string"),
        ROW_DIGEST: Value("int64"),
    }
    if draws:
        features |= {DRAW_IDS: List(List(Value("int32"))), DRAW_COUNTS: List(List(Value("uint16")))}
    return Features(features)


def tokenizer_fingerprint(processing_class: Any) -> str:
    """
    Digest of what maps text to ids: the whole vocabulary (added tokens included), merges, normaliser and
    pre-tokenizer. Padding, truncation and the choice of pad / bos / eos token do not enter, because trainers set
    them without changing the meaning of any id.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    parts: dict[str, Any] = {"vocab": sorted(tokenizer.get_vocab().items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        spec = json.loads(backend.to_str())
        parts["merges"] = (spec.get("model") or {}).get("merges")
        parts["normalizer"] = spec.get("normalizer")
        parts["pre_tokenizer"] = spec.get("pre_tokenizer")
    return _hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode())


def chat_template_hash(processing_class: Any) -> str | None:
    """Digest of the chat template, `None` when the tokenizer has none."""
    template = getattr(processing_class, "chat_template", None)
    return None if template is None else _hexdigest(json.dumps(template, sort_keys=True).encode())


def _hexdigest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass
class Manifest:
    """
    What a cache is and where it came from. `identity` fields are fixed when the capture starts and define the cache's
    id, so that a resumed capture cannot mix teachers, data or settings; the rest is filled in when it ends.

    Args:
        teacher (`dict`): `{"name", "revision", "weights_digest", "parameters"}`.
        backend (`dict`): `{"name", "version", "dtype", "quantization"}`.
        tokenizer (`dict`): `{"name", "fingerprint", "chat_template", "size"}`.
        head_size (`int`): Rows of the teacher's output head; may exceed the tokenizer's size (padded heads).
        k (`int`): Entries kept per supervised position.
        logprob_dtype (`str`): `"float16"` or `"float32"`.
        num_draws (`int`): Draws stored per position for the `sampled` estimator; 0 for none.
        source (`dict`): `{"name", "fingerprint", "rows"}` of the tokenised input.
        split (`str`): Name of the split.
        counts (`dict`): Rows, supervised positions, rows dropped with the reason.
        kept_mass (`list[float]`): Mean teacher mass of the 1..k most likely tokens.
        recalibration (`dict`): Fitted recalibrations by method, curve included.
        versions (`dict`): Library versions.
        timing (`dict`): Wall time in seconds and tokens per second.
        notes (`list[str]`): Anything a reader must know, e.g. a tail derived from rounded values.
    """

    teacher: dict[str, Any]
    backend: dict[str, Any]
    tokenizer: dict[str, Any]
    head_size: int
    k: int
    logprob_dtype: str
    source: dict[str, Any]
    num_draws: int = 0
    split: str = "train"
    format_version: int = FORMAT_VERSION
    counts: dict[str, Any] = field(default_factory=dict)
    kept_mass: list[float] = field(default_factory=list)
    recalibration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that define the cache. Two captures with equal identity hold the same rows."""
        data = asdict(self)
        identity = {
            key: data[key]
            for key in ("format_version", "head_size", "k", "logprob_dtype", "num_draws", "backend", "split")
        }
        # Names and paths are provenance, not identity: the same weights in another folder are the same teacher.
        identity["teacher"] = {key: data["teacher"].get(key) for key in ("revision", "weights_digest")}
        identity["tokenizer"] = {key: data["tokenizer"].get(key) for key in ("fingerprint", "chat_template")}
        identity["source"] = {key: data["source"].get(key) for key in ("fingerprint", "rows")}
        return identity

    @property
    def id(self) -> str:
        return _hexdigest(json.dumps(self.identity, sort_keys=True).encode())

    @property
    def cache_id(self) -> str:
        """Value of the `teacher_cache` column: manifest id and tokenizer fingerprint."""
        return f"{self.id}:{self.tokenizer['fingerprint']}"

    def to_json(self) -> str:
        return json.dumps({"id": self.id, **asdict(self)}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises `ValueError` when the text is no manifest of this format or was edited by hand."""
        data = json.loads(text)
        stated = data.pop("id", None)
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"This cache has format version {data.get('format_version')}, this package reads {FORMAT_VERSION}. "
                "Capture it again, or install the version of first_trl that wrote it."
            )
        try:
            manifest = cls(**data)
        except TypeError as error:
            raise ValueError(f"Not a teacher-cache manifest: {error}. Pull or capture the cache again.") from error
        if stated != manifest.id:
            raise ValueError(
                f"The manifest states id {stated} but its contents give {manifest.id}: teacher, tokenizer, k or "
                "source were edited after the capture. Restore the original manifest."
            )
        return manifest


def split_cache_id(cache_id: str) -> tuple[str, str]:
    """`teacher_cache` value -> (manifest id, tokenizer fingerprint)."""
    manifest_id, separator, fingerprint = cache_id.partition(":")
    if not separator or not manifest_id or not fingerprint:
        raise ValueError(f"`{CACHE_ID}` must read '<manifest id>:<tokenizer fingerprint>', got {cache_id!r}.")
    return manifest_id, fingerprint


def attach_manifest(dataset: Dataset, manifest: Manifest) -> Dataset:
    """
    Carry the manifest with an in-memory dataset. `DatasetInfo.description` is the one free-text field that `map`,
    `select`, `shuffle`, `train_test_split` and `save_to_disk` keep.
    """
    dataset = dataset.select_columns(dataset.column_names)  # a copy, so that the caller's object stays as it was
    dataset.info.description = json.dumps({"first_trl_manifest": json.loads(manifest.to_json())})
    return dataset


def read_manifest(dataset: Any) -> Manifest | None:
    """Manifest attached to a dataset, `None` when it carries none (or several, after concatenation)."""
    description = getattr(getattr(dataset, "info", None), "description", "") or ""
    try:
        data = json.loads(description)["first_trl_manifest"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return Manifest.from_json(json.dumps(data))


def supervised_positions(labels: np.ndarray, row_starts: np.ndarray) -> np.ndarray:
    """
    Mask of the positions that carry a teacher entry: label set and not the first of its row, which nothing predicts.

    Args:
        labels (`np.ndarray` of shape `(tokens,)`): Labels of several rows, one after the other.
        row_starts (`np.ndarray` of shape `(rows,)`): Index of each row's first token.
    """
    mask = labels != IGNORE_INDEX
    starts = row_starts[row_starts < len(labels)]
    mask[starts] = False
    return mask


@dataclass
class TeacherArrays:
    """
    Several cache rows as flat arrays, one entry per supervised position.

    Args:
        ids (`np.ndarray` of shape `(N, k)`): Token ids, most likely first.
        logprobs (`np.ndarray` of shape `(N, k)`): Raw log-probabilities, float64.
        tail_logprob (`np.ndarray` of shape `(N,)`): Log-mass outside the k ids, float64.
        labels (`np.ndarray` of shape `(N,)`): The token that stands in the text.
        row (`np.ndarray` of shape `(N,)`): Row of each entry.
        first (`np.ndarray` of shape `(N,)`): Whether the entry is the first of its row (the answer position of
            single-token answers).
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail_logprob: np.ndarray
    labels: np.ndarray
    row: np.ndarray
    first: np.ndarray


@dataclass
class CacheBatch:
    """
    Arrow columns of a few rows as flat numpy arrays. Offsets have one entry more than there are rows. The teacher
    columns are left ragged here (`topk_lengths`): whether they are well formed is for `verify` to say.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    label_offsets: np.ndarray
    entry_offsets: np.ndarray
    logprob_offsets: np.ndarray
    tail_offsets: np.ndarray
    topk_lengths: np.ndarray
    logprob_lengths: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    tail_logprob: np.ndarray
    cache_ids: list[str]
    digests: np.ndarray

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "CacheBatch":
        offsets, input_ids = _flat(table, INPUT_IDS)
        label_offsets, labels = _flat(table, LABELS)
        entry_offsets, topk = _flat_list(table, TOPK_IDS)
        logprob_offsets, logprobs = _flat_list(table, TOPK_LOGPROBS)
        tail_offsets, tail = _flat(table, TAIL_LOGPROB)
        return cls(
            input_ids=input_ids,
            labels=labels,
            offsets=offsets,
            label_offsets=label_offsets,
            entry_offsets=entry_offsets,
            logprob_offsets=logprob_offsets,
            tail_offsets=tail_offsets,
            topk_lengths=np.diff(_offsets(topk)),
            logprob_lengths=np.diff(_offsets(logprobs)),
            ids=_values(topk),
            logprobs=_values(logprobs),
            tail_logprob=tail,
            cache_ids=_column(table, CACHE_ID).to_pylist(),
            digests=np.asarray(_column(table, ROW_DIGEST)),
        )

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def row_digests(self) -> np.ndarray:
        """Digest of every row from its contents, to be compared with the stored `digests`."""
        ids_at = np.concatenate([[0], np.cumsum(self.topk_lengths)])
        logprobs_at = np.concatenate([[0], np.cumsum(self.logprob_lengths)])
        digests = np.empty(self.num_rows, np.int64)
        for row in range(self.num_rows):
            e0, e1 = self.entry_offsets[row : row + 2]
            l0, l1 = self.logprob_offsets[row : row + 2]
            digests[row] = row_digest(
                self.input_ids[self.offsets[row] : self.offsets[row + 1]],
                self.labels[self.label_offsets[row] : self.label_offsets[row + 1]],
                self.ids[ids_at[e0] : ids_at[e1]],
                self.logprobs[logprobs_at[l0] : logprobs_at[l1]],
                self.tail_logprob[self.tail_offsets[row] : self.tail_offsets[row + 1]],
                self.cache_ids[row],
            )
        return digests


def row_digest(
    input_ids: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    logprobs: np.ndarray,
    tail_logprob: np.ndarray,
    cache_id: str,
) -> int:
    """
    64-bit digest of one row: its tokens, which of them are supervised, the teacher's entries in their stored dtype,
    and the cache they belong to. Lengths enter too, so that no value can move between neighbouring fields.
    """
    digest = hashlib.blake2b(digest_size=8)
    for values, dtype in (
        (input_ids, np.int32),
        (np.asarray(labels) != IGNORE_INDEX, np.uint8),
        (ids, np.int32),
        (logprobs, None),
        (tail_logprob, np.float32),
    ):
        array = np.ascontiguousarray(values, dtype)
        digest.update(array.size.to_bytes(8, "little"))
        digest.update(array.tobytes())
    digest.update(cache_id.encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def flatten_cache(dataset: Dataset, batch_size: int = 1000) -> TeacherArrays:
    """
    Read a cache into flat arrays.

    Args:
        dataset (`datasets.Dataset`): A cache; call [`verify_teacher_cache`] on it first.

    Raises:
        `ValueError`: A column is missing, or the entries do not match the supervised positions.
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"Missing teacher cache columns {missing}; the dataset has {dataset.column_names}. Make them with "
            "`add_teacher_topk`."
        )
    parts: list[tuple[np.ndarray, ...]] = []
    first_row = 0
    for batch in iterate_batches(dataset, batch_size):
        mask = supervised_positions(batch.labels, batch.offsets[:-1])
        per_row = np.add.reduceat(np.append(mask, False), batch.offsets[:-1]) * (np.diff(batch.offsets) > 0)
        lengths = np.unique(batch.topk_lengths)
        if len(lengths) > 1 or not np.array_equal(np.diff(batch.entry_offsets), per_row):
            raise ValueError(
                "The teacher entries do not match the supervised positions; run `verify_teacher_cache` for the row."
            )
        k = int(lengths[0]) if len(lengths) else 0
        row = np.repeat(np.arange(batch.num_rows) + first_row, per_row)
        first = np.diff(row, prepend=-1) != 0
        parts.append(
            (
                batch.ids.reshape(-1, k).astype(np.int64) if k else np.empty((0, 0), np.int64),
                batch.logprobs.reshape(-1, k).astype(np.float64) if k else np.empty((0, 0)),
                batch.tail_logprob.astype(np.float64),
                batch.labels[mask].astype(np.int64),
                row,
                first,
            )
        )
        first_row += batch.num_rows
    parts = [part for part in parts if len(part[0])]
    if not parts:
        raise ValueError("The teacher cache has no supervised position: nothing to fit or train on.")
    return TeacherArrays(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def iterate_batches(dataset: Dataset, batch_size: int = 1000) -> Iterator[CacheBatch]:
    """Walk over a cache in Arrow batches; memory stays at one batch."""
    columns = [name for name in REQUIRED_COLUMNS if name in dataset.column_names]
    arrow = dataset.select_columns(columns).with_format("arrow")
    for table in arrow.iter(batch_size=batch_size):
        yield CacheBatch.from_arrow(table)


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _offsets(array: pa.ListArray) -> np.ndarray:
    offsets = np.asarray(array.offsets).astype(np.int64)
    return offsets - (offsets[0] if len(offsets) else 0)


def _values(array: pa.ListArray) -> np.ndarray:
    # `flatten` honours the slice of a sliced list array, `values` does not; nulls inside become NaN or raise below.
    values = array.flatten()
    if values.null_count:
        raise ValueError("A cache column holds null values; capture or pull the cache again.")
    return values.to_numpy(zero_copy_only=False)


def _flat_list(table: pa.Table, name: str) -> tuple[np.ndarray, pa.ListArray]:
    column = _column(table, name)
    if column.null_count:
        raise ValueError(f"Column `{name}` holds null rows; capture or pull the cache again.")
    return _offsets(column), column.flatten()


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    column = _column(table, name)
    if column.null_count:
        raise ValueError(f"Column `{name}` holds null rows; capture or pull the cache again.")
    return _offsets(column), _values(column)
