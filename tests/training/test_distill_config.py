"""Options that have no meaning are refused when the config is built."""

import dataclasses
import re

import pytest
from trl import SFTConfig

from first_trl import FirstDistillConfig
from first_trl.training.options import DistillOptions, TrainerOptions


CPU = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}

REFUSED = {
    "estimator": ({"estimator": "forward_kl"}, "`estimator` must be one of"),
    "recalibration": ({"recalibration": "platt"}, "`recalibration` must be one of"),
    "ce_weight": ({"ce_weight": 1.5}, r"`ce_weight` must be in \[0, 1\]"),
    "top_k": ({"top_k": 0}, "`top_k` must be at least 1"),
    "loss_chunk_size": ({"loss_chunk_size": 0}, "`loss_chunk_size` must be at least 1"),
    "value without method": ({"recalibration_value": 0.5}, "has no effect with `recalibration='none'`"),
    "zero c": ({"recalibration": "probability_temperature", "recalibration_value": 0.0}, "finite temperature above 0"),
    "negative T": ({"recalibration": "logit_temperature", "recalibration_value": -1.0}, "finite temperature above 0"),
    "delta of one": ({"recalibration": "label_smoothing", "recalibration_value": 1.0}, "0 <= delta < 1"),
    "infinite T": ({"recalibration": "logit_temperature", "recalibration_value": float("inf")}, "finite"),
    "NaN c": ({"recalibration": "probability_temperature", "recalibration_value": float("nan")}, "finite"),
    "infinite delta": ({"recalibration": "log_label_smoothing", "recalibration_value": float("inf")}, "finite delta"),
    "student temperature": ({"student_temperature": 0.3}, "has no effect with estimator='topk'"),
    "zero student temperature": (
        {"estimator": "probability_softmax", "student_temperature": 0.0},
        "`student_temperature` must be finite and above 0",
    ),
    "sampled and rescaled": (
        {"estimator": "sampled", "recalibration": "logit_temperature", "recalibration_value": 2.0},
        "which cannot be rescaled",
    ),
    "sampled and cut": ({"estimator": "sampled", "top_k": 3}, "leaving draws out would bias"),
    "token_dropout of one": ({"token_dropout": 1.0}, r"`token_dropout` must be in \[0, 1\)"),
    "negative token_dropout": ({"token_dropout": -0.1}, r"`token_dropout` must be in \[0, 1\)"),
    "NaN token_dropout": ({"token_dropout": float("nan")}, r"`token_dropout` must be in \[0, 1\)"),
    "token without dropout": ({"token_dropout_id": 3}, "has no effect with `token_dropout=0`"),
    "negative token": ({"token_dropout": 0.1, "token_dropout_id": -1}, "must be an id of the vocabulary"),
    "loss_type": ({"loss_type": "dft"}, "change a loss this trainer replaces"),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.1}, "change a loss this trainer replaces"),
    "wrapped packing": ({"packing": True, "packing_strategy": "wrapped"}, "the teacher scored each one alone"),
    "unverified": ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "a cache nobody verified"),
    "dispatch": ({"accelerator_config": {"dispatch_batches": True}}, "cut collated batches between processes"),
    "split": ({"accelerator_config": {"split_batches": True}}, "cut collated batches between processes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        FirstDistillConfig(**CPU, **options)


def test_defaults():
    config = FirstDistillConfig(**CPU)
    assert (config.estimator, config.recalibration, config.recalibration_value) == ("topk", "none", None)
    assert (config.ce_weight, config.top_k, config.loss_chunk_size) == (0.0, None, None)
    assert config.student_temperature is None
    assert (config.token_dropout, config.token_dropout_id) == (0.0, None)


def test_every_own_field_is_documented_alike_for_the_api_and_the_command_line():
    def words(text):
        return re.sub(r"\W+", " ", text).strip()

    for cls in (DistillOptions, TrainerOptions):
        for name in cls.__annotations__:
            field = FirstDistillConfig.__dataclass_fields__[name]
            assert f"{name} (`" in cls.__doc__
            assert words(field.metadata["help"]) in words(cls.__doc__)
            assert name not in {field.name for field in dataclasses.fields(SFTConfig)}
