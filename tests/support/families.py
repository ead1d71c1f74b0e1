"""Families of tokenizers and chat templates, built in code: what stands in front, behind and between."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


TEXTS = [
    "Which river runs past the old mill?\nAnswer Choices:\n(A) Tarn\n(B) Lune\nAnswer: A B C D",
    "user assistant system tool think Name the metal that is liquid. mercury iron",
    " A B C D" * 5,
]
SPECIAL = ["<|pad|>", "<|end|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last "
    "and '<think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false "
    "%}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
# Opens a thinking block, always
REASONER = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}" + CHAT
)
PLAIN = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}### assistant:{% endif %}"


def family_tokenizer(
    *,
    sentencepiece: bool = False,
    front: bool = False,
    behind: bool = False,
    template: str | None = None,
    pad: str = "<|pad|>",
) -> PreTrainedTokenizerFast:
    """
    A BPE tokenizer in which " A" (byte-level) or "▁A" is one token.

    Args:
        sentencepiece (`bool`): Spaces as "▁", one in front of every text, as Llama 2 does.
        front (`bool`), behind (`bool`): Whether a begin or an end token is put around every text.
        template (`str`, *optional*): The chat template.
        pad (`str`): The padding token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if sentencepiece else None, fuse_unk=sentencepiece))
    alphabet: list[str] = []
    if sentencepiece:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL, "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    parts = [*(["<|begin|>"] if front else []), "$A", *(["<|end|>"] if behind else [])]
    if len(parts) > 1:
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<|begin|>", "<|end|>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=ids)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token="<|end|>", bos_token="<|begin|>" if front else None
    )
    made.chat_template = template
    return made


@dataclass(frozen=True)
class Family:
    """A tokenizer with its template, and the arguments and tools that its conversations come with."""

    tokenizer: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    tools: Sequence[Any] | None = None

    def make(self) -> PreTrainedTokenizerFast:
        return family_tokenizer(**self.tokenizer)


TOOL = {
    "type": "function",
    "function": {"name": "river", "parameters": {"type": "object", "properties": {"mill": {"type": "string"}}}},
}
FAMILIES = {
    "byte-level": Family({}),
    "sentencepiece-like": Family({"sentencepiece": True, "front": True}),
    "begin token": Family({"front": True}),
    "end token": Family({"behind": True}),
    "both": Family({"front": True, "behind": True}),
    "padded with its end token": Family({"front": True, "pad": "<|end|>"}),
    "chat": Family({"template": CHAT}),
    "chat, begin token in tokenizer and template": Family({"front": True, "template": "{{ bos_token }}" + CHAT}),
    "chat, begin token in the tokenizer alone": Family({"front": True, "template": CHAT}),
    "chat, end token": Family({"behind": True, "template": CHAT}),
    "chat without special tokens": Family({"front": True, "behind": True, "template": PLAIN}),
    "generation marks": Family({"front": True, "template": "{{ bos_token }}" + MARKED}),
    "thinking": Family({"template": THINKING}),
    "thinking, turned off": Family({"template": THINKING}, {"enable_thinking": False}),
    "tools": Family({"front": True, "template": "{{ bos_token }}" + TOOLS}, tools=[TOOL]),
}
