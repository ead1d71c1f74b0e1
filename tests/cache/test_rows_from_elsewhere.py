"""Rows in the words of other tools: read as they are meant, or refused."""

import pytest
from datasets import Dataset

from first_trl import add_teacher_topk
from first_trl.tasks.conversation import render
from tests.support.families import CHAT, family_tokenizer
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
