"""Whether a student will be asked with the text that it is trained on."""

import warnings
from collections.abc import Sequence
from typing import Any

from ..cache.manifest import Manifest, chat_template_hash
from ..tasks.conversation import template_starts
from ..tasks.encode import front_tokens


def check_served_text(rows: Sequence[Sequence[int]], manifests: Sequence[Manifest], processing_class: Any) -> None:
    """
    Compare how rows of a cache begin with what the student's tokenizer puts in front of a text, and the chat templates.

    Args:
        rows (`Sequence[Sequence[int]]`): Ids of some rows of the cache.
        manifests (`Sequence[Manifest]`): Manifests of the cache, where it carries any.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The student's tokenizer, with which it is saved.

    Raises:
        `ValueError`: The teacher's tokenizer put other special tokens in front of the rows than the student's would.

    Warns:
        When rows begin otherwise than the same tokenizer would make them begin, or the chat templates differ.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    front = front_tokens(tokenizer)
    own = list(tokenizer.convert_ids_to_tokens(front))
    starts = [tokenizer(start, add_special_tokens=False)["input_ids"] for start in template_starts(tokenizer)]
    for entry in [manifest.tokenizer for manifest in manifests] or [{}]:
        from_template, names = entry.get("from_template"), entry.get("front")
        template_differs = entry.get("chat_template") != chat_template_hash(processing_class)
        asked = from_template or (from_template is None and getattr(tokenizer, "chat_template", None) is not None)
        if asked and template_differs and entry.get("chat_template") is not None:
            warnings.warn(
                "The student's chat template is not the one that the teacher's tokenizer had at the capture: asked "
                "with a conversation, the student may read another text than it was trained on. Give the student's "
                "tokenizer that template, `student_tokenizer.chat_template = teacher_tokenizer.chat_template`."
            )
        if from_template is True:
            continue
        # What the student's template writes is the same, whatever a tokenizer would put in front of a bare text
        plain = [row for row in rows if from_template is False or not any(s and _begins(row, s) for s in starts)]
        bare = [row for row in plain if not _begins(row, front)]
        if names is not None and names != own:
            expected = tokenizer.convert_tokens_to_ids(names) if names else []
            if bare or (expected and any(_begins(row, expected) for row in plain)):
                raise ValueError(
                    f"The teacher's tokenizer put {''.join(names) or _NOTHING} in front of a text, and the student's puts "
                    f"{''.join(own) or _NOTHING}: the student would be asked with another text than it is trained on. Give "
                    "the student the teacher's tokenizer (its post-processor adds these tokens), or capture a cache with "
                    "this tokenizer."
                )
        elif bare or (not front and tokenizer.bos_token_id is not None and _all_begin(plain, tokenizer.bos_token_id)):
            warnings.warn(
                f"{len(bare or plain)} of {len(rows)} rows looked at {'do not ' if bare else ''}begin with "
                f"{''.join(own) if bare else tokenizer.bos_token}, which the tokenizer {'puts' if bare else 'does not put'} "
                "in front of a text: asked with a text, the student reads another one than it is trained on. Tokenise the "
                "rows as the student's tokenizer does, and cut them at the end."
            )


_NOTHING = "no special token"


def _all_begin(rows: Sequence[Sequence[int]], token: int) -> bool:
    return bool(rows) and all(_begins(row, [token]) for row in rows)


def _begins(row: Sequence[int], start: Sequence[int]) -> bool:
    return list(row[: len(start)]) == list(start)
