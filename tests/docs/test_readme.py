"""The README's code is run as it stands, with folders of the names it uses."""

import json
from pathlib import Path

import pytest

from tests.support.readme import README, block
from tests.support.tiny import tiny_llama, tiny_tokenizer


def test_python_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    for name, seed in (("my-teacher-sft", 0), ("my-student", 1)):
        tiny_llama(seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    row = json.dumps({"prompt": "w3 w4 w5", "completion": " w6 w7"})
    for split in ("train", "validation"):
        Path(f"{split}.jsonl").write_text("\n".join([row] * 16))
    code = block("In Python")
    assert len(code.strip().splitlines()) <= 15
    with pytest.warns(UserWarning, match="below 1000"):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert list((tmp_path / "cache" / "data").glob("train-*.parquet"))


def test_calibration_example():
    exec(compile(block("Calibration of anything"), "README.md", "exec"), {"__name__": "__main__"})


def test_exactly_two_setup_commands():
    commands = [line for line in README.splitlines() if line.startswith("python3.11 -m venv")]
    assert len(commands) == 2
    assert "first-trl run recipes/quickstart.yaml" in commands[0]
    assert "pytest" in commands[1]
