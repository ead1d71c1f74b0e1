"""A student that would be asked with another text than it is trained on is refused, or a warning says so."""

import warnings

import pytest
from datasets import Dataset
from trl import SFTConfig

from first_trl import FirstDistillTrainer, FirstSFTTrainer, add_teacher_topk
from first_trl.cache.manifest import read_manifest
from tests.support.families import CHAT, THINKING, family_tokenizer
from tests.support.tiny import tiny_config, tiny_llama


QUESTIONS = ["Which river?\nAnswer:", "Which mill?\nAnswer:"]
TURNS = [[{"role": "user", "content": question}] for question in QUESTIONS]


def capture(tokenizer, columns, folder, **options):
    teacher = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    return add_teacher_topk(
        Dataset.from_dict(columns), teacher, tokenizer, k=3, output_dir=folder, disable_tqdm=True, **options
    )


def train(cache, tokenizer, folder):
    student = tiny_llama(1, vocab_size=len(tokenizer), max_position_embeddings=256)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FirstDistillTrainer(student, tiny_config(folder), cache, processing_class=tokenizer)
    return [str(w.message) for w in caught if "text" in str(w.message)]


@pytest.mark.parametrize("teacher_adds", [True, False])
def test_another_front_is_refused(teacher_adds, tmp_path):
    columns = {"prompt": QUESTIONS, "completion": [" A", " B"]}
    cache = capture(family_tokenizer(front=teacher_adds), columns, tmp_path / "cache")
    assert read_manifest(cache).tokenizer["front"] == (["<|begin|>"] if teacher_adds else [])
    assert train(cache, family_tokenizer(front=teacher_adds), tmp_path) == []
    with pytest.raises(ValueError, match=r"trained on\. Give the student the teacher's tokenizer"):
        train(cache, family_tokenizer(front=not teacher_adds), tmp_path)
    # A stream of rows in memory has lost its manifest: only the rows tell
    student = family_tokenizer(front=not teacher_adds)
    student.bos_token = "<|begin|>"
    (message,) = train(cache.to_iterable_dataset(), student, tmp_path)
    assert (
        "begin with <|begin|>, which the tokenizer does not put" if teacher_adds else "do not begin with"
    ) in message


@pytest.mark.parametrize("field", ["prompt", "text"])
@pytest.mark.parametrize("written", ["template", "text"])
def test_no_teacher_is_fine_tuned_on_a_doubled_begin_token(field, written, tmp_path):
    """As TRL reads a text that brings the token: everyone else reads it once."""
    tokenizer = family_tokenizer(front=True, template="{{ bos_token }}" + CHAT if written == "template" else None)
    text = "<|begin|>Which river?\n"
    if written == "template":
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Which?"}], tokenize=False)

    def trained_on(text):
        rows = Dataset.from_list([{field: text} | ({"completion": "A"} if field == "prompt" else {})])
        model = tiny_llama(vocab_size=len(tokenizer))
        args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        return FirstSFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train_dataset

    with pytest.raises(ValueError, match=r"Row 0 of the train dataset would be read as <\|begin\|> <\|begin\|>"):
        trained_on(text)
    assert trained_on(text.removeprefix("<|begin|>"))[0]["input_ids"].count(tokenizer.bos_token_id) == 1


def test_what_a_template_writes_needs_no_front(tmp_path):
    chat = "{{ bos_token }}" + CHAT
    columns = {"prompt": TURNS, "completion": [[{"role": "assistant", "content": "A"}]] * 2}
    cache = capture(family_tokenizer(front=True, template=CHAT), columns, tmp_path / "cache")
    assert read_manifest(cache).tokenizer["from_template"]
    assert train(cache, family_tokenizer(front=False, template=CHAT), tmp_path) == []
    (message,) = train(cache, family_tokenizer(front=True, template=chat), tmp_path)
    assert "chat template is not the one" in message


def test_rows_without_their_front_are_told(tmp_path):
    tokenizer = family_tokenizer(front=True)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in QUESTIONS]
    cache = capture(tokenizer, {"input_ids": ids, "labels": ids}, tmp_path / "cache")
    (message,) = train(cache, tokenizer, tmp_path)
    assert "2 of 2 rows looked at do not begin with <|begin|>" in message


def test_arguments_of_the_template_are_stored(tmp_path):
    tokenizer = family_tokenizer(template=THINKING)
    cache = capture(tokenizer, {"prompt": TURNS}, tmp_path, chat_template_kwargs={"enable_thinking": True})
    assert read_manifest(cache).tokenizer["template_arguments"] == {"enable_thinking": True}
    assert tokenizer.decode(cache[0]["input_ids"]).endswith("<think>\n<|end|>")
    options = {"chat_template_kwargs": {"enable_thinking": False, "left_out": None}}
    cache = capture(tokenizer, {"prompt": TURNS}, tmp_path / "off", **options)
    assert read_manifest(cache).tokenizer["template_arguments"] == {"enable_thinking": False}
    assert tokenizer.decode(cache[0]["input_ids"]).endswith("</think>\n\n<|end|>")
    with pytest.raises(ValueError, match="cannot set 'tokenize'"):
        capture(tokenizer, {"prompt": TURNS}, tmp_path / "other", chat_template_kwargs={"tokenize": True})


@pytest.mark.parametrize("form", ["messages", "answered", "open"])
def test_arguments_of_the_template_reach_rows_of_every_form(form, tmp_path):
    """Those of a row go before those of all."""
    tokenizer, answer = family_tokenizer(template="{{ style }}" + CHAT), [{"role": "assistant", "content": "A"}]
    columns = {
        "messages": {"messages": [turn + answer for turn in TURNS]},
        "answered": {"prompt": TURNS, "completion": [answer] * 2},
        "open": {"prompt": TURNS},
    }[form]
    own = {"chat_template_kwargs": [{"style": "short"}, {"style": None}]}
    cache = capture(tokenizer, columns | own, tmp_path, chat_template_kwargs={"style": "long"})
    texts = [tokenizer.decode(ids) for ids in cache["input_ids"]]
    assert [text.partition("<|im_start|>")[0] for text in texts] == ["short", "long"]
