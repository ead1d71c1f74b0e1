"""What the package takes from TRL beyond its public API is there, in one file, and behaves as the package needs it."""

import ast
import inspect
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import first_trl
from first_trl import _trl_compat
from tests.support.tiny import tiny_llama, tiny_tokenizer


PACKAGE = Path(first_trl.__file__).parent


@pytest.mark.parametrize("name", _trl_compat.__all__)
def test_every_name_is_there(name):
    assert callable(getattr(_trl_compat, name))


@pytest.mark.parametrize(("name", "parameters"), _trl_compat.OVERRIDDEN_METHODS.items())
def test_overridden_methods_take_what_they_took(name, parameters):
    assert tuple(inspect.signature(getattr(SFTTrainer, name)).parameters) == ("self", *parameters)


def test_attributes_are_set(tmp_path):
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, gradient_checkpointing=False)
    rows = Dataset.from_dict({"text": ["w3 w4 w5"] * 4})
    trainer = SFTTrainer(tiny_llama(0), args, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer._set_signature_columns_if_needed()
    assert isinstance(trainer._signature_columns, list)
    assert set(trainer._metrics) == {"train", "eval"} and trainer._total_train_tokens == 0
    assert set(_trl_compat.ATTRIBUTES) <= set(vars(trainer))


def test_borrowed_tokenisation_equals_the_trainers(tmp_path):
    rows = Dataset.from_list([{"prompt": "w3 w4", "completion": " w5 w6"}, {"prompt": "w7", "completion": " w8"}])
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, shuffle_dataset=False)
    tokenizer = tiny_tokenizer()
    expected = SFTTrainer(tiny_llama(0), args, train_dataset=rows, processing_class=tokenizer).train_dataset
    found = _trl_compat.prepare_as_sft_trainer(
        rows,
        tokenizer,
        completion_only_loss=True,
        chat_template=None,
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
    )
    for column in ("input_ids", "labels"):
        assert found[column][:] == expected[column][:]


def test_no_other_file_reaches_into_trl():
    reaching = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_trl_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                module = node.module or ""
                private = any(part.startswith("_") for part in module.split("."))
                if module.startswith("trl.") or (private and module.split(".")[0] in ("accelerate", "datasets")):
                    reaching.append(f"{path.relative_to(PACKAGE)}: {module}")
                if module == "trl":
                    assert {alias.name for alias in node.names} <= set(trl.__all__) | set(dir(trl))
    assert reaching == []
