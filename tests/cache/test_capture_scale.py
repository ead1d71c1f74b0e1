"""Memory stays flat as rows grow, and the teacher columns stay small."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from first_trl import add_teacher_topk, load_teacher_cache, verify_teacher_cache
from first_trl.cache.folder import cache_size
from first_trl.cache.manifest import read_manifest
from tests.conftest import DATA


CAPTURE = """
import sys
import torch
torch.set_num_threads(1)
from datasets import load_dataset
from first_trl import add_teacher_topk, verify_teacher_cache
from tests.support.tiny import tiny_llama, tiny_tokenizer

rows = load_dataset("parquet", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2] + "/datasets")
cache = add_teacher_topk(rows, tiny_llama(), tiny_tokenizer(), output_dir=sys.argv[2] + "/cache", disable_tqdm=True)
verify_teacher_cache(cache, tiny_tokenizer())
assert len(cache) == len(rows)
# Not `ru_maxrss`, with which a child starts at its parent's peak
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of a process from Linux's /proc")
def test_memory_is_flat_in_the_number_of_rows(tmp_path):
    peaks = {}
    for count in (10_000, 100_000):
        rng = np.random.default_rng(0)
        ids = rng.integers(3, 24, (count, 8)).tolist()
        file = tmp_path / f"{count}.parquet"
        Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]}).to_parquet(file)
        output = subprocess.run(
            [sys.executable, "-c", CAPTURE, str(file), str(tmp_path / str(count))],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        peaks[count] = int(output.split()[-1]) / 1024
    ratio = peaks[100_000] / peaks[10_000]
    print(f"peak resident memory in MiB by rows: {peaks}, ratio {ratio:.3f}")
    assert ratio <= 1.2


@pytest.mark.skipif(not (DATA / "alpaca_5000").is_dir(), reason=f"needs the Alpaca rows and GPT-2 tokenizer in {DATA}")
def test_bytes_per_position_on_alpaca_with_the_gpt2_vocabulary(tmp_path, monkeypatch):
    """
    A GPT-2-shaped model with a sharpened random head: its kept ids are spread over all 50,257, which is harder to
    compress than a trained teacher's.
    """
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2_tokenizer")
    with gzip.open(DATA / "alpaca_5000" / "alpaca_5000.json.gz") as file:
        rows = json.load(file)[:120]
    dataset = Dataset.from_list(
        [{"prompt": f"{row['instruction']}\n{row['input']}\n", "completion": row["output"]} for row in rows]
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, bos_token_id=50256, eos_token_id=50256))
    with torch.no_grad():
        model.transformer.wte.weight.normal_()
        model.transformer.wpe.weight.normal_()
        model.transformer.ln_f.weight.fill_(0.55)
    folder = tmp_path / "cache"
    cache = add_teacher_topk(
        dataset, model, tokenizer, output_dir=folder, max_length=128, max_tokens_per_batch=2048, disable_tqdm=True
    )
    verify_teacher_cache(load_teacher_cache(folder), tokenizer)
    positions = read_manifest(cache).counts["positions"]
    stored = cache_size(folder, "train")["teacher_bytes"] / positions
    print(f"{positions} positions, kept mass {read_manifest(cache).kept_mass[-1]:.3f}, {stored:.2f} bytes a position")
    assert stored <= 22
    assert len(np.unique(np.concatenate([np.ravel(ids) for ids in cache["teacher_topk_ids"]]))) > 5_000

    # `first-trl cache push` uploads these very shards. Written again by `datasets`, the rows are still sound
    cache.to_parquet(tmp_path / "again.parquet")
    again = Dataset.from_parquet(str(tmp_path / "again.parquet"), cache_dir=str(tmp_path / "datasets"))
    verify_teacher_cache(again, tokenizer)
