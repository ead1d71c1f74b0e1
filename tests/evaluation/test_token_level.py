"""Token-level evaluation: against one float64 forward a row, and what is scored, cut and refused."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from first_trl import add_teacher_topk
from first_trl.calibration.temperature import fit_temperature
from first_trl.evaluation.posthoc import fit_posthoc_temperature
from first_trl.evaluation.supervised import read_supervised_rows, supervised_logits
from first_trl.evaluation.token_level import evaluate_token_level, row_intervals
from first_trl.tasks import tokenize_rows
from tests.support.tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_rows, tiny_tokenizer


pytestmark = pytest.mark.filterwarnings("ignore:.*(examples|improve).*:UserWarning")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_list([{"id": f"r{i}", **row} for i, row in enumerate(tiny_rows(30, longest=20))])


def scored(row):
    return [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]


def naive(model, rows, temperature=1.0):
    """Log-probabilities `[N, V]` and targets of every scored position: full logits, float64, one row at a time."""
    model = copy.deepcopy(model).double().eval()
    logprobs, targets = [], []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        for t in scored(row):
            logprobs.append((logits[t - 1] / temperature).log_softmax(-1).numpy())
            targets.append(row["labels"][t])
    return np.array(logprobs), np.array(targets)


def gemma(vocab_size=VOCAB):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=8, initializer_range=0.3, final_logit_softcapping=2.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def lora():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2, gemma, lora])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_every_score_is_that_of_full_logits(make_model, temperature, tokenizer, rows):
    model = make_model()
    result = evaluate_token_level(model, tokenizer, rows, batch_size=7, temperature=temperature, disable_tqdm=True)
    logprobs, targets = naive(model, rows, temperature)
    p, report = result.predictions, result.report
    probabilities = np.exp(logprobs)
    right = probabilities.argmax(1) == targets
    every = np.arange(len(targets))
    assert report["n"] == len(targets) == sum(len(scored(row)) for row in rows)
    assert (p["row"].tolist(), p["position"].tolist()) == tuple(
        map(list, zip(*[(i, t) for i, row in enumerate(rows) for t in scored(row)], strict=True))
    )
    np.testing.assert_array_equal(p["top_token"], probabilities.argmax(1))
    np.testing.assert_array_equal(p["top_is_gold"], right)
    np.testing.assert_allclose(p["top_prob"], probabilities.max(1), atol=1e-5)
    np.testing.assert_allclose(p["gold_logprob"], logprobs[every, targets], atol=1e-4)
    np.testing.assert_allclose(p["sum_squares"], np.square(probabilities).sum(1), atol=1e-5)
    scores = report["full_vocab"]
    assert scores["accuracy"] == pytest.approx(right.mean())
    assert scores["nll"] == pytest.approx(-logprobs[every, targets].mean(), abs=1e-5)
    one_hot = np.eye(VOCAB)[targets]
    assert scores["brier"] == pytest.approx(np.square(probabilities - one_hot).sum(1).mean(), abs=1e-5)
    confidence = probabilities.max(1)
    bins = np.clip(np.ceil(confidence * 10).astype(int) - 1, 0, 9)
    ece = sum(abs((confidence - right)[bins == b].sum()) for b in range(10)) / len(right)
    assert scores["ece"] == pytest.approx(ece, abs=1e-5)
    assert scores["trust"] == pytest.approx(right.mean() - ece, abs=1e-5)
    assert sum(scores["calibration"]["bins"]["count"]) == len(right)


def test_the_order_of_rows_and_the_chunks_change_nothing(tokenizer, rows):
    model = tiny_llama()
    read = read_supervised_rows(model, tokenizer, rows)
    found = np.full((len(read.row), VOCAB), np.nan)
    seen = []
    chunks = supervised_logits(model, read, batch_size=4, disable_tqdm=True, desc="", chunk_size=3)
    for index, logits in chunks:
        assert len(logits) <= 3
        found[index] = logits.log_softmax(-1).numpy()
        seen.append(len(index))
    assert max(seen) == 3 and sum(seen) == len(read.row)
    np.testing.assert_allclose(found, naive(model, rows)[0], atol=1e-4)


def test_the_backbone_never_makes_the_logits_of_a_batch(tokenizer, rows):
    model = tiny_llama()
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    evaluate_token_level(model, tokenizer, rows, batch_size=30, disable_tqdm=True)
    hook.remove()
    longest = max(len(row["input_ids"]) for row in rows)
    assert max(sizes) == sum(len(scored(row)) for row in rows) < len(rows) * longest


def test_first_tokens_masks_and_prompts_without_answer_are_not_scored(tokenizer):
    rows = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "has_gold": True},
            {"input_ids": [5, 6, 7], "labels": [5, -100, -100], "has_gold": True},
            {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "has_gold": True},
            {"input_ids": [5, 6, 1], "labels": [-100, -100, 1], "has_gold": False},
        ]
    )
    result = evaluate_token_level(tiny_llama(), tokenizer, rows, disable_tqdm=True)
    places = list(zip(result.predictions["row"].tolist(), result.predictions["position"].tolist(), strict=True))
    assert places == [(0, 1), (0, 2), (2, 1), (2, 3)]
    assert result.predictions["gold_token"].tolist() == [6, 7, 6, 8]
    report = result.report
    assert (report["n"], report["n_rows"], report["n_unlabelled"], report["n_truncated"]) == (4, 4, 2, 0)
    assert report["unit"] == "token"
    assert result.predictions["id"].tolist() == ["0", "0", "2", "2"]


def test_fillers_of_a_teacher_cache_are_not_scored(tokenizer):
    """Its column has another name, and null, as behind other rows that have none, means that there is an answer."""
    answers = [{"prompt": "w3 w9", "completion": " w4 w6"}, {"prompt": "w5 w7", "completion": None}]
    cache = add_teacher_topk(Dataset.from_list(answers), tiny_llama(), tokenizer, k=2, disable_tqdm=True)
    both = concatenate_datasets(
        [
            cache.select_columns(["input_ids", "labels", "teacher_has_gold"]),
            cache.select([0]).select_columns(["input_ids", "labels"]),
        ]
    )
    result = evaluate_token_level(tiny_llama(1), tokenizer, both, disable_tqdm=True)
    assert result.predictions["row"].tolist() == [0, 0, 0, 2, 2, 2] and result.report["n_unlabelled"] == 1


@pytest.mark.parametrize("numbers", [[0, 1], [0.0, None]])
def test_has_gold_in_numbers_is_read_as_such(tokenizer, numbers):
    """As CSV and pandas make them."""
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[-100, 6, 7]] * 2, "has_gold": numbers})
    result = evaluate_token_level(tiny_llama(1), tokenizer, rows, disable_tqdm=True)
    assert result.predictions["row"].tolist() == [1, 1] and result.report["n_unlabelled"] == 1


def test_a_dataset_without_rows_is_refused(tokenizer):
    rows = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6], "has_gold": True}]).select([])
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate_token_level(tiny_llama(1), tokenizer, rows, disable_tqdm=True)


def test_long_rows_lose_their_end_and_are_counted(tokenizer):
    rows = Dataset.from_list(
        [
            {"input_ids": list(range(3, 13)), "labels": [-100] * 5 + list(range(8, 13))},
            {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
            {"input_ids": list(range(3, 13)), "labels": [-100] * 8 + [11, 12]},
        ]
    )
    model = tiny_llama()
    with pytest.warns(UserWarning, match="2 of 3 rows are longer than 7 tokens and lose their end, 5 supervised"):
        result = evaluate_token_level(model, tokenizer, rows, max_length=7, disable_tqdm=True)
    report = result.report
    assert (report["n"], report["n_rows"], report["n_truncated"], report["n_cut"]) == (3, 3, 2, 5)
    assert report["n_unlabelled"] == 1
    whole = evaluate_token_level(model, tokenizer, rows, disable_tqdm=True)
    kept = [0, 1, 5]  # positions 5 and 6 of the first row, the second row
    np.testing.assert_allclose(result.predictions["gold_logprob"], whole.predictions["gold_logprob"][kept], atol=1e-5)
    # The context of the model is the default bound
    short = tiny_llama(max_position_embeddings=7)
    with pytest.warns(UserWarning, match="longer than 7 tokens"):
        assert evaluate_token_level(short, tokenizer, rows, disable_tqdm=True).report["n_cut"] == 5


def test_rows_of_a_task_and_back_as_plain_rows():
    from first_trl.tasks.word_tokenizer import word_tokenizer

    tokenizer = word_tokenizer(["question", "is", "blue", "red", "why"])
    examples = {"id": ["a", "b"], "prompt": ["question why", "why"], "completion": [" is blue", " red"]}
    split = tokenize_rows(Dataset.from_dict(examples), tokenizer, append_eos=True)
    result = evaluate_token_level(tiny_llama(), tokenizer, split.dataset, disable_tqdm=True)
    plain = result.to_rows()
    assert [row["id"] for row in plain] == ["a", "a", "a", "b", "b"]
    words = tokenizer.convert_ids_to_tokens([row["gold_token"] for row in plain])
    assert words == ["is", "blue", "<eos>", "red", "<eos>"]
    assert Dataset.from_list(plain).num_rows == 5
    assert type(plain[0]["top_prob"]) is float and type(plain[0]["top_is_gold"]) is bool
    confidences = result.confidences()
    assert confidences.report()["ece"] == pytest.approx(result.report["full_vocab"]["ece"])
    assert confidences.extras["nll"] == result.report["full_vocab"]["nll"]


@pytest.mark.parametrize("objective", ["nll", "ece"])
def test_the_posthoc_temperature_is_that_of_all_logits(objective, tokenizer):
    model = tiny_llama()
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (120, 1))
    # Text drawn from the model at T = 1.6, which is what a fit has to find
    for _ in range(11):
        with torch.no_grad():
            probabilities = (model(ids).logits[:, -1] / 1.6).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    logprobs, targets = naive(model, rows)
    expected = fit_temperature(logprobs, targets, objective=objective)
    fit = fit_posthoc_temperature(model, tokenizer, rows, objective=objective, disable_tqdm=True)
    assert fit.n == len(targets)
    assert fit.temperature == pytest.approx(expected.temperature, rel=1e-3)
    assert fit.temperature == pytest.approx(1.6, rel=0.15)
    scaled = evaluate_token_level(model, tokenizer, rows, temperature=fit.temperature, disable_tqdm=True)
    assert scaled.report["full_vocab"][objective] == pytest.approx(fit.fitted[objective], abs=1e-3)


def test_intervals_resample_rows_not_tokens():
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(40), 50)
    # All tokens of a row are right or wrong together: there are 40 observations, not 2000
    right = np.repeat(rng.random(40) < 0.5, 50)
    predictions = {
        "row": row,
        "top_prob": np.full(2000, 0.5),
        "top_is_gold": right,
        "gold_logprob": np.log(np.full(2000, 0.5)),
        "sum_squares": np.full(2000, 0.5),
    }
    low, high = row_intervals(predictions)["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.15)
    independent = row_intervals(predictions | {"row": np.arange(2000)})
    assert independent["accuracy"][1] - independent["accuracy"][0] < (high - low) / 5
    assert row_intervals(predictions)["nll"] == pytest.approx((np.log(2), np.log(2)))
    low, high = row_intervals(predictions)["ece"]
    assert low <= abs(right.mean() - 0.5) <= high
    assert row_intervals(predictions, seed=3) == row_intervals(predictions, seed=3)
    with pytest.raises(ValueError, match="level"):
        row_intervals(predictions, level=1.0)


def test_what_is_refused(tokenizer, rows):
    model = tiny_llama()

    def fails(match, data, **options):
        with pytest.raises(ValueError, match=match):
            evaluate_token_level(options.pop("model", model), tokenizer, data, disable_tqdm=True, **options)

    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    fails("lacks the columns", rows.remove_columns("labels"))
    fails("Row 1: `labels`", Dataset.from_list([good, {"input_ids": [5, 6, 7], "labels": [-100, 7, 7]}]))
    fails("Row 0: `labels`", Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6]}]))
    fails("another model's tokenizer", Dataset.from_list([{"input_ids": [5, VOCAB], "labels": [-100, VOCAB]}]))
    fails("nothing to score", Dataset.from_list([{"input_ids": [5, 6], "labels": [5, -100]}]))
    fails("`batch_size`", rows, batch_size=0)
    fails("`temperature`", rows, temperature=0.0)
    fails("`max_length` must be at least 2", rows, max_length=1)
    broken = tiny_llama()
    broken.lm_head.weight.data[3] = torch.nan
    fails("NaN or infinite", rows, model=broken)


def test_a_model_that_does_more_behind_its_backbone_is_refused(tokenizer, rows):
    class Louder(type(tiny_llama())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2.0
            return output

    model = tiny_llama()
    model.__class__ = Louder
    with pytest.raises(ValueError, match="does something this evaluation does not know"):
        evaluate_token_level(model, tokenizer, rows, disable_tqdm=True)


def test_train_mode_is_given_back(tokenizer, rows):
    model = tiny_llama().train()
    evaluate_token_level(model, tokenizer, rows, disable_tqdm=True)
    assert model.training


def test_a_pretrained_model_on_text(stories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories)
    texts = ["Once upon a time there was a little girl named Lily.", "She loved to play outside in the park."]
    data = Dataset.from_dict({"prompt": ["", ""], "completion": texts})
    rows = tokenize_rows(data, tokenizer, supervise="all").dataset
    report = evaluate_token_level(model, tokenizer, rows, disable_tqdm=True).report
    assert report["full_vocab"]["accuracy"] > 0.4
    assert 0.0 < report["full_vocab"]["nll"] < 3.0
