"""Targets over the choices through the public path: a restricted teacher, soft labels, both, and what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from first_trl import (
    FirstDistillTrainer,
    Recalibration,
    add_soft_labels,
    add_teacher_topk,
    fit_recalibration,
    restrict_to_choices,
    verify_teacher_cache,
)
from tests.support.tiny import VOCAB, run, tiny_config, tiny_llama, tiny_tokenizer


torch.set_num_threads(1)

STEPS = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def questions(count=24, answered=True, seed=0):
    """Prompts of different lengths with two to four choices."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = rng.choice(np.arange(3, VOCAB), 4 + int(rng.integers(0, 5)))
        choices = [f" w{token}" for token in rng.choice(np.arange(3, VOCAB), 2 + i % 3, replace=False)]
        gold = int(rng.integers(0, len(choices))) if answered else -1
        rows.append(
            {
                "prompt": " ".join(f"w{token}" for token in words),
                "completion": choices[gold] if answered else None,
                "choices": choices,
                "gold": gold,
            }
        )
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def cache(tokenizer, tmp_path_factory):
    """A teacher run over the rows, with an end token behind each answer, and every token kept."""
    folder = tmp_path_factory.mktemp("cache")
    return add_teacher_topk(
        questions(), tiny_llama(), tokenizer, k=VOCAB, logprob_dtype="float32", output_dir=folder, disable_tqdm=True
    )


def teacher_shares(cache, tokenizer):
    """The teacher's distribution over the choices, from the cached entries alone."""
    found = []
    for row in cache:
        tokens = [tokenizer.convert_tokens_to_ids(choice.strip()) for choice in row["choices"]]
        entries = dict(zip(row["teacher_topk_ids"][0], row["teacher_topk_logprobs"][0], strict=True))
        shares = np.exp([entries[token] for token in tokens])
        found.append((shares / shares.sum()).tolist())
    return found


def soft_rows(cache, tokenizer):
    return questions().add_column("target_probs", teacher_shares(cache, tokenizer))


def trained(args, rows, tokenizer, **options):
    trainer, recorded = run(tiny_llama(seed=1), args, rows, tokenizer, **options)
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}, recorded


def largest_difference(one, other):
    assert set(one) == set(other)
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "renormalized"},
        {"recalibration": "probability_temperature", "recalibration_value": 0.3},
        {"recalibration": "label_smoothing", "recalibration_value": 0.1, "brier_weight": 0.5, "rps_weight": 0.5},
        {"estimator": "bucket", "recalibration": "logit_temperature", "recalibration_value": 2.0},
        {"ce_weight": 0.3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "brier_weight": 1.0},
    ],
    ids=str,
)
def test_the_teachers_distribution_as_soft_labels_trains_the_same_weights(options, cache, tokenizer, tmp_path):
    """`target_probs` = the teacher over the choices, against the cached teacher restricted to the choices."""
    options = {**STEPS, **options}
    restricted, recorded = trained(tiny_config(tmp_path, restrict_to_choices=True, **options), cache, tokenizer)
    soft, _ = trained(tiny_config(tmp_path, **options), soft_rows(cache, tokenizer), tokenizer)
    untrained = dict(tiny_llama(seed=1).named_parameters())
    assert largest_difference(restricted, untrained) > 1e-2
    # The end token is supervised in one of them alone: other shapes, and six steps of Adam on their rounding. On the same
    # tokens it is bit for bit, below
    assert largest_difference(soft, restricted) < 5e-6
    assert np.isfinite([log["loss"] for log in recorded.logs if "loss" in log]).all()
    plain, _ = trained(
        tiny_config(tmp_path, **{k: v for k, v in options.items() if k not in ("brier_weight", "rps_weight")}),
        cache,
        tokenizer,
    )
    assert largest_difference(plain, restricted) > 1e-3


def test_bit_for_bit_on_the_same_tokens(cache, tokenizer, tmp_path):
    """Same rows, same batches: the end token that is no longer supervised is the only thing that could differ."""
    restricted = restrict_to_choices(cache, tokenizer)
    rows = restricted.select_columns(["input_ids", "labels"])
    rows = rows.add_column(
        "choice_ids", [[tokenizer.convert_tokens_to_ids(c.strip()) for c in row["choices"]] for row in cache]
    ).add_column("target_probs", teacher_shares(cache, tokenizer))
    one, _ = trained(tiny_config(tmp_path, **STEPS), restricted, tokenizer)
    other, _ = trained(tiny_config(tmp_path, **STEPS), rows, tokenizer)
    assert largest_difference(one, other) < 1e-7


def target_of(trainer):
    """Ids and probabilities of every row as they reach the loss, through the trainer's own data and collator."""
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(rows)
    tail = batch.get("teacher_tail_log_target")
    return batch["teacher_ids"], batch["teacher_log_target"].exp(), None if tail is None else tail.exp()


def made(rows, tokenizer, tmp_path, **options):
    return FirstDistillTrainer(tiny_llama(seed=1), tiny_config(tmp_path, **options), rows, processing_class=tokenizer)


def test_entries_stand_in_the_order_of_the_choices(cache, tokenizer, tmp_path):
    trainer = made(soft_rows(cache, tokenizer), tokenizer, tmp_path)
    ids, target, _ = target_of(trainer)
    for row, shares, own, probabilities in zip(
        questions(), teacher_shares(cache, tokenizer), ids, target, strict=True
    ):
        n = len(row["choices"])
        assert tokenizer.convert_ids_to_tokens(own[:n].tolist()) == [choice.strip() for choice in row["choices"]]
        np.testing.assert_allclose(probabilities[:n], shares, atol=1e-6)
        assert (probabilities[n:] == 0).all()


def test_nothing_is_left_to_what_is_no_choice(cache, tokenizer, tmp_path):
    trainer = made(cache, tokenizer, tmp_path, estimator="bucket", restrict_to_choices=True)
    _, target, tail = target_of(trainer)
    torch.testing.assert_close(target.sum(-1), torch.ones(len(cache)))
    assert tail.tolist() == [0.0] * len(cache)
    _, recorded = trained(
        tiny_config(tmp_path, restrict_to_choices=True, **{**STEPS, "max_steps": 60}), cache, tokenizer
    )
    outside = [log["student_mass_outside"] for log in recorded.logs if "loss" in log]
    assert outside[0] > 0.5 > 0.25 > outside[-1]


@pytest.mark.parametrize("estimator", ["topk", "bucket"])
@pytest.mark.parametrize("method", ["none", "logit_temperature"])
def test_mixed_with_a_teacher(method, estimator, cache, tokenizer, tmp_path):
    """Its share is added behind the teacher's recalibration; votes are shares of their sum."""
    rng = np.random.default_rng(1)
    votes = [rng.multinomial(5, np.ones(len(row["choices"])) / len(row["choices"])).tolist() for row in cache]
    rows = cache.add_column("target_votes", votes)
    options = {} if method == "none" else {"recalibration": method, "recalibration_value": 2.0}
    _, alone, alone_tail = target_of(
        made(cache, tokenizer, tmp_path, estimator=estimator, restrict_to_choices=True, **options)
    )
    _, mixed, tail = target_of(made(rows, tokenizer, tmp_path, estimator=estimator, soft_label_weight=0.3, **options))
    for i, counts in enumerate(votes):
        n = len(counts)
        expected = 0.7 * alone[i, :n].numpy() + 0.3 * np.array(counts) / 5
        np.testing.assert_allclose(mixed[i, :n], expected, atol=1e-6)
    if estimator == "bucket":
        assert tail.tolist() == alone_tail.tolist() == [0.0] * len(votes)
    weights, _ = trained(tiny_config(tmp_path, soft_label_weight=1.0, **STEPS, **options), rows, tokenizer)
    soft = questions().add_column("target_votes", votes)
    only, _ = trained(tiny_config(tmp_path, **STEPS), soft, tokenizer)
    assert largest_difference(weights, only) < 1e-6


def test_votes_are_shares_and_a_sure_annotator_is_no_padding(tokenizer, tmp_path):
    rows = questions(6)
    votes = [[3] + [0] * (len(row["choices"]) - 1) for row in rows]
    trainer = made(rows.add_column("target_votes", votes), tokenizer, tmp_path, brier_weight=1.0)
    rows = [trainer.train_dataset[i] for i in range(6)]
    target = trainer.data_collator(rows)["teacher_log_target"]
    for i, counts in enumerate(votes):
        assert target[i].exp()[: len(counts)].tolist() == [1.0] + [pytest.approx(0.0, abs=1e-30)] * (len(counts) - 1)
        assert target[i].isfinite().tolist() == [True] * len(counts) + [False] * (4 - len(counts))


def test_prompts_without_an_answer_train_and_hard_labels_are_refused(tokenizer, tmp_path):
    rows = questions(answered=False)
    rows = rows.add_column(
        "target_probs", [np.full(len(row["choices"]), 1 / len(row["choices"])).tolist() for row in rows]
    )
    args = tiny_config(tmp_path, brier_weight=1.0, **{**STEPS, "max_steps": 36})
    _, recorded = trained(args, rows, tokenizer)
    losses = [log["loss"] for log in recorded.logs if "loss" in log]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert "mean_token_accuracy" not in recorded.logs[0] and recorded.logs[0]["choice_score"] > 0
    with pytest.raises(ValueError, match="24 of 24 rows of the train dataset have none"):
        made(rows, tokenizer, tmp_path, ce_weight=0.5)


def test_recalibration_is_fitted_on_the_target_that_is_trained_on(cache, tokenizer, tmp_path):
    """With padding between rows of different lengths, on the choices alone."""
    soft = soft_rows(cache, tokenizer)
    with pytest.warns(UserWarning):
        fits = [
            fit_recalibration(rows, method="logit_temperature", objective="nll", n_bootstrap=0)
            for rows in (add_soft_labels(soft, tokenizer), restrict_to_choices(cache, tokenizer))
        ]
    assert fits[0].recalibration == fits[1].recalibration and fits[0].gold_coverage == 1.0

    def nll(value):
        total = 0.0
        for row in soft:
            tempered = np.array(row["target_probs"]) ** (1 / value)
            total -= np.log(tempered[row["gold"]] / tempered.sum())
        return total / len(soft)

    values = [point.value for point in fits[0].curve]
    assert nll(fits[0].recalibration.value) == pytest.approx(min(map(nll, values)), rel=1e-6)
    assert fits[0].chosen.nll == pytest.approx(nll(fits[0].recalibration.value), rel=1e-4)
    with pytest.raises(ValueError, match="of a target over the choices needs `recalibration_value`"):
        made(soft, tokenizer, tmp_path, recalibration="logit_temperature")


def test_what_fills_up_a_row_takes_no_part_in_a_rescale():
    q = np.log([[0.6, 0.3, 0.1], [0.7, 0.3, 1.0]])
    q[1, 2] = -65504.0
    for method, value in (("probability_temperature", 0.3), ("label_smoothing", 0.1), ("logit_temperature", 2.0)):
        rescale = Recalibration(method, value)
        found, tail = rescale.apply(q, np.array([-np.inf, -np.inf]), estimator="bucket")
        np.testing.assert_allclose(found[:1], rescale.apply(q[:1])[0])
        np.testing.assert_allclose(found[1:, :2], rescale.apply(q[1:, :2])[0])
        assert found[1, 2] == -np.inf and tail.tolist() == [-np.inf] * 2


def test_a_format_of_the_rows_does_not_matter(tokenizer):
    rows = Dataset.from_list(
        [{"prompt": "w3 w4 w5", "choices": [" w6", " w7"], "gold": 1, "target_probs": [0.2, 0.8]}]
    )
    assert add_soft_labels(rows.with_format("numpy"), tokenizer)[0] == add_soft_labels(rows, tokenizer)[0]


def test_rows_are_verified_like_any_cache(cache, tokenizer):
    found = add_soft_labels(soft_rows(cache, tokenizer), tokenizer)
    verify_teacher_cache(found, tokenizer, head_size=VOCAB)
    verify_teacher_cache(restrict_to_choices(cache, tokenizer), tokenizer, head_size=VOCAB)
    damaged = found.map(lambda row: {"teacher_topk_ids": [row["teacher_topk_ids"][0][::-1]]}, features=found.features)
    with pytest.raises(ValueError, match=r"Row 0 .*digest mismatch"):
        verify_teacher_cache(damaged, tokenizer)
    with pytest.raises(ValueError, match="captured with tokenizer"):
        verify_teacher_cache(found, tiny_tokenizer(prefix="other"))


def test_choices_outside_the_cached_entries_count_as_nothing(tokenizer, tmp_path):
    few = add_teacher_topk(
        questions(), tiny_llama(), tokenizer, k=12, logprob_dtype="float32", output_dir=tmp_path, disable_tqdm=True
    )
    tokens = [[tokenizer.convert_tokens_to_ids(c.strip()) for c in row["choices"]] for row in few]
    kept = [set(row["teacher_topk_ids"][0]) for row in few]
    some = [i for i, ids in enumerate(tokens) if kept[i] & set(ids)]
    absent = sum(token not in kept[i] for i in some for token in tokens[i])
    assert absent and len(some) < len(few)
    with pytest.warns(UserWarning, match=rf"{absent} of {sum(len(tokens[i]) for i in some)} choices"):
        found = restrict_to_choices(few.select(some), tokenizer)
    verify_teacher_cache(found, tokenizer)
    with pytest.raises(ValueError, match=r"none of the . choices is among its 12 cached entries"):
        restrict_to_choices(few, tokenizer)


@pytest.mark.parametrize("layout", ["padded", "padding_free", "packed", "chunks", "accumulated"])
def test_scores_do_not_depend_on_how_rows_are_batched(layout, cache, tokenizer, tmp_path):
    layouts = {
        "padded": {}, "padding_free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True, "max_length": 64}, "chunks": {"loss_chunk_size": 3},
        "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6},
    }  # fmt: skip
    options = {"restrict_to_choices": True, "brier_weight": 0.7, "rps_weight": 1.3}
    gradients = []
    for extra in ({}, layouts[layout]):
        args = tiny_config(tmp_path, **{"per_device_train_batch_size": 24, **options, **extra})
        gradients.append(trained(args, cache, tokenizer)[1].gradients[0])
    assert max(float(value.abs().max()) for value in gradients[0].values()) > 1e-2
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-4)


def test_loss_and_gradient_of_the_trainer_equal_a_naive_one(cache, tokenizer, tmp_path):
    args = tiny_config(
        tmp_path, per_device_train_batch_size=24, per_device_eval_batch_size=5, restrict_to_choices=True,
        brier_weight=0.7, rps_weight=1.3, ce_weight=0.2,
    )  # fmt: skip
    student = tiny_llama(seed=1).train()
    total = 0
    for row, shares in zip(cache, teacher_shares(cache, tokenizer), strict=True):
        at = next(i for i, label in enumerate(row["labels"]) if label != -100)
        log_p = student(torch.tensor([row["input_ids"]])).logits[0, at - 1].log_softmax(-1)
        tokens = [tokenizer.convert_tokens_to_ids(choice.strip()) for choice in row["choices"]]
        own, t = log_p[tokens].softmax(-1), torch.tensor(shares)
        kl = sum(a * (a.log() - log_p[token]) for a, token in zip(t, tokens, strict=True))
        brier = sum((a - b) ** 2 for a, b in zip(own, t, strict=True))
        ranked = sum((own[:j].sum() - t[:j].sum()) ** 2 for j in range(1, len(t))) / (len(t) - 1)
        total = total + 0.8 * kl - 0.2 * log_p[row["labels"][at]] + 0.7 * brier + 1.3 * ranked
    loss = total / len(cache)
    loss.backward()
    trainer, recorded = run(tiny_llama(seed=1), args, cache, tokenizer, eval_dataset=cache)
    assert recorded.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(recorded.gradients[0][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    held_out = trainer.evaluate()
    parts = 0.8 * held_out["eval_kl"] + 0.2 * held_out["eval_cross_entropy"] + held_out["eval_choice_score"]
    assert held_out["eval_loss"] == pytest.approx(parts, rel=1e-5)


def test_a_lora_student_learns_the_soft_labels(cache, tokenizer, tmp_path):
    args = tiny_config(tmp_path, **{**STEPS, "max_steps": 30}, brier_weight=1.0, rps_weight=1.0)
    _, recorded = trained(
        args, soft_rows(cache, tokenizer), tokenizer, peft_config=LoraConfig(target_modules="all-linear")
    )
    assert all("lora" in name for name in recorded.gradients[0])
    losses = [log["loss"] for log in recorded.logs if "loss" in log]
    assert losses[-1] < 0.7 * losses[0]


def test_the_card_names_the_soft_labels(cache, tokenizer, tmp_path):
    soft = soft_rows(cache, tokenizer)
    made(soft, tokenizer, tmp_path / "alone").create_model_card()
    line = "| Soft labels | `target_probs` of the training rows, over the choices: in place of a teacher |"
    assert line in (tmp_path / "alone" / "README.md").read_text()
    both = cache.add_column("target_probs", soft["target_probs"][:])
    made(both, tokenizer, tmp_path / "both", soft_label_weight=0.25).create_model_card()
    assert (
        "over the choices: 25 % of the target, the rest is the teacher's"
        in (tmp_path / "both" / "README.md").read_text()
    )


def three(**columns):
    """A sound row, the one to break, a sound row."""
    row = {"prompt": "w3 w4 w5", "choices": [" w6", " w7", " w8"], "gold": 1, "target_probs": [0.2, 0.5, 0.3]}
    return [row, {**row, **columns}, row]


def votes(values):
    rows = [{**row, "target_votes": [1, 2, 0]} for row in three()]
    rows[1]["target_votes"] = values
    return [{name: value for name, value in row.items() if name != "target_probs"} for row in rows]


def tokens(**columns):
    row = {
        "input_ids": [3, 4, 5, 6],
        "labels": [-100] * 3 + [6],
        "choice_ids": [6, 7, 8],
        "target_probs": [0.2, 0.5, 0.3],
    }
    return [row, {**row, **columns}, row]


NAN, INF = float("nan"), float("inf")
BAD = {
    "negative": (three(target_probs=[-0.1, 0.8, 0.3]), "Row 1: .*negative probability -0.1"),
    "sum": (three(target_probs=[0.2, 0.5, 0.2]), "Row 1: .*adds up to 0.9, not to 1"),
    "length": (three(target_probs=[0.5, 0.5]), "Row 1: .*has 2 numbers for 3 choices"),
    "NaN": (three(target_probs=[0.2, NAN, 0.8]), "Row 1: .*probability that is nan"),
    "infinite": (three(target_probs=[0.2, INF, 0.3]), "Row 1: .*probability that is inf"),
    "empty": (three(target_probs=[]), "Row 1: `target_probs` is empty"),
    "null": (three(target_probs=None), "Row 1: `target_probs` is missing"),
    "a null among them": (three(target_probs=[0.5, None, 0.5]), "Row 1: `target_probs` holds None, which is no number"),
    "texts": ([{**row, "target_probs": ["0.2", "0.5", "0.3"]} for row in three()], "Row 0: .*holds '0.2', which is no number"),
    "no vote": (votes([0, 0, 0]), "Row 1: .*No annotator voted"),
    "part of a vote": (votes([0.5, 1.5, 1.0]), r"Row 1: .*Votes are counts \(0, 1, 2, ...\)"),
    "negative vote": (votes([-1, 2, 2]), r"Row 1: .*Votes are counts"),
    "a choice of two tokens": (three(choices=[" w6 w7", " w7", " w8"]), "row 1: the answer ' w6 w7' is 2 tokens"),
    "a choice twice": (three(choices=[" w6", " w6", " w8"]), "row 1: the answers ' w6' and ' w6' are the same token"),
    "choices of the Hub": (
        [{**row, "choices": {"label": ["A"], "text": [" w6"]}} for row in three()], r"Row 0: .*the keys \['label', 'text'\]"
    ),
    "no choices": (three(choices=[]), "Row 1: `choices` must be a list of texts"),
    "gold outside": (three(gold=3), "Row 1: `gold` is 3, and there are 3 choices"),
    "gold that is a flag": ([{**row, "gold": True} for row in three()], "Row 0: `gold` is True, and there are 3 choices"),
    "no answer position": (tokens(labels=[-100] * 4), "Row 1: it has no answer position"),
    "another position": (tokens(labels=[-100, -100, 5, 6]), "Row 1: its first supervised token 5 is none of the choices"),
    "a whole text": (tokens(labels=[3, 4, 5, 6]), "Row 1: it has 3 supervised positions"),
    "an id twice": (tokens(choice_ids=[6, 6, 8]), "Row 1: `choice_ids` must be the distinct token ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_refused_by_name(case, tokenizer, tmp_path):
    rows, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        made(Dataset.from_list(rows), tokenizer, tmp_path)
    sound = [rows[0], rows[2]] if not message.startswith("Row 0") else three()
    made(Dataset.from_list(sound), tokenizer, tmp_path)


def test_options_and_columns_that_do_not_go_together(cache, tokenizer, tmp_path):
    soft = soft_rows(cache, tokenizer)
    both = cache.add_column("target_probs", soft["target_probs"][:])
    cases = [
        (both, {}, "soft labels beside a cached teacher: set `soft_label_weight`"),
        (cache, {"soft_label_weight": 0.5}, "has no `target_probs` or `target_votes`"),
        (soft, {"soft_label_weight": 0.5}, "has no cached teacher"),
        (cache, {"brier_weight": 0.5}, "`brier_weight` is a score among the choices"),
        (soft, {"top_k": 2}, "`top_k=2` would leave choices out"),
        (soft, {"estimator": "sampled"}, "needs draws from the teacher"),
        (soft.add_column("target_votes", [[1]] * len(soft)), {}, "the dataset has both. Remove one"),
        (soft.remove_columns("choices"), {}, "needs the columns `prompt` and `choices`"),
        (soft.to_iterable_dataset(), {}, "is a stream, and targets over the choices are made of all rows"),
    ]
    for rows, options, message in cases:
        with pytest.raises(ValueError, match=message):
            made(rows, tokenizer, tmp_path, **options)
    with pytest.raises(ValueError, match="`restrict_to_choices` has no meaning with `top_k=2`"):
        tiny_config(tmp_path, restrict_to_choices=True, top_k=2)
    with pytest.raises(ValueError, match="use `restrict_to_choices`, which keeps both"):
        add_soft_labels(both, tokenizer)


def test_concatenated_with_rows_of_a_teacher(cache, tokenizer, tmp_path):
    """Questions that only annotators answered beside those that a teacher answered."""
    restricted = restrict_to_choices(cache, tokenizer)
    together = concatenate_datasets([restricted, add_soft_labels(soft_rows(cache, tokenizer), tokenizer)])
    trainer = made(together, tokenizer, tmp_path)
    ids, target, _ = target_of(trainer)
    assert len(ids) == 48 and torch.equal(ids[:24], ids[24:])
    torch.testing.assert_close(target[:24], target[24:], atol=1e-6, rtol=0)
