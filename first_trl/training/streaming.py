"""Verification of a cache that is read as a stream: there is no pass before training, so each batch is checked."""

from typing import Any

import pyarrow as pa
from datasets import IterableDataset

from .._trl_compat import get_dataset_column_names
from ..cache.manifest import Manifest, read_manifest, tokenizer_fingerprint
from ..cache.schema import CacheBatch
from ..cache.verify import RowStatistics, check_batch, check_columns


class StreamVerifier:
    """Checks rows as they pass. Within a process, k must not change from one batch to the next."""

    def __init__(self, manifest: Manifest | None, fingerprint: str, head_size: int | None) -> None:
        self.manifest = manifest
        self.fingerprint = fingerprint
        self.head_size = head_size
        self.found = RowStatistics()
        if manifest is not None:
            self.found.k, self.found.num_draws = manifest.k, manifest.num_draws

    def __call__(self, table: pa.Table, indices: list[int]) -> pa.Table:
        # Messages number the rows by their place in the stream, whichever worker reads them
        self.found.rows = indices[0]
        check_batch(CacheBatch.from_arrow(table), self.found, self.manifest, self.fingerprint, self.head_size)
        return table


def verify_stream(dataset: IterableDataset, processing_class: Any, head_size: int | None) -> IterableDataset:
    """
    The same rows, each checked like [`verify_teacher_cache`] does when it is read.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            Streamed cache.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        head_size (`int`, *optional*):
            Rows of the student's output head.

    Raises:
        `ValueError`: A column is missing; on iteration, what [`verify_teacher_cache`] raises.
    """
    check_columns(get_dataset_column_names(dataset))
    verifier = StreamVerifier(read_manifest(dataset), tokenizer_fingerprint(processing_class), head_size)
    return dataset.with_format("arrow").map(verifier, batched=True, with_indices=True)
