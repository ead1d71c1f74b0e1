"""Rows in the words of other tools: read as they are meant, or refused."""

import json

import pytest
from datasets import Dataset

from first_trl import add_teacher_topk
from first_trl.tasks.conversation import render
from tests.support.families import CHAT, MARKED, TOOLS, family_tokenizer
from tests.support.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("name", ["assistant_mask", "loss_mask", "prompt_mask", "completion_masks"])
def test_a_mask_of_an_unknown_name_is_refused(tmp_path, name):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], name: [0, 0, 1]}])
    with pytest.raises(ValueError, match=rf"'{name}'.*Rename it to `completion_mask`"):
        add_teacher_topk(rows, tiny_llama(), tiny_tokenizer(), output_dir=tmp_path)
    cache = add_teacher_topk(
        rows.rename_column(name, "completion_mask"), tiny_llama(), tiny_tokenizer(), output_dir=tmp_path
    )
    assert cache[0]["labels"] == [-100, -100, 5]


def test_content_in_parts_is_text_for_templates_that_do_not_read_parts():
    parts = [{"type": "text", "text": "Which "}, {"type": "text", "text": "river?"}]
    tokenizer = family_tokenizer(template=CHAT)
    whole = render(tokenizer, [{"role": "user", "content": "Which river?"}])
    assert render(tokenizer, [{"role": "user", "content": parts}]) == whole
    with pytest.raises(ValueError, match="does not look into parts"):
        render(tokenizer, [{"role": "user", "content": [*parts, {"type": "image", "image": "x.png"}]}])
    reads = CHAT.replace("{{ m['content'] }}", "{% for part in m['content'] %}<{{ part['text'] }}>{% endfor %}")
    assert "<Which ><river?>" in render(family_tokenizer(template=reads), [{"role": "user", "content": parts}])


CALLS = TOOLS.replace(
    "{{ m['content'] }}", "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}{{ c | tojson }}{% endfor %}"
)


def captured_texts(template, rows, folder):
    """What the teacher reads of the rows, from a cache in a folder."""
    tokenizer = family_tokenizer(template=template)
    teacher = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    cache = add_teacher_topk(Dataset.from_list(rows), teacher, tokenizer, k=2, output_dir=folder, disable_tqdm=True)
    return [tokenizer.decode(ids) for ids in cache["input_ids"]]


def test_nulls_of_columns_are_not_read(tmp_path):
    """Arrow gives every call the arguments of all others."""
    calls = [{"name": "river", "arguments": {"a": 1}}, {"name": "mill", "arguments": {"b": "x", "c": {"d": 2}}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Which?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "A", "name": call["name"]},
                {"role": "assistant", "content": "A"},
            ]
        }
        for call in calls
    ]
    filled = Dataset.from_list(rows)[0]["messages"]
    assert filled[1]["tool_calls"][0]["arguments"] == {"a": 1, "b": None, "c": None}
    texts = captured_texts(CALLS, rows, tmp_path)
    for call, text in zip(calls, texts, strict=True):
        assert json.dumps(call) in text.replace("\\u0020", " ") and "null" not in text and "None" not in text


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_without_parameters(as_text, tmp_path):
    tool = {"type": "function", "function": {"name": "river", "parameters": {}}}
    row = {
        "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A"}],
        "tools": json.dumps([tool]) if as_text else [tool],
    }
    for text in captured_texts(TOOLS, [row, row], tmp_path):
        assert json.dumps(tool) in text


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_roles_of_sharegpt_are_those_of_the_template(column, tmp_path):
    turns = [("system", "Name the river."), ("human", "Which?"), ("gpt", "A"), ("human", "And?"), ("gpt", "B")]
    names = {"human": "user", "gpt": "assistant"}
    theirs = [{"from": role, "value": text} for role, text in turns]
    ours = [{"role": names.get(role, role), "content": text} for role, text in turns]
    (text,) = captured_texts(CHAT, [{column: theirs}], tmp_path / "theirs")
    assert [text] == captured_texts(CHAT, [{"messages": ours}], tmp_path / "ours")
    assert "<|im_start|>user\nWhich?<|im_end|>" in text and "human" not in text


def talk(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_what_a_template_marks_is_supervised_and_a_cut_answer_is_counted(tmp_path):
    """Every turn of the assistant with its end, nothing of the user; a row whose answer is cut off goes, and is counted."""
    tokenizer = family_tokenizer(template=MARKED)
    teacher = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)

    def supervised(rows, **options):
        cache = add_teacher_topk(
            Dataset.from_list(rows), teacher, tokenizer, k=2, output_dir=tmp_path / str(options), disable_tqdm=True,
            assistant_only_loss=True, **options,
        )  # fmt: skip
        return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in cache]

    rows = [talk("Which river?", "A", "And the mill?", "B C"), talk("Which " * 30, "D")]
    assert supervised(rows) == ["A<|im_end|>B C<|im_end|>", "D<|im_end|>"]
    with pytest.warns(UserWarning, match="1 rows without a supervised position are left out"):
        assert supervised(rows, max_length=20) == ["A<|im_end|>"]
    with pytest.raises(ValueError, match=r"Row 1 of the dataset: .*marks nothing of this conversation"):
        supervised([rows[0], talk("Anyone?")])
