"""A cache that went over the Hub trains like the one it was."""

from pathlib import Path

import pytest

from tests.support.hub_server import HubServer, run_client


CAPTURE = """
import sys
from datasets import Dataset
from first_trl import add_teacher_topk
from first_trl.cli import main
from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer

add_teacher_topk(Dataset.from_list(tiny_rows(24)), tiny_llama(0), tiny_tokenizer(), output_dir=FOLDER, shard_size=10)
assert main(["cache", "push", FOLDER, "alice/cache", "--private", "--tag", "v1"]) == 0
prompts = Dataset.from_dict({"prompt": ["w3 w4", "w5 w6 w7", "w8"]})
add_teacher_topk(prompts, tiny_llama(0), tiny_tokenizer(), output_dir=FOLDER + "-prompts")
assert main(["cache", "push", FOLDER + "-prompts", "alice/prompts"]) == 0
"""

TRAIN = """
import hashlib
from first_trl import FirstDistillConfig, FirstDistillTrainer, load_teacher_cache, verify_teacher_cache
from first_trl.cache.manifest import read_manifest
from tests.support.tiny import tiny_llama, tiny_tokenizer

def train(cache):
    args = FirstDistillConfig("out", max_steps=3, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none",
                              save_strategy="no", use_cpu=True, gradient_checkpointing=False, disable_tqdm=True)
    trainer = FirstDistillTrainer(tiny_llama(1), args, cache, processing_class=tiny_tokenizer())
    trainer.train()
    digest = hashlib.sha256()
    for name, weight in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()
"""

LOCAL = """
print("weights", train(load_teacher_cache(FOLDER)))
"""

REMOTE = """
from datasets import load_dataset
cache = load_teacher_cache("alice/cache", revision="v1")
verify_teacher_cache(cache, tiny_tokenizer())
assert len(cache) == 24 and read_manifest(cache) is not None
print("weights", train(cache))
prompts = load_teacher_cache("alice/prompts")
verify_teacher_cache(prompts, tiny_tokenizer())
assert prompts["teacher_has_gold"][:] == [False] * 3
assert list(load_teacher_cache("alice/prompts", streaming=True)) == list(prompts)
stream = load_teacher_cache("alice/cache", streaming=True)
assert list(stream) == list(cache) and read_manifest(stream) is not None
verify_teacher_cache(load_dataset("alice/cache", split="train"), tiny_tokenizer())
from first_trl.cli import main
assert main(["cache", "pull", "alice/cache", "pulled"]) == 0
assert main(["cache", "verify", "pulled"]) == 0
"""


TEACHER = """
from datasets import Dataset
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM
from first_trl import add_teacher_topk
from first_trl.cache.folder import load_manifest
from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer

tiny_llama(0).push_to_hub("alice/teacher")
first = HfApi().model_info("alice/teacher").sha
rows, tokenizer = Dataset.from_list(tiny_rows(4)), tiny_tokenizer()
add_teacher_topk(rows, "alice/teacher", tokenizer, output_dir="cache")
add_teacher_topk(rows, AutoModelForCausalLM.from_pretrained("alice/teacher"), tokenizer, output_dir="of-object")
tiny_llama(1).push_to_hub("alice/teacher")
add_teacher_topk(rows, "alice/teacher", tokenizer, output_dir="pinned", model_init_kwargs={"revision": first})
manifests = [load_manifest(folder) for folder in ("cache", "of-object", "pinned")]
assert [manifest.teacher["revision"] for manifest in manifests] == [first, None, first]
assert len({manifest.id for manifest in manifests}) == 1
try:
    add_teacher_topk(rows, "alice/teacher", tokenizer, output_dir="cache")
except ValueError as error:
    print("refused:", error)
"""


def test_a_cache_says_of_which_commit_its_teacher_was(tmp_path: Path) -> None:
    """The commit is told, and the weights decide: those of another commit are another teacher."""
    with HubServer(tmp_path / "hub") as hub:
        assert "holds a capture of other inputs" in run_client(TEACHER, hub).stdout


@pytest.mark.parametrize(
    "env",
    [pytest.param({}, id="xet"), pytest.param({"HF_HUB_DISABLE_XET": "1"}, id="lfs", marks=pytest.mark.slow)],
)
def test_push_then_load_elsewhere_then_train_equals_local(env, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        where = f"FOLDER = {str(tmp_path / 'cache')!r}\n"
        run_client(where + CAPTURE, hub, env)
        local = run_client(where + TRAIN + LOCAL, hub, env)
        remote = run_client(TRAIN + REMOTE, hub, env)
        weights = [result.stdout.split("weights ")[1].split()[0] for result in (local, remote)]
        assert weights[0] == weights[1]
        assert "24 rows, sound" in remote.stdout
        assert hub.foreign_requests == [] and hub.internal_errors == []
        files = hub.files("alice/cache")
        assert b"# Teacher cache" in files["README.md"]
        assert hub.token.encode() not in b"".join(files.values())


AGAIN = """
from datasets import Dataset, load_dataset
from first_trl import add_teacher_topk, load_teacher_cache
from first_trl.cli import main
from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer

# The second time the rows are fewer and the files larger
for name, count, size in (("a", 24, 4), ("b", 20, 10)):
    rows = Dataset.from_list(tiny_rows(count))
    add_teacher_topk(rows, tiny_llama(0), tiny_tokenizer(), output_dir=name, shard_size=size, disable_tqdm=True)
    assert main(["cache", "push", name, "alice/cache"]) == 0
    assert len(load_dataset("alice/cache", split="train")) == len(load_teacher_cache("alice/cache")) == count
    assert main(["cache", "pull", "alice/cache", "pulled_" + name]) == 0
    assert main(["cache", "verify", "pulled_" + name]) == 0
"""


def test_a_cache_pushed_again_with_fewer_files_leaves_none_behind(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        run_client(AGAIN, hub, {"HF_HUB_DISABLE_XET": "1"})
        assert len([path for path in hub.files("alice/cache") if path.endswith(".parquet")]) == 2
