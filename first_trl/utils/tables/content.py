"""From a file to its bytes and its text: compression and encoding."""

import bz2
import codecs
import gzip
import lzma
import re
import zipfile
import zlib
from pathlib import Path

from .names import file_kind


# In this order: the mark of UTF-32 starts with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What files of these kinds begin with, whatever they are called
_MAGIC = (
    (rb"\x1f\x8b", "gzip data", "end its name in .gz"),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", "end its name in .bz2"),
    (rb"\xfd7zXZ\x00", "xz data", "end its name in .xz"),
    (rb"\x28\xb5\x2f\xfd", "zstd data", "end its name in .zst"),
    (rb"PK\x03\x04", "a zip archive or an Excel workbook", "end its name in .zip or .xlsx"),
    (rb"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind", "save it as .xlsx or .csv"),
    (rb"PAR1[\x00-\x1f]", "a Parquet file", "end its name in .parquet"),
    (rb"ARROW1\x00", "an Arrow file", "end its name in .arrow"),
)
_MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# Runs of other characters than ASCII which hold letters do not get as long in the languages that Windows-1252 is for
_FOREIGN = re.compile(r"[^\x00-\x7f]{4,}")


def read_bytes(path: Path) -> tuple[bytes, str | None]:
    """
    Contents of a file without its compression, and the kind that the name of an archive's member tells.

    Raises:
        `ValueError`: naming the file, when it is damaged or an archive of several files.
    """
    _, _, compression = file_kind(path)
    try:
        data = path.read_bytes()
        if compression == ".gz":
            data = gzip.decompress(data)
        elif compression == ".bz2":
            data = bz2.decompress(data)
        elif compression == ".xz":
            data = lzma.decompress(data)
        elif compression == ".zst":
            import pyarrow as pa

            data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read() if data else data
        elif compression == ".zip":
            return _only_member(path)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        if compression is None:
            raise ValueError(f"Cannot read {path}: {error}.") from None
        raise ValueError(
            f"Cannot read {path}: {_sentence(error)}. Copy or download it again, or give it uncompressed."
        ) from None
    return data, None


def _only_member(path: Path) -> tuple[bytes, str | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [
                info.filename
                for info in archive.infolist()
                if not info.is_dir() and not info.filename.startswith("__MACOSX/")
            ]
            if len(names) != 1:
                listed = ", ".join(names[:5]) or "none"
                raise ValueError(f"{path} holds {len(names)} files ({listed}). Give one of them.")
            return archive.read(names[0]), file_kind(names[0])[1]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"Cannot read {path}: {_sentence(error)}. Copy or download it again, or give the file inside it."
        ) from None


def _sentence(error: BaseException) -> str:
    return (str(error) or type(error).__name__).rstrip(".")


def decode(data: bytes, path: Path) -> tuple[str, str | None]:
    """
    Text of a file, and a caution where its encoding had to be guessed.

    Raises:
        `ValueError`: naming file and line, for bytes that no encoding known here explains.
    """
    for magic, what, mend in _MAGIC:
        if re.match(magic, data):
            raise ValueError(f"{path} holds {what}, not the text that its name tells: {mend}.")
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _strictly(data[len(mark) :], encoding, path), None
    if b"\0" in data:
        # Headers and the brackets of JSON are ASCII, which in UTF-16 has a zero in every pair of bytes
        start = [byte == 0 for byte in data[:4]]
        if start in ([False, True, False, True], [True, False, True, False]):
            return _strictly(data, "utf-16-le" if start[1] else "utf-16-be", path), None
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise ValueError(
            f"{path}, line {line} holds a zero byte, which no text does: the file is damaged or of another kind. "
            "Save it again as UTF-8."
        )
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        problem = error
    # Text of another encoding is hardly ever valid where UTF-8 needs several bytes. Where most of it is, the file is
    # UTF-8 with some damage, and any other reading would garble every other letter in it.
    valid = len(_MULTIBYTE.findall(data))
    stray = sum(byte > 127 for byte in _MULTIBYTE.sub(b"", data))
    if 4 * valid >= stray:
        raise ValueError(_undecodable(path, data, problem)) from None
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(path, data, error)) from None
    runs = (run for run in _FOREIGN.finditer(text) if sum(map(str.isalpha, run[0])) > 1)
    foreign = next(runs, None)
    if foreign is not None:
        line = text.count("\n", 0, foreign.start()) + 1
        raise ValueError(
            f"{path}, line {line} is neither UTF-8 nor Windows-1252 (as which it would hold {foreign[0][:12]!r}). Save "
            "the file as UTF-8."
        )
    return text, f"{path} is not UTF-8 and was read as Windows-1252. Save it as UTF-8 if letters look wrong."


def _strictly(data: bytes, encoding: str, path: Path) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, errors="ignore").count("\n")
        raise ValueError(
            f"{path}, line {before + 1} is not {encoding.upper()}, as which the file begins: {error.reason}. Save the "
            "file again as UTF-8."
        ) from None


def _undecodable(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    line = data.count(b"\n", 0, error.start) + 1
    return (
        f"{path}, line {line} holds the byte 0x{data[error.start]:02x}, which is no {error.encoding.upper()} text. Save "
        "the file again as UTF-8."
    )
