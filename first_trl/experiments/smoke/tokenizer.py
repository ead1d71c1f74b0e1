"""A byte-level tokenizer trained on the rows of a smoke run."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ...tasks.mmlu_field import ANSWERS as FIELDS
from ...tasks.multiple_choice import LETTERS
from .rows import DATA


_SPECIAL = ["<pad>", "<bos>", "<eos>"]
# Behind a space these have to be one token, as in the tokenizers of real models
_WORDS = ["yes", "no", "Yes", "No", "true", "false", "True", "False", *(field.strip() for field in FIELDS)]
_ANSWERS = [*LETTERS, *"0123456789", *_WORDS]
_VOCABULARY = 660


def smoke_tokenizer(folder: Path) -> Path:
    """
    Train the tokenizer into `folder`, or keep the one that is there.

    Reads any text. The answers `" A"` to `" Z"`, `" yes"` and `" no"` are single tokens, and so is a bare letter behind a
    bracket. It puts `<bos>` in front.

    Args:
        folder (`Path`):
            Where to.

    Returns:
        `Path`: `folder`.
    """
    # A run is continued only with the very files it was started with
    if (folder / "tokenizer_config.json").is_file():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", _SPECIAL.index("<bos>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder


def _texts() -> Iterable[str]:
    # Merges are learned by frequency: often enough, and the answers come before the words of the rows
    for answer in _ANSWERS:
        yield from [f" {answer}"] * 1000
    for file in sorted(DATA.rglob("*.*")):
        yield file.read_text(encoding="utf-8")
