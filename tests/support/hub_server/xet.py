"""The Xet content-addressed store: xorbs (packs of compressed chunks), shards (which chunks make a file), rebuilding.

Formats as the `hf_xet` client writes them: https://github.com/huggingface/xet-core and
https://huggingface.co/docs/xet/index. Hashes are not recomputed (BLAKE3 is not in the standard library); what is
checked instead is that every segment exists and that a rebuilt file has the sha256 it was committed under.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

from .lz4 import decompress_frame
from .storage import ObjectStore
from .wire import HttpError


_END_OF_SECTION = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_METADATA = 1 << 30


def hash_to_hex(raw: bytes) -> str:
    """Xet prints a hash as four little-endian 64-bit words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


@dataclass(frozen=True)
class Chunk:
    """A chunk of a xorb: `[start, end)` are the bytes it takes there, header of 8 bytes included."""

    start: int
    end: int
    scheme: int
    size: int


def parse_xorb(xorb: bytes) -> list[Chunk]:
    chunks = []
    position = 0
    while position < len(xorb) and not xorb.startswith(b"XETBLOB", position):
        if position + 8 > len(xorb):
            raise HttpError(400, "Malformed xorb: truncated chunk header")
        compressed = int.from_bytes(xorb[position + 1 : position + 4], "little")
        scheme, size = xorb[position + 4], int.from_bytes(xorb[position + 5 : position + 8], "little")
        end = position + 8 + compressed
        if end > len(xorb) or scheme > 2:
            raise HttpError(400, "Malformed xorb: truncated chunk or unknown compression")
        chunks.append(Chunk(position, end, scheme, size))
        position = end
    return chunks


def read_chunk(xorb: bytes, chunk: Chunk) -> bytes:
    content = xorb[chunk.start + 8 : chunk.end]
    if chunk.scheme:
        content = decompress_frame(content)
    if chunk.scheme == 2:  # bytes grouped by their position modulo 4 before compression
        grouped, content, start = content, bytearray(chunk.size), 0
        for group in range(4):
            length = (chunk.size + 3 - group) // 4
            content[group::4] = grouped[start : start + length]
            start += length
    if len(content) != chunk.size:
        raise ValueError("a chunk has another length than its header says")
    return bytes(content)


@dataclass(frozen=True)
class Segment:
    """Chunks `[start, end)` of a xorb, `size` bytes once decompressed."""

    xorb: str
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class XetFile:
    hash: str
    sha256: str | None
    segments: list[Segment]

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)


def parse_shard(shard: bytes) -> list[XetFile]:
    """The files a shard describes (its first section, after a header of 48 bytes)."""
    files = []
    position = 48
    while shard[position : position + 32] != _END_OF_SECTION:
        header = shard[position : position + 48]
        if len(header) < 48:
            raise HttpError(400, "Malformed shard: truncated file section")
        flags, count = struct.unpack("<II", header[32:40])
        position += 48
        segments = []
        for _ in range(count):
            size, start, end = struct.unpack("<III", shard[position + 36 : position + 48])
            segments.append(Segment(hash_to_hex(shard[position : position + 32]), size, start, end))
            position += 48
        position += 48 * count if flags & _HAS_VERIFICATION else 0
        sha256 = None
        if flags & _HAS_METADATA:
            sha256 = hash_to_hex(shard[position : position + 32])
            position += 48
        files.append(XetFile(hash_to_hex(header[:32]), sha256, segments))
    return files


class XetStore:
    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects

    def add_xorb(self, key: str, xorb: bytes) -> bool:
        parse_xorb(xorb)
        return self.objects.put("xorbs", key, xorb)

    def add_shard(self, shard: bytes) -> bool:
        """Register the files of a shard; 400 when one needs a xorb that was never sent.

        A client that remembers an older server's store believes that its chunks are here: it must be told, or the
        files would be committed and could never be read.
        """
        new = False
        for file in parse_shard(shard):
            for segment in file.segments:
                if not self.objects.has("xorbs", segment.xorb):
                    raise HttpError(400, f"Shard names unknown xorb {segment.xorb}")
            new |= self.objects.put("xet-files", file.hash, json.dumps(asdict(file)).encode())
            if file.sha256:
                self.objects.put("xet-by-sha256", file.sha256, file.hash.encode())
        return new

    def file(self, key: str) -> XetFile | None:
        state = self.objects.get("xet-files", key)
        if state is None:
            return None
        fields = json.loads(state)
        return XetFile(fields["hash"], fields["sha256"], [Segment(**segment) for segment in fields["segments"]])

    def by_sha256(self, sha256: str) -> XetFile | None:
        key = self.objects.get("xet-by-sha256", sha256)
        return self.file(key.decode()) if key else None

    def rebuild(self, file: XetFile) -> bytes:
        """The whole file, for clients that read without Xet; kept as a plain object afterwards."""
        parts = []
        for segment in file.segments:
            xorb = self.objects.get("xorbs", segment.xorb)
            assert xorb is not None
            parts += [read_chunk(xorb, chunk) for chunk in parse_xorb(xorb)[segment.start : segment.end]]
        content = b"".join(parts)
        sha256 = hashlib.sha256(content).hexdigest()
        if file.sha256 not in (None, sha256):
            raise ValueError(f"xet file {file.hash} rebuilds to sha256 {sha256}, expected {file.sha256}")
        self.objects.put("objects", sha256, content)
        return content

    def reconstruction(self, file: XetFile, first: int, last: int, xorb_url: str) -> dict[str, Any]:
        """Which parts of which xorbs make bytes `[first, last]` of a file."""
        terms: list[dict[str, Any]] = []
        wanted: dict[str, set[int]] = {}
        offset_into_first = 0
        position = 0
        for segment in file.segments:
            chunks = self._chunks(segment.xorb)
            inside = []
            for index in range(segment.start, segment.end):
                size = chunks[index].size
                if position + size > first and position <= last:
                    if not terms and not inside:
                        offset_into_first = first - position
                    inside.append(index)
                position += size
            if inside:
                length = sum(chunks[index].size for index in inside)
                chunk_range = {"start": inside[0], "end": inside[-1] + 1}
                terms.append({"hash": segment.xorb, "unpacked_length": length, "range": chunk_range})
                wanted.setdefault(segment.xorb, set()).update(inside)
        fetch = {
            xorb: [
                {
                    "range": {"start": run[0], "end": run[-1] + 1},
                    "url": f"{xorb_url}/{xorb}",
                    "url_range": {"start": chunks[run[0]].start, "end": chunks[run[-1]].end - 1},
                }
                for chunks in [self._chunks(xorb)]
                for run in _runs(indices)
            ]
            for xorb, indices in wanted.items()
        }
        return {"offset_into_first_range": offset_into_first, "terms": terms, "fetch_info": fetch}

    def _chunks(self, xorb: str) -> list[Chunk]:
        content = self.objects.get("xorbs", xorb)
        assert content is not None
        return parse_xorb(content)


def _runs(indices: set[int]) -> list[list[int]]:
    """Maximal runs of consecutive numbers. Overlapping ranges of one xorb would confuse the client."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs
