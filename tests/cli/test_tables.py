"""One reader for every command: generated messy tables are read to the same rows by all, or refused by all."""

import datetime
import importlib.util
import json
import re
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from first_trl.evaluation.readers import read_confidences
from first_trl.tasks import get_task
from first_trl.tasks.source import read_rows
from first_trl.utils.dataset_rows import load_rows
from first_trl.utils.tables import as_number, load_table
from tests.support.tables import Case, messy_tables, write


# Without shrinking: a failing table is small enough to read, and making it smaller takes minutes
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "phases": [Phase.generate],
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
APP = Path(__file__).resolve().parents[2] / "first_trl" / "metrics" / "ece" / "app.py"


@pytest.fixture(scope="module")
def page() -> Any:
    pytest.importorskip("gradio", reason="needs gradio")
    pytest.importorskip("evaluate", reason="needs evaluate")
    spec = importlib.util.spec_from_file_location("ece_app", APP)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_right(value: Any) -> bool:
    return str(value).lower() in ("1", "true")


def check(case: Case, page: Any) -> str:
    """Reads a table by every way in; returns what became of it."""
    pytest.importorskip("openpyxl", reason="needs openpyxl")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(case, Path(folder))
        task = get_task("custom")
        readers = {
            "run": lambda: [
                row for _, row in read_rows(str(path), split="train", hub_split="train") if row is not None
            ],
            "task": lambda: task.load("train", path=str(path)).dataset,
            "precompute": lambda: load_rows(str(path)),
            "calibrate": lambda: read_confidences(path)[0],
            "page": lambda: page.read_table(str(path))[""],
        }
        found, errors = {}, {}
        for name, reader in readers.items():
            try:
                found[name] = reader()
            except ValueError as error:
                errors[name] = str(error)
    if case.damage is not None:
        assert not found, (case.damage, case.name, list(found))
        for text in errors.values():
            assert case.name in text and "\n" not in text and len(text) < 600, text
            assert not case.row_known or re.search(r"\b(row|line) \d|the header", text), text
        assert len({re.sub(r"^Cannot read |damaged.*", "", text) for text in errors.values()}) == 1, errors
        return case.damage
    assert not errors, (case.name, errors)
    assert found["run"] == case.rows
    assert found["precompute"].to_list() == case.rows
    assert [row["question"] for row in found["task"]] == [row["question"].strip() for row in case.rows]
    for row, truth in zip(found["task"], case.rows, strict=True):
        assert f"\n(A) {truth['A'].strip()}\n(B) {truth['B'].strip()}\nAnswer:" in row["prompt"]
        assert row["gold"] == "AB".index(truth["answer"].strip("().").upper())
    numbers = [float(str(row["confidence"]).replace(",", ".")) for row in case.rows]
    right = [is_right(row["correct"]) for row in case.rows]
    assert found["calibrate"].confidence.tolist() == numbers and found["calibrate"].correct.tolist() == right
    assert found["page"] == (numbers, [int(flag) for flag in right])
    return "read"


@settings(max_examples=100, **SETTINGS)
@given(case=messy_tables())
def test_every_command_reads_a_messy_table_alike(page, case):
    check(case, page)


@pytest.mark.slow
@settings(max_examples=500, **SETTINGS)
@given(case=messy_tables())
def test_every_command_reads_five_hundred_messy_tables_alike(page, case):
    check(case, page)


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b\nNone,NA\nnull,nan\n,  \n-, \n", [("None", "NA"), ("null", "nan"), ("-", None)]),
        ("sep=;\na;b\n1,5;2\n", [("1,5", "2")]),
        ("a,b;c\n", None),  # Two delimiters in the header and no row to tell
        ("a;b|c;d\n1;2;3\n", [("1", "2", "3")]),
        ("a,b,\n1,2,\n3,,\n", [("1", "2"), ("3", None)]),
        ("a,b\r1,2\r", [("1", "2")]),
        ('a\n"1, 2"\n', [("1, 2",)]),
        ('\n\n a , b \n 1, "x"\n', [(" 1", ' "x"')]),
    ],
)
def test_what_a_cell_means(tmp_path, text, rows):
    path = put(tmp_path, "x.csv", text)
    if rows is None:
        with pytest.raises(ValueError, match=r"x\.csv"):
            load_table(path)
    else:
        assert [tuple(row.values()) for row in load_table(path).rows] == rows


def test_empty_rows_are_counted_with_their_place(tmp_path):
    table = load_table(put(tmp_path, "x.csv", "a,b\n,\n1,2\n\n,\n,\n3,4\n,\n"))
    assert (len(table.rows), table.empty) == (2, [0, 1, 1, 2])
    assert table.place(1).endswith("x.csv, row 2 (line 7)")
    questions = "question,A,B,answer\nQ1?,x,y,A\n,,,\nQ2?,x,y,A\n,,,\n,,,\n"
    path = put(tmp_path, "train.csv", questions)
    split = get_task("custom").load("train", path=str(path))
    assert (split.n_read, split.reasons, len(split.dataset)) == (5, {"empty row": 3}, 2)
    head, tail = (get_task("custom").load(part, path=str(path)) for part in ("train[:1]", "train[1:]"))
    assert (head.reasons, tail.reasons) == ({"empty row": 1}, {"empty row": 2})
    shuffled = get_task("custom", shuffle_seed=3).load("train", path=str(path))
    assert (shuffled.n_read, shuffled.reasons) == (5, {"empty row": 3})
    path = put(tmp_path, "c.csv", "confidence,correct\n0.5,1\n,\n")
    assert read_confidences(path)[0].dropped == {"empty row": 1}
    with pytest.warns(UserWarning, match=r"c\.csv: 1 empty rows"):
        assert len(load_rows(str(path))) == 1


def test_other_encodings_are_told_or_refused(tmp_path):
    with pytest.warns(UserWarning, match=r"w\.csv is not UTF-8 and was read as Windows-1252"):
        assert load_table(put(tmp_path, "w.csv", "a\ngrößer\n".encode("cp1252"))).rows == [{"a": "größer"}]
    for name, encoding, text in (
        ("k.csv", "cp1251", "Привет"),
        ("j.csv", "shift_jis", "日本語の文"),
        ("g.csv", "gbk", "汉字汉字"),
    ):
        with pytest.raises(ValueError, match=rf"{name}, line 2 .*UTF-8"):
            load_table(put(tmp_path, name, f"a\n{text}\n".encode(encoding)))
    damaged = "a\ngrößer\n".encode().replace("ß".encode(), b"\xc3")
    with pytest.raises(ValueError, match=r"d\.csv, line 2 holds the byte 0xc3, which is no UTF-8 text"):
        load_table(put(tmp_path, "d.csv", damaged))
    with pytest.raises(ValueError, match=r"z\.csv, line 2 holds a zero byte"):
        load_table(put(tmp_path, "z.csv", b"a,b\n1,\0\n"))
    with pytest.raises(ValueError, match=r"u\.csv, line 2 is not UTF-16-LE"):
        load_table(put(tmp_path, "u.csv", "a\nb".encode("utf-16") + b"x"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b\n" + "1,2,3\n" * 7, r"row 1 \(line 2\) has 3 cells, .*\(and 2 more such rows\) under 2 columns \(a, b\)"),
        ("x.csv", "a,b\n1,2,\n3,4\n", r"row 1 \(line 2\) has 3 cells under"),
        ("x.csv", 'a,b\n"x\ny",2\n"z,4\n', r"row 2 \(line 4\) opens a double quote that is never closed"),
        ("x.csv", b"\x1f\x8b\x08\x00", r"holds gzip data, .*end its name in \.gz"),
        ("x.csv", b"PK\x03\x04", "a zip archive or an Excel workbook"),
        ("x.xls", b"\xd0\xcf\x11\xe0", r"its name must end in .*\.xlsx"),
        ("x.csv", b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind"),
        ("x.jsonl", '{"a": 1}\n{"a": \nx\n', r"(?s)line 2 is not JSON.*line 3 is not JSON.*2 of 3 rows cannot be used"),
        ("x.json", '{"rows": [\n]}', r"line 1 is not JSON .*one list of rows"),
        ("x.jsonl", '{"a": "\\ud83d"}', r"line 1 holds half of a character"),
        ("x.jsonl", '{"a": 1, "a": 2}', "line 1 gives the field 'a' twice"),
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.parquet", b"PAR1", "is damaged or no parquet file"),
        ("x.arrow", b"ARROW1", "is damaged or no arrow file"),
        ("x.xlsx", b"PK\x03\x04", "is damaged or no Excel workbook"),
        ("x.csv.zst", b"\x28\xb5\x2f\xfd", "Cannot read"),
        ("x.csv.zip", b"PK\x03\x04", "Cannot read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_table(put(tmp_path, name, content))
    assert name in str(caught.value)


def test_json_in_both_forms_under_both_names(tmp_path):
    rows = [{"a": 1, "b": "null"}, {"a": 2.5, "b": None}]
    for name in ("x.json", "X.JSONL", "x.ndjson"):
        assert load_table(put(tmp_path, name, json.dumps(rows))).rows == rows
        assert load_table(put(tmp_path, name, "\n".join(map(json.dumps, rows)))).rows == rows


def test_types_of_parquet_and_class_labels(tmp_path):
    import pandas
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"label": ClassLabel(names=["no", "yes"]), "x": Value("float64")})
    rows = Dataset.from_dict({"label": [0, 1, -1], "x": [0.5, 1.0, 2.0]}, features=features)
    rows.to_parquet(tmp_path / "x.parquet")
    rows.save_to_disk(tmp_path / "saved")
    want = [{"label": "no", "x": 0.5}, {"label": "yes", "x": 1.0}, {"label": None, "x": 2.0}]
    assert load_table(tmp_path / "x.parquet").rows == want
    assert load_table(next((tmp_path / "saved").glob("*.arrow"))).rows == want
    assert load_rows(str(tmp_path / "x.parquet")).features == features
    assert len(load_rows(str(tmp_path / "saved"), split="train[:2]")) == 2
    pandas.DataFrame({"c": pandas.Categorical(["u", "v", "u"])}).to_feather(tmp_path / "x.feather")
    assert [row["c"] for row in load_table(tmp_path / "x.feather").rows] == ["u", "v", "u"]
    assert load_rows(str(tmp_path / "x.feather"))["c"][:] == ["u", "v", "u"]


def test_columns_of_one_type(tmp_path):
    path = put(tmp_path, "x.jsonl", '{"a": 4}\n{"a": "four"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl: column 'a' is a whole number in row 1 .* and a text in row 2"):
        load_rows(str(path))
    assert load_rows(str(put(tmp_path, "y.jsonl", '{"a": 4}\n{"b": 1.5}\n{"a": 1, "b": 2}\n'))).to_list() == [
        {"a": 4, "b": None}, {"a": None, "b": 1.5}, {"a": 1, "b": 2.0},
    ]  # fmt: skip


def test_numbers_that_are_texts_stay_as_they_are_written(tmp_path):
    """In a column of one type 4 would become 4.0."""
    path = put(tmp_path, "x.jsonl", '{"prompt": "a", "completion": 4}\n{"prompt": "b", "completion": 1.5}\n{}\n')
    assert load_rows(str(path))["completion"][:] == ["4", "1.5", None]
    # NaN is refused by row where texts are made of the column
    path = put(tmp_path, "x.jsonl", '{"prompt": "a", "completion": 4}\n{"prompt": "b", "completion": NaN}\n')
    assert load_rows(str(path)).features["completion"].dtype == "float64"


def test_a_day_in_excel_has_no_hour(tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl")
    book, day = openpyxl.Workbook(), datetime.datetime(2024, 1, 31)
    book.active.append(["day", "time", "midnight"])
    book.active.append([day, day.replace(hour=9), day])
    book.active["A2"].number_format, book.active["C2"].number_format = "dd.mm.yyyy", "yyyy-mm-dd hh:mm"
    book.save(tmp_path / "x.xlsx")
    want = {"day": "2024-01-31", "time": "2024-01-31T09:00:00", "midnight": "2024-01-31T00:00:00"}
    assert load_table(tmp_path / "x.xlsx").rows == [want]


def test_excel_tells_what_it_cannot_know(tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["a", "b"])
    book.active.append(["=1+1", 4])
    book.save(tmp_path / "x.xlsx")
    with pytest.raises(ValueError, match=r"line 2, column 1 is a formula whose value is not stored"):
        load_table(tmp_path / "x.xlsx")
    book.active["A2"] = "None"
    book.active["B2"] = "#N/A"
    book.save(tmp_path / "x.xlsx")
    with pytest.raises(ValueError, match=r"line 2, column 2 is the error #N/A"):
        load_table(tmp_path / "x.xlsx")
    book.active["B2"] = True
    book.active.cell(5, 1).value = " "
    book.create_sheet("Notes")
    book.save(tmp_path / "x.xlsx")
    assert load_table(tmp_path / "x.xlsx").rows == [{"a": "None", "b": True}]
    book["Notes"].append(["x"])
    book.save(tmp_path / "x.xlsx")
    with pytest.raises(ValueError, match=r"2 sheets with cells \(Sheet, Notes\)"):
        load_table(tmp_path / "x.xlsx")


def test_excel_is_read_beyond_the_area_that_it_states(tmp_path):
    """Writers that stream rows do not know how many there will be when they state it."""
    openpyxl = pytest.importorskip("openpyxl", reason="needs openpyxl")
    book = openpyxl.Workbook()
    for row in [["confidence", "correct"], *([0.9, 1] for _ in range(20))]:
        book.active.append(row)
    book.save(tmp_path / "whole.xlsx")
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "x.xlsx", "w") as stated:
        for name in whole.namelist():
            stated.writestr(name, whole.read(name).replace(b'<dimension ref="A1:B21"', b'<dimension ref="A1:B6"'))
    assert b'ref="A1:B6"' in zipfile.ZipFile(tmp_path / "x.xlsx").read("xl/worksheets/sheet1.xml")
    assert len(load_table(tmp_path / "x.xlsx").rows) == 20


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_coarse_floats_keep_their_value_and_their_text(tmp_path, kind):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = np.array([1.1, 0.1], dtype=kind)
    columns = {"question": ["q", "r"], "A": numbers, "B": numbers + 1, "answer": ["A", "B"]}
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path)
    assert [row["A"] for row in load_table(path).rows] == numbers.tolist()
    (first, _) = get_task("custom").load("train", path=str(path)).dataset["options"][:]
    assert first == ["1.1", "2.1"]
    choices = pa.array([[1.1, 2.1]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"question": ["q"], "choices": choices, "answer": ["A"]}), path)
    assert get_task("custom").load("train", path=str(path)).dataset["options"][:] == [["1.1", "2.1"]]


@pytest.mark.parametrize(
    ("value", "number"),
    [("0,8", 0.8), (" .5 ", 0.5), ("1e-3", 0.001), (1, 1.0), ("nan", None), ("inf", None), ("1_0", None), (True, None),
     (float("nan"), None), ("0x1", None), ("", None), (None, None), ("1,000,000", None)],
)  # fmt: skip
def test_numbers(value, number):
    assert as_number(value) == number


def test_several_bad_rows_are_shown_at_once(tmp_path, page):
    path = put(tmp_path, "x.csv", "confidence,correct\n0.5,1\n" + "high,1\n" * 7)
    for reader in (read_confidences, page.read_table):
        with pytest.raises(
            ValueError, match=r"(?s)row 2 \(line 3\).*row 6 \(line 7\).*7 of 8 rows cannot be used, the first 5"
        ):
            reader(path)
    path = put(tmp_path, "train.csv", "question,A,B,answer\n" + "Why?,x,x,A\n" * 7)
    with pytest.raises(
        ValueError, match=r"(?s)row 1 \(line 2\).*row 5 \(line 6\).*7 of 7 rows cannot be used, the first 5"
    ):
        get_task("custom").load("train", path=str(path))
    with pytest.raises(ValueError, match=r"no column 'confidence'.*--confidence-column"):
        read_confidences(path)
    path = put(tmp_path, "c.csv", "confidence,right\n0.5,1\n")
    with pytest.raises(ValueError, match=r"no column 'correct'.*--correct-column"):
        read_confidences(path)


def test_a_cell_of_any_length(tmp_path):
    long = "step " * 60_000
    assert load_table(put(tmp_path, "x.csv", f"a,b\n{long},1\n")).rows == [{"a": long, "b": "1"}]
