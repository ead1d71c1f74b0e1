"""The metadata of a dataset card that the Hub's viewer and `load_dataset` read: which files are which config and split."""

from collections.abc import Mapping

from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard


def estimate_bytes(dataset: Dataset) -> int:
    """Bytes of the rows in memory; a selection of rows is taken to be as large as the average."""
    return int(dataset.data.nbytes * (len(dataset) / max(1, len(dataset.data))))


def merge_dataset_card(
    current: str | None,
    new: str | None,
    config_name: str,
    data_dir: str,
    splits: Mapping[str, Dataset],
    download_size: int,
    replace_config: bool,
) -> str:
    """Enter one config into a dataset card without touching the others.

    Args:
        current (`str`, *optional*): The card as it is on the Hub.
        new (`str`, *optional*): A card to put in its place. Metadata of `current` that `new` does not set is kept.
        config_name (`str`): The config that was pushed.
        data_dir (`str`): Folder of its shards in the repository.
        splits (`dict[str, Dataset]`): What was pushed.
        download_size (`int`): Bytes of all shards of the config.
        replace_config (`bool`): Whether splits of the config that were not pushed are gone.

    Raises:
        `ValueError`: The features differ from those of splits that stay.
    """
    old = DatasetCard(current).data if current is not None else None
    # A card without metadata gets an empty block: the client only writes metadata where there is some.
    card = DatasetCard(new if new is not None else current if current is not None else "---\n{}\n---\n")
    if old is not None:
        for key, value in old.to_dict().items():
            if card.data.get(key) is None or key in ("configs", "dataset_info"):
                card.data[key] = value

    configs = MetadataConfigs.from_dataset_card_data(card.data)
    infos = DatasetInfosDict.from_dataset_card_data(card.data)
    features = next(iter(splits.values())).features
    split_infos, data_files = SplitDict(), {}
    if not replace_config:
        info = infos.get(config_name)
        kept = {name: split for name, split in ((info and info.splits) or {}).items() if name not in splits}
        if info is not None and kept and info.features != features:
            raise ValueError(
                f"The config {config_name!r} has the split(s) {sorted(kept)} with other features than the pushed ones. "
                "Push under another config_name, or push a DatasetDict with all splits to replace the whole config."
            )
        for split in kept.values():
            split_infos.add(split)
        data_files = {
            entry["split"]: entry["path"]
            for entry in configs.get(config_name, {}).get("data_files", [])
            if isinstance(entry, dict)
        }
    for name, part in splits.items():
        split_infos.add(SplitInfo(name=name, num_bytes=estimate_bytes(part), num_examples=len(part)))
        data_files[name] = f"{data_dir}/{name}-*"
    dataset_size = sum(split.num_bytes for split in split_infos.values())
    DatasetInfosDict(
        {
            config_name: DatasetInfo(
                config_name=config_name,
                features=features,
                splits=split_infos,
                download_size=download_size,
                dataset_size=dataset_size,
            )
        }
    ).to_dataset_card_data(card.data)
    entry = {key: value for key, value in configs.get(config_name, {}).items() if key != "data_files"}
    entry["data_files"] = [{"split": name, "path": path} for name, path in sorted(data_files.items())]
    MetadataConfigs({config_name: entry}).to_dataset_card_data(card.data)
    return str(card)
