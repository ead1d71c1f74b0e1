"""Tiny models whose tokenizer has a token a word, in a folder, for recipes on questions of one's own."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_llama


def save_word_model(folder: Path, words: Sequence[str], seed: int = 0) -> Path:
    """A model that reads these words, each with and without a space before it; other texts are split nowhere."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *words, *[f" {word}" for word in words]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=r" ", behavior="merged_with_next")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    tiny_llama(seed, vocab_size=len(vocabulary), max_position_embeddings=128).save_pretrained(folder)
    return folder
