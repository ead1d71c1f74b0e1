"""Token dropout through the trainers: what the model reads, that targets stay, and that runs can be repeated."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from first_trl import FirstDistillTrainer, TokenDropoutSFTTrainer
from first_trl.training.token_dropout import (
    TokenDropoutMixin,
    drop_tokens,
    replacement_token,
)
from tests.support.tiny import VOCAB, run, tiny_cache, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)
SPECIAL = {0, 1, 2}
UNK = 2


class Reader:
    """Keeps what the model is called with in training and in evaluation."""

    def __init__(self, model):
        self.train, self.eval = [], []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        if "labels" in kwargs and kwargs["input_ids"].shape[1] > 0:
            (self.train if module.training else self.eval).append(
                {name: value.clone() for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
            )


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def cache(tokenizer):
    rows = [*tiny_rows(15), {"input_ids": [5, 1, 2, 0, 6, 7], "labels": [-100] * 4 + [6, 7]}]
    return tiny_cache(tiny_llama(), tokenizer, rows, k=5)


def read(cache, tokenizer, folder, **options):
    """Batches of a training run, and of an evaluation after it."""
    student = tiny_llama(seed=1)
    reader = Reader(student)
    trainer = FirstDistillTrainer(
        student, tiny_config(folder, **options), cache, eval_dataset=cache, processing_class=tokenizer
    )
    # The head is compared with the model's own logits once; that is no training
    trainer._student_checked = True
    trainer.train()
    trainer.evaluate()
    return reader


BATCHES = {
    "padded": {},
    "multiple of": {"pad_to_multiple_of": 8},
    "padding free": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "packed": {"packing": True, "max_length": 24},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("batches", BATCHES)
def test_only_unsupervised_words_are_replaced_and_targets_stay(batches, cache, tokenizer, tmp_path):
    options = {"max_steps": 2, "learning_rate": 0.0, "estimator": "bucket", **BATCHES[batches]}
    plain = read(cache, tokenizer, tmp_path, **options)
    dropped = read(cache, tokenizer, tmp_path, token_dropout=0.5, **options)
    assert len(plain.train) == len(dropped.train) == 2 * options.get("gradient_accumulation_steps", 1)
    replaced = kept = 0
    for before, after in zip(plain.train, dropped.train, strict=True):
        assert set(before) == set(after)
        for name in before:
            if name != "input_ids":
                torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)
        tokens, read_tokens = before["input_ids"], after["input_ids"]
        free = (before["labels"] == -100) & ~torch.isin(tokens, torch.tensor(sorted(SPECIAL)))
        assert torch.equal(read_tokens[~free], tokens[~free])
        changed = read_tokens != tokens
        assert set(read_tokens[changed].tolist()) == {UNK}
        replaced, kept = replaced + int(changed.sum()), kept + int((free & ~changed).sum())
    assert replaced > 10 and kept > 10
    for before, after in zip(plain.eval, dropped.eval, strict=True):
        assert torch.equal(before["input_ids"], after["input_ids"])
    assert plain.eval


def test_rate_and_independence():
    """20,000 free positions: the count of replaced ones, and of neighbours replaced together, is that of the rate."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((100, 200), 7)
    labels = torch.full_like(tokens, -100)
    for rate in (0.05, 0.15, 0.6):
        out = drop_tokens(
            tokens, labels, None, rate=rate, replacement=3, special_ids=torch.tensor([0]), generator=generator
        )
        changed = (out == 3).double()
        n = changed.numel()
        assert abs(float(changed.mean()) - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
        pairs = float((changed[:, 1:] * changed[:, :-1]).mean())
        assert abs(pairs - rate**2) < 6 * (rate**2 / n) ** 0.5
    assert int((tokens == 7).sum()) == n  # not in place
    mask = torch.ones_like(tokens)
    mask[:, 100:] = 0
    out = drop_tokens(
        tokens,
        labels,
        mask,
        rate=0.9,
        replacement=3,
        special_ids=torch.tensor([], dtype=torch.int64),
        generator=generator,
    )
    assert (out[:, 100:] == 7).all() and (out[:, :100] == 3).any()


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first, second):
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_rate_zero_changes_nothing_bit_for_bit(cache, tokenizer, tmp_path):
    options = {"max_steps": 3, "learning_rate": 1e-2}
    plain, _ = run(tiny_llama(seed=1), tiny_config(tmp_path, **options), cache, tokenizer)
    zero, _ = run(tiny_llama(seed=1), tiny_config(tmp_path, token_dropout=0.0, **options), cache, tokenizer)
    dropped, _ = run(tiny_llama(seed=1), tiny_config(tmp_path, token_dropout=0.3, **options), cache, tokenizer)
    assert_same(weights(plain), weights(zero))
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(dropped).values(), strict=True))


def test_runs_repeat_and_seeds_differ(cache, tokenizer, tmp_path):
    options = {"max_steps": 3, "learning_rate": 1e-2, "token_dropout": 0.3, "per_device_train_batch_size": 4}
    runs = [read(cache, tokenizer, tmp_path, seed=seed, **options).train for seed in (5, 5, 6)]
    for a, b in zip(runs[0], runs[1], strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(runs[0], runs[2], strict=True))
    # The same rows come again and are read with other words missing
    whole = read(cache, tokenizer, tmp_path, **{**options, "max_steps": 2, "per_device_train_batch_size": 16}).train
    assert torch.equal(whole[0]["labels"], whole[1]["labels"])
    assert not torch.equal(whole[0]["input_ids"], whole[1]["input_ids"])


def test_batches_of_one_optimizer_step_drop_other_words(tokenizer, tmp_path):
    same = [{"input_ids": [*range(3, 23), 5], "labels": [-100] * 20 + [5]}] * 4
    cache = tiny_cache(tiny_llama(), tokenizer, same, k=5)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "token_dropout": 0.5}
    batches = read(cache, tokenizer, tmp_path, **options).train
    assert len({tuple(batch["input_ids"][0].tolist()) for batch in batches}) == 4


def test_data_parallel_ranks_draw_apart_and_tensor_parallel_ranks_together():
    def draw(rank, tp_size):
        trainer = SimpleNamespace(
            state=SimpleNamespace(global_step=3),
            args=SimpleNamespace(seed=0),
            accelerator=SimpleNamespace(process_index=rank),
            get_tp_size=lambda: tp_size,
            _dropout_batch=(-1, 0),
        )
        return tuple(torch.rand(8, generator=TokenDropoutMixin._dropout_generator(trainer)).tolist())

    assert len({draw(rank, 1) for rank in range(4)}) == 4
    assert draw(0, 2) == draw(1, 2) != draw(2, 2) == draw(3, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_equals_the_uninterrupted_run(workers, cache, tokenizer, tmp_path):
    def train(folder, steps, resume=None):
        args = tiny_config(
            tmp_path / folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps,
            save_strategy="steps", save_steps=3, train_sampling_strategy="random", learning_rate=1e-2,
            token_dropout=0.4, dataloader_num_workers=workers,
        )  # fmt: skip
        trainer = FirstDistillTrainer(tiny_llama(seed=1), args, cache, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer)

    whole = train("whole", 6)
    train("parts", 3)
    assert_same(whole, train("parts", 6, resume=str(tmp_path / "parts" / "checkpoint-3")))


def test_the_global_random_state_is_left_alone(cache, tokenizer, tmp_path):
    """Dropout of the model and shuffling draw from it: with and without token dropout they must draw the same."""
    states = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            states[-1].append(torch.get_rng_state())

    for rate in (0.0, 0.3):
        states.append([])
        args = tiny_config(tmp_path, token_dropout=rate, max_steps=2)
        FirstDistillTrainer(
            tiny_llama(seed=1), args, cache, processing_class=tokenizer, callbacks=[Watch()]
        ).train()  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def sft_config(folder, **options):
    return SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, disable_tqdm=True,
        max_steps=3, save_strategy="no", per_device_train_batch_size=4, learning_rate=1e-2, **options,
    )  # fmt: skip


def test_plain_sft_with_token_dropout(tokenizer, tmp_path):
    rows = Dataset.from_list(tiny_rows(12))

    def train(cls, **options):
        student = tiny_llama(seed=1)
        reader = Reader(student)
        trainer = cls(student, sft_config(tmp_path), train_dataset=rows, processing_class=tokenizer, **options)
        trainer.train()
        trainer.evaluate(rows)
        return trainer, reader

    plain, before = train(SFTTrainer)
    zero, _ = train(TokenDropoutSFTTrainer)
    assert_same(weights(plain), weights(zero))
    _, after = train(TokenDropoutSFTTrainer, token_dropout=0.5, token_dropout_id=9)
    counts = Counter()
    for a, b in zip(before.train, after.train, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        changed = a["input_ids"] != b["input_ids"]
        assert (a["labels"][changed] == -100).all() and (a["attention_mask"][changed] == 1).all()
        counts.update(b["input_ids"][changed].tolist())
    assert set(counts) == {9} and counts[9] > 5
    for a, b in zip(before.eval, after.eval, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    _, again = train(TokenDropoutSFTTrainer, token_dropout=0.5, token_dropout_id=9)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(after.train, again.train, strict=True))


def test_replacement_token(cache, tmp_path):
    tokenizer = tiny_tokenizer()
    assert replacement_token(tokenizer) == UNK and replacement_token(tokenizer, 7) == 7
    tokenizer.unk_token = None
    assert replacement_token(tokenizer) == 0
    tokenizer.mask_token = "w5"
    assert replacement_token(tokenizer) == 5
    tokenizer.mask_token = tokenizer.pad_token = None
    assert replacement_token(tokenizer) == 1
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Name a token with `token_dropout_id`"):
        replacement_token(tokenizer)
    with pytest.raises(ValueError, match=f"`token_dropout_id={VOCAB}` is no id of the vocabulary of {VOCAB} tokens"):
        FirstDistillTrainer(
            tiny_llama(),
            tiny_config(tmp_path, token_dropout=0.1, token_dropout_id=VOCAB),
            copy.copy(cache),
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(ValueError, match=r"`token_dropout` must be in \[0, 1\)"):
        TokenDropoutSFTTrainer(tiny_llama(), sft_config(tmp_path), token_dropout=1.5)
