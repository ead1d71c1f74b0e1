"""A word-level tokenizer, for tasks that bring their own vocabulary."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def word_tokenizer(words: Sequence[str], *, unknown: str | None = None) -> PreTrainedTokenizerFast:
    """
    Builds a tokenizer with one token per word of `words`, in that order after `<pad>`, `<bos>` and `<eos>`.

    Words are separated by white space, `<bos>` is put first. By default the vocabulary is closed: a word outside it is
    an error rather than a token that means nothing.

    Args:
        words (`Sequence[str]`): Distinct words without white space.
        unknown (`str`, *optional*): One of `words` that stands for all words outside the vocabulary, as `"<unk>"`.

    Raises:
        `ValueError`: when a word repeats or holds white space, or `unknown` is not one of them.
    """
    vocabulary = [*SPECIAL_TOKENS, *words]
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError("The words of a vocabulary must be distinct.")
    if any(word.split() != [word] for word in words):
        raise ValueError("The words of a vocabulary must be non-empty and without white space.")
    if unknown is not None and unknown not in words:
        raise ValueError(f"`unknown` is {unknown!r}, which is not one of the words.")
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids) if unknown is None else models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )
