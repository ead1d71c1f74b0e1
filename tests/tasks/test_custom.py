"""Questions of one's own: every file format, splits, and errors that name the row and the cure."""

import json

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from first_trl.tasks import get_task
from first_trl.tasks.overlap import drop_overlap


ROWS = [
    {"id": "q1", "group": "pens", "question": "What absorbs ink?", "choices": ["pocket", "blotter"], "answer": "B"},
    {"id": "q2", "group": "pens", "question": "Where is ink kept?", "choices": ["jar", "hat", "sea"], "answer": "jar"},
]
CSV = """\
id,group,question,A,B,C,answer,note
q1,pens,What absorbs ink?,pocket,blotter,,B,ours
q2,pens,Where is ink kept?,jar,hat,sea,jar,
"""
PROMPT = "What absorbs ink?\nAnswer Choices:\n(A) pocket\n(B) blotter\nAnswer:"


@pytest.fixture(scope="module")
def task():
    return get_task("custom")


def write(folder, text, name="questions.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json", "x.parquet", "texts.csv"])
def test_every_format_gives_the_same_rows(task, tmp_path, name):
    path = tmp_path / name
    if name == "x.csv":
        path.write_text(CSV)
    elif name == "texts.csv":
        Dataset.from_list([{**row, "choices": json.dumps(row["choices"])} for row in ROWS]).to_csv(path)
    elif name == "x.parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        lines = [json.dumps(row) for row in ROWS]
        path.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    rows = task.load("train", path=str(path)).dataset
    assert rows[0] == {
        "id": "q1",
        "prompt": PROMPT,
        "completion": " B",
        "choices": [" A", " B"],
        "gold": 1,
        "group": "pens",
        "question": "What absorbs ink?",
        "options": ["pocket", "blotter"],
    }
    assert (rows[1]["id"], rows[1]["gold"], rows[1]["choices"]) == ("q2", 0, [" A", " B", " C"])


def test_only_question_choices_and_answer_are_needed(task, tmp_path):
    path = write(tmp_path, '\ufeffquestion,A,B,answer\n"He said ""hm"", twice\nand left?",yes,no,A\n\nMore?,1,2,2\n')
    rows = task.load("train", path=path).dataset
    assert rows["id"][:] == ["custom-train-0", "custom-train-1"]
    assert rows["question"][:] == ['He said "hm", twice\nand left?', "More?"]
    assert (rows["gold"][:], rows["group"][:]) == ([0, 1], ["", ""])


def test_options_of_the_template(tmp_path):
    task = get_task("custom", template="[{group}] {question}\n{choices}\n(", completion="{letter}")
    row = task.load("train", path=write(tmp_path, CSV)).dataset[0]
    assert (row["prompt"], row["completion"]) == ("[pens] What absorbs ink?\n(A) pocket\n(B) blotter\n(", "B")


def numbered(n, start=0):
    return "question,A,B,answer\n" + "".join(f"Question {i}?,yes,no,A\n" for i in range(start, start + n))


def test_one_file_is_cut_by_slices(task, tmp_path):
    path = write(tmp_path, numbered(20))
    parts = [
        task.load(part, path=path).dataset["question"][:] for part in ("train[:70%]", "train[70%:85%]", "train[85%:]")
    ]
    assert [len(part) for part in parts] == [14, 3, 3]
    assert [*parts[0], *parts[1], *parts[2]] == [f"Question {i}?" for i in range(20)]
    with pytest.raises(ValueError, match=r"one file, and without 'test' in its name .*same rows.*train\[85%:\]"):
        task.load("test", path=path)


def test_shuffled_slices_still_part_the_file(tmp_path):
    path = write(tmp_path, numbered(20))
    task = get_task("custom", shuffle_seed=1)
    head, tail = (task.load(part, path=path).dataset["question"][:] for part in ("train[:70%]", "train[70%:]"))
    assert sorted(head + tail) == sorted(f"Question {i}?" for i in range(20))
    assert head != [f"Question {i}?" for i in range(14)]
    assert head == task.load("train[:70%]", path=path).dataset["question"][:]
    assert head != get_task("custom", shuffle_seed=2).load("train[:70%]", path=path).dataset["question"][:]


def test_a_folder_holds_a_file_per_split(task, tmp_path):
    for start, name in enumerate(["train.csv", "dev.csv", "my_test_questions.csv", "ood.csv"]):
        write(tmp_path, numbered(start + 1, 10 * start), name)
    for n, split in enumerate(["train", "validation", "test", "ood"], start=1):
        assert task.load(split, path=str(tmp_path)).n_read == n
    # A file that says which split it is may be given itself
    assert task.load("test", path=str(tmp_path / "my_test_questions.csv")).n_read == 3
    with pytest.raises(ValueError, match="'unlabelled' in its name"):
        task.load("unlabelled", path=str(tmp_path))


def test_questions_without_an_answer(task, tmp_path):
    write(tmp_path, "question,A,B\nWhy?,x,y\n", "unlabelled.csv")
    row = task.load("unlabelled", path=str(tmp_path)).dataset[0]
    assert (row["gold"], row["completion"], row["choices"]) == (-1, None, [" A", " B"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 1}, "answer 1 is neither a letter from A to C nor the text.*count from 0 or from 1"),
        ({"answer": "D"}, "answer 'D' is neither a letter from A to C"),
        ({"answer": "e"}, "answer 'e' is neither"),
        ({"answer": "A,C"}, "answer 'A,C' is neither.*Write one letter"),
        ({"answer": None}, "'answer' is missing.*split 'unlabelled'"),
        ({"choices": ["B", "A"], "answer": "A"}, "letter of choice A and the text of choice B"),
        ({"choices": ["x", "y", "x"]}, "choices A and C are both 'x'"),
        ({"choices": ["x", None]}, "choice B is empty"),
        ({"choices": ["x", ["y"]]}, r"choice B is \['y'\], not a text"),
        ({"choices": ["x"], "answer": "A"}, "1 choices, expected 2 to 26"),
        ({"choices": [str(i) for i in range(27)]}, "27 choices, expected 2 to 26"),
        ({"choices": "x; y"}, "not the text of a JSON list"),
        ({"choices": '{"x": 1}'}, "must be a list"),
        ({"choices": None}, r"no choices: give 'choices', or columns A, B"),
        ({"A": "x"}, "keep one of the two"),
        ({"choices": None, "A": "x", "C": "y"}, "columns of the choices are A, C; they must be A, B, C"),
        ({"choices": None, "A": "x", "B": None, "C": "y", "answer": "A"}, "choice B is empty"),
        ({"question": None}, "field 'question' is missing"),
        ({"question": 3}, "the question is 3, not a text"),
        ({"question": " "}, "the question is empty"),
        ({"id": "fine"}, "id 'fine' was already used by"),
    ],
)
def test_malformed_rows_name_their_place(task, tmp_path, row, message):
    good = {"question": "Q?", "choices": ["x", "y", "z"], "answer": "B"}
    lines = [json.dumps(r) for r in ({**good, "id": "fine"}, {**good, **row})]
    path = write(tmp_path, "\n".join(lines), "x.jsonl")
    with pytest.raises(ValueError, match=rf"(?s)x\.jsonl, row 2 \(line 2\): .*{message}"):
        task.load("train", path=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,A,B,answer\nWhy, then?,x,y,A\n", r"row 1 \(line 2\) has 5 cells under 4 columns .*double quotes"),
        ("question,A,A,answer\nWhy?,x,y,A\n", "must name the columns, each differently"),
        ("question,,B,answer\nWhy?,x,y,A\n", "must name the columns"),
        (
            "question:A:B:answer\nWhy?:x:y:A\n",
            r"row 1 \(line 2\): there are no choices.*the row has: question:A:B:answer",
        ),
        ("", "is empty: it has no rows"),
        ("question,A,B,answer\n", "no rows under its header"),
    ],
)
def test_malformed_csv(task, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        task.load("train", path=write(tmp_path, text))


def test_a_path_is_needed_and_may_be_on_the_hub(task, monkeypatch):
    with pytest.raises(ValueError, match="has no data of its own: give `path`"):
        task.load("train")
    asked = []

    def load_dataset(path, config, *, split, revision):
        asked.append((path, config, split, revision))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert task.load("test", path="me/questions", revision="abc").dataset["gold"][:] == [1, 0]
    assert asked == [("me/questions", None, "test", "abc")]


def rows_file(folder, answers, **fields):
    good = {"question": "Q?", "A": "sand", "B": "rain", "C": "dust", "D": "ash", **fields}
    lines = [json.dumps({**good, "question": f"Q{i}?", "answer": answer}) for i, answer in enumerate(answers)]
    return write(folder, "\n".join(lines), "train.jsonl")


def test_letters_as_people_write_them(task, tmp_path):
    answers = ["B", "b", "(B)", "(b)", "B.", "b)", "B:", " B ", "rain"]
    assert task.load("train", path=rows_file(tmp_path, answers)).dataset["gold"][:] == [1] * 9
    # What is the text of a choice is not a letter of another one
    path = rows_file(tmp_path, ["b", "a"], A="b", B="a")
    assert task.load("train", path=path).dataset["gold"][:] == [0, 1]


def test_numbers_count_from_where_they_are_said_to(tmp_path):
    for start in (0, 1):
        path = rows_file(tmp_path, [start + i for i in range(4)] + [f"{start}", float(start + 3)])
        found = get_task("custom", answers_from=start).load("train", path=path).dataset["gold"][:]
        assert found == [0, 1, 2, 3, 0, 3]
        with pytest.raises(
            ValueError, match=rf"numbers that count from {start}: give the option answers_from={start}"
        ):
            get_task("custom").load("train", path=path)
        with pytest.raises(
            ValueError, match=rf"the answer {(0, 4)[start]} is no number from {1 - start} to {4 - start}"
        ):
            get_task("custom", answers_from=1 - start).load("train", path=path)
    path = rows_file(tmp_path, [1, 2, 3, 1])
    with pytest.raises(ValueError, match=r"numbers 1 to 3, which may count from 0 or from 1: say which"):
        get_task("custom").load("train", path=path)
    # Said to be a number, it is one, though it is the text of another choice too
    path = rows_file(tmp_path, [2], A="2", B="3", C="4", D="5")
    assert get_task("custom", answers_from=0).load("train", path=path).dataset["gold"][:] == [2]
    assert get_task("custom").load("train", path=path).dataset["gold"][:] == [0]
    for wrong in (2, True, "0"):
        with pytest.raises(ValueError, match="`answers_from` must be 0 or 1"):
            get_task("custom", answers_from=wrong)


@pytest.mark.parametrize("field", ["A", "C", "question", "answer", "group", "id"])
def test_nan_is_no_word(task, tmp_path, field):
    row = {"question": "Q?", "A": "x", "B": "y", "C": "z", "answer": "A", field: float("nan")}
    path = write(tmp_path, json.dumps(row), "train.jsonl")
    with pytest.raises(ValueError, match=r"row 1 \(line 1\): .*(NaN|missing)"):
        task.load("train", path=path)


def test_words_that_other_readers_take_for_missing(task, tmp_path):
    path = write(tmp_path, "question,A,B,C,answer\nHow many?,None,NA,null,None\nnan,nan,1,,A\n")
    rows = task.load("train", path=path).dataset
    assert (rows["gold"][:], rows["question"][:]) == ([0, 0], ["How many?", "nan"])
    assert "(A) None\n(B) NA\n(C) null" in rows[0]["prompt"] and "(A) nan\n(B) 1\nAnswer" in rows[1]["prompt"]


def test_numbers_and_flags_are_choices(task, tmp_path):
    row = {"question": "Q?", "choices": [1, 2.5, True], "answer": True}
    loaded = task.load("train", path=write(tmp_path, json.dumps(row), "train.jsonl")).dataset[0]
    assert "(A) 1\n(B) 2.5\n(C) True" in loaded["prompt"] and loaded["gold"] == 2


def test_whole_numbers_as_floats_are_refused(task, tmp_path):
    """As pandas writes the last choice, a whole number, where some rows have one choice less."""
    rows = [{"question": "Q?", "A": 1, "B": 2, "C": 3.0, "answer": "A"}, {"question": "R?", "A": 1, "B": 2, "C": None, "answer": "B"}]  # fmt: skip
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "train.jsonl")
    with pytest.raises(ValueError, match=r"train\.jsonl: the column 'C' holds whole numbers as floats.*3\.0 or 3"):
        task.load("train", path=path)
    rows[1]["C"] = 3.5
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "train.jsonl")
    assert task.load("train", path=path).dataset["options"][0] == ["1", "2", "3.0"]


def test_class_labels_of_a_dataset_on_the_hub(task, monkeypatch):
    features = Features({"question": Value("string"), "A": Value("string"), "B": Value("string"), "answer": ClassLabel(names=["A", "B"])})  # fmt: skip
    rows = Dataset.from_dict({"question": ["Q1?", "Q2?"], "A": ["x"] * 2, "B": ["y"] * 2, "answer": [1, 0]}, features)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    assert task.load("train", path="me/questions").dataset["gold"][:] == [1, 0]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_numbered_group_is_the_same_beside_an_empty_cell(tmp_path, kind):
    """pandas makes floats of a column of integers where one is missing."""
    for split, groups in {"train": [1, 2, None], "test": [1, 12, 3]}.items():
        questions = [f"{split} {i}" for i in range(3)]
        table = pd.DataFrame({"question": questions, "A": "x", "B": "y", "answer": "A", "group": groups})
        getattr(table, f"to_{kind}")(tmp_path / f"{split}.{kind}", index=False)
    train, test = (get_task("custom").load(split, path=str(tmp_path)).dataset for split in ("train", "test"))
    assert (train["group"][:], test["group"][:]) == (["1", "2", ""], ["1", "12", "3"])
    assert drop_overlap(train, test, by="group")[1] == 1


@pytest.mark.parametrize("group", ["2.0", 2.0, 0])
def test_a_group_in_the_prompt_is_the_same_in_a_row_that_is_asked_later(tmp_path, group):
    row = {"question": "Q?", "A": "x", "B": "y", "answer": "A", "group": group}
    task = get_task("custom", template="Chapter {group}: {question}\n{choices}\nAnswer:")
    trained = task.load("train", path=write(tmp_path, json.dumps(row), "train.jsonl")).dataset[0]
    assert task.reorder({"question": "Q?", "options": ["x", "y"], "group": group}, [0, 1]).prompt == trained["prompt"]


def test_a_row_that_is_asked_with_an_empty_cell_has_no_group(task):
    asked = [{"question": "Q?", "options": ["x", "y"], "group": group} for group in (None, float("nan"), "")]
    assert [task.reorder(row, [0, 1]).group for row in asked] == ["", "", ""]
