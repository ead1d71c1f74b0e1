"""
Held-out means over tokens: the same at any batch size, number of processes and batch layout.

[`~transformers.Trainer`] averages the means of batches, in which a token of a batch with few labels weighs more, and
with several processes the last batch is filled up with rows that were scored already.
"""

import copy
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, SequentialSampler

from .._trl_compat import get_dataset_column_names
from ..cache.schema import LABELS
from ..vocabulary import IGNORE_INDEX


# Sums over an evaluation on labels alone, in this order
PLAIN_SUMS = ("loss", "entropy", "mean_token_accuracy", "num_labels")


class TokenMeansMixin:
    """
    For a subclass of [`~trl.SFTTrainer`]: `evaluate` and `predict` report means over all labels of the data set.
    `eval_loss` is their negative log-likelihood, whatever smoothing or auxiliary loss a model is trained with.
    """

    # Names and sums of the evaluation that is going on
    _held_out: tuple[tuple[str, ...], torch.Tensor] | None = None
    # Sum over the batches since the last report, and their number, by mode
    _aux_losses: Mapping[str, tuple[torch.Tensor, int]] = MappingProxyType({})

    def add_held_out(self, names: tuple[str, ...], sums: torch.Tensor) -> None:
        """Adds the sums of a batch, the last of them its number of labels. They stay on the device."""
        wide = sums if sums.device.type == "mps" else sums.double()
        self._held_out = (names, wide if self._held_out is None else self._held_out[1] + wide)

    def add_aux_loss(self: Any, value: torch.Tensor) -> None:
        """Adds the auxiliary loss of a batch. It stays on the device, and processes do not wait for each other."""
        mode = "train" if self.model.training else "eval"
        total, count = self._aux_losses.get(mode, (0.0, 0))
        self._aux_losses = {**self._aux_losses, mode: (total + value.detach().float(), count + 1)}

    def report_aux_loss(self: Any, mode: str) -> None:
        """Moves the mean over batches and processes to the metrics."""
        if mode in self._aux_losses:
            total, count = self._aux_losses[mode]
            self._aux_losses = {name: kept for name, kept in self._aux_losses.items() if name != mode}
            self._metrics[mode]["aux_loss"] = [self.accelerator.reduce(total / count, reduction="mean").item()]

    def held_out_means(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics, without a prefix, from the sums over all processes."""
        count = max(sums["num_labels"], 1.0)
        return {name: sums[name] / count for name in PLAIN_SUMS[:-1]}

    def evaluation_loop(self: Any, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        # What an interrupted evaluation left behind
        self._held_out = None
        self._metrics["eval"].clear()
        self._aux_losses = {name: kept for name, kept in self._aux_losses.items() if name != "eval"}
        output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
        if self._held_out is not None:
            names, sums = self._held_out
            totals = self.accelerator.reduce(sums, reduction="sum").tolist()
            means = self.held_out_means(dict(zip(names, totals, strict=True)))
            self.report_aux_loss("eval")
            means |= {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
            self._held_out = None
            self._metrics["eval"].clear()
        return output

    def predict(
        self: Any, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> Any:
        if not self._skip_prepare_dataset:
            # As `evaluate` does it, with predictions in the order of the rows
            args = copy.copy(self.args)
            args.shuffle_dataset = False
            packing = args.packing if args.eval_packing is None else args.eval_packing
            test_dataset = self._prepare_dataset(
                test_dataset, self.processing_class, args, packing, self._formatting_func, "test"
            )
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        parallelism = self.accelerator.parallelism_config
        split_rows = parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)
        if self.model.training or "labels" not in inputs or self.compute_loss_func is not None or split_rows:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        inputs["use_cache"] = False
        # TRL knows the number of experts by one name only
        routed = self.aux_loss_enabled and hasattr(self.model.config.get_text_config(), "num_experts")
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = routed
        outputs = model(**inputs, fused_lm_head=True)
        count = outputs.label_mask.sum()
        sums = (-outputs.log_probs.sum(), outputs.entropy.sum(), outputs.is_top1.sum(), count)
        self.add_held_out(PLAIN_SUMS, torch.stack([value.detach().float() for value in sums]))
        if routed:
            self.add_aux_loss(outputs.aux_loss)
        self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]
        loss = sums[0] / count.clamp(min=1)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def _get_dataloader(self: Any, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        training = kwargs.get("is_training", len(args) > 1 and args[1])
        ranks = self.accelerator.num_processes // self.get_tp_size()
        if ranks > 1 and isinstance(dataset, IterableDataset):
            # Otherwise one process collates for all and cuts the batch, away from its teacher entries
            self.accelerator.dataloader_config.dispatch_batches = False
        if not training and ranks > 1 and LABELS in get_dataset_column_names(dataset):
            if isinstance(dataset, IterableDataset):
                dataset = _BlankEndStream(dataset, batch_size * ranks)
            else:
                dataset = _BlankEndRows(self._remove_unused_columns(dataset, description), batch_size * ranks)
        drop_last = self.args.dataloader_drop_last
        # For steps of one size; what is held out has no steps, and would lose rows
        self.args.dataloader_drop_last = drop_last and training
        try:
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_eval_sampler(self: Any, eval_dataset: Any) -> Any:
        # Rows sorted by length would put blank rows between the others
        if isinstance(eval_dataset, _BlankEndRows):
            return SequentialSampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]


def blank_row(row: dict[str, Any]) -> dict[str, Any]:
    """The same tokens without a label and without a teacher entry: it is read and adds nothing to a sum."""
    blank = {name: value[:0] if name.startswith("teacher_") else value for name, value in row.items()}
    return {**blank, LABELS: [IGNORE_INDEX] * len(row[LABELS])}


class _BlankEndRows(Dataset):
    """Rows and as many blank ones as fill up the last batch of all processes."""

    def __init__(self, rows: Any, multiple: int) -> None:
        self.rows = rows
        self.length = len(rows) + -len(rows) % multiple
        # `gather_for_metrics` cuts what it gathers down to this
        self.total_dataset_length = len(rows)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        count = self.total_dataset_length
        real = self.rows.__getitems__([index for index in indices if index < count])
        return [*real, *(blank_row(self.rows[0]) for index in indices if index >= count)]


class _BlankEndStream(IterableDataset):
    """The same for a stream; with workers, each of them fills up its own part."""

    def __init__(self, rows: Any, multiple: int) -> None:
        self.rows = rows
        self.multiple = multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, row = 0, None
        for row in self.rows:
            count += 1
            yield row
        for _ in range(-count % self.multiple):
            assert row is not None
            yield blank_row(row)
