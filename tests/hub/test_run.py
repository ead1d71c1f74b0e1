"""A run whose model, tokenizer and rows come from the Hub, which moves while the run goes on."""

from pathlib import Path

from tests.support.hub_server import HubServer, run_client


PUBLISH = """
import json
from huggingface_hub import HfApi
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from tests.support.tiny import tiny_llama

WORDS = [f"w{i}" for i in range(3, 22)] + ["A", "B"]

def publish(seed, words, answers):
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).push_to_hub("alice/model")
    tiny_llama(seed).push_to_hub("alice/model")
    rows = [
        {"question": f"w{3 + i % 19} w{3 + i // 19} {split}", "A": "w5", "B": "w6", "answer": answers[i % 2]}
        for i, split in enumerate(["train"] * 24 + ["test"] * 8)
    ]
    api = HfApi()
    api.create_repo("alice/questions", repo_type="dataset", exist_ok=True)
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\\n" for row in rows if row["question"].endswith(split))
        where = {"path_in_repo": f"{split}.jsonl", "repo_id": "alice/questions", "repo_type": "dataset"}
        api.upload_file(path_or_fileobj=text.encode(), **where)
"""

RUN = """
import yaml
from datasets import load_from_disk
from transformers import AutoTokenizer
from first_trl.cli import main

RECIPE = {
    "name": "moved",
    "task": {
        "name": "custom",
        "path": "alice/questions",
        "splits": {"train": "train[:16]", "validation": "train[16:]", "test": "test"},
    },
    "teacher": {"name_or_path": "alice/model"},
    "student": {"name_or_path": "alice/model"},
    "training": {"max_steps": 1, "global_batch_size": 8, "save_strategy": "no"},
    "capture": {"k": 4},
    "recalibration": {"methods": []},
    "arms": {"teacher": {"kind": "teacher"}, "sft": {"kind": "sft"}},
    "evaluation": {"splits": ["test"]},
}

def run(*options):
    with open("moved.yaml", "w") as file:
        yaml.safe_dump(RECIPE, file)
    assert main(["run", "moved.yaml", "--output-dir", "run", *options]) == 0
    return load_from_disk("run/data/tokens/train").to_dict()
"""

BEGIN = """
publish(1, WORDS, "AB")
before = run()
publish(2, WORDS[::-1], "BA")
# A further role makes the rows anew, and those of the others must stay what their keys say
RECIPE["task"]["splits"]["ood"] = "test[:4]"
assert run("--stage", "data") == before
"""

GO_ON = """
RECIPE["task"]["splits"] |= {"ood": "test[:4]", "far": "test[4:]"}
RECIPE["evaluation"]["splits"] = ["test", "far"]
RECIPE["arms"]["first"] = {"kind": "distill"}
run()
for arm in ("sft", "first"):
    assert AutoTokenizer.from_pretrained(f"run/students/{arm}/model").get_vocab()["w3"] == 3
"""


def test_a_run_stays_with_the_commits_that_it_began_with(tmp_path: Path) -> None:
    """And it goes on without a network."""
    with HubServer(tmp_path / "hub") as hub:
        home = run_client(PUBLISH + RUN + BEGIN, hub).home
        seen = len(hub.requests)
        run_client(RUN + GO_ON, hub, {"HF_HUB_OFFLINE": "1"}, home=home)
        assert len(hub.requests) == seen and hub.internal_errors == []
