"""The cache of a committee, where positions that its teachers disagree on count less."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from first_trl import add_teacher_topk, restrict_to_choices, verify_teacher_cache
from first_trl.losses import sparse_kl_reference
from tests.support.tiny import run, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_list(tiny_rows(8))


@pytest.fixture(scope="module")
def cache(rows, tokenizer):
    return add_teacher_topk(
        rows, [tiny_llama(3), tiny_llama(4)], tokenizer, k=6, logprob_dtype="float32", disable_tqdm=True
    )


def by_hand(cache, weight: float) -> tuple[float, float]:
    """Weighted and plain mean divergence of the student before its first step."""
    student, weighted, plain, count = tiny_llama(0), 0.0, 0.0, 0
    for row in cache:
        with torch.no_grad():
            logits = student(torch.tensor([row["input_ids"]])).logits[0].double()
        at = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        for i, t in enumerate(at):
            given = np.array(row["teacher_topk_logprobs"][i], np.float64)
            rest = np.array([row["teacher_tail_logprob"][i]], np.float64)
            total = np.logaddexp.reduce(np.concatenate([given, rest]))
            found = sparse_kl_reference(
                logits[t - 1 : t], torch.tensor([row["teacher_topk_ids"][i]]), torch.tensor((given - total)[None]),
                tail_log_target=torch.tensor(rest - total), estimator="bucket",
            )  # fmt: skip
            weighted += np.exp(-weight * row["teacher_mutual_information"][i]) * found.loss.item()
            plain += found.loss.item()
            count += 1
    return weighted / count, plain / count


def test_the_loss_is_the_weighted_mean_and_eval_loss_the_plain_one(cache, tokenizer, tmp_path):
    options = {"estimator": "bucket", "disagreement_weight": 4.0}
    args = tiny_config(tmp_path, **options)
    trainer, _ = run(tiny_llama(0), args, cache, tokenizer, eval_dataset=cache)
    weighted, plain = by_hand(cache, 4.0)
    assert weighted < 0.99 * plain
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logs["loss"] == pytest.approx(weighted, rel=1e-4) and logs["kl"] == pytest.approx(plain, rel=1e-4)
    fresh, _ = run(tiny_llama(0), tiny_config(tmp_path, **options, learning_rate=0.0), cache, tokenizer)
    assert fresh.evaluate(cache)["eval_loss"] == pytest.approx(plain, rel=1e-4)


def test_weights_stay_on_their_positions_when_rows_are_cut_and_shuffled(cache, tokenizer, tmp_path):
    cut = {"max_length": 6, "truncation_mode": "keep_start", "estimator": "bucket"}
    recorded = []
    for given in (cache, cache.select(range(7, -1, -1))):
        _, recorder = run(tiny_llama(0), tiny_config(tmp_path, **cut, disagreement_weight=4.0), given, tokenizer)
        recorded.append(recorder)
    plain = run(tiny_llama(0), tiny_config(tmp_path, **cut), cache, tokenizer)[1]
    one, other, without = (dict(found.gradients[0]) for found in (*recorded, plain))
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-7)
    assert any(not torch.allclose(gradient, without[name], rtol=1e-3) for name, gradient in one.items())


def test_targets_over_the_choices_are_weighted_too(tokenizer, tmp_path):
    """By what the teachers disagree at the answer; the end token behind it has another weight, and is not trained on."""
    rows = [
        {"prompt": f"w{5 + i} w6 w{9 + i}", "completion": " w3", "choices": [" w3", " w4", " w8"], "gold": 0}
        for i in range(8)
    ]
    cache = add_teacher_topk(
        Dataset.from_list(rows),
        [tiny_llama(3), tiny_llama(4)],
        tokenizer,
        k=24,
        logprob_dtype="float32",
        disable_tqdm=True,
    )
    expected, student = 0.0, tiny_llama(0)
    for row in cache:
        entries = dict(zip(row["teacher_topk_ids"][0], row["teacher_topk_logprobs"][0], strict=True))
        target = torch.tensor([entries[token] for token in (3, 4, 8)]).log_softmax(-1)
        at = next(t for t, label in enumerate(row["labels"]) if label != -100)
        with torch.no_grad():
            own = student(torch.tensor([row["input_ids"]])).logits[0, at - 1].log_softmax(-1)[[3, 4, 8]]
        divergence = (target.exp() * (target - own)).sum().item()
        expected += np.exp(-4.0 * row["teacher_mutual_information"][0]) * divergence / len(rows)
    args = tiny_config(tmp_path, restrict_to_choices=True, disagreement_weight=4.0)
    _, recorder = run(student, args, cache, tokenizer)
    assert recorder.logs[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert expected < 0.99 * recorder.logs[0]["kl"]


@pytest.mark.parametrize("restricted", ["before", "after", None])
def test_rows_of_one_teacher_beside_those_of_a_committee(tokenizer, tmp_path, restricted):
    """They are trained on as they are; what teachers disagree by is not known of them."""
    rows = [
        {"prompt": f"w{5 + i} w6 w{9 + i}", "completion": " w3", "choices": [" w3", " w4", " w8"], "gold": 0}
        for i in range(8)
    ]
    caches = [
        add_teacher_topk(Dataset.from_list(some), teacher, tokenizer, k=24, logprob_dtype="float32", disable_tqdm=True)
        for some, teacher in ((rows[:4], tiny_llama(3)), (rows[4:], [tiny_llama(3), tiny_llama(4)]))
    ]
    if restricted == "before":
        caches = [restrict_to_choices(cache, tokenizer) for cache in caches]
    both = concatenate_datasets(caches)
    verify_teacher_cache(both, tokenizer)
    options = {"max_steps": 1, "restrict_to_choices": restricted == "after"}
    _, recorder = run(tiny_llama(0), tiny_config(tmp_path, **options), both, tokenizer)
    parts = [run(tiny_llama(0), tiny_config(tmp_path, **options), part, tokenizer)[1] for part in caches]
    assert recorder.logs[0]["loss"] == pytest.approx(np.mean([part.logs[0]["loss"] for part in parts]), rel=1e-4)
    with pytest.raises(ValueError, match="4 rows of the train dataset do not have: they are of one teacher"):
        run(tiny_llama(0), tiny_config(tmp_path, disagreement_weight=1.0, **options), both, tokenizer)
    # In place of a value that was there, null is noticed
    lost = both.to_dict()
    lost["teacher_mutual_information"][5] = None
    with pytest.raises(ValueError, match=r"[Rr]ow 5"):
        verify_teacher_cache(Dataset.from_dict(lost, both.features), tokenizer)


def test_a_cache_of_one_teacher_is_refused(rows, tokenizer, tmp_path):
    single = add_teacher_topk(rows, tiny_llama(3), tokenizer, k=6, disable_tqdm=True)
    with pytest.raises(ValueError, match=r"`disagreement_weight=1\.0` weighs by `teacher_mutual_information`"):
        run(tiny_llama(0), tiny_config(tmp_path, disagreement_weight=1.0), single, tokenizer)
    with pytest.raises(ValueError, match="disagreement_weight"):
        tiny_config(tmp_path, disagreement_weight=-1.0)
