"""A dataset as one config of a Hub repository: shards and card in one commit."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from datasets.features.features import require_decoding
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from .commit import Tree, commit_once, open_repo, tag_commit, upload_content
from .dataset_card import estimate_bytes, merge_dataset_card
from .session import DEFAULT_RETRY_POLICY, HubSession, RetryPolicy


_CARD = "README.md"
# Uncompressed. Readers hold whole row groups, streaming ones wait for the first.
_ROW_GROUP_BYTES = 32_000_000


def push_dataset(
    dataset: Dataset | DatasetDict,
    repo_id: str,
    *,
    config_name: str = "default",
    split: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    extra_files: Mapping[str, bytes | str | Path] | None = None,
    max_shard_size: int = 500_000_000,
    parquet_writer_kwargs: Mapping[str, Any] | None = None,
    token: str | None = None,
    retry_policy: RetryPolicy = DEFAULT_RETRY_POLICY,
) -> str:
    """Push a dataset as Parquet shards, its card and further files in one commit.

    A [`~datasets.Dataset`] replaces one split of the config, a [`~datasets.DatasetDict`] the whole config; other
    configs stay, in the files and in the card's metadata, also when several writers push at the same time. Unlike
    [`datasets.Dataset.push_to_hub`], the commit survives server errors and lost answers without being made twice. An
    unchanged dataset makes no commit. Load what was pushed with
    `load_dataset(repo_id, config_name, revision=<the returned commit>)`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]):
            What to push. Columns that hold files (images, audio) are refused.
        repo_id (`str`):
            `"namespace/name"`; created if it does not exist.
        config_name (`str`, defaults to `"default"`):
            Config (subset) of the dataset repository.
        split (`str`, *optional*):
            Name of the split of a [`~datasets.Dataset`]; defaults to its own, else `"train"`.
        private (`bool`, *optional*):
            Visibility of a repository that is created. `True` for a repository that exists and is public is an error.
        revision (`str`, *optional*):
            Branch to push to, created from `main` if it does not exist.
        tag (`str`, *optional*):
            Tag to set on the commit.
        commit_message (`str`, *optional*):
            First line of the commit.
        extra_files (`dict[str, bytes | str | Path]`, *optional*):
            Path in the repository -> content (`bytes`) or local file, sent in the same commit. A `README.md` becomes
            the card; `configs` and `dataset_info` of its metadata are filled in.
        max_shard_size (`int`, defaults to `500_000_000`):
            Bytes of one shard, before compression.
        parquet_writer_kwargs (`dict`, *optional*):
            Passed to [`pyarrow.parquet.ParquetWriter`], e.g. `{"compression": "snappy"}`; the default is `"zstd"`.
        token (`str`, *optional*):
            Hub token; defaults to the one of `hf auth login` or `HF_TOKEN`.
        retry_policy ([`RetryPolicy`], *optional*):
            Bounds of the retries of each step.

    Returns:
        `str`: The commit that holds the dataset.

    Raises:
        `ValueError`: Something the caller can mend: token, permissions, names, features that do not fit the config.
        `RuntimeError`: The Hub did not manage within the bounds.
    """
    splits = _splits(dataset, split)
    if not re.fullmatch(r"[\w.-]+", config_name) or config_name == "data":
        raise ValueError(f"config_name is {config_name!r}; use letters, digits, '_', '-' and '.', and not 'data'.")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}; give the bytes of one shard, at least 1.")
    data_dir = "data" if config_name == "default" else config_name
    extra = _contents(extra_files or {}, data_dir)
    session = HubSession(repo_id, "dataset", token, retry_policy, write=True)
    branch = open_repo(session, private, revision)
    shards = [
        shard
        for name, part in splits.items()
        for shard in _upload_shards(session, branch, part, f"{data_dir}/{name}", max_shard_size, parquet_writer_kwargs)
    ]
    paths = {shard.path_in_repo for shard in shards}
    replaced = f"{data_dir}/" if isinstance(dataset, DatasetDict) else f"{data_dir}/{next(iter(splits))}-"

    def card_and_deletions(head: str, tree: Tree) -> list[CommitOperationAdd | CommitOperationDelete]:
        old = {path for path in tree if re.fullmatch(rf"{re.escape(data_dir)}/[^/]+\.parquet", path)} - paths
        stale = {path for path in old if path.startswith(replaced)}
        current = None
        if _CARD in tree:
            local = session.api.hf_hub_download(repo_id, _CARD, repo_type="dataset", revision=head)
            current = Path(local).read_text(encoding="utf-8")
        card = merge_dataset_card(
            current,
            extra[_CARD].decode("utf-8") if _CARD in extra else None,
            config_name,
            data_dir,
            splits,
            download_size=sum(tree[path].size for path in old - stale)
            + sum(shard.upload_info.size for shard in shards),
            replace_config=isinstance(dataset, DatasetDict),
        )
        files = {**extra, _CARD: card.encode("utf-8")}
        return [
            *(CommitOperationAdd(path, content) for path, content in files.items()),
            *(CommitOperationDelete(path) for path in sorted(stale)),
        ]

    commit = commit_once(session, branch, commit_message or f"Upload {config_name}", shards, card_and_deletions)
    if tag:
        tag_commit(session, tag, commit, paths)
    return commit


def _splits(dataset: Dataset | DatasetDict, split: str | None) -> dict[str, Dataset]:
    if isinstance(dataset, DatasetDict):
        if split is not None:
            raise ValueError("split only goes with a Dataset: a DatasetDict has its own split names.")
        splits = {str(name): part for name, part in dataset.items()}
    elif isinstance(dataset, Dataset):
        splits = {split or str(dataset.split or "train"): dataset}
    else:
        raise ValueError(f"Cannot push a {type(dataset).__name__}; pass a Dataset or a DatasetDict.")
    if not splits:
        raise ValueError("The DatasetDict has no splits: there is nothing to push.")
    for name, part in splits.items():
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ValueError(f"{name!r} is no name of a split; use letters, digits, '_' and '.', e.g. 'train'.")
        if len(part) == 0:
            raise ValueError(f"The split {name!r} has no rows: `load_dataset` could not load it. Leave it out.")
        if part.features != next(iter(splits.values())).features:
            raise ValueError(f"The splits of one config need the same features; those of {name!r} differ.")
        files = [
            key for key, feature in part.features.items() if require_decoding(feature, ignore_decode_attribute=True)
        ]
        if files:
            raise ValueError(f"The columns {files} hold files (images, audio); push those with Dataset.push_to_hub.")
    return splits


def _upload_shards(
    session: HubSession,
    branch: str,
    dataset: Dataset,
    prefix: str,
    max_shard_size: int,
    parquet_writer_kwargs: Mapping[str, Any] | None,
) -> Iterator[CommitOperationAdd]:
    """Write and send one shard after the other: an interrupted push goes on after the last finished one, and the disk
    holds one shard at a time."""
    count = min(len(dataset), 1 + estimate_bytes(dataset) // max_shard_size)
    with tempfile.TemporaryDirectory(prefix="first_trl-push-") as folder:
        for index in range(count):
            path = Path(folder) / f"{index}.parquet"
            shard = dataset.shard(count, index, contiguous=True) if count > 1 else dataset
            _write_parquet(shard, path, parquet_writer_kwargs or {})
            addition = CommitOperationAdd(f"{prefix}-{index:05d}-of-{count:05d}.parquet", path)
            upload_content(session, branch, [addition])
            if addition.path_or_fileobj != b"":  # how the client says that it no longer needs the file
                addition.path_or_fileobj = path.read_bytes()
            path.unlink()
            yield addition


def _write_parquet(dataset: Dataset, path: Path, options: Mapping[str, Any]) -> None:
    """As [`datasets.Dataset.to_parquet`], which does not let compression and encodings be chosen: they decide how much a
    large cache of numbers takes."""
    rows = max(1, len(dataset) * _ROW_GROUP_BYTES // max(1, estimate_bytes(dataset)))
    # Content-defined pages let Xet recognise what an edited dataset has in common with an earlier one.
    defaults = {"compression": "zstd", "use_content_defined_chunking": True, "write_page_index": True}
    tables = dataset.with_format("arrow")
    with pq.ParquetWriter(path, dataset.features.arrow_schema, **{**defaults, **options}) as writer:
        for start in range(0, len(dataset), rows):
            writer.write_table(tables[start : start + rows], row_group_size=rows)


def _contents(files: Mapping[str, bytes | str | Path], data_dir: str) -> dict[str, bytes]:
    contents = {}
    for path, content in files.items():
        if path.startswith(f"{data_dir}/") and path.endswith(".parquet"):
            raise ValueError(f"extra_files: {path!r} would be taken for a shard of the dataset; use another name.")
        contents[path] = content if isinstance(content, bytes) else Path(content).read_bytes()
    return contents
