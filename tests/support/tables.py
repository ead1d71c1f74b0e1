"""Generated tables as people have them, and what every command makes of one."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


# Words that other readers take for missing, marks that other readers cut at, and letters of several alphabets
WORDS = [
    "None",
    "NA",
    "N/A",
    "null",
    "nan",
    "NaN",
    "-",
    "TRUE",
    "007",
    "1e5",
    "=1+1",
    "a,b",
    "c;d",
    "e|f",
    "g\th",
    "i\nj",
]
WESTERN = ["größer", "»Straße«", "café", "naïve", "£5", "Ångström", "señor"]
WIDE = ["Привет", "汉字", "Ελλάδα", "🙂", "ﬁne", "two\u2028lines"]
PLAIN = ["Which one floats", 'the "best" one', " with spaces ", "it's", "1,000.5", "x" * 200]
COLUMNS = ("question", "A", "B", "answer", "prompt", "completion", "confidence", "correct", "note")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252")
PACKERS = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
DAMAGES = ("short row", "long row", "open quote", "text behind a quote", "stray bytes", "cut archive", "no rows", "empty",
           "name twice", "no name", "not an object", "field twice", "cut file")  # fmt: skip


@dataclass
class Case:
    """
    A file, and the truth about it.

    Attributes:
        name (`str`), data (`bytes`): the file.
        rows (`list[dict]`): what was written.
        damage (`str` or `None`): what was done to it.
        row_known (`bool`): whether the damage is in a row that an error can name.
    """

    name: str
    data: bytes
    rows: list[dict[str, Any]]
    damage: str | None
    row_known: bool


def _cells(wide: bool) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(WORDS + WESTERN + PLAIN + (WIDE if wide else [])), min_size=1, max_size=3).map(
        " ".join
    )


@st.composite
def messy_tables(draw: st.DrawFn) -> Case:
    """A table in some format, encoding, delimiter, quoting and compression, in one of three cases damaged."""
    kind = draw(st.sampled_from(["csv", "csv", "csv", "tsv", "jsonl", "json", "parquet", "xlsx"]))
    text = kind in ("csv", "tsv")
    encoding = draw(st.sampled_from(ENCODINGS)) if text else "utf-8"
    delimiter = "\t" if kind == "tsv" else DELIMITERS[draw(st.sampled_from(list(DELIMITERS)))]
    typed = not text
    cell = _cells(encoding != "cp1252")
    rows: list[dict[str, Any]] = []
    for i in range(draw(st.integers(1, 5))):
        number = draw(st.integers(0, 1000)) / 1000
        right = draw(st.booleans())
        decimal = str(number) if delimiter == "," or draw(st.booleans()) else str(number).replace(".", ",")
        rows.append(
            {
                "question": f"{i} {draw(cell)}",
                "A": f"a {draw(cell)}",
                "B": draw(st.sampled_from(["None", "NA", "null", "nan"]))
                if draw(st.booleans())
                else f"b {draw(cell)}",
                "answer": draw(st.sampled_from(["A", "b", "(A)", "B."])),
                "prompt": f"{draw(cell)}?",
                "completion": f" {draw(cell)}",
                "confidence": number if typed else decimal,
                "correct": draw(st.sampled_from([right, int(right)] if typed else [str(int(right)), str(right)])),
                "note": draw(st.none() | cell),
            }
        )
    if typed and len({type(row["correct"]) for row in rows}) > 1:
        rows = [{**row, "correct": bool(row["correct"])} for row in rows]
    damages = [d for d in DAMAGES if _possible(d, kind, encoding, rows)]
    damage = draw(st.sampled_from(damages)) if draw(st.integers(0, 2)) == 0 else None
    target = draw(st.integers(0, len(rows) - 1))
    packer = draw(
        st.sampled_from([".gz", ".bz2", ".xz"] if damage == "cut archive" else ["", "", "", *PACKERS, ".zip"])
    )
    if text:
        data = _delimited(draw, rows, encoding, delimiter, damage, target)
    else:
        data = {"jsonl": _lines, "json": _list, "parquet": _parquet, "xlsx": _excel}[kind](rows, damage, target)
    if damage == "cut file":
        data = data[: len(data) // 2]
    name = f"train.{kind}"
    if packer == ".zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(name, data)
        data = buffer.getvalue()
    else:
        data = PACKERS[packer](data)
    if damage == "cut archive":
        data = data[:-9]
    name += packer
    name = name.upper() if draw(st.booleans()) else name
    known = damage in (
        "short row",
        "long row",
        "open quote",
        "text behind a quote",
        "stray bytes",
        "not an object",
        "field twice",
    )
    return Case(name, data, rows, damage, known)


def _possible(damage: str, kind: str, encoding: str, rows: list[dict[str, Any]]) -> bool:
    if damage == "cut file":
        return kind in ("parquet", "xlsx", "json")
    if damage in ("not an object", "field twice"):
        return kind == "jsonl"
    if damage in ("cut archive", "no rows", "empty"):
        return not (damage == "no rows" and kind in ("parquet", "xlsx"))
    if damage == "stray bytes":
        return encoding in ("utf-8", "utf-8-sig", "cp1252") and kind in ("csv", "tsv")
    return kind in ("csv", "tsv")


def _delimited(
    draw: st.DrawFn, rows: list[dict[str, Any]], encoding: str, delimiter: str, damage: str | None, target: int
) -> bytes:
    if damage == "empty":
        return b""
    end = draw(st.sampled_from(["\n", "\r\n"]))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    trailing, blank = draw(st.booleans()), draw(st.integers(0, 2))
    names = list(COLUMNS)
    if damage == "name twice":
        names[-1] = names[0]
    if damage == "no name":
        names[2] = " "
    lines = [_line(names, delimiter, quoting)]
    for i, row in enumerate(rows if damage != "no rows" else []):
        cells = ["" if row[name] is None else row[name] for name in COLUMNS]
        if damage == "short row" and i == target:
            cells = cells[:-2]
        if damage == "long row" and i == target:
            cells.append("one more")
        line = _line(cells, delimiter, quoting)
        if damage == "open quote" and i == target:
            line = f'"open{delimiter}' + line.replace('"', "")
        if damage == "text behind a quote" and i == target:
            line = f'"closed" and more{delimiter}' + _line(cells[1:], delimiter, quoting)
        lines += [line, *[delimiter * (len(COLUMNS) - 1)] * (blank if i % 2 else 0)]
    if trailing:
        lines = [line + delimiter for line in lines]
    lines += [delimiter * (len(COLUMNS) - 1 + trailing)] * blank
    data = (end.join(lines) + draw(st.sampled_from(["", end, end * 3]))).encode(encoding)
    if damage == "stray bytes":
        # A byte that neither of the encodings has, in front of the last line's end
        at = data.rstrip().rindex(b"\n") + 1 if b"\n" in data.rstrip() else 0
        data = data[:at] + b"\x81\x81" + data[at:]
    return data


def _line(cells: list[str], delimiter: str, quoting: int) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator="\r\n").writerow(cells)  # type: ignore[arg-type]
    return buffer.getvalue().removesuffix("\r\n")


def _lines(rows: list[dict[str, Any]], damage: str | None, target: int) -> bytes:
    lines = [json.dumps(row, ensure_ascii=bool(target % 2)) for row in (rows if damage != "no rows" else [])]
    if damage == "not an object":
        lines[target] = "[1, 2]"
        lines.insert(0, json.dumps(rows[0]))
    if damage == "field twice":
        lines[target] = lines[target][:-1] + ', "answer": "A"}'
    return b"" if damage == "empty" else "\n".join(lines).encode()


def _list(rows: list[dict[str, Any]], damage: str | None, target: int) -> bytes:
    return b"" if damage == "empty" else json.dumps(rows if damage != "no rows" else [], indent=target).encode()


def _parquet(rows: list[dict[str, Any]], damage: str | None, target: int) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return b"" if damage == "empty" else buffer.getvalue()


def _excel(rows: list[dict[str, Any]], damage: str | None, target: int) -> bytes:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(list(COLUMNS))
    for row in rows:
        book.active.append([row[name] for name in COLUMNS])
        for cell in book.active[book.active.max_row]:
            if isinstance(cell.value, str):
                cell.data_type = "s"  # "=1+1" is a text here
    buffer = io.BytesIO()
    book.save(buffer)
    return b"" if damage == "empty" else buffer.getvalue()


def write(case: Case, folder: Path) -> Path:
    """The file in a folder."""
    path = folder / case.name
    path.write_bytes(case.data)
    return path
