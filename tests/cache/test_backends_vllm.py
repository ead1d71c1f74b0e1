"""The vLLM backend: its HTTP habits against a small server of the same protocol, its values against vLLM itself."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from first_trl import add_teacher_topk, load_teacher_cache, verify_teacher_cache
from first_trl.cache.manifest import read_manifest
from first_trl.cache.schema import flatten_cache
from first_trl.cli import main
from first_trl.teacher.backends.vllm import VLLMBackend
from tests.support.families import CHAT, family_tokenizer
from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer
from tests.support.vllm.protocol import ProtocolServer
from tests.support.vllm.server import VLLMServer, free_port, vllm_python


TOKENS = 104


@pytest.fixture
def serve():
    running = []

    def start(*args, **kwargs):
        running.append(ProtocolServer(*args, **kwargs))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(autouse=True)
def _quick(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("first_trl.teacher.backends.vllm._LONGEST_PAUSE", 0.05)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def rows(count=8):
    return Dataset.from_list(tiny_rows(count, vocab_size=TOKENS))


def tokenizer():
    return tiny_tokenizer(TOKENS)


def model(seed=0, **options):
    return tiny_llama(seed, **({"vocab_size": TOKENS} | options))


def same_values(a, b, atol=1e-4):
    a, b = flatten_cache(a), flatten_cache(b)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=atol)
    np.testing.assert_allclose(np.exp(a.tail_logprob), np.exp(b.tail_logprob), atol=atol)


def test_the_same_cache_as_transformers(serve):
    served = add_teacher_topk(rows(), VLLMBackend(serve(model()).url), tokenizer(), logprob_dtype="float32")
    local = add_teacher_topk(rows(), model(), tokenizer(), logprob_dtype="float32")
    same_values(served, local)
    verify_teacher_cache(served, tokenizer(), head_size=TOKENS)
    manifest = read_manifest(served)
    assert manifest.teacher["name"] == "teacher-x" and "/models" not in manifest.to_json()
    assert manifest.backend["name"] == "vllm" and manifest.backend["version"] == "9.9"
    assert "tail is derived" in manifest.notes[0]


def test_prompts_without_an_answer(serve):
    prompts = Dataset.from_dict({"prompt": ["w3 w4 w5", "w6", "w7 w8 w9 w10"]})
    served, local = (
        add_teacher_topk(prompts, teacher, tokenizer(), logprob_dtype="float32")
        for teacher in (VLLMBackend(serve(model()).url), model())
    )
    same = ["input_ids", "labels", "teacher_has_gold", "teacher_topk_ids"]
    assert served.select_columns(same).to_list() == local.select_columns(same).to_list()
    for name in ("teacher_topk_logprobs", "teacher_tail_logprob"):
        for a, b in zip(served[name], local[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert read_manifest(served).counts["rows_without_gold"] == 3


def test_the_ids_of_conversations_and_rendered_texts_are_sent_as_they_are(serve, tmp_path):
    """A server that was sent texts would put a second begin token in front of them."""
    tokenizer = family_tokenizer(template=f"<|begin|>{CHAT}", front=True)
    turn = [{"role": "user", "content": "Which river?"}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    talks = [{"prompt": turn, "completion": [{"role": "assistant", "content": "A"}]}]
    texts = [{"prompt": text, "completion": " A"} for text in (rendered, "Which river?")]
    teacher = model(vocab_size=len(tokenizer))
    for i, rows in enumerate((talks, texts)):
        server = serve(teacher)
        options = {"logprob_dtype": "float32", "disable_tqdm": True}
        served, local = (
            add_teacher_topk(Dataset.from_list(rows), engine, tokenizer, output_dir=tmp_path / f"{name}{i}", **options)
            for name, engine in (("served", VLLMBackend(server.url)), ("local", teacher))
        )
        sent = [prompt for request in server.requests for prompt in request["prompt"]]
        assert all(ids in sent and ids.count(tokenizer.bos_token_id) == 1 for ids in served["input_ids"])
        same_values(served, local)


def test_padded_ids_are_replaced_by_the_next_ones(serve):
    padded = model(vocab_size=TOKENS + 8)
    with torch.no_grad():
        padded.lm_head.weight[TOKENS:] = padded.lm_head.weight[3:11] * 2
    server = serve(padded)
    served = add_teacher_topk(
        rows(), VLLMBackend(server.url, head_size=TOKENS + 8), tokenizer(), logprob_dtype="float32"
    )
    same_values(served, add_teacher_topk(rows(), padded, tokenizer(), logprob_dtype="float32"))
    assert any(request["prompt_logprobs"] > 5 for request in server.requests)


def test_failures_that_pass_are_waited_out(serve):
    server = serve(model())
    backend = VLLMBackend(server.url, retry_seconds=20)
    server.script = [503, 429, "reset", 500]
    served = add_teacher_topk(rows(), backend, tokenizer(), logprob_dtype="float32")
    same_values(served, add_teacher_topk(rows(), model(), tokenizer(), logprob_dtype="float32"))


def test_a_restarted_server_is_waited_for(serve, tmp_path):
    server = serve(model())
    port = server.server.server_port
    backend = VLLMBackend(server.url, retry_seconds=30)

    def restart():
        server.stop()
        time.sleep(0.5)
        serve(model(), port=port)

    def away():
        threading.Thread(target=restart).start()
        raise ConnectionError

    server.script = [None, away]
    served = add_teacher_topk(rows(), backend, tokenizer(), max_rows_per_batch=2, logprob_dtype="float32")
    same_values(served, add_teacher_topk(rows(), model(), tokenizer(), logprob_dtype="float32"))


def test_another_model_at_the_same_address_is_refused(serve, tmp_path):
    server = serve(model())
    # One request after the other: the first shards are finished when the model is exchanged
    backend = VLLMBackend(server.url, concurrency=1)

    def exchange():
        server.model = model(seed=1)

    server.script = [None, None, exchange]
    call = {"max_rows_per_batch": 2, "shard_size": 2, "output_dir": tmp_path}
    with pytest.raises(ValueError, match="Another model answers at"):
        add_teacher_topk(rows(), backend, tokenizer(), **call)
    assert list(tmp_path.glob("data/*.parquet"))
    # A new run against the other model is refused as well, the first model finishes
    with pytest.raises(ValueError, match="Another model answers at"):
        add_teacher_topk(rows(), VLLMBackend(server.url), tokenizer(), **call)
    server.model = model()
    assert len(add_teacher_topk(rows(), VLLMBackend(server.url), tokenizer(), **call)) == 8
    # ... and once it is finished, too
    server.model = model(seed=1)
    with pytest.raises(ValueError, match="Another model answers at"):
        add_teacher_topk(rows(), VLLMBackend(server.url), tokenizer(), **call)


def test_a_model_that_differs_on_the_rows_alone_is_noticed_by_one_of_them(serve, tmp_path):
    """As another fine-tuning of the same base, reloaded under its name while a capture goes on."""
    near = model()
    with torch.no_grad():
        near.get_input_embeddings().weight[100:] += 1.0  # ids that no probe of arbitrary ones has
    server = serve(model())
    told = {"input_ids": [3, 100, 5, 101, 7, 102] * 2, "labels": [-100] * 11 + [102]}
    data = Dataset.from_list([told, *tiny_rows(8, vocab_size=TOKENS)])
    options = {"max_rows_per_batch": 2, "shard_size": 2, "output_dir": tmp_path / "near"}
    backend = VLLMBackend(server.url, concurrency=1)
    server.script = [None, None, lambda: setattr(server, "model", near)]
    with pytest.raises(ValueError, match="Another model answers at"):
        add_teacher_topk(data, backend, tokenizer(), **options)
    # Nor does it go on with what the first one began
    with pytest.raises(ValueError, match="Another model answers at"):
        add_teacher_topk(data, VLLMBackend(server.url), tokenizer(), **options)
    server.model = model()
    cache = add_teacher_topk(data, VLLMBackend(server.url), tokenizer(), **options)
    same_values(cache, add_teacher_topk(data, VLLMBackend(server.url), tokenizer(), output_dir=tmp_path / "plain"))


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("data/*"))}


def capture_by_one_and_by_eight(serve, tmp_path) -> float:
    """How many times as fast eight requests at once are, at 50 ms an answer; both must give the same files."""
    seconds = {}
    server = serve(model())
    server.table = {}
    for run, concurrency in {"filled": 8, "one": 1, "eight": 8}.items():
        backend = VLLMBackend(server.url, concurrency=concurrency)
        server.most_at_once, server.latency = 0, 0.0 if run == "filled" else 0.05
        start = time.perf_counter()
        add_teacher_topk(
            rows(240),
            backend,
            tokenizer(),
            output_dir=tmp_path / run,
            # Shards of few batches: requests go on over their ends
            shard_size=24,
            max_rows_per_batch=4,
            disable_tqdm=True,
        )
        seconds[run] = time.perf_counter() - start
        # A busy machine does not get all of them off within one answer's time
        assert run == "filled" or min(concurrency, 2) <= server.most_at_once <= concurrency
    assert shard_bytes(tmp_path / "eight") == shard_bytes(tmp_path / "one")
    ratio = seconds["one"] / seconds["eight"]
    print(f"seconds by requests at once: {seconds}, {ratio:.1f} times as fast")
    return ratio


def test_eight_requests_at_once(serve, tmp_path):
    capture_by_one_and_by_eight(serve, tmp_path)


@pytest.mark.slow
def test_eight_requests_are_five_times_as_fast(serve, tmp_path):
    """On a quiet machine: other work on its processors slows the eight more than the one."""
    assert capture_by_one_and_by_eight(serve, tmp_path) >= 5


@pytest.mark.parametrize("stop", ["refused", "interrupted", "gone"])
def test_stopped_with_requests_under_way_and_started_again(serve, tmp_path, stop):
    call = {"shard_size": 20, "max_rows_per_batch": 2, "disable_tqdm": True}
    add_teacher_topk(rows(40), VLLMBackend(serve(model()).url), tokenizer(), output_dir=tmp_path / "whole", **call)
    server = serve(model(), latency=0.02)
    backend = VLLMBackend(server.url, retry_seconds=1.0 if stop == "gone" else 60)
    # Requests that wait for a busy server must not keep a failed capture
    server.script = [None] * 12 + {"refused": [503, 503, 401], "interrupted": [], "gone": [503] * 1000}[stop]
    seen = len(server.requests)

    class Interrupted(VLLMBackend):
        def score(self, *args, **kwargs):
            if stop == "interrupted" and len(server.requests) - seen >= 12:
                raise KeyboardInterrupt
            return super().score(*args, **kwargs)

    backend.__class__ = Interrupted
    error, message = {
        "refused": (ValueError, "refused: 401"),
        "interrupted": (KeyboardInterrupt, None),
        "gone": (ConnectionError, "did not answer within"),
    }[stop]
    with pytest.raises(error, match=message):
        add_teacher_topk(rows(40), backend, tokenizer(), output_dir=tmp_path / "cache", **call)
    time.sleep(0.3)  # what was on its way arrives
    server.script, before = [], len(server.requests)
    time.sleep(0.3)
    assert len(server.requests) == before  # nobody asks for what nobody waits for
    add_teacher_topk(rows(40), VLLMBackend(server.url), tokenizer(), output_dir=tmp_path / "cache", **call)
    # The probe of the new backend is the other request
    assert 0 < len(server.requests) - before - 1 < 20
    assert shard_bytes(tmp_path / "cache") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("asked", [2, 5])
def test_requests_at_once_are_an_option_of_the_command(asked, serve, tmp_path):
    server = serve(model())
    server.latency = 0.2
    rows(12).to_json(tmp_path / "rows.jsonl")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = [
        "precompute", "--dataset", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"),
        "--vllm-url", server.url, "--concurrency", str(asked), "--max-rows-per-batch", "1", "--output-dir",
        str(tmp_path / "cache"),
    ]  # fmt: skip
    assert main(command) == 0
    assert server.most_at_once == asked
    assert load_teacher_cache(tmp_path / "cache").num_rows == 12


def test_concurrency_is_checked():
    with pytest.raises(ValueError, match="`concurrency` must be at least 1, got 0"):
        VLLMBackend("http://127.0.0.1:1", concurrency=0)


def test_what_cannot_pass_is_said_at_once(serve):
    server = serve(model(), max_logprobs=20, max_model_len=10, key="secret-key")
    with pytest.raises(ValueError, match="401 Unauthorized Pass `api_key`") as caught:
        VLLMBackend(server.url)
    assert "secret-key" not in str(caught.value)
    backend = VLLMBackend(server.url, api_key="secret-key")
    assert "secret-key" not in json.dumps(backend.describe())
    assert backend.max_length == 9
    with pytest.raises(ValueError, match="max allowed: 20 Start the server with `--max-logprobs 21`"):
        add_teacher_topk(rows(), backend, tokenizer(), k=21, max_length=9)
    with pytest.warns(UserWarning, match="longer than the teacher's context of 9 tokens"):
        cache = add_teacher_topk(rows(), backend, tokenizer())
    assert read_manifest(cache).counts["dropped_longer_than_context"] > 0
    with pytest.raises(ValueError, match="nothing can be drawn"):
        add_teacher_topk(rows(), backend, tokenizer(), num_draws=3, max_length=9)
    with pytest.raises(ValueError, match=r"serves \['teacher'\], not 'other'"):
        VLLMBackend(server.url, "other", api_key="secret-key")
    server.name = "renamed"
    with pytest.raises(ValueError, match=r"404 .* start the first one again"):
        add_teacher_topk(rows(), backend, tokenizer(), k=4, max_length=9)


def test_addresses_are_checked():
    for url in ("localhost:8000", "ftp://host", "http://"):
        with pytest.raises(ValueError, match="http://host:port"):
            VLLMBackend(url)
    with pytest.raises(ValueError, match="Leave credentials out") as caught:
        VLLMBackend("http://user:password@127.0.0.1:1")
    assert "password" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up():
    with pytest.raises(ConnectionError, match=r"did not answer within 0 s .*continues where it stopped"):
        VLLMBackend(f"http://127.0.0.1:{free_port()}", retry_seconds=0.2)


# --- vLLM itself -------------------------------------------------------------------------------------------------------

NO_VLLM = (
    "vLLM is not installed: run tests/support/vllm/install.sh FOLDER and set FIRST_TRL_VLLM_PYTHON=FOLDER/bin/python"
)


@pytest.mark.slow
@pytest.mark.skipif(vllm_python() is None, reason=NO_VLLM)
def test_against_vllm(tmp_path):
    """Ids and log-probabilities of transformers; the server killed and restarted mid-capture; then another model."""
    vocab, k = 5000, 5
    config = {
        "vocab_size": vocab, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    for seed in (0, 1):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / f"model-{seed}")
    tokenizer = tiny_tokenizer(vocab)
    dataset = Dataset.from_list(tiny_rows(120, vocab_size=vocab, longest=80, seed=3))
    port, log = free_port(), tmp_path / "server.log"
    server = VLLMServer(tmp_path / "model-0", "teacher", port, log)
    try:
        server.wait()
        backend = VLLMBackend(server.url, head_size=vocab)
        call = {"k": k, "output_dir": tmp_path / "cache", "shard_size": 30, "max_rows_per_batch": 10}
        scored = []

        class Killed(VLLMBackend):
            def score(self, rows, *args, **kwargs):
                nonlocal server
                if len(scored) == 4:  # in the second shard
                    server.kill()
                    server = VLLMServer(tmp_path / "model-0", "teacher", port, log)
                scored.append(len(rows))
                return super().score(rows, *args, **kwargs)

        served = add_teacher_topk(
            dataset, Killed(server.url, head_size=vocab), tokenizer, logprob_dtype="float32", **call
        )
        assert sum(scored) == len(dataset) == len(served)
        verify_teacher_cache(served, tokenizer, head_size=vocab)

        local = flatten_cache(
            add_teacher_topk(
                dataset, str(tmp_path / "model-0"), tokenizer, k=k + 1, logprob_dtype="float32", dtype="float32"
            )
        )
        served = flatten_cache(served)
        gaps = -np.diff(local.logprobs, axis=1)
        clear = (gaps > 1e-4).all(axis=1)
        equal = (served.ids == local.ids[:, :k]).all(axis=1)
        difference = np.abs(served.logprobs - local.logprobs[:, :k])[equal].max()
        print(
            f"positions {len(equal)}, near-ties excluded {int((~clear).sum())}, ids equal {equal[clear].mean():.5f}, "
            f"largest log-probability difference {difference:.2e}"
        )
        assert clear.mean() > 0.95 and equal[clear].mean() >= 0.999 and difference < 1e-3

        with pytest.raises(ValueError, match="--max-logprobs 21"):
            add_teacher_topk(dataset, backend, tokenizer, k=21)
        server.kill()
        server = VLLMServer(tmp_path / "model-1", "teacher", port, log)
        server.wait()
        # The same folder name would be no way out: the probe tells the models apart
        with pytest.raises(ValueError, match=r"holds a capture of other inputs|Another model answers"):
            add_teacher_topk(
                dataset, VLLMBackend(server.url, head_size=vocab), tokenizer, logprob_dtype="float32", **call
            )
        with pytest.raises(ValueError, match="Another model answers"):
            backend.score([np.array([3, 4, 5])], [np.array([1, 2])], k, vocab)
    finally:
        server.kill()
    assert len(load_teacher_cache(tmp_path / "cache")) == len(dataset)
