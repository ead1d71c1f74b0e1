"""Scored batches of an unfinished shard, kept on disk so that an interruption costs a batch and not a shard."""

import hashlib
import io
import struct
import zipfile
from pathlib import Path

import numpy as np

from .backends import Scores


# Record: payload length, digest, payload. The digest is keyed with the cache's id and the shard's name: a journal of other
# inputs is empty, and so is that of another shard, whose rows have the same numbers.
_HEADER = struct.Struct("<Q16s")


class ShardJournal:
    """
    Append-only file beside a shard.

    Whole batches are recorded and replayed, never single rows: the rows that are left then form the batches they
    would have formed without the interruption, and a resumed capture equals an uninterrupted one bit for bit.

    Args:
        shard (`Path`): Path of the shard.
        cache_id (`str`): The cache the shard belongs to.
    """

    def __init__(self, shard: Path, cache_id: str) -> None:
        self.path = journal_path(shard)
        self._key = hashlib.blake2b(f"{cache_id} {shard.name}".encode()).digest()
        self._end = 0

    def read(self) -> dict[tuple[int, ...], list[Scores]]:
        """Scores by batch (the rows' numbers in the shard). A torn or foreign record ends the journal."""
        batches = {}
        data = self.path.read_bytes() if self.path.is_file() else b""
        while len(data) >= self._end + _HEADER.size:
            length, digest = _HEADER.unpack_from(data, self._end)
            start = self._end + _HEADER.size
            payload = data[start : start + length]
            if len(payload) < length or self._digest(payload) != digest:
                break
            rows, scores = _decode(payload)
            batches[rows] = scores
            self._end = start + length
        return batches

    def append(self, rows: list[int], scores: list[Scores]) -> None:
        payload = _encode(rows, scores)
        # Not synced: what a killed process wrote is safe with the operating system
        with open(self.path, "r+b" if self.path.is_file() else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(_HEADER.pack(len(payload), self._digest(payload)) + payload)
            self._end = file.tell()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.blake2b(payload, digest_size=16, key=self._key).digest()


def journal_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.journal")


def _encode(rows: list[int], scores: list[Scores]) -> bytes:
    arrays = {
        "rows": np.array(rows),
        "lengths": np.array([len(score.tail_logprob) for score in scores]),
        "ids": np.concatenate([score.ids for score in scores]),
        "logprobs": np.concatenate([score.logprobs for score in scores]),
        "tail_logprob": np.concatenate([score.tail_logprob for score in scores]),
    }
    for name in ("draws", "mutual_information"):
        if getattr(scores[0], name) is not None:
            arrays[name] = np.concatenate([getattr(score, name) for score in scores])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _decode(payload: bytes) -> tuple[tuple[int, ...], list[Scores]]:
    try:
        arrays = np.load(io.BytesIO(payload), allow_pickle=False)
        ends = np.cumsum(arrays["lengths"])
        columns = {name: arrays[name] for name in arrays.files if name not in ("rows", "lengths")}
    except (zipfile.BadZipFile, KeyError) as error:  # the digest was right, so another version wrote it
        raise ValueError(f"Unreadable journal record: {error}. Delete the capture's *.journal files.") from error
    spans = [slice(end - length, end) for end, length in zip(ends, arrays["lengths"], strict=True)]
    return tuple(arrays["rows"].tolist()), [
        Scores(**{name: values[span] for name, values in columns.items()}) for span in spans
    ]
