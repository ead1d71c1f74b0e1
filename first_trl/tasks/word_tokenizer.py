"""A word-level tokenizer over a closed vocabulary, for tasks that generate their own text."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    Builds a tokenizer with one token per word of `words`, in that order after `<pad>`, `<bos>` and `<eos>`.

    Words are separated by white space, `<bos>` is put first. There is no `<unk>`: the vocabulary is closed, and a word
    outside it is an error rather than a token that means nothing.

    Args:
        words (`Sequence[str]`): Distinct words without white space.

    Raises:
        `ValueError`: when a word repeats or holds white space.
    """
    vocabulary = [*SPECIAL_TOKENS, *words]
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError("The words of a vocabulary must be distinct.")
    if any(word.split() != [word] for word in words):
        raise ValueError("The words of a vocabulary must be non-empty and without white space.")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
