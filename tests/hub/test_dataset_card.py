"""Metadata of dataset cards: one config is entered, everything else stays."""

import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard

from first_trl.hub.dataset_card import merge_dataset_card


ROWS = Dataset.from_dict({"a": [1, 2, 3]})


def merge(current: str | None, new: str | None = None, config: str = "default", **options: object) -> DatasetCard:
    arguments = {
        "data_dir": "data" if config == "default" else config,
        "splits": {"train": ROWS},
        "download_size": 7,
        "replace_config": False,
        **options,
    }
    return DatasetCard(merge_dataset_card(current, new, config, **arguments))


def test_first_card() -> None:
    card = merge(None)
    data_files = [{"split": "train", "path": "data/train-*"}]
    assert card.data["configs"] == [{"config_name": "default", "data_files": data_files}]
    info = card.data["dataset_info"]
    assert info["download_size"] == 7 and info["features"] == [{"name": "a", "dtype": "int64"}]
    assert info["splits"][0]["num_examples"] == 3 and info["splits"][0]["num_bytes"] == 24


def test_same_push_gives_the_same_text() -> None:
    text = str(merge(None, "---\nlicense: mit\n---\n# Title\n"))
    assert str(merge(text, "---\nlicense: mit\n---\n# Title\n")) == text
    assert str(merge(text)) == text


@pytest.mark.parametrize("body", ["# Only text\n", "---\nlicense: mit\nlanguage: en\n---\n# Text\n\n- a\n"])
def test_text_and_other_metadata_of_the_hub_stay(body: str) -> None:
    card = merge(body)
    assert card.text.strip() == DatasetCard(body).text.strip()
    for key, value in DatasetCard(body).data.to_dict().items():
        assert card.data[key] == value


def test_new_card_replaces_text_but_not_other_configs() -> None:
    current = str(merge(str(merge("---\nlicense: mit\npretty_name: Old\n---\n# Old\n", config="one")), config="two"))
    card = merge(current, "---\nlicense: apache-2.0\n---\n# New\n", config="two", splits={"test": ROWS})
    assert card.text.strip() == "# New"
    assert card.data["license"] == "apache-2.0" and card.data["pretty_name"] == "Old"
    assert [config["config_name"] for config in card.data["configs"]] == ["one", "two"]
    assert [entry["split"] for entry in card.data["configs"][1]["data_files"]] == ["test", "train"]
    assert [info["config_name"] for info in card.data["dataset_info"]] == ["one", "two"]


def test_replacing_the_config_forgets_its_splits() -> None:
    current = str(merge(None, splits={"train": ROWS, "test": ROWS}))
    card = merge(current, replace_config=True)
    assert [entry["split"] for entry in card.data["configs"][0]["data_files"]] == ["train"]
    assert [split["name"] for split in card.data["dataset_info"]["splits"]] == ["train"]


def test_settings_of_the_config_stay() -> None:
    current = str(merge(None)).replace("- config_name: default", "- config_name: default\n  default: true")
    assert merge(current).data["configs"][0]["default"] is True


def test_other_features_are_refused_unless_everything_is_replaced() -> None:
    current = str(merge(None, splits={"test": ROWS}))
    other = {"train": Dataset.from_dict({"b": ["x"]})}
    with pytest.raises(ValueError, match=r"\['test'\] with other features"):
        merge(current, splits=other)
    assert merge(current, splits=other, replace_config=True).data["dataset_info"]["features"][0]["name"] == "b"
