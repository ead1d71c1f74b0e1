"""
Token dropout: in training, some tokens of the input are replaced by one neutral token, while the targets stay.

The student then has to say what the teacher said of the whole text from a part of it, so that it cannot rest on
memorised combinations of tokens. The technique is word dropout, known from deep averaging networks (Iyyer et al.,
2015), from the decoder of a text VAE (Bowman et al., 2016) and, with whole embeddings set to zero, from variational
dropout (Gal & Ghahramani, 2016).
"""

from typing import Any

import numpy as np
import torch

from ..vocabulary import IGNORE_INDEX
from .options import TrainerOptions, check_options


def drop_tokens(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    rate: float,
    replacement: int,
    special_ids: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """
    Replace each token independently with probability `rate`. Padding, special tokens and tokens that are labels
    themselves stay: the latter are what the model is taught to write.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq_len)`, int64):
            Tokens; not changed in place.
        labels (`torch.Tensor` of shape `(batch, seq_len)`, int64):
            Labels, -100 where unsupervised.
        attention_mask (`torch.Tensor` of shape `(batch, seq_len)`, *optional*):
            0 at padding; `None` where rows are flattened into one.
        rate (`float`):
            Probability of each token, in [0, 1).
        replacement (`int`):
            Token put in place.
        special_ids (`torch.Tensor` of shape `(S,)`, int64):
            Tokens that are never replaced.
        generator (`torch.Generator`):
            Source of the draws, on the CPU: they are the same on every device.

    Returns:
        `torch.Tensor` of shape `(batch, seq_len)`: the tokens the model reads.
    """
    drawn = torch.rand(input_ids.shape, generator=generator) < rate
    if input_ids.device.type == "cuda":
        drawn = drawn.pin_memory()  # a copy from other memory would wait for the device
    drawn = drawn.to(input_ids.device, non_blocking=True)
    # Not `torch.isin`, which sorts long lists and waits for the length of the result
    keep = (labels != IGNORE_INDEX) | (input_ids[..., None] == special_ids).any(-1)
    if attention_mask is not None:
        keep |= attention_mask == 0
    return input_ids.masked_fill(drawn & ~keep, replacement)


def replacement_token(processing_class: Any, token_id: int | None = None) -> int:
    """
    The token put in place of dropped ones: `token_id`, else the first that the tokenizer has of unknown, mask, padding
    and end-of-sequence token.

    Raises:
        `ValueError`: The id is outside the vocabulary, or the tokenizer has none of these tokens.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if token_id is not None:
        if not 0 <= token_id < len(tokenizer):
            raise ValueError(
                f"`token_dropout_id={token_id}` is no id of the vocabulary of {len(tokenizer)} tokens. Choose one in "
                "it, or leave it unset."
            )
        return token_id
    for name in ("unk", "mask", "pad", "eos"):
        default = getattr(tokenizer, f"{name}_token_id", None)
        if default is not None:
            return int(default)
    raise ValueError(
        "The tokenizer has no unknown, mask, padding or end-of-sequence token to put in place of dropped ones. Name a "
        "token with `token_dropout_id`."
    )


class TokenDropoutMixin:
    """
    Token dropout for a subclass of [`~trl.SFTTrainer`], in training steps only. The draws depend on `args.seed`, the
    optimizer step, the batch within it and the data-parallel rank: a resumed run makes those of an uninterrupted one.
    """

    _token_dropout = 0.0
    _dropout_batch = (-1, 0)

    def set_token_dropout(self: Any, rate: float, token_id: int | None = None) -> None:
        """
        Args:
            rate (`float`): Probability of each token, in [0, 1); 0 leaves training as it is.
            token_id (`int`, *optional*): Token put in place, see [`replacement_token`].
        """
        check_options(TrainerOptions(token_dropout=rate, token_dropout_id=token_id))
        self._token_dropout = rate
        if rate > 0:
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            self._replacement = replacement_token(tokenizer, token_id)
            special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
            self._special_ids = special.to(self.args.device)

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._token_dropout > 0:
            inputs = {
                **inputs,
                "input_ids": drop_tokens(
                    inputs["input_ids"],
                    inputs["labels"],
                    inputs.get("attention_mask"),
                    rate=self._token_dropout,
                    replacement=self._replacement,
                    special_ids=self._special_ids,
                    generator=self._dropout_generator(),
                ),
            }
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _dropout_generator(self: Any) -> torch.Generator:
        step = self.state.global_step
        before, number = self._dropout_batch
        self._dropout_batch = (step, number + 1 if step == before else 0)
        # Ranks of a tensor-parallel group hold parts of one model and read the same tokens
        rank = self.accelerator.process_index // self.get_tp_size()
        entropy = np.random.SeedSequence([self.args.seed, *self._dropout_batch, rank])
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
