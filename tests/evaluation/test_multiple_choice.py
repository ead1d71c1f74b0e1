"""Multiple-choice evaluation by the next token, and the post-hoc temperature fitted there."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from first_trl import evaluate_multiple_choice
from first_trl.calibration.temperature import TemperatureFit, fit_temperature
from first_trl.evaluation.multiple_choice import spelling_variants
from first_trl.evaluation.next_token import evaluation_mode
from first_trl.evaluation.posthoc import fit_posthoc_temperature
from first_trl.evaluation.predictions import MultipleChoiceResult, multiple_choice_report
from first_trl.tasks.word_tokenizer import word_tokenizer


pytestmark = pytest.mark.filterwarnings("ignore:.*(n < 300|noise|fewer than|bin).*:UserWarning")

WORDS = ["A", "B", "C", "D", "a", "b", "?", *[f"w{i}" for i in range(20)]]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


def make_model(vocab_size, seed=0, context=64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        pad_token_id=0,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


def make_dataset(n=60, seed=0, max_words=12):
    """Prompts of many lengths, 2 to 4 choices, one answer in ten hidden."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = [f"w{j}" for j in rng.integers(0, 20, size=rng.integers(1, max_words))]
        n_choices = int(rng.integers(2, 5))
        gold = -1 if i % 10 == 9 else int(rng.integers(n_choices))
        choices = [f" {letter}" for letter in "ABCD"[:n_choices]]
        rows.append({"id": f"q{i}", "prompt": " ".join([*words, "?"]), "choices": choices, "gold": gold})
    return Dataset.from_list(rows)


def reference_logits(model, tokenizer, prompts):
    """One unpadded forward per prompt."""
    with torch.no_grad(), evaluation_mode(model):
        rows = [model(torch.tensor([tokenizer(p)["input_ids"]])).logits[0, -1].float() for p in prompts]
    return torch.stack(rows).double().numpy()


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=1)[:, None]


def ece10(confidence, correct):
    bins = np.clip(np.ceil(confidence * 10).astype(int) - 1, 0, 9)
    return sum(abs((confidence - correct)[bins == b].sum()) for b in range(10)) / len(confidence)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_predictions_and_report_agree_with_single_forwards(model, tokenizer, temperature):
    dataset = make_dataset()
    result = evaluate_multiple_choice(
        model, tokenizer, dataset, batch_size=7, temperature=temperature, disable_tqdm=True
    )
    lp = log_softmax(reference_logits(model, tokenizer, dataset["prompt"]) / temperature)
    p, predictions, report = np.exp(lp), result.predictions, result.report
    letters = tokenizer.convert_tokens_to_ids(["A", "B", "C", "D"])
    gold, n_choices = np.array(dataset["gold"]), np.array([len(c) for c in dataset["choices"]])
    assert predictions["id"].tolist() == dataset["id"]
    assert predictions["gold"].tolist() == gold.tolist()
    np.testing.assert_array_equal(predictions["top_token"], lp.argmax(1))
    np.testing.assert_allclose(predictions["top_prob"], p.max(1), atol=1e-5)
    np.testing.assert_allclose(predictions["sum_squares"], np.square(p).sum(1), atol=1e-5)
    np.testing.assert_allclose(predictions["topk_mass"], np.sort(p, axis=1)[:, -5:].sum(1), atol=1e-5)
    for i in range(len(dataset)):
        np.testing.assert_allclose(
            predictions["choice_logprobs"][i, : n_choices[i]], lp[i, letters[: n_choices[i]]], atol=1e-4
        )
        assert (predictions["choice_logprobs"][i, n_choices[i] :] == -np.inf).all()

    known = np.flatnonzero(gold >= 0)
    token = np.array([letters[g] for g in gold[known]])
    correct = lp[known].argmax(1) == token
    confidence = p[known].max(1)
    full = report["full_vocab"]
    assert report["n"] == 54 and report["n_unlabelled"] == 6 and report["n_rows"] == 60 and report["n_truncated"] == 0
    assert full["accuracy"] == pytest.approx(correct.mean())
    assert full["ece"] == pytest.approx(ece10(confidence, correct), abs=1e-5)
    assert full["trust"] == pytest.approx(full["accuracy"] - full["ece"])
    assert full["nll"] == pytest.approx(-lp[known, token].mean(), abs=1e-5)
    one_hot = np.eye(len(tokenizer))[token]
    assert full["brier"] == pytest.approx(np.square(p[known] - one_hot).sum(1).mean(), abs=1e-5)
    assert full["mean_confidence"] == pytest.approx(confidence.mean(), abs=1e-5)

    nll, brier, conf, right, mass = [], [], [], [], []
    for i in known:
        q = p[i, letters[: n_choices[i]]]
        mass.append(q.sum())
        q = q / q.sum()
        nll.append(-math.log(q[gold[i]]))
        brier.append(np.square(q - np.eye(len(q))[gold[i]]).sum())
        conf.append(q.max())
        right.append(q.argmax() == gold[i])
    options = report["options"]
    assert report["option_mass"] == pytest.approx(np.mean(mass), abs=1e-5)
    assert options["accuracy"] == pytest.approx(np.mean(right))
    assert options["nll"] == pytest.approx(np.mean(nll), abs=1e-5)
    assert options["brier"] == pytest.approx(np.mean(brier), abs=1e-5)
    assert options["ece"] == pytest.approx(ece10(np.array(conf), np.array(right)), abs=1e-5)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("batch_size", [1, 8, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_do_not_matter(model, batch_size, side):
    tokenizer = word_tokenizer(WORDS)
    dataset = make_dataset()
    expected = evaluate_multiple_choice(model, tokenizer, dataset, batch_size=1, disable_tqdm=True)
    tokenizer.padding_side = side
    result = evaluate_multiple_choice(model, tokenizer, dataset, batch_size=batch_size, disable_tqdm=True)
    np.testing.assert_allclose(
        result.predictions["choice_logprobs"], expected.predictions["choice_logprobs"], atol=1e-4
    )
    np.testing.assert_array_equal(result.predictions["top_token"], expected.predictions["top_token"])


def test_row_order_does_not_matter(model, tokenizer):
    dataset = make_dataset()
    order = np.random.default_rng(1).permutation(len(dataset))
    one = evaluate_multiple_choice(model, tokenizer, dataset, disable_tqdm=True).predictions
    two = evaluate_multiple_choice(model, tokenizer, dataset.select(order), disable_tqdm=True).predictions
    assert two["id"].tolist() == one["id"][order].tolist()
    np.testing.assert_allclose(two["option_mass"], one["option_mass"][order], atol=1e-5)


def test_only_last_positions_go_through_the_head(model, tokenizer):
    dataset = Dataset.from_list(
        [{"prompt": " ".join(["w1"] * 9 + ["?"]), "choices": [" A", " B"], "gold": 0} for _ in range(4)]
    )
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    try:
        evaluate_multiple_choice(model, tokenizer, dataset, disable_tqdm=True)
    finally:
        hook.remove()
    assert shapes == [(4, 1, len(tokenizer))]


class NoLogitsToKeep(GPT2LMHeadModel):
    """A model whose forward does not know `logits_to_keep`, and with learned positions."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_other_architectures(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = NoLogitsToKeep(config)
    dataset = make_dataset(20)
    result = evaluate_multiple_choice(model, tokenizer, dataset, batch_size=6, disable_tqdm=True)
    lp = log_softmax(reference_logits(model, tokenizer, dataset["prompt"]))
    np.testing.assert_allclose(result.predictions["top_prob"], np.exp(lp.max(1)), atol=1e-5)


def test_peft_model_is_read_with_its_adapter(tokenizer):
    base = make_model(len(tokenizer), seed=1)
    dataset = make_dataset(20)
    before = evaluate_multiple_choice(base, tokenizer, dataset, disable_tqdm=True)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    result = evaluate_multiple_choice(model, tokenizer, dataset, batch_size=6, disable_tqdm=True)
    lp = log_softmax(reference_logits(model, tokenizer, dataset["prompt"]))
    np.testing.assert_allclose(result.predictions["top_prob"], np.exp(lp.max(1)), atol=1e-5)
    assert np.abs(result.predictions["top_prob"] - before.predictions["top_prob"]).max() > 1e-3


def test_modes_are_given_back_and_no_graph_is_kept(tokenizer):
    model = make_model(len(tokenizer))
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    evaluate_multiple_choice(model, tokenizer, make_dataset(10), disable_tqdm=True)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_bfloat16_model(tokenizer):
    dataset = make_dataset(40)
    full = evaluate_multiple_choice(make_model(len(tokenizer)), tokenizer, dataset, disable_tqdm=True)
    half = evaluate_multiple_choice(make_model(len(tokenizer)).bfloat16(), tokenizer, dataset, disable_tqdm=True)
    assert np.abs(half.predictions["top_prob"] - full.predictions["top_prob"]).mean() < 0.05
    assert half.predictions["top_prob"].dtype == np.float64


def test_variants_are_merged_only_when_asked(model, tokenizer):
    rows = [{"prompt": f"w{i} ?", "choices": [" A", " B"], "gold": i % 2} for i in range(20)]
    dataset = Dataset.from_list(rows)
    plain = evaluate_multiple_choice(model, tokenizer, dataset, disable_tqdm=True).predictions
    merged = evaluate_multiple_choice(
        model, tokenizer, dataset, variants=spelling_variants, disable_tqdm=True
    ).predictions
    p = np.exp(log_softmax(reference_logits(model, tokenizer, dataset["prompt"])))
    upper, lower = tokenizer.convert_tokens_to_ids(["A", "B"]), tokenizer.convert_tokens_to_ids(["a", "b"])
    np.testing.assert_allclose(np.exp(plain["choice_logprobs"]), p[:, upper], atol=1e-5)
    np.testing.assert_allclose(np.exp(merged["choice_logprobs"]), p[:, upper] + p[:, lower], atol=1e-5)
    events = p.copy()
    events[:, upper] += events[:, lower]
    events[:, lower] = 0.0
    np.testing.assert_allclose(merged["top_prob"], events.max(1), atol=1e-5)
    np.testing.assert_allclose(merged["sum_squares"], np.square(events).sum(1), atol=1e-5)
    with pytest.raises(ValueError, match="share a spelling"):
        evaluate_multiple_choice(model, tokenizer, dataset, variants=lambda choice: ["a"], disable_tqdm=True)


@pytest.mark.parametrize("limit", [None, np.int64(8)])
def test_long_prompts_lose_their_beginning_and_are_counted(tokenizer, limit):
    model = make_model(len(tokenizer), context=8)
    dataset = make_dataset(30)
    n_long = sum(len(tokenizer(p)["input_ids"]) > 8 for p in dataset["prompt"])
    assert 0 < n_long < 30
    with pytest.warns(UserWarning, match=f"{n_long} of 30 prompts are longer than 8 tokens"):
        result = evaluate_multiple_choice(model, tokenizer, dataset, max_length=limit, disable_tqdm=True)
    assert result.report["n_truncated"] == n_long == result.predictions["truncated"].sum()
    i = int(result.predictions["truncated"].argmax())
    ids = tokenizer(dataset[i]["prompt"])["input_ids"]
    with torch.no_grad(), evaluation_mode(model):
        logits = model(torch.tensor([[ids[0], *ids[-7:]]])).logits[0, -1]
    assert result.predictions["top_prob"][i] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


def test_rows_round_trip(model, tokenizer):
    result = evaluate_multiple_choice(model, tokenizer, make_dataset(), disable_tqdm=True)
    rows = json.loads(json.dumps(result.to_rows(), allow_nan=False))
    assert len(rows[0]["choice_logprobs"]) == rows[0]["n_choices"]
    again = MultipleChoiceResult.from_rows(rows)
    for name, values in result.predictions.items():
        np.testing.assert_array_equal(again.predictions[name], values)
    assert again.report == result.report == multiple_choice_report(result.predictions)


def test_definitions_of_confidence(model, tokenizer):
    dataset = make_dataset()
    result = evaluate_multiple_choice(model, tokenizer, dataset, top_k=3, disable_tqdm=True)
    p = np.exp(log_softmax(reference_logits(model, tokenizer, dataset["prompt"])))
    letters = tokenizer.convert_tokens_to_ids(["A", "B", "C", "D"])
    known = np.flatnonzero(np.array(dataset["gold"]) >= 0)
    gold = np.array(dataset["gold"])[known]
    options = [p[i, letters[: len(dataset[int(i)]["choices"])]] for i in known]
    top_is_gold = p[known].argmax(1) == np.array(letters)[gold]
    best_is_gold = np.array([q.argmax() for q in options]) == gold
    expected = {
        "full_vocab": (p[known].max(1), top_is_gold),
        "choice": ([q.max() for q in options], best_is_gold),
        "renormalized": ([q.max() / q.sum() for q in options], best_is_gold),
        "topk": (p[known].max(1) / np.sort(p[known], axis=1)[:, -3:].sum(1), top_is_gold),
    }
    for definition, (confidence, correct) in expected.items():
        read = result.confidences(definition)
        np.testing.assert_allclose(read.confidence, confidence, atol=1e-5)
        np.testing.assert_array_equal(read.correct, correct)
        assert read.definition == definition and read.dropped == {"without a gold answer": 6}
    assert result.confidences("full_vocab").report()["ece"] == result.report["full_vocab"]["ece"]
    assert result.confidences("renormalized").report()["ece"] == pytest.approx(
        result.report["options"]["ece"], abs=1e-12
    )


def with_choices(dataset, choices):
    return dataset.remove_columns("choices").add_column("choices", [choices] * len(dataset))


def test_formats_and_hidden_answers_of_a_dataset_do_not_matter(model, tokenizer):
    rows = make_dataset(10)
    expected = evaluate_multiple_choice(model, tokenizer, rows, disable_tqdm=True).report
    null = [None if gold < 0 else gold for gold in rows["gold"]]
    for same in (rows.with_format("numpy"), rows.remove_columns("gold").add_column("gold", null)):
        assert evaluate_multiple_choice(model, tokenizer, same, disable_tqdm=True).report == expected


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.remove_columns("gold"), r"lacks the columns \['gold'\]"),
        (lambda d: d.select([]), "dataset is empty"),
        (lambda d: d.map(lambda row: {"gold": -1}), "No row has a gold answer"),
        (lambda d: d.map(lambda row: {"gold": 4}), "Row 0 has gold = 4"),
        (lambda d: d.remove_columns("gold").add_column("gold", [True] * 10), "Row 0 has a boolean as `gold`"),
        (lambda d: d.remove_columns("gold").add_column("gold", [0.5] * 10), "Row 0 has 0.5 as `gold`"),
        (lambda d: d.remove_columns("gold").add_column("gold", ["A"] * 10), "Row 0 has 'A' as `gold`"),
        (lambda d: d.map(lambda row: {"choices": [" A w1", " B", " C", " D"]}), "2 tokens behind the prompt"),
        (lambda d: with_choices(d, {"label": ["A", "B"], "text": ["w1", "w2"]}), r"the keys \['label', 'text'\]"),
        (lambda d: with_choices(d, [1, 2]), r"must be a list of texts, got \[1, 2\]"),
        (lambda d: with_choices(d, None), "must be a list of texts, got None"),
        (lambda d: with_choices(d, " A"), "must be a list of texts, got ' A'"),
    ],
)
def test_bad_datasets_are_refused(model, tokenizer, change, match):
    with pytest.raises(ValueError, match=match):
        evaluate_multiple_choice(model, tokenizer, change(make_dataset(10)), disable_tqdm=True)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"temperature": 0.0}, "`temperature`"),
        ({"temperature": math.nan}, "`temperature`"),
        ({"temperature": "2"}, "got str '2'"),
        ({"temperature": np.float32(-1.0)}, "above 0, got -1"),
        ({"temperature": TemperatureFit(2.0, "nll", 1, {}, {}, [], False)}, r"give its `\.temperature`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"top_k": 0}, "`top_k`"),
        ({"max_length": 1}, "`max_length`"),
        ({"max_length": 8.0}, "`max_length`"),
    ],
)
def test_bad_options_are_refused(model, tokenizer, kwargs, match):
    with pytest.raises(ValueError, match=match):
        evaluate_multiple_choice(model, tokenizer, make_dataset(10), disable_tqdm=True, **kwargs)


def test_broken_weights_are_refused(tokenizer):
    model = make_model(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate_multiple_choice(model, tokenizer, make_dataset(10), disable_tqdm=True)


def test_tokenizer_of_another_model_is_refused(tokenizer):
    model = make_model(5)
    with pytest.raises(ValueError, match="head has 5 rows"):
        evaluate_multiple_choice(model, tokenizer, make_dataset(10), disable_tqdm=True)


# --- post-hoc temperature ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["nll", "ece"])
def test_posthoc_temperature_equals_the_fit_on_all_logits(model, tokenizer, objective):
    dataset = make_dataset(400, seed=3)
    logits = reference_logits(model, tokenizer, dataset["prompt"])
    # Every word is a choice, and the answers follow the model at T = 1.7, so that there is something to find.
    tokens = tokenizer.convert_tokens_to_ids(WORDS)
    rng = np.random.default_rng(0)
    gold = []
    for i in range(400):
        q = np.exp((logits[i, tokens] - logits[i, tokens].max()) / 1.7)
        gold.append(int(rng.choice(len(WORDS), p=q / q.sum())) if i % 20 else -1)
    dataset = Dataset.from_dict(
        {"prompt": dataset["prompt"], "choices": [[f" {w}" for w in WORDS]] * 400, "gold": gold}
    )
    known = np.flatnonzero(np.array(gold) >= 0)
    labels = np.array([tokens[gold[i]] for i in known])
    with pytest.warns(UserWarning, match="Only 380 examples"):
        expected = fit_temperature(logits[known], labels, objective=objective)
    with pytest.warns(UserWarning, match="Only 380 examples"):
        fit = fit_posthoc_temperature(model, tokenizer, dataset, objective=objective, batch_size=16, disable_tqdm=True)
    assert fit.n == 380
    tolerance = 1e-3 if objective == "nll" else 0.05
    assert fit.temperature == pytest.approx(expected.temperature, rel=tolerance)
    assert fit.raw == pytest.approx(expected.raw, abs=1e-5)
    if objective == "nll":
        assert fit.fitted == pytest.approx(expected.fitted, abs=2e-4)
    result = evaluate_multiple_choice(model, tokenizer, dataset, temperature=fit.temperature, disable_tqdm=True)
    assert result.report["full_vocab"]["nll"] == pytest.approx(fit.fitted["nll"], abs=5e-5)
    assert result.report["full_vocab"]["ece"] == pytest.approx(fit.fitted["ece"], abs=1e-4)
    assert result.report["full_vocab"]["brier"] == pytest.approx(fit.fitted["brier"], abs=5e-5)
