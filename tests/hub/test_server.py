"""The unmodified clients against the loopback Hub: this is what the other Hub tests stand on."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_server import HubServer, run_client
from tests.support.hub_server.lz4 import decompress_frame


MODES = {"xet": {}, "lfs": {"HF_HUB_DISABLE_XET": "1"}}


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path, lfs_part_size=1_000_000, page_size=3) as server:
        yield server
        assert server.internal_errors == []
        assert server.foreign_requests == []
        assert not [
            request for request in server.requests if request.port == "store" and request.authorization == "hub"
        ]


def test_huggingface_hub(hub: HubServer, mode: str, tmp_path: Path) -> None:
    code = """
import hashlib, numpy as np
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
api, rng = HfApi(), np.random.default_rng(0)
api.create_repo("alice/m", private=True)
content = {
    "noise.bin": rng.bytes(2_500_000),
    "floats.bin": rng.normal(size=200_000).astype("float32").tobytes(),
    "ints.bin": rng.integers(0, 50_000, 200_000).astype("int32").tobytes(),
    "repeated.bin": b"abcd" * 300_000,
    "deep/er/small.json": b"{}",
    "empty.txt": b"",
}
for name, value in content.items():
    path = Path("folder", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value)
first = api.upload_folder(repo_id="alice/m", folder_path="folder").oid
assert api.upload_folder(repo_id="alice/m", folder_path="folder").oid == first
path = snapshot_download("alice/m")
for name, value in content.items():
    assert Path(path, name).read_bytes() == value, name
assert set(api.list_repo_files("alice/m")) == {*content, ".gitattributes"}
assert len(list(api.list_repo_tree("alice/m"))) == 7
assert {entry.path for entry in api.get_paths_info("alice/m", ["deep", "ints.bin"])} == {"deep", "ints.bin"}
api.create_tag("alice/m", tag="v1")
api.create_branch("alice/m", branch="dev/one")
second = api.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="alice/m", revision="dev/one").oid
api.delete_file("ints.bin", "alice/m", revision="dev/one")
assert api.model_info("alice/m", revision="v1").sha == first
assert [commit.title for commit in api.list_repo_commits("alice/m", revision="dev/one")][-1] == "initial commit"
assert "ints.bin" not in api.list_repo_files("alice/m", revision="dev/one")
try:
    api.create_commit("alice/m", [], commit_message="x", parent_commit=first, revision="dev/one")
    api.upload_file(path_or_fileobj=b"3", path_in_repo="b.txt", repo_id="alice/m", revision="dev/one", parent_commit=first)
except HfHubHTTPError as error:
    assert error.response.status_code == 412
else:
    raise AssertionError("a stale parent was accepted")
api.delete_repo("alice/m")
try:
    api.model_info("alice/m")
except RepositoryNotFoundError:
    print("gone")
"""
    result = run_client(code, hub, env=MODES[mode])
    assert "gone" in result.stdout
    assert result.contacted_hosts == {"127.0.0.1"}
    if mode == "xet":
        assert hub.count(r"POST /v1/xorbs/", status=200) > 0 and hub.count(r"PUT /objects/") == 0
    else:
        assert hub.count(r"PUT /objects/.*/parts/3", status=200) == 1 and hub.count(r"POST /v1/") == 0


@pytest.mark.slow
def test_each_mode_reads_what_the_other_wrote(hub: HubServer, mode: str) -> None:
    code = """
import sys, numpy as np
from datasets import Dataset, load_dataset
rng = np.random.default_rng(0)
data = Dataset.from_dict({"ids": rng.integers(0, 50_000, (3_000, 5)).astype("int32"), "i": list(range(3_000))})
if sys.argv[1] == "push":
    data.push_to_hub("alice/d", num_shards=3)
else:
    assert load_dataset("alice/d", split="train")[:] == data[:]
    assert list(load_dataset("alice/d", split="train", streaming=True).skip(2_990)) == list(data.select(range(2_990, 3_000)))
"""
    run_client(code, hub, env=MODES[mode], args=("push",))
    for reader in MODES.values():
        run_client(code, hub, env=reader, args=("load",))
    for path, content in hub.files("alice/d").items():
        entry = hub.repo("alice/d").commit(hub.repo("alice/d").resolve("main")).files[path]
        assert hashlib.sha256(content).hexdigest() == entry.sha256


def test_store_outlives_the_server(tmp_path: Path, mode: str) -> None:
    code = "import sys; from huggingface_hub import *; "
    with HubServer(tmp_path) as hub:
        push = "create_repo('alice/m'); upload_file(path_or_fileobj=bytes(99_999), path_in_repo='a.bin', repo_id='alice/m')"
        run_client(code + push, hub, env=MODES[mode])
    with HubServer(tmp_path) as hub:
        result = run_client(code + "print(len(open(hf_hub_download('alice/m', 'a.bin'), 'rb').read()))", hub)
    assert "99999" in result.stdout


def test_shard_of_unknown_xorbs_is_refused(tmp_path: Path) -> None:
    """A client with the memory of another store must fail at once, not commit what nobody can read."""
    code = """
from huggingface_hub import *
create_repo("alice/m")
upload_file(path_or_fileobj=bytes(range(256)) * 4000, path_in_repo="a.bin", repo_id="alice/m")
"""
    with HubServer(tmp_path / "one") as hub:
        port = int(hub.endpoint.rsplit(":", 1)[1])
        home = run_client(code, hub).home
        store_port = int(hub.store_endpoint.rsplit(":", 1)[1])
    with HubServer(tmp_path / "two", port, store_port=store_port) as hub:
        result = run_client(code, hub, home=home, check=False)
        assert result.returncode == 1 and "400" in result.stderr
        assert hub.count(r"POST /v1/shards", status=400) >= 1 and hub.count(r"POST /v1/xorbs") == 0
        assert hub.count(r"POST .*/commit/") == 0


def test_roles_and_private_repositories(hub: HubServer) -> None:
    def status(path: str, token: str | None) -> tuple[int, str | None]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(hub.endpoint + path, headers=headers)) as answer:
                return answer.status, None
        except urllib.error.HTTPError as error:
            return error.code, error.headers["X-Error-Code"]

    run_client("from huggingface_hub import create_repo; create_repo('team/m', private=True)", hub)
    path = "/api/models/team/m"
    assert status(path, hub.token) == status(path, hub.read_token) == (200, None)
    assert status(path, None) == (401, "RepoNotFound")
    assert status(path, hub.other_token) == (404, "RepoNotFound")
    assert status(path, "hf_wrong") == (401, None)
    assert status(f"{path}/xet-write-token/main", hub.read_token) == (403, None)
    assert status(f"{path}/xet-read-token/main", hub.read_token) == (200, None)
    assert status("/team/m/resolve/main/nothing", hub.token) == (404, "EntryNotFound")
    assert status(f"{path}/revision/nothing", hub.token) == (404, "RevisionNotFound")


def test_foreign_hosts_are_refused_and_recorded(tmp_path: Path) -> None:
    code = """
import urllib.request, socket
for attempt in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=5),
    lambda: socket.getaddrinfo("huggingface.co", 443),
    lambda: urllib.request.urlopen("https://example.org/", timeout=5),
):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit("a foreign host was reached")
"""
    with HubServer(tmp_path) as hub:
        result = run_client(code, hub)
        assert result.contacted_hosts == {"192.0.2.1", "huggingface.co", "127.0.0.1"}
        assert hub.foreign_requests == ["CONNECT example.org:443"]


def test_lz4_frames() -> None:
    """A stored block, then one with a literal, a match that overlaps itself, and closing literals."""
    stored = (5 | 1 << 31).to_bytes(4, "little") + b"hello"
    sequence = bytes([0x14]) + b"x" + (1).to_bytes(2, "little") + bytes([0x50]) + b"world"
    frame = b"\x04\x22\x4d\x18\x40\x40\x00" + stored + len(sequence).to_bytes(4, "little") + sequence + bytes(4)
    assert decompress_frame(frame) == b"hello" + b"x" * 9 + b"world"
    with pytest.raises(ValueError, match="not an LZ4 frame"):
        decompress_frame(b"nothing like it")


TINY_MODEL = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
torch.manual_seed(0)
torch.set_num_threads(1)
words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "e"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64))

def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
"""


@pytest.mark.slow
def test_transformers_and_peft(hub: HubServer, mode: str) -> None:
    code = (
        TINY_MODEL
        + """
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
model.push_to_hub("alice/model", private=True)
tokenizer.push_to_hub("alice/model")
assert equal(AutoModelForCausalLM.from_pretrained("alice/model"), model)
assert AutoTokenizer.from_pretrained("alice/model")("a b z")["input_ids"] == tokenizer("a b z")["input_ids"]
base = AutoModelForCausalLM.from_pretrained("alice/model")
adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
adapted.push_to_hub("alice/adapter", private=True)
assert equal(AutoPeftModelForCausalLM.from_pretrained("alice/adapter"), adapted)
print("equal")
"""
    )
    result = run_client(code, hub, env=MODES[mode])
    assert "equal" in result.stdout and result.contacted_hosts == {"127.0.0.1"}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= hub.files("alice/adapter", "model").keys()


METRIC = """
import datasets
import evaluate

class HalfRight(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"half_right": 0.5 * sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


@pytest.mark.slow
def test_evaluate_metric_in_a_space(hub: HubServer, mode: str) -> None:
    code = f"""
from pathlib import Path
from first_trl.hub import push_folder
Path("space").mkdir()
Path("space/half_right.py").write_text({METRIC!r})
Path("space/README.md").write_text("---\\ntitle: Half right\\nsdk: gradio\\n---\\n")
commit = push_folder("space", "alice/half_right", repo_type="space", space_sdk="gradio", private=True)
import evaluate
for revision in (commit, None):
    metric = evaluate.load("alice/half_right", revision=revision)
    print(metric.compute(predictions=[1, 2, 3, 4], references=[1, 2, 0, 0]))
"""
    result = run_client(code, hub, env=MODES[mode])
    assert result.stdout.count("{'half_right': 0.25}") == 2
    assert hub.repo("alice/half_right", "space").sdk == "gradio"


@pytest.mark.slow
def test_trl_pushes_while_training(hub: HubServer, mode: str) -> None:
    code = (
        TINY_MODEL
        + """
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import SFTConfig, SFTTrainer
data = Dataset.from_dict({"text": ["a b c d e a b"] * 16})
arguments = SFTConfig(output_dir="out", push_to_hub=True, hub_model_id="alice/student", hub_strategy="every_save", save_steps=2,
                      max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, hub_private_repo=True,
                      max_length=32, bf16=False)
trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer,
                     peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
trainer.train()
trainer.push_to_hub()
from safetensors.torch import load_file
from huggingface_hub import hf_hub_download
pushed = load_file(hf_hub_download("alice/student", "adapter_model.safetensors"))
local = load_file("out/adapter_model.safetensors")
assert pushed.keys() == local.keys() and all(torch.equal(pushed[key], local[key]) for key in pushed)
print("equal")
"""
    )
    result = run_client(code, hub, env=MODES[mode])
    assert "equal" in result.stdout
    assert len(hub.repo("alice/student", "model").history("main")) >= 3
