"""Columns used as text that hold numbers, booleans, class labels or nothing."""

import datetime
import decimal

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.table import InMemoryTable

from first_trl import add_teacher_topk, load_teacher_cache
from first_trl.cli import main
from first_trl.teacher.text_cells import text_columns
from tests.support.families import family_tokenizer
from tests.support.tiny import tiny_llama, tiny_tokenizer


def column(values, kind=None):
    return Dataset(InMemoryTable(pa.table({"completion": pa.array(values, kind)})))


@pytest.mark.parametrize(
    ("values", "kind", "texts"),
    [
        ([4, -5], pa.int64(), ["4", "-5"]),
        ([200, None], pa.uint8(), ["200", None]),
        ([1.5, 4.0, None], pa.float64(), ["1.5", "4.0", None]),
        ([0.1, 2.5], pa.float32(), ["0.1", "2.5"]),
        ([True, False], pa.bool_(), ["True", "False"]),
        ([decimal.Decimal("1.50")], pa.decimal128(5, 2), ["1.50"]),
        ([datetime.date(2024, 1, 31)], pa.date32(), ["2024-01-31"]),
        (["None", "nan", ""], pa.string(), ["None", "nan", ""]),
        (["x"], pa.large_string(), ["x"]),
        ([None, None], pa.null(), [None, None]),
    ],
)
def test_texts(values, kind, texts):
    assert text_columns(column(values, kind), [], ["completion"])["completion"][:] == texts


def test_class_labels_by_name():
    features = Features({"completion": ClassLabel(names=["no", "yes"]), "n": Value("int64")})
    rows = Dataset.from_dict({"completion": [1, 0, -1], "n": [1, 2, 3]}, features=features)
    found = text_columns(rows, [], ["completion"])
    assert found.to_dict() == {"completion": ["yes", "no", None], "n": [1, 2, 3]}
    with pytest.raises(ValueError, match="Row 2 of the dataset: the completion is missing"):
        text_columns(rows, ["completion"], [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.5, float("nan")], "Row 1 of the dataset: the completion is NaN, which pandas writes for an empty cell"),
        ([1.5, float("inf")], "Row 1 of the dataset: the completion is inf, not a text"),
        ([4.0, None], r"whole numbers as floats, such as 4\.0.*whether 4\.0 or 4 is meant"),
        ([b"x"], r"Row 0 of the dataset: the completion is b'x', not a text"),
    ],
)
def test_what_has_no_text_of_its_own(values, message):
    with pytest.raises(ValueError, match=message):
        text_columns(column(values), [], ["completion"])


def test_messages_and_texts_are_left_alone():
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "2+2?"}]], "text": ["a"]})
    assert text_columns(rows, ["prompt", "text"], []) is rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": ["2 3 ", "7 8 "], "completion": [4, 5]}, None),
        ({"prompt": [4, 5], "completion": [" 6", " 7"]}, None),
        ({"text": [8, 9]}, None),
        ({"prompt": ["2+2=", None], "completion": [" 4", " 5"]}, "Row 1 of the dataset: the prompt is missing"),
        ({"text": ["2+2=4", None]}, "Row 1 of the dataset: the text is missing"),
    ],
)
def test_capture_reads_them_as_their_texts(tmp_path, rows, message):
    def capture(rows, name):
        return add_teacher_topk(
            Dataset.from_dict(rows), tiny_llama(), tiny_tokenizer(prefix=""), k=2, output_dir=tmp_path / name
        )

    if message is not None:
        with pytest.raises(ValueError, match=message):
            capture(rows, "x")
        return
    texts = {name: [str(value) for value in values] for name, values in rows.items()}
    numbers = capture(rows, "numbers")["input_ids"][:]
    assert numbers == capture(texts, "texts")["input_ids"][:]
    assert numbers[0] != numbers[1]


def test_only_an_empty_cell_of_a_file_is_no_answer(tmp_path):
    """By the command: words that other readers take for missing are answers, and are trained on."""
    tokenizer, words = family_tokenizer(), ["None", "NA", "null", "nan", "N/A", "Neon", ""]
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    lines = [f"Which is {i}?,{word}" for i, word in enumerate(words)]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,completion", *lines]))
    paths = ["--teacher", tmp_path / "teacher", "--dataset", tmp_path / "rows.csv", "--output-dir", tmp_path / "cache"]
    assert main(["precompute", *map(str, paths), "--k", "2"]) == 0
    cache = load_teacher_cache(tmp_path / "cache")
    assert cache["teacher_has_gold"][:] == [True] * 6 + [False]
    labels = [tokenizer.decode([label for label in row if label != -100]) for row in cache["labels"]]
    assert labels == [f"{word}<|end|>" for word in words]
