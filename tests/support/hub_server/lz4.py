"""LZ4 frame decoding (https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md): Xet chunks use it."""

_MAGIC = b"\x04\x22\x4d\x18"


def decompress_frame(frame: bytes) -> bytes:
    """Decode one LZ4 frame. Checksums are skipped: the caller compares the sha256 of the whole file."""
    if frame[:4] != _MAGIC:
        raise ValueError("not an LZ4 frame")
    flags = frame[4]
    position = 6 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0) + 1
    out = bytearray()
    while True:
        size = int.from_bytes(frame[position : position + 4], "little")
        position += 4
        if size == 0:
            return bytes(out)
        stored, size = size >> 31, size & 0x7FFFFFFF
        block = frame[position : position + size]
        position += size + (4 if flags & 0x10 else 0)
        if stored:
            out += block
        else:
            _decode_block(block, out)


def _decode_block(block: bytes, out: bytearray) -> None:
    """Append a block's content to `out`, which also is the window that matches point back into."""
    position = 0
    while position < len(block):
        token = block[position]
        position += 1
        length, position = _extended(token >> 4, block, position)
        out += block[position : position + length]
        position += length
        if position >= len(block):
            return  # the last sequence has literals only
        offset = int.from_bytes(block[position : position + 2], "little")
        length, position = _extended(token & 15, block, position + 2)
        length += 4
        start = len(out) - offset
        if offset == 0 or start < 0:
            raise ValueError("corrupt LZ4 block: a match points before the start")
        while length > 0:  # a match may overlap what it produces, then it repeats
            piece = out[start : start + length]
            out += piece
            length -= len(piece)


def _extended(length: int, block: bytes, position: int) -> tuple[int, int]:
    if length == 15:
        while True:
            extra = block[position]
            position += 1
            length += extra
            if extra != 255:
                break
    return length, position
