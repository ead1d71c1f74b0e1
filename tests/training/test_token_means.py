"""Held-out numbers are means over tokens: at any batch size, in any layout, for `evaluate` and for `predict`."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from first_trl import FirstDistillTrainer
from first_trl.training.sft import FirstSFTTrainer
from tests.support.tiny import tiny_cache, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def uneven_rows():
    """One label in some rows and twenty in others, so that a mean of batch means is another number."""
    rows = tiny_rows(11, longest=30, seed=3)
    for row in rows[::2]:
        row["labels"] = [-100] * (len(row["labels"]) - 1) + row["input_ids"][-1:]
    for row in rows[1::2]:
        row["labels"] = [-100, *row["input_ids"][1:]]
    return rows


def true_nll(model, rows):
    total, count, correct = 0.0, 0, 0
    for row in rows:
        with torch.no_grad():
            logprobs = model.double()(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"]):
            if position > 0 and label != -100:
                total -= float(logprobs[position - 1, label])
                correct += int(logprobs[position - 1].argmax() == label)
                count += 1
    model.float()
    return total / count, correct / count


def sft_config(folder, **options):
    return SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, disable_tqdm=True,
        max_steps=1, save_strategy="no", **options,
    )  # fmt: skip


LAYOUTS = {
    "1": {"per_device_eval_batch_size": 1},
    "4": {"per_device_eval_batch_size": 4},
    "padding free": {"per_device_eval_batch_size": 3, "padding_free": True, "max_length": None},
    "packed": {"per_device_eval_batch_size": 2, "packing": True, "max_length": 40},
    "whole batches alone in training": {"per_device_eval_batch_size": 3, "dataloader_drop_last": True},
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_negative_log_likelihood_of_sft(layout, streaming, smoothing, tokenizer, tmp_path):
    """Also of a model that is trained with smoothed labels: what epochs are chosen by is the likelihood."""
    student, rows = tiny_llama(seed=1), uneven_rows()
    expected, accuracy = true_nll(student, rows)
    held_out = Dataset.from_list(rows)
    trainer = FirstSFTTrainer(
        student,
        args=sft_config(tmp_path, label_smoothing_factor=smoothing, **LAYOUTS[layout]),
        train_dataset=held_out,
        eval_dataset=held_out.to_iterable_dataset() if streaming else held_out,
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.parametrize("estimator, ce_weight", [("bucket", 0.0), ("topk", 0.3), ("renormalized", 0.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_held_out_loss_is_that_of_one_batch(layout, estimator, ce_weight, tokenizer, tmp_path):
    cache = tiny_cache(tiny_llama(), tokenizer, uneven_rows(), k=5)
    found = []
    for options in ({"per_device_eval_batch_size": 11}, LAYOUTS[layout]):
        args = tiny_config(tmp_path, estimator=estimator, ce_weight=ce_weight, **options)
        trainer = FirstDistillTrainer(
            tiny_llama(seed=1), args, cache, eval_dataset=cache, processing_class=tokenizer
        )  # fmt: skip
        found.append(trainer.evaluate())
    one, other = found
    assert one["eval_loss"] == pytest.approx(
        (1 - ce_weight) * one["eval_kl"] + ce_weight * one["eval_cross_entropy"], rel=1e-5
    )
    for name in ("loss", "kl", "cross_entropy", "entropy", "teacher_entropy", "mean_token_accuracy"):
        assert other[f"eval_{name}"] == pytest.approx(one[f"eval_{name}"], rel=1e-5), name


def test_predict_gives_the_parts_that_evaluate_gives(tokenizer, tmp_path):
    cache = tiny_cache(tiny_llama(), tokenizer, uneven_rows(), k=5)
    args = tiny_config(tmp_path, per_device_eval_batch_size=4, shuffle_dataset=True)
    trainer = FirstDistillTrainer(tiny_llama(seed=1), args, cache, eval_dataset=cache, processing_class=tokenizer)
    evaluated = trainer.evaluate()
    predicted = trainer.predict(cache)
    parts = {name.removeprefix("eval_"): value for name, value in evaluated.items() if "_per_second" not in name}
    for name in ("loss", "kl", "cross_entropy", "teacher_entropy", "entropy", "student_mass_outside"):
        assert predicted.metrics[f"test_{name}"] == pytest.approx(parts[name], rel=1e-5), name
    assert {name.removeprefix("test_") for name in predicted.metrics} >= set(parts) - {"runtime", "epoch"}
    # In the order of the rows, and the next evaluation is its own
    longest = max(len(row["input_ids"]) for row in cache)
    assert predicted.predictions.shape[:2] == (11, longest)
    for row, labels in zip(cache, predicted.label_ids, strict=True):
        assert labels[: len(row["labels"])][1:].tolist() == row["labels"][1:]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)


def test_predict_on_labels_alone(tokenizer, tmp_path):
    student, rows = tiny_llama(seed=1), uneven_rows()
    expected, _ = true_nll(student, rows)
    cache = tiny_cache(tiny_llama(), tokenizer, tiny_rows(), k=5)
    trainer = FirstDistillTrainer(student, tiny_config(tmp_path), cache, processing_class=tokenizer)
    predicted = trainer.predict(Dataset.from_list(rows), metric_key_prefix="held_out")
    assert predicted.metrics["held_out_loss"] == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(predicted.predictions).any()


def test_selection_ranks_by_the_likelihood(tokenizer, tmp_path):
    """The epoch that is kept is the best by the exact mean, which a mean of batch means would rank otherwise."""
    rows = Dataset.from_list(uneven_rows())
    trainer = FirstSFTTrainer(
        tiny_llama(seed=1),
        args=SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, num_train_epochs=3,
            per_device_train_batch_size=4, per_device_eval_batch_size=2, learning_rate=3e-2, eval_strategy="epoch",
            save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
            gradient_checkpointing=False,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    curve = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(curve)
    # Logged values are rounded
    assert true_nll(trainer.model, rows)[0] == pytest.approx(min(curve), rel=1e-4)
