"""`first-trl precompute` and `first-trl cache`: one process, two processes, and the errors a user meets."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from first_trl import load_teacher_cache, verify_teacher_cache
from first_trl.cli import main
from tests.support.capture_process import free_port
from tests.support.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("inputs")
    tiny_llama().save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(30):
            words = " ".join(f"w{3 + (7 * i + j) % 21}" for j in range(2 + i % 7))
            file.write(json.dumps({"prompt": f"w{3 + i % 20} ", "completion": words}) + "\n")
    return folder


def arguments(inputs, output, *more):
    return [
        "--teacher", str(inputs / "teacher"), "--dataset", str(inputs / "rows.jsonl"), "--output-dir", str(output),
        "--shard-size", "7", *more,
    ]  # fmt: skip


def sums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("data/*"))}


def test_precompute_then_verify_and_describe(inputs, tmp_path, capsys):
    assert main(["precompute", *arguments(inputs, tmp_path / "cache", "--num-draws", "4", "--max-length", "6")]) == 0
    assert "30 rows" in capsys.readouterr().out
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0
    assert "train: sound, 30 rows" in capsys.readouterr().out
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    assert '"weights_digest"' in capsys.readouterr().out
    assert main(["cache", "card", str(tmp_path / "cache")]) == 0
    assert "# Teacher cache: teacher, top 5" in capsys.readouterr().out
    verify_teacher_cache(load_teacher_cache(tmp_path / "cache"), tiny_tokenizer())
    # Damage is an error with a status
    path = sorted((tmp_path / "cache" / "data").glob("*"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_two_launched_processes_write_the_same_cache(inputs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-m", "first_trl", "precompute", *arguments(inputs, one)], check=True, env=environment
    )
    # On CPUs `accelerate launch` starts one process whatever it is told; torchrun starts two
    # On a machine without GPUs this configuration starts its processes on the CPU
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "ddp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--num_processes", "2", "--main_process_port", str(free_port())]
    output = subprocess.run(
        [*launch, "-m", "first_trl", "precompute", *arguments(inputs, two)],
        check=True, env=environment, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert output.count("30 rows") == 1
    assert sums(one) == sums(two)
    a, b = (json.loads((folder / "manifest" / "train.json").read_text()) for folder in (one, two))
    assert (a["timing"]["processes"], b["timing"]["processes"]) == (1, 2)
    assert {k: v for k, v in a.items() if k not in ("timing", "digest")} == {
        k: v for k, v in b.items() if k not in ("timing", "digest")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["precompute", "--dataset", "x.jsonl", "--output-dir", "y"], "Give either `--teacher` or `--vllm-url`"),
        (["precompute", "--dataset", "x", "--output-dir", "y", "--vllm-url", "http://127.0.0.1:1"], "--tokenizer"),
        (["cache", "verify", "absent"], "is no folder"),
        (["cache", "info", "absent"], "No teacher cache"),
        (["cache", "push", "folder"], "Usage: first-trl cache push FOLDER REPO"),
        (["cache", "verify", "folder", "repo"], "Usage: first-trl cache verify FOLDER"),
    ],
)
def test_errors_name_the_mend(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_named(inputs, tmp_path, capsys):
    words = arguments(inputs, tmp_path / "cache")
    words[words.index("--dataset") + 1] = str(tmp_path / "absent.jsonl")
    assert main(["precompute", *words]) == 2
    assert "absent.jsonl does not exist" in capsys.readouterr().err


def test_quantisation_and_placement_reach_from_pretrained():
    import argparse

    from first_trl.cli.precompute import _init_kwargs, add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    base = ["--teacher", "t", "--dataset", "d", "--output-dir", "o"]
    assert _init_kwargs(parser.parse_args(base)) == {}
    options = _init_kwargs(parser.parse_args([*base, "--quantization", "4bit", "--teacher-revision", "abc"]))
    assert options["quantization_config"].load_in_4bit and not options["quantization_config"].load_in_8bit
    # One for each teacher
    assert options["revision"] == ["abc"] and set(options["device_map"]) == {""}
    assert _init_kwargs(parser.parse_args([*base, "--device-map", "auto"])) == {"device_map": "auto"}
    assert _init_kwargs(parser.parse_args([*base, "--tp-plan", "auto"])) == {"tp_plan": "auto"}
