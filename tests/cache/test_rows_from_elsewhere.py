"""Rows in the words of other tools: read as they are meant, or refused."""

import json
import warnings

import numpy as np
import pytest
from datasets import Dataset

from first_trl import add_teacher_topk, evaluate_multiple_choice, load_teacher_cache
from first_trl.cache.choices import restrict_to_choices
from first_trl.tasks import encode_prompts
from first_trl.tasks.conversation import render
from tests.support.families import CHAT, MARKED, PLAIN, TOOLS, family_tokenizer
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


@pytest.mark.parametrize("form", ["messages", "answered", "open"])
def test_tools_have_no_nulls_of_other_rows(form, tmp_path):
    """Arrow gives every tool the parameters of all others; teacher, evaluation and inference read those of its own."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name, properties in (("river", {"a": {"type": "string"}}), ("mill", {"b": {"type": "integer"}}))
    ]
    turn, answer = [{"role": "user", "content": "Which?"}], [{"role": "assistant", "content": "A"}]
    columns = {
        "messages": {"messages": turn + answer},
        "answered": {"prompt": turn, "completion": answer},
        "open": {"prompt": turn},
    }[form]
    rows = [{**columns, "tools": [tool]} for tool in tools]
    filled = Dataset.from_list(rows)
    assert filled[0]["tools"][0]["function"]["parameters"]["properties"] == {"a": {"type": "string"}, "b": None}
    texts = captured_texts(TOOLS, rows, tmp_path)
    tokenizer = family_tokenizer(template=TOOLS)
    asked = encode_prompts(tokenizer, [turn] * 2, tools=filled["tools"])
    for tool, text, ids in zip(tools, texts, asked, strict=True):
        assert json.dumps(tool) in text and "null" not in text
        assert text.startswith(tokenizer.decode(ids))


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_without_parameters(as_text, tmp_path):
    tool = {"type": "function", "function": {"name": "river", "parameters": {}}}
    row = {
        "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A"}],
        "tools": json.dumps([tool]) if as_text else [tool],
    }
    for text in captured_texts(TOOLS, [row, row], tmp_path):
        assert json.dumps(tool) in text


def test_documents_that_no_template_is_given_are_told(tmp_path):
    template = "{% for d in documents or [] %}<|im_start|>system\n{{ d['text'] }}<|im_end|>\n{% endfor %}" + CHAT
    documents = [{"text": "Old mill"}]
    row = {"prompt": [{"role": "user", "content": "Which?"}]}
    with pytest.warns(UserWarning, match="column `documents` is not read.*without them. Put them into"):
        (without,) = captured_texts(template, [{**row, "documents": documents}], tmp_path / "column")
    assert "Old mill" not in without
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*`documents`")
        own = {**row, "chat_template_kwargs": {"documents": documents}}
        (read,) = captured_texts(template, [own], tmp_path / "own")
        captured_texts(CHAT, [{**row, "documents": documents}], tmp_path / "no place")
    assert "<|im_start|>system\nOld mill<|im_end|>" in read


@pytest.mark.parametrize("answered", [True, False])
def test_a_conversation_with_empty_objects_is_read_from_its_cache(answered, tmp_path):
    """Parquet stores no object without a key, and a text in its place would be asked as the prompt."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "mill", "arguments": {}}}]}
    turns = [{"role": "user", "content": "Which?"}, call, {"role": "user", "content": "And?", "metadata": {}}]
    row = {"prompt": turns, "choices": ["A", "B"]} | (
        {"completion": [{"role": "assistant", "content": "A"}]} if answered else {}
    )
    tokenizer = family_tokenizer(template=CALLS.replace("<|im_end|>\n", "<|im_end|>"))
    teacher = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    rows = Dataset.from_list([row, {**row, "prompt": turns[:1]}])
    add_teacher_topk(rows, teacher, tokenizer, k=len(tokenizer), output_dir=tmp_path, disable_tqdm=True)
    cache = load_teacher_cache(tmp_path)
    asked = encode_prompts(tokenizer, cache["prompt"][:])
    assert '"arguments": {}' in tokenizer.decode(asked[0]) and asked == encode_prompts(tokenizer, rows["prompt"][:])
    assert [ids[: len(prompt)] for ids, prompt in zip(cache["input_ids"], asked, strict=True)] == asked
    found, wanted = (
        evaluate_multiple_choice(teacher, tokenizer, data.add_column("gold", [0, 0]), disable_tqdm=True)
        for data in (cache, rows)
    )
    np.testing.assert_array_equal(found.predictions["choice_logprobs"], wanted.predictions["choice_logprobs"])
    shares = np.exp(wanted.predictions["choice_logprobs"])
    for row, share in zip(restrict_to_choices(cache, tokenizer), shares / shares.sum(1, keepdims=True), strict=True):
        order = row["teacher_choice_index"][0]
        np.testing.assert_allclose(np.exp(row["teacher_topk_logprobs"][0]), share[order], rtol=1e-3)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_roles_of_sharegpt_are_those_of_the_template(column, tmp_path):
    turns = [("system", "Name the river."), ("human", "Which?"), ("gpt", "A"), ("human", "And?"), ("gpt", "B")]
    names = {"human": "user", "gpt": "assistant"}
    theirs = [{"from": role, "value": text} for role, text in turns]
    ours = [{"role": names.get(role, role), "content": text} for role, text in turns]
    (text,) = captured_texts(CHAT, [{column: theirs}], tmp_path / "theirs")
    assert [text] == captured_texts(CHAT, [{"messages": ours}], tmp_path / "ours")
    assert "<|im_start|>user\nWhich?<|im_end|>" in text and "human" not in text


TWO_ROLES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n"
    "{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = {"role": "user", "content": "Which?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "river", "arguments": {"mill": 1}}}]}
TOOL = {"type": "function", "function": {"name": "river"}}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        *(
            ({"prompt": [{"role": role, "content": "Old mill"}, ASKED]}, rf"leaves out message 1 \(role '{role}'\)")
            for role in ("system", "developer", "tool")
        ),
        ({"tools": [TOOL]}, "has `tools`, and the chat template does not write them"),
        ({"prompt": [ASKED, CALL, ASKED]}, "has `tool_calls`, and the chat template does not write them"),
        ({"prompt": [{"role": "user", "content": None}]}, "message of the role 'user' has no content"),
        ({"prompt": [{"role": "user"}]}, "message of the role 'user' has no content"),
        ({"completion": [{"role": "assistant", "content": None}]}, "message of the role 'assistant' has no content"),
        (
            {"completion": [{"role": "assistant", "content": "A", "reasoning_content": "The old one"}]},
            "has `reasoning_content`, and the chat template does not write it",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(columns, message, tmp_path):
    """The teacher would answer another conversation."""
    row = {"prompt": [ASKED], "completion": [{"role": "assistant", "content": "A"}]}
    with pytest.raises(ValueError, match=f"Row 0 of the dataset: .*{message}"):
        captured_texts(TWO_ROLES, [row | columns], tmp_path)


@pytest.mark.parametrize("as_text", [False, True])
def test_empty_answers_are_counted(as_text, tmp_path):
    def row(answer):
        if as_text:
            return {"prompt": "Which?", "completion": answer}
        return {"prompt": [ASKED], "completion": [{"role": "assistant", "content": answer}]}

    with pytest.warns(UserWarning, match="1 of 3 rows have an empty completion: their answer is the end token"):
        captured_texts(CHAT, [row("A"), row(""), row("B")], tmp_path)


DATED = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"


def test_a_date_that_a_template_writes_is_told(tmp_path):
    tokenizer = family_tokenizer(template=f"{DATED}<|im_start|>system\n{{{{ date_string }}}}<|im_end|>\n{CHAT}")
    teacher = tiny_llama(vocab_size=len(tokenizer))
    rows = Dataset.from_list([talk("Which?", "A")])

    def text(**options):
        cache = add_teacher_topk(rows, teacher, tokenizer, k=2, disable_tqdm=True, **options)
        return tokenizer.decode(cache[0]["input_ids"])

    with pytest.warns(UserWarning, match="writes the date of the day into every conversation"):
        text(output_dir=tmp_path / "today")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        day = text(output_dir=tmp_path / "day", chat_template_kwargs={"date_string": "1 May 2024"})
        captured_texts(f"{DATED}{CHAT}", [talk("Which?", "A")], tmp_path / "unwritten")
    assert "1 May 2024" in day


def test_a_template_may_write_a_message_in_other_words(tmp_path):
    turns = [{"role": "system", "content": "Old mill"}, ASKED, {"role": "assistant", "content": "A"}]
    (text,) = captured_texts(CHAT.replace("m['content']", "m['content'] | upper"), [{"messages": turns}], tmp_path)
    assert "OLD MILL" in text and "WHICH?" in text


@pytest.mark.parametrize(
    ("write", "parsed"),
    [
        ("{{ c | tojson }}", True),
        ("{{ c.function.name }}({{ c.function.arguments | tojson }})", True),
        ("{{ c['function']['arguments']|tojson }}", True),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", True),
        ("{{ c.function.name + c.function.arguments }}", False),
        (
            "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}",
            False,
        ),
    ],
)
def test_arguments_of_calls_as_an_api_returns_them_are_written_once(write, parsed, tmp_path):
    template = TOOLS.replace(
        "{{ m['content'] }}", f"{{{{ m['content'] }}}}{{% for c in m.tool_calls or [] %}}{write}{{% endfor %}}"
    )
    arguments = {"mill": "old", "none": None}

    def text(value, folder):
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "river", "arguments": value}}],
        }
        row = {"messages": [ASKED, call, {"role": "tool", "content": "A"}, {"role": "assistant", "content": "B"}]}
        (found,) = captured_texts(template, [row], tmp_path / folder)
        return found

    found = text(json.dumps(arguments), "text")
    assert "\\" not in found and "old" in found
    if parsed:
        expected = {name: value for name, value in arguments.items() if value is not None}
        assert text(json.dumps(expected), "some") == text(expected, "objects")
    else:
        assert json.dumps(arguments) in found


@pytest.mark.parametrize("change", [{"split_special_tokens": True}, {"eos_token": "<|stop|>"}])
@pytest.mark.parametrize("row", [{"prompt": "Which?", "completion": " A"}, {"text": "Which? A"}])
def test_an_end_token_that_falls_into_letters_is_refused(change, row, tmp_path):
    tokenizer = family_tokenizer()
    for name, value in change.items():
        setattr(tokenizer, name, value)
    teacher = tiny_llama(vocab_size=len(tokenizer))
    with pytest.raises(
        ValueError, match=r"Row 0 of the dataset: the end-of-sequence token .* the tokenizer splits it"
    ):
        add_teacher_topk(Dataset.from_list([row]), teacher, tokenizer, k=2, output_dir=tmp_path, disable_tqdm=True)


ANSWER = [{"role": "assistant", "content": "A"}]
SPLIT = {
    "messages": (lambda turn, _: {"messages": turn + ANSWER}, {}),
    "marked": (lambda turn, _: {"messages": turn + ANSWER}, {"assistant_only_loss": True}),
    "answered": (lambda turn, _: {"prompt": turn, "completion": ANSWER}, {}),
    "open": (lambda turn, _: {"prompt": turn}, {}),
    "rendered": (lambda _, text: {"prompt": text}, {}),
}


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("form", SPLIT)
def test_a_template_whose_tokens_fall_into_letters_is_refused(form, front, tmp_path):
    tokenizer = family_tokenizer(template=MARKED, front=front)
    turn = [{"role": "user", "content": "Which?"}]
    row, options = SPLIT[form]
    row = row(turn, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    tokenizer.split_special_tokens = True
    teacher = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128)
    options = {"k": 2, "output_dir": tmp_path, "disable_tqdm": True} | options
    with pytest.raises(ValueError, match=r"writes '<\|im_start\|>', and the tokenizer splits it into letters"):
        add_teacher_topk(Dataset.from_list([row]), teacher, tokenizer, **options)
    # Such a token that somebody writes into a message may be split
    plain = family_tokenizer(template=PLAIN, front=front)
    plain.split_special_tokens = True
    (ids,) = encode_prompts(plain, [[{"role": "user", "content": "Which <|im_start|>?"}]])
    assert plain.convert_tokens_to_ids("<|im_start|>") not in ids
    tokenizer.split_special_tokens = False
    assert len(add_teacher_topk(Dataset.from_list([row]), teacher, tokenizer, **options)) == 1


def talk(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_a_role_that_no_template_names_is_refused(tmp_path):
    """Written as it is, it would be one that the model never saw."""
    rows = [
        talk("Which river?", "A"),
        {"messages": [{"role": "moderator", "content": "Which?"}, talk("x", "A")["messages"][1]]},
    ]
    with pytest.raises(
        ValueError, match=r"Row 1 of the dataset: the role 'moderator' .* Rename it to one of system, .*user"
    ):
        captured_texts(CHAT, rows, tmp_path)
    knows = CHAT.replace("{{ m['role'] }}", "{{ 'host' if m['role'] == 'moderator' else m['role'] }}")
    assert "<|im_start|>host\nWhich?" in captured_texts(knows, rows, tmp_path)[1]


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
