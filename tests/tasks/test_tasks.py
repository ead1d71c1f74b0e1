"""Readers of benchmarks: original files, the Hub's layouts, splits, slices, limits and malformed rows."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from first_trl.experiments.smoke.rows import DATA as SMOKE_DATA
from first_trl.tasks import get_task, list_tasks
from tests.conftest import DATA


FIXTURES = SMOKE_DATA
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the benchmark files are not at {DATA}")
COLUMNS = ["id", "prompt", "completion", "choices", "gold", "group", "question"]


def question(n: int = 5, key: str | None = "B", labels: str = "ABCDE", stem: str = "Which one?") -> dict:
    row: dict = {"id": "row-1", "question": {"stem": stem}}
    row["question"]["choices"] = [{"label": label, "text": f"text {label}"} for label in labels[:n]]
    return row if key is None else {**row, "answerKey": key}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_registry_knows_every_task_and_names_the_nearest():
    assert list_tasks() == [
        "alpaca",
        "arc",
        "boolq",
        "commonsense_qa",
        "custom",
        "diabetes",
        "digits",
        "mmlu",
        "mmlu_category",
        "mmlu_field",
        "noisy_world",
        "openbook_qa",
        "system_one",
    ]
    for name in list_tasks():
        assert get_task(name).name == name
    with pytest.raises(ValueError, match="Did you mean 'commonsense_qa'"):
        get_task("comonsense_qa")
    with pytest.raises(ValueError, match="Did you mean 'template'"):
        get_task("arc", tempalte="{question}")
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        get_task("arc").load("validaton", path=str(FIXTURES / "arc"))


def test_prompt_is_the_documented_one():
    row = get_task("commonsense_qa").load("train", path=str(FIXTURES / "commonsense_qa")).dataset[0]
    assert row == {
        "id": "own-csqa-0",
        "prompt": (
            "Where would you most likely put a kettle to heat it?\nAnswer Choices:\n(A) bookshelf\n(B) mailbox\n"
            "(C) pillow\n(D) stove\n(E) bathtub\nAnswer:"
        ),
        "completion": " D",
        "choices": [" A", " B", " C", " D", " E"],
        "gold": 3,
        "group": "kettle",
        "question": "Where would you most likely put a kettle to heat it?",
        "options": ["bookshelf", "mailbox", "pillow", "stove", "bathtub"],
    }


@pytest.mark.parametrize(
    ("name", "folder", "split", "n"),
    [
        ("commonsense_qa", "commonsense_qa", "train", 12),
        ("commonsense_qa", "commonsense_qa", "validation", 8),
        ("openbook_qa", "openbook_qa", "train", 12),
        ("openbook_qa", "openbook_qa", "validation", 8),
        ("openbook_qa", "openbook_qa", "test", 4),
        ("arc", "arc", "train", 12),
        ("arc", "arc/ARC-Easy", "validation", 8),
        ("boolq", "boolq", "train", 16),
        ("boolq", "boolq", "validation", 8),
        ("mmlu", "mmlu", "dev", 10),
        ("mmlu", "mmlu", "validation", 4),
        ("mmlu", "mmlu", "test", 10),
        ("alpaca", "alpaca/alpaca_data.json", "train", 24),
    ],
)
def test_original_files(name, folder, split, n):
    loaded = get_task(name).load(split, path=str(FIXTURES / folder))
    rows = loaded.dataset
    assert (loaded.n_read, len(rows), loaded.n_dropped, loaded.n_not_selected) == (n, n, 0, 0)
    lettered = name not in ("boolq", "alpaca")
    assert rows.column_names == COLUMNS + ["options"] * lettered
    assert rows.features["gold"] == Value("int64")
    assert len(set(rows["id"])) == n
    for row in rows:
        assert row["prompt"] and row["completion"]
        if row["choices"]:
            assert row["choices"][row["gold"]] == row["completion"]
        else:
            assert row["gold"] == -1


def test_choices_by_position_with_digits_as_labels(tmp_path):
    # Labels in another order than A, B, C: the letter shown is the place of the text, and gold follows the text.
    path = write(tmp_path / "x.jsonl", question(4, key="3", labels="1234"), {**question(3, "C", "CAB"), "id": "row-2"})
    rows = get_task("arc").load("test", path=path).dataset
    assert (rows[0]["gold"], rows[0]["completion"], rows[0]["choices"]) == (2, " C", [" A", " B", " C", " D"])
    assert "(C) text 3\n" in rows[0]["prompt"]
    assert (rows[1]["gold"], rows[1]["completion"]) == (0, " A")
    assert "(A) text C\n(B) text A\n(C) text B\n" in rows[1]["prompt"]


def test_rows_without_answers(tmp_path):
    rows = get_task("commonsense_qa").load("test", path=str(FIXTURES / "commonsense_qa")).dataset
    assert rows["gold"][:] == [-1] * 4
    assert rows["completion"][:] == [None] * 4
    path = write(tmp_path / "x.jsonl", question(key=None))
    with pytest.raises(ValueError, match=r"x\.jsonl, row 1 \(line 1\): answerKey is missing"):
        get_task("commonsense_qa").load("train", path=path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (question(key="F"), "answerKey 'F' is not among the labels"),
        (question(labels="AABCD"), "choice labels repeat"),
        (question(stem="  "), "the question is empty"),
        (question(n=4), "4 choices, expected 5"),
        ({"id": "x", "answerKey": "A"}, "field 'question' is missing"),
        ({"id": "x", "question": {"stem": "q"}, "answerKey": "A"}, "`choices` must be a list"),
        ({**question(), "question": {"stem": "q", "choices": [{"label": "A"}]}}, "field 'text' is missing"),
        (
            {"question": {"stem": "q", "choices": [{"label": c, "text": "" if c == "C" else c} for c in "ABCDE"]}}
            | {"answerKey": "A"},
            "choice C is empty",
        ),
    ],
)
def test_malformed_rows_name_their_place(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", {**question(), "id": "fine"}, row)
    with pytest.raises(ValueError, match=rf"x\.jsonl, row 2 \(line 2\): .*{message}"):
        get_task("commonsense_qa").load("train", path=path)


def test_files_that_cannot_be_read(tmp_path):
    task = get_task("commonsense_qa")
    with pytest.raises(ValueError, match=r"no file or folder .*nowhere\.jsonl.*Give"):
        task.load("train", path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match=r"no file or folder 'data/rows\.jsonl'"):
        task.load("train", path="data/rows.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(question()) + "\n{'single': 'quotes'}\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl.*line 2 is not JSON"):
        task.load("train", path=str(bad))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 5000)[:-20])
    with pytest.raises(ValueError, match=r"Cannot read .*cut\.jsonl\.gz"):
        task.load("train", path=str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match="convert it"):
        task.load("train", path=str(tmp_path / "rows.txt"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty: it has no rows"):
        task.load("train", path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"`revision`.*is local"):
        task.load("train", path=str(FIXTURES / "commonsense_qa"), revision="main")


def test_folders_are_not_guessed_at(tmp_path):
    write(tmp_path / "train_rand_split.jsonl", question())
    write(tmp_path / "train_token_split.jsonl", question())
    with pytest.raises(ValueError, match=r"2 files .*train_rand_split\.jsonl, train_token_split\.jsonl"):
        get_task("commonsense_qa").load("train", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"'validation' or 'valid' or 'val' or 'dev'.*found: train_rand_split"):
        get_task("commonsense_qa").load("validation", path=str(tmp_path))


def test_duplicate_ids_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 2 \(line 2\): id 'row-1' was already used by .*row 1"):
        get_task("commonsense_qa").load("train", path=write(tmp_path / "x.jsonl", question(), question(key="C")))


def test_json_strings_with_line_separators_are_one_row(tmp_path):
    row = question(stem="one\u2028two")
    (tmp_path / "x.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    loaded = get_task("commonsense_qa").load("train", path=str(tmp_path / "x.jsonl"))
    assert loaded.n_read == 1
    assert loaded.dataset[0]["prompt"].startswith("one\u2028two\n")


def test_slices_partition_and_limit_is_seeded():
    task, path = get_task("openbook_qa"), str(FIXTURES / "openbook_qa")
    whole = task.load("train", path=path).dataset["id"][:]
    head = task.load("train[:75%]", path=path).dataset["id"][:]
    tail = task.load("train[75%:]", path=path).dataset["id"][:]
    assert head + tail == whole and len(tail) == 3
    limited = task.load("train", path=path, limit=5, seed=1)
    assert (limited.n_read, len(limited.dataset), limited.n_not_selected, limited.n_dropped) == (12, 5, 7, 0)
    chosen = limited.dataset["id"][:]
    assert chosen == [i for i in whole if i in chosen]
    assert chosen == task.load("train", path=path, limit=5, seed=1).dataset["id"][:]
    assert any(chosen != task.load("train", path=path, limit=5, seed=s).dataset["id"][:] for s in (2, 3, 4))
    assert task.load("train", path=path, limit=100).n_not_selected == 0
    for bad in ("train[:x]", "train[50:10]", "train[:90%"):
        with pytest.raises(ValueError, match="train"):
            task.load(bad, path=path)
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        task.load("train", path=path, limit=0)


def test_ids_made_here_do_not_depend_on_the_slice():
    task, path = get_task("boolq"), str(FIXTURES / "boolq")
    whole = task.load("train", path=path).dataset
    assert task.load("train[8:]", path=path).dataset["id"][:] == whole["id"][8:]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arc", {"template": "{question} {answers}"}, r"unknown field \{answers\}; this task knows \{question\}"),
        ("arc", {"template": "{choices}"}, r"lacks \{question\}"),
        ("arc", {"template": "{question"}, "is not a template"),
        ("arc", {"template": "{question!r}"}, "bare field"),
        ("arc", {"template": 3}, "must be a text"),
        ("arc", {"completion": " A"}, "the same for every answer"),
        ("arc", {"subset": "hard"}, "easy, challenge"),
        ("boolq", {"with_passage": False, "template": "{passage} {question}"}, r"unknown field \{passage\}"),
        ("alpaca", {"template": "{input}"}, "lacks the instruction"),
        ("alpaca", {"completion": "yes"}, r"lacks \{output\}"),
    ],
)
def test_templates_are_checked_before_reading(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_task(name, **options)


def test_own_template_and_braces_in_the_data(tmp_path):
    row = question(stem="What is {choices} in a set {1, 2}?")
    task = get_task("commonsense_qa", template="Q: {question}\n{choices}\nA: (", completion="{letter}")
    loaded = task.load("train", path=write(tmp_path / "x.jsonl", row)).dataset[0]
    assert loaded["prompt"] == (
        "Q: What is {choices} in a set {1, 2}?\n(A) text A\n(B) text B\n(C) text C\n(D) text D\n(E) text E\nA: ("
    )
    assert loaded["choices"] == ["A", "B", "C", "D", "E"]
    words = get_task("commonsense_qa", completion=" {text}").load("train", path=str(tmp_path / "x.jsonl")).dataset[0]
    assert words["completion"] == " text B"


def test_boolq_passages(tmp_path):
    row = get_task("boolq").load("validation", path=str(FIXTURES / "boolq")).dataset[1]
    assert row["prompt"] == (
        "The volcano has smoked for years but has not thrown out any lava since 1902.\n"
        "Question: has the volcano thrown out lava recently?\nAnswer:"
    )
    assert (row["completion"], row["choices"], row["gold"], row["group"]) == (" no", [" yes", " no"], 1, "Volcano")
    assert row["question"] == "has the volcano thrown out lava recently"
    path = write(tmp_path / "x.jsonl", {"question": "is it so", "answer": True})
    with pytest.raises(ValueError, match=r"'passage' is missing.*with_passage=False"):
        get_task("boolq").load("train", path=path)
    row = get_task("boolq", with_passage=False).load("train", path=path).dataset[0]
    assert (row["prompt"], row["gold"]) == ("Question: is it so?\nAnswer:", 0)
    path = write(tmp_path / "y.jsonl", {"question": "is it so", "answer": "true", "passage": "It is."})
    with pytest.raises(ValueError, match="must be true or false, got 'true'"):
        get_task("boolq").load("train", path=path)


def test_mmlu_subjects_and_bad_cells(tmp_path):
    rows = get_task("mmlu").load("test", path=str(FIXTURES / "mmlu")).dataset
    assert Counter(rows["group"][:]) == {"everyday_objects": 5, "plain_nature": 5}
    only = get_task("mmlu", subject="plain_nature").load("test", path=str(FIXTURES / "mmlu"))
    assert (len(only.dataset), only.reasons, set(only.dataset["group"])) == (5, {"other subject": 5}, {"plain_nature"})
    (tmp_path / "a_test.csv").write_text('"a, quoted\nquestion",1,2,3,4,B\n')
    row = get_task("mmlu").load("test", path=str(tmp_path)).dataset[0]
    assert row["prompt"].startswith("a, quoted\nquestion\nAnswer Choices:\n(A) 1\n") and row["gold"] == 1
    for line, message in (("q,1,2,3,B", "5 columns, expected 6"), ("q,1,2,3,4,E", "not one of A, B, C, D")):
        (tmp_path / "a_test.csv").write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            get_task("mmlu").load("test", path=str(tmp_path))
    # The Hub's class labels are read by name
    path = write(tmp_path / "x.jsonl", {"question": "q", "choices": list("wxyz"), "answer": "B"})
    assert get_task("mmlu").load("test", path=path).dataset["gold"][:] == [1]
    for answer in (4, -1, True, "E"):
        path = write(tmp_path / "x.jsonl", {"question": "q", "choices": list("wxyz"), "answer": answer})
        with pytest.raises(ValueError, match="is not the number of one of 4 choices"):
            get_task("mmlu").load("test", path=path)


def test_alpaca_prompt_and_counted_drops(tmp_path):
    (tmp_path / "x.json").write_text(
        json.dumps(
            [
                {"instruction": "Name the capital.", "input": "Peru", "output": "Lima"},
                {"instruction": "Say hello.", "input": "", "output": "Hello."},
                {"instruction": "Say nothing.", "input": "", "output": " \n"},
            ]
        )
    )
    loaded = get_task("alpaca").load("train", path=str(tmp_path / "x.json"))
    assert (loaded.n_read, len(loaded.dataset), loaded.reasons) == (3, 2, {"empty output": 1})
    assert loaded.dataset["prompt"][:] == [
        "Instruction:\nName the capital.\n\nInput:\nPeru\n\nResponse:\n",
        "Instruction:\nSay hello.\n\nResponse:\n",
    ]
    assert loaded.dataset[0]["completion"] == "Lima"
    assert (loaded.dataset[0]["choices"], loaded.dataset[0]["gold"]) == ([], -1)
    assert loaded.dataset["question"][:] == ["Name the capital.\n\nInput:\nPeru", "Say hello."]


LABELLED = {"id": Value("string"), "answerKey": Value("string")}
CHOICES = {"text": List(Value("string")), "label": List(Value("string"))}
HUB_ROWS = {
    "commonsense_qa": (
        {**LABELLED, "question": Value("string"), "question_concept": Value("string"), "choices": CHOICES},
        {"id": "a", "question": "q?", "question_concept": "c", "answerKey": "D"}
        | {"choices": {"label": list("ABCDE"), "text": list("vwxyz")}},
        (3, " D", "c"),
    ),
    "openbook_qa": (
        {**LABELLED, "question_stem": Value("string"), "choices": CHOICES},
        {"id": "a", "question_stem": "q?", "answerKey": "A"}
        | {"choices": {"text": list("wxyz"), "label": list("ABCD")}},
        (0, " A", ""),
    ),
    "arc": (
        {**LABELLED, "question": Value("string"), "choices": CHOICES},
        {"id": "a", "question": "q?", "answerKey": "2", "choices": {"text": list("xyz"), "label": list("123")}},
        (1, " B", ""),
    ),
    "boolq": (
        {"question": Value("string"), "answer": Value("bool"), "passage": Value("string")},
        {"question": "q", "answer": False, "passage": "p"},
        (1, " no", ""),
    ),
    "mmlu": (
        {"question": Value("string"), "subject": Value("string"), "choices": List(Value("string"))}
        | {"answer": ClassLabel(names=list("ABCD"))},
        {"question": "q?", "subject": "s", "choices": list("wxyz"), "answer": 2},
        (2, " C", "s"),
    ),
    "alpaca": (
        {column: Value("string") for column in ("instruction", "input", "output", "text")},
        {"instruction": "i", "input": "", "output": "o", "text": "t"},
        (-1, "o", ""),
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
@pytest.mark.parametrize("through", ["file", "load_dataset"])
def test_layouts_of_the_hub(tmp_path, monkeypatch, name, through):
    features, row, expected = HUB_ROWS[name]
    dataset = Dataset.from_list([row], features=Features(features))
    task = get_task(name)
    split = next(iter(task.splits))
    if through == "file":
        folder = tmp_path / (task.hub_config or "data")
        folder.mkdir()
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        loaded = task.load(split, path=str(tmp_path))
    else:
        asked = []

        def load_dataset(path, config, *, split, revision):
            asked.append((path, config, split, revision))
            return dataset

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        loaded = task.load(split, revision="abc")
        assert asked == [(task.hub_id, task.hub_config, task.splits[split], "abc")]
    result = loaded.dataset[0]
    assert (result["gold"], result["completion"], result["group"]) == expected


def test_shards_of_a_parquet_file_are_joined(tmp_path):
    for shard in range(2):
        row = {**HUB_ROWS["arc"][1], "id": f"row-{shard}"}
        rows = Dataset.from_list([row], features=Features(HUB_ROWS["arc"][0]))
        rows.to_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet")
    assert get_task("arc").load("train", path=str(tmp_path)).dataset["id"][:] == ["row-0", "row-1"]


@needs_data
@pytest.mark.parametrize(
    ("name", "options", "split", "path", "n"),
    [
        ("commonsense_qa", {}, "train", "commonsense_qa", 9741),
        ("commonsense_qa", {}, "validation", "commonsense_qa", 1221),
        ("commonsense_qa", {}, "test", "commonsense_qa", 1140),
        ("openbook_qa", {}, "train", "openbook_qa", 4957),
        ("openbook_qa", {}, "test", "openbook_qa", 500),
        ("arc", {}, "train", "arc_easy", 2251),
        ("arc", {}, "test", "arc_easy", 2376),
        ("boolq", {"with_passage": False}, "train", "boolq_train_questions", 9427),
        ("mmlu", {}, "dev", "mmlu", 285),
        ("mmlu", {}, "test", "mmlu", 14042),
        ("alpaca", {}, "train", "alpaca_5000/alpaca_5000.json.gz", 5000),
    ],
)
def test_real_benchmarks_have_their_known_sizes(name, options, split, path, n):
    loaded = get_task(name, **options).load(split, path=str(DATA / path))
    assert loaded.n_read == n
    assert loaded.reasons == ({"empty output": 2} if name == "alpaca" else {})
    if name == "arc":
        sizes = {"train": {4: 2241, 3: 6, 5: 4}, "test": {4: 2365, 3: 7, 5: 4}}
        assert Counter(len(choices) for choices in loaded.dataset["choices"]) == sizes[split]
    if name == "boolq":
        assert loaded.dataset["gold"][:].count(0) / n == pytest.approx(0.6231, abs=5e-5)
    if name == "mmlu":
        assert len(set(loaded.dataset["group"])) == 57


@pytest.mark.parametrize(
    ("name", "row", "options"),
    [
        ("alpaca", {"instruction": "Say.", "input": float("nan"), "output": "x"}, {}),
        ("alpaca", {"instruction": float("nan"), "input": "", "output": "x"}, {}),
        ("boolq", {"question": "is it", "answer": True, "passage": float("nan")}, {}),
        ("boolq", {"question": "is it", "answer": True, "title": float("nan")}, {"with_passage": False}),
        ("mmlu", {"question": "q", "choices": ["a", "b", float("nan"), "d"], "answer": 1}, {}),
        ("mmlu", {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": float("nan")}, {}),
        ("commonsense_qa", {"question": "q", "answerKey": "A", "choices": {"label": list("ABCDE"), "text": ["a", float("nan"), "c", "d", "e"]}}, {}),
    ],
)  # fmt: skip
def test_an_empty_cell_is_no_word_of_any_task(tmp_path, name, row, options):
    split = "test" if name == "mmlu" else "train"
    with pytest.raises(ValueError, match=r"x\.jsonl, row 1 \(line 1\): .*(NaN|missing|empty)"):
        get_task(name, **options).load(split, path=write(tmp_path / "x.jsonl", row))
