"""The answer position lies behind what a template writes in front of an answer, by whatever name."""

import pytest
from datasets import Dataset

from first_trl import add_teacher_topk
from first_trl.tasks.conversation import answered_text, opens_thinking, prompt_text
from tests.support.families import family_tokenizer
from tests.support.tiny import tiny_llama


TURN = [{"role": "user", "content": "Which river?"}]
HEAD = "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n{% else %}"


def tokenizer_of(answer, prompt, *special):
    template = f"{HEAD}{answer}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    tokenizer = family_tokenizer(template=template)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def block(opened, closed, switch):
    """A template that closes its thinking block when an argument says so."""
    # As expressions: Jinja drops a line break behind a tag
    start, end = f"<|im_start|>assistant\n{{{{ {opened!r} }}}}", f"{{{{ {closed!r} }}}}"
    prompt = f"{start}{{% if {switch} %}}{end}{{% endif %}}"
    answer = (
        f"{start}{{% if '{closed.strip()}' not in m['content'] %}}{end}{{% endif %}}{{{{ m['content'] }}}}<|im_end|>"
    )
    return tokenizer_of(answer, prompt, opened.strip(), closed.strip())


OFF = "{0} is defined and not {0}"
BLOCKS = {
    "think": ("<think>\n", "\n</think>\n\n", OFF.format("enable_thinking")),
    "namespace": ("<seed:think>", "</seed:think>", OFF.format("thinking_budget")),
    "brackets": ("[THINK]", "[/THINK]", OFF.format("thinking")),
    "pipes": ("<|START_THINKING|>", "<|END_THINKING|>", OFF.format("reasoning")),
    "thought": ("<|begin_of_thought|>\n", "<|end_of_thought|>\n", OFF.format("thinking")),
    "triangles": ("◁think▷", "◁/think▷", OFF.format("enable_thinking")),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_closed_in_front_of_the_answer(name):
    opened, closed, _ = BLOCKS[name]
    tokenizer = block(*BLOCKS[name])
    assert opens_thinking(f"x{opened}") and not opens_thinking(f"x{opened}{closed}")
    text = prompt_text(tokenizer, TURN)
    assert text.endswith(f"assistant\n{opened}{closed}")
    head, tail, served = answered_text(tokenizer, TURN, [{"role": "assistant", "content": "Lune"}])
    assert (head, tail, served) == (text, "Lune<|im_end|>", True)
    # A thought of one's own is supervised
    own = f"{opened}rivers{closed}Lune"
    _, tail, _ = answered_text(tokenizer, TURN, [{"role": "assistant", "content": own}])
    assert "rivers" in tail


@pytest.mark.parametrize(
    ("prompt", "lead"),
    [
        ("<|im_start|>assistant", "<|channel|>final<|message|>"),
        ("<|im_start|>assistant\n", "<|start_response|>"),
        ("", "<|im_start|>assistant\n"),  # a template without a generation prompt
    ],
)
def test_special_tokens_in_front_of_an_answer_belong_to_the_prompt(prompt, lead):
    tokenizer = tokenizer_of(
        f"{prompt}{lead}{{{{ m['content'] }}}}<|im_end|>\n", prompt, "<|channel|>", "<|message|>", "<|start_response|>"
    )
    text = prompt_text(tokenizer, TURN)
    assert text.endswith(prompt + lead)
    assert answered_text(tokenizer, TURN, "Lune") == (text, "Lune<|im_end|>\n", True)


def test_a_blank_in_front_of_an_answer_is_the_answers():
    tokenizer = tokenizer_of("[/INST] {{ m['content'] }}<|end|>", "[/INST]", "[/INST]")
    assert answered_text(tokenizer, TURN, "Lune")[1:] == (" Lune<|end|>", True)


def test_an_empty_block_of_plain_text_belongs_to_the_prompt():
    """Not every tokenizer has a token for the marks of its template; the student is asked behind the block all the same."""
    start = "<|im_start|>assistant\n"
    tokenizer = tokenizer_of(f"{start}[THINK][/THINK]{{{{ m['content'] }}}}<|im_end|>", start)
    text = prompt_text(tokenizer, TURN)
    assert text.endswith(f"{start}[THINK][/THINK]")
    assert answered_text(tokenizer, TURN, "Lune") == (text, "Lune<|im_end|>", True)


def test_a_block_that_nothing_closes_is_told(tmp_path):
    """Behind it the teacher reads the answer, while a model that is asked the prompt would think."""
    start = "<|im_start|>assistant\n<think>\n"
    whole = start + "\n</think>\n\n"
    tokenizer = tokenizer_of(f"{{{{ {whole!r} }}}}{{{{ m['content'] }}}}<|im_end|>", f"{{{{ {start!r} }}}}")
    with pytest.raises(ValueError, match="what follows is a thought, not the answer"):
        prompt_text(tokenizer, TURN)
    head, tail, served = answered_text(tokenizer, TURN, "Lune")
    assert head.endswith(whole) and (tail, served) == ("Lune<|im_end|>", False)
    rows = Dataset.from_list([{"prompt": TURN, "completion": [{"role": "assistant", "content": "Lune"}]}])
    teacher = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128)
    with pytest.warns(UserWarning, match="1 of 1 rows are read by the teacher, and trained on, behind another text"):
        cache = add_teacher_topk(rows, teacher, tokenizer, k=2, output_dir=tmp_path, disable_tqdm=True)
    assert tokenizer.decode([label for label in cache[0]["labels"] if label != -100]) == "Lune<|im_end|>"
