"""Training steps on the fused head: the loss, its share of the step, and its statistics, for every trainer here."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..losses.head import SUMS, add_distill_head, check_distill_head, check_rows_apart


class FusedHeadMixin:
    """For a subclass of [`~trl.SFTTrainer`] whose loss is made inside the student's forward."""

    _train_sums: torch.Tensor | None = None
    _student_checked = False
    _first_step: int | None = None

    def add_fused_head(self: Any, estimator: str, ce_weight: float, chunk_size: int | None, **options: Any) -> None:
        """Patches the student, see [`add_distill_head`] for the `options`."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process with {self.args.n_gpu} GPUs cuts a batch of tokens and a list of targets at different places. "
                "Start one process a GPU with `accelerate launch`, or show it a single GPU with `CUDA_VISIBLE_DEVICES=0`."
            )
        base: PreTrainedModel = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_distill_head(base, estimator, ce_weight, chunk_size, **options)
        # The loss is a sum over `num_items_in_batch`, whatever the student's own forward accepts
        self.model_accepts_loss_kwargs = True
        self._tokens_since_log: Any = 0
        if is_deepspeed_zero3_enabled() and not any(hasattr(p, "ds_id") for p in base.parameters()):
            # Before DeepSpeed splits it
            embeddings: Any = base.get_input_embeddings()
            tokens = torch.arange(8, device=embeddings.weight.device) % len(embeddings.weight)
            self._check_student(base, tokens[None], fused=True)

    def check_student(self: Any, model: Any, input_ids: torch.Tensor, *, fused: bool) -> None:
        """At its first step: whether it computes what it is trained for."""
        if not self._student_checked and self._may_check():
            self._check_student(model, input_ids, fused=fused)

    def _check_student(self: Any, model: Any, input_ids: torch.Tensor, *, fused: bool) -> None:
        self._student_checked = True
        parameters = self.model.parameters()
        rounds = self.accelerator.mixed_precision != "no" or any(p.dtype != torch.float32 for p in parameters)
        tolerance = 3e-2 if rounds else 1e-3
        if fused:
            check_distill_head(model, input_ids[:1, :8], tolerance)
        if self.padding_free:
            check_rows_apart(model, input_ids[:1, :8], tolerance)

    def _may_check(self: Any) -> bool:
        """ZeRO-3 takes the order in which weights are used from the first forward, which must be one of training."""
        if not is_deepspeed_zero3_enabled():
            return True
        if self.model.training and self._first_step is None:
            self._first_step = self.state.global_step
        return self._first_step is not None and self.state.global_step > self._first_step

    def fused_loss(
        self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch with `teacher_ids` and the sums named in `SUMS`."""
        training = self.model.training
        self.check_student(model, inputs["input_ids"], fused=True)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs)
        sums = outputs.sums.detach()
        num_tokens = sums[SUMS.index("num_tokens")] if num_items_in_batch is None else num_items_in_batch
        if isinstance(num_tokens, torch.Tensor):
            loss = outputs.loss[0] / num_tokens.to(outputs.loss.device).clamp(min=1)
        else:
            loss = outputs.loss[0] / max(num_tokens, 1)
        # `num_items_in_batch` counts the tokens of every rank, and DDP averages the gradients across ranks
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            # A mean over the batch: it belongs to training, and what is held out is a mean over tokens
            if training:
                steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
            self.add_aux_loss(outputs.aux_loss)
        if training:
            # Kept on the device and reduced when logs are due: a host read per step would stall the GPU
            self._train_sums = sums if self._train_sums is None else self._train_sums + sums
            mask = inputs.get("attention_mask")
            self._tokens_since_log = self._tokens_since_log + (
                mask.sum() if mask is not None else inputs["position_ids"].numel()
            )
        return loss, sums

    def train_means(self: Any, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of training steps, from the sums over all processes since the last log."""
        count = max(sums["num_tokens"], 1.0)
        return {"entropy": sums["student_entropy"] / count, "mean_token_accuracy": sums["num_correct"] / count}

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        sums = self._train_sums
        if self.model.training and sums is not None:
            self._train_sums = None
            totals = self.accelerator.reduce(sums, reduction="sum").tolist()
            logs.update(self.train_means(dict(zip(SUMS, totals, strict=True))))
            tokens = torch.as_tensor(self._tokens_since_log, device=sums.device)
            tokens = self.accelerator.reduce(tokens, reduction="sum").item()
            self._total_train_tokens += int(tokens) // self.get_tp_size()
            self._tokens_since_log = 0
            logs["num_tokens"] = float(self._total_train_tokens)
            self.report_aux_loss("train")
        super().log(logs, start_time)  # type: ignore[misc]


def head_size(model: Any) -> int:
    """Rows of a model's head."""
    weight = model.get_output_embeddings().weight
    # Under ZeRO-3 a sharded parameter has shape (0,) and keeps its real one beside it
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def refuse_resized(model: Any, peft_config: Any) -> None:
    """
    Raises `ValueError` for an adapter on a model whose embeddings were resized after it was loaded: the adapter names
    that model as its base, and would not load on it again.
    """
    if isinstance(model, str):
        return  # loaded by the trainer, and resized by no one since
    base = model.get_base_model() if is_peft_model(model) else model
    name = str(getattr(getattr(base, "config", None), "name_or_path", "") or "")
    if (peft_config is None and not is_peft_model(model)) or not name:
        return
    try:
        stored = AutoConfig.from_pretrained(name, local_files_only=True).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):
        return  # nothing to compare with
    weight = base.get_input_embeddings().weight
    rows = int(getattr(weight, "ds_shape", weight.shape)[0])
    if rows != stored and base.config.get_text_config().vocab_size != stored:
        raise ValueError(
            f"The embeddings of the student have {rows} rows, and those of {name}, which an adapter would be loaded on "
            f"again, have {stored}. Save the resized model with `save_pretrained`, load it from there, and train the "
            "adapter on that; or train without an adapter."
        )
