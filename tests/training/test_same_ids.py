"""Teacher, training, evaluation and inference read the same ids, whatever the tokenizer and the template put around."""

import json

import pytest
import torch
from datasets import Dataset

from first_trl import FirstDistillTrainer, add_teacher_topk, answer_pipeline
from first_trl.cache.choices import add_soft_labels
from first_trl.evaluation.multiple_choice import evaluate_multiple_choice
from first_trl.evaluation.whole_answers import evaluate_whole_answers
from first_trl.tasks import encode_prompts, tokenize_rows
from tests.support.families import CHAT, FAMILIES, family_tokenizer
from tests.support.tiny import tiny_config, tiny_llama


QUESTIONS = ["Which river?\nAnswer:", "Which river runs past the old mill?\nAnswer:"]
CHOICES = [" A", " B"]


class Recorder:
    """Keeps the ids that a model is given, without their padding."""

    def __init__(self, model):
        self.rows = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        self.rows += [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def prompts_of(family, tokenizer):
    """Prompts in every form the family knows: form -> (prompts, tools)."""
    tools = None if family.tools is None else [list(family.tools)] * len(QUESTIONS)
    if tokenizer.chat_template is None:
        return {"text": (QUESTIONS, None)}
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    options = {"tools": family.tools, "add_generation_prompt": True, "tokenize": False}
    arguments = family.arguments or (
        {"enable_thinking": False} if "enable_thinking" in tokenizer.chat_template else {}
    )
    rendered = [tokenizer.apply_chat_template(turn, **options, **arguments) for turn in turns]
    return {"messages": (turns, tools), "rendered": (rendered, None)}


def expected_ids(family, tokenizer, prompts):
    """What the tokenizer's own `apply_chat_template` gives, or the text with the begin token that it adds, once."""
    if tokenizer.chat_template is not None:
        text = prompts["rendered"][0]
        return [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in text]
    front = [tokenizer.bos_token_id] if family.tokenizer.get("front") else []
    return [front + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts["text"][0]]


MODE = "{% if mode is defined %}<|im_start|>{{ mode }}<|im_end|>\n{% endif %}" + CHAT


@pytest.mark.parametrize("as_text", [False, True])
def test_all_read_the_arguments_that_a_row_brings(as_text, tmp_path):
    """They go before those of all rows, wherever a conversation is read."""
    tokenizer = family_tokenizer(template=MODE)
    modes = [{"mode": "river"}, {"mode": "mill", "more": {"a": 1}}, None]
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "Which river?"}],
                "choices": ["A", "B"],
                "gold": 0,
                "chat_template_kwargs": json.dumps(mode) if as_text else mode,
            }
            for mode in modes
        ]
    )
    texts = [
        (f"<|im_start|>{mode}<|im_end|>\n" if mode else "") + "<|im_start|>user\nWhich river?<|im_end|>\n"
        "<|im_start|>assistant\n"
        for mode in ("river", "mill", "tool")
    ]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    options = {"chat_template_kwargs": {"mode": "tool"}, "disable_tqdm": True}
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
    cache = add_teacher_topk(rows, model, tokenizer, k=3, output_dir=tmp_path, **options)
    assert [ids[:-1] for ids in cache["input_ids"]] == expected
    for evaluate in (evaluate_multiple_choice, evaluate_whole_answers):
        read = Recorder(model)
        evaluate(model, tokenizer, rows, batch_size=1, **options)
        assert all(ids in read.rows or ids[:-1] in read.rows for ids in expected)
    read = Recorder(model)
    answer_pipeline(model, tokenizer=tokenizer, chat_template_kwargs={"mode": "tool"})(rows)
    assert read.rows == expected
    soft = add_soft_labels(rows.add_column("target_votes", [[1, 1]] * 3), tokenizer)
    assert [ids[:-1] for ids in soft["input_ids"][:2]] == expected[:2]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_read_the_same_ids(name, tmp_path):
    family = FAMILIES[name]
    tokenizer = family.make()
    choices = ["A", "B"] if family.tokenizer.get("sentencepiece") else CHOICES
    forms = prompts_of(family, tokenizer)
    expected = expected_ids(family, tokenizer, forms)
    for form, (prompts, tools) in forms.items():
        if family.tokenizer.get("sentencepiece"):
            # Here the space belongs to the prompt
            prompts, expected_here = [p + " (" for p in prompts], None
            expected_here = encode_prompts(tokenizer, prompts)
            assert [ids[0] for ids in expected_here] == [tokenizer.bos_token_id] * 2
            assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in expected_here)
        else:
            expected_here = expected
        columns = {"prompt": prompts} | ({} if tools is None else {"tools": tools})
        options = {"chat_template_kwargs": family.arguments or None}
        assert encode_prompts(tokenizer, prompts, tools=tools, **options) == expected_here
        for prompt, own, ids in zip(prompts, tools or [None] * 2, expected_here, strict=True):
            assert encode_prompts(tokenizer, [prompt], tools=[own], **options) == [ids]

        # The teacher: with an answer and without one
        completions = [[{"role": "assistant", "content": choice}] for choice in choices]
        if form != "messages":
            completions = choices
        teacher = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
        read = Recorder(teacher)
        answered = Dataset.from_dict(columns | {"completion": completions})
        open_rows = Dataset.from_dict(columns)
        caches = [
            add_teacher_topk(
                rows, teacher, tokenizer, k=3, output_dir=tmp_path / f"{form}{i}", disable_tqdm=True, **options
            )
            for i, rows in enumerate((answered, open_rows))
        ]
        for cache in caches:
            for row, ids in zip(cache, expected_here, strict=True):
                assert row["input_ids"][: len(ids)] == ids
                assert [label != -100 for label in row["labels"]].index(True) == len(ids)
                # Nothing is cut off, and no second end token follows
                assert row["input_ids"].count(tokenizer.eos_token_id) <= 1
        assert sorted(read.rows) == sorted([*caches[0]["input_ids"], *caches[1]["input_ids"]])

        # The student
        student = tiny_llama(1, vocab_size=len(tokenizer), max_position_embeddings=512)
        trainer = FirstDistillTrainer(
            student, tiny_config(tmp_path, max_steps=1), caches[0], processing_class=tokenizer
        )
        read = Recorder(trainer.model)
        trainer.train()
        # Before the first step, the head is compared with the model's logits on a few tokens
        assert sorted(read.rows[-2:]) == sorted(caches[0]["input_ids"])

        # Evaluation and inference, batched and single
        student = trainer.model
        rows = Dataset.from_dict(columns | {"choices": [choices] * 2, "gold": [0, 1]})
        for batch_size in (1, 2):
            read = Recorder(student)
            evaluate_multiple_choice(student, tokenizer, rows, batch_size=batch_size, disable_tqdm=True, **options)
            assert sorted(read.rows) == sorted(expected_here)
        read = Recorder(student)
        pipe = answer_pipeline(student, tokenizer=tokenizer, choices=choices, **options)
        pipe([{name: values[i] for name, values in columns.items()} for i in range(2)], batch_size=2)
        assert sorted(read.rows) == sorted(expected_here)
        if tools is None:
            read = Recorder(student)
            assert pipe(prompts[0])["choices"] is not None
            assert read.rows == expected_here[:1]
            pipe(list(prompts))
            assert read.rows[1:] == expected_here
        if form != "messages":
            tokenized = tokenize_rows(answered, tokenizer).dataset
            assert [
                row[: len(ids)] for row, ids in zip(tokenized["input_ids"], expected_here, strict=True)
            ] == expected_here
