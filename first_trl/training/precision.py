"""
Precision of training: trainable weights are float32 master weights, whatever the model was loaded in.

An optimizer step is about as large as the learning rate. bfloat16 has 8 significant bits: next to a weight of 0.02 the
following number is 1e-4 away, next to a norm weight of 1 it is 8e-3 away, and a step of 1e-5 is rounded to nothing.
Products still run in 16 bits under autocast (`bf16=True`), and frozen weights (the base of an adapter) stay as they
are. DeepSpeed keeps float32 masters of its own. Weights stay in 16 bits only with an optimizer that is made for them
(`BIT16_OPTIMIZERS`), which carries what was rounded away to the next step, or with an optimizer object of one's own.
"""

import warnings
from typing import Any

import torch
from accelerate.logging import get_logger
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback


logger = get_logger(__name__)

# Keep the rounding error of 16-bit weights: Kahan summation
BIT16_OPTIMIZERS = ("adamw_anyprecision", "stable_adamw")
_BIT16 = (torch.float16, torch.bfloat16)


def cast_to_master_weights(
    model: torch.nn.Module, optimizer: str | None, *, autocast: bool = False, deepspeed: bool = False
) -> int:
    """
    Casts the trainable 16-bit weights of a model to float32, in place, unless something else keeps what would be
    rounded away. Frozen weights stay in 16 bits, unless they would meet float32 ones without autocast.

    Args:
        model (`torch.nn.Module`):
            Model, with its adapters.
        optimizer (`str`, *optional*):
            Name of the optimizer, as in `TrainingArguments.optim`; `None` for an object that the user made.
        autocast (`bool`, *optional*, defaults to `False`):
            Whether it is trained under autocast.
        deepspeed (`bool`, *optional*, defaults to `False`):
            Whether DeepSpeed trains the model, with master weights of its own.

    Returns:
        `int`: Number of trainable weights that were cast.
    """
    if deepspeed or optimizer is None or optimizer in BIT16_OPTIMIZERS:
        return 0
    trainable = {id(p): p for p in model.parameters() if p.requires_grad and p.dtype in _BIT16}
    # Adapters cast what they are given to their own type, all but a norm that is trained in place of the model's own
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, LNTuningLayer)]
    adapters = {id(p) for layer in layers for p in layer.parameters()}
    if not autocast and not trainable.keys() <= adapters:
        for parameter in model.parameters():
            if parameter.dtype in _BIT16:
                parameter.data = parameter.data.float()
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    return sum(parameter.numel() for parameter in trainable.values())


def restore_frequencies(model: torch.nn.Module) -> int:
    """
    Makes the rotary frequencies of a model again that a cast of the whole model (`model.bfloat16()`) rounded, in place:
    they are stored nowhere, so that the trained model would be loaded with others. At position 1,000 angles are off by up
    to two radians.

    Args:
        model (`torch.nn.Module`):
            Model, with its adapters.

    Returns:
        `int`: Number of modules whose frequencies were rounded.
    """
    count = 0
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        rounded = [name for name, buffer in own.items() if name.endswith("inv_freq") and buffer.dtype in _BIT16]
        config: Any = getattr(module, "config", None)
        if rounded and config is not None:
            exact = dict(type(module)(config).named_buffers(recurse=False))
            for name in rounded:
                setattr(module, name, exact[name].to(own[name].device))
            count += 1
    return count


class MasterWeightsMixin:
    """
    Float32 master weights, and a warning where updates are rounded away, for a subclass of [`~trl.SFTTrainer`].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        own_optimizer = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
        optimizer = None if own_optimizer else str(getattr(trainer.args.optim, "value", trainer.args.optim))
        deepspeed = bool(trainer.is_deepspeed_enabled)
        autocast = trainer.accelerator.mixed_precision != "no"
        if restore_frequencies(trainer.model):
            logger.warning_once(
                "A cast of the student had rounded its rotary frequencies, which are stored nowhere; it is trained with the "
                "exact ones that it is loaded with. `from_pretrained(..., dtype=...)` does not round them."
            )
        count = cast_to_master_weights(trainer.model, optimizer, autocast=autocast, deepspeed=deepspeed)
        if count:
            logger.warning_once(
                f"{count} trainable weights were loaded in 16 bits and are trained in float32: updates of the size of "
                "the learning rate would be rounded away otherwise. `bf16=True` keeps the products in 16 bits."
            )
        if not deepspeed and optimizer not in BIT16_OPTIMIZERS:
            trainer.add_callback(RoundedUpdatesCallback())


class RoundedUpdatesCallback(TrainerCallback):
    """
    Warns when the first optimizer steps leave most weights as they were. Of a sample of the weights, it counts those
    that a step changed among those whose gradient is not negligible.

    Args:
        steps (`int`, *optional*, defaults to `8`):
            Optimizer steps that are looked at.
        threshold (`float`, *optional*, defaults to `0.5`):
            Smallest share of changed weights a step that is no reason to warn.
    """

    _PER_TENSOR = 256
    # Adam moves a weight by about the learning rate, unless its gradient is far below the usual
    _NEGLIGIBLE = 1e-2

    def __init__(self, steps: int = 8, threshold: float = 0.5) -> None:
        self.steps = steps
        self.threshold = threshold
        self._left = steps
        self._before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._changed: Any = 0
        self._looked_at: Any = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._left, self._before, self._changed, self._looked_at = self.steps, [], 0, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = []
        optimizer = kwargs.get("optimizer")
        rates = [group["lr"] for group in optimizer.param_groups] if optimizer is not None else []
        # A warm-up starts at a rate of 0
        if self._left <= 0 or model is None or not any(float(rate) > 0 for rate in rates):
            return
        for parameter in model.parameters():
            if parameter.grad is None:
                continue
            weights, gradient = _local(parameter.detach()), _local(parameter.grad).reshape(-1)
            if weights.numel() == 0:
                continue
            stride = max(weights.numel() // self._PER_TENSOR, 1)
            sample = weights.reshape(-1)[::stride].clone()
            size = gradient[::stride].abs()
            self._before.append((weights, sample, size > self._NEGLIGIBLE * size.max()))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before, self._before = self._before, []
        # A scaler leaves a step out when float16 gradients overflow
        if not before or getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            return
        for weights, sample, counts in before:
            stride = max(weights.numel() // self._PER_TENSOR, 1)
            # Kept on the device: the host reads them once
            self._changed = self._changed + ((weights.reshape(-1)[::stride] != sample) & counts).sum()
            self._looked_at = self._looked_at + counts.sum()
        self._left -= 1
        if self._left == 0:
            self._warn(kwargs.get("optimizer"), {weights.dtype for weights, _, _ in before})

    def _warn(self, optimizer: Any, dtypes: set[torch.dtype]) -> None:
        share = float(self._changed) / max(float(self._looked_at), 1.0)
        if share >= self.threshold or float(self._looked_at) == 0:
            return
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        warnings.warn(
            f"An optimizer step changes {share:.1%} of the trained weights: at a learning rate of {rate:g} the updates "
            f"are smaller than the spacing of {names} numbers and are rounded away. Train float32 weights with "
            f"`bf16=True`, use an optimizer for 16-bit weights (`optim='{BIT16_OPTIMIZERS[0]}'`), or raise the rate.",
            stacklevel=2,
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that is spread over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
