"""Answers of several tokens: probabilities against a plain forward, for two kinds of tokenizers and paddings."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from first_trl.evaluation.predictions import MultipleChoiceResult
from first_trl.evaluation.whole_answers import evaluate_whole_answers
from tests.support.tiny import tiny_gpt2, tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")
QUESTIONS = [
    ("Which animal is red?\nAnswer:", [" the red fox", " the red hen", " a cow", " the red"], 0),
    ("Name a place where rivers meet the sea.\nAnswer:", [" delta", " deltas and estuaries"], 1),
    ("Wo fließt der Rhein, naïvely?\nAnswer:", [" Köln", " Kölner Straße", " Köl"], 2),
    ("Which animal is red and large?\nAnswer:", [" the fox", " the fox, I think"], -1),
]


def byte_pair():
    """Byte-pair encoding of bytes, as GPT-2 has it; no special token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        [text for question, choices, _ in QUESTIONS for text in (question, *choices)], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>")


def sentencepiece():
    """Pieces that begin with `▁`, byte fallback and `<s>` in front, as Llama has it."""
    letters = sorted(
        {letter for question, choices, _ in QUESTIONS for text in (question, *choices) for letter in text}
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *(set(letters) - {"ß", " "})]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "r"), ("e", "d"), ("▁r", "ed"), ("▁", "d"), ("▁d", "e")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *(a + b for a, b in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.fixture(scope="module", params=[byte_pair, sentencepiece])
def tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def rows():
    columns = dict(zip(("prompt", "choices", "gold"), map(list, zip(*QUESTIONS, strict=True)), strict=True))
    return Dataset.from_dict({"id": list("abcd"), **columns})


def padded_logprobs(model, tokenizer, prompts, choices, temperature=1.0):
    """Sum over the tokens of each choice, from one forward of all texts padded on the tokenizer's side."""
    encoded = tokenizer([p + c for p, c in zip(prompts, choices, strict=True)], return_tensors="pt", padding=True)
    mask = encoded["attention_mask"]
    # Positions count the tokens of the text, wherever it stands
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(input_ids=encoded["input_ids"], attention_mask=mask, position_ids=position_ids).logits
    logprobs = (logits / temperature).double().log_softmax(-1)
    sums = []
    for i, prompt in enumerate(prompts):
        real = mask[i].nonzero()[:, 0].tolist()
        start = len(tokenizer(prompt)["input_ids"])
        sums.append(sum(float(logprobs[i, t - 1, encoded["input_ids"][i, t]]) for t in real[start:]))
    return np.array(sums), [
        len(tokenizer(p + c)["input_ids"]) - len(tokenizer(p)["input_ids"])
        for p, c in zip(prompts, choices, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_probabilities_are_a_direct_sum(tokenizer, rows, side, build, temperature):
    model = build(vocab_size=len(tokenizer))
    model.config.max_position_embeddings = 200
    if build is tiny_gpt2:
        rows = rows.map(lambda row: {"prompt": row["prompt"][-16:]})  # its 64 positions
    tokenizer.padding_side = side
    prompts = [row["prompt"] for row in rows for _ in row["choices"]]
    choices = [choice for row in rows for choice in row["choices"]]
    sums, lengths = padded_logprobs(model, tokenizer, prompts, choices, temperature)
    assert max(lengths) > 5
    per_byte = np.array([len(choice[1:].encode()) for choice in choices])
    for length, scores in {"none": sums, "tokens": sums / lengths, "bytes": sums / per_byte}.items():
        options = {"length": length, "temperature": temperature, "batch_size": 4, "disable_tqdm": True}
        result = evaluate_whole_answers(model, tokenizer, rows, **options)
        start = 0
        for i, row in enumerate(rows):
            part = slice(start, start := start + len(row["choices"]))
            found = {
                name: result.predictions[name][i][: len(row["choices"])]
                for name in ("choice_logprobs", "choice_scores")
            }
            np.testing.assert_allclose(np.exp(found["choice_logprobs"]), np.exp(sums[part]), atol=1e-5)
            np.testing.assert_allclose(found["choice_logprobs"], sums[part], atol=1e-4)
            expected = np.exp(scores[part]) / np.exp(scores[part]).sum()
            shares = np.exp(found["choice_scores"]) / np.exp(found["choice_scores"]).sum()
            np.testing.assert_allclose(shares, expected, atol=1e-5)


def test_against_the_probability_without_the_question(tokenizer, rows):
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=200)
    result = evaluate_whole_answers(model, tokenizer, rows, length="unconditional", disable_tqdm=True)
    plain = evaluate_whole_answers(model, tokenizer, rows, disable_tqdm=True)
    for i, row in enumerate(rows):
        for j, choice in enumerate(row["choices"]):
            ids = tokenizer(row["prompt"] + choice)["input_ids"][len(tokenizer(row["prompt"])["input_ids"]) :]
            with torch.no_grad():
                lp = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0].double().log_softmax(-1)
            bare = sum(float(lp[t, token]) for t, token in enumerate(ids))
            gained = plain.predictions["choice_logprobs"][i, j] - bare
            assert result.predictions["choice_scores"][i, j] == pytest.approx(gained, abs=1e-4)


def test_report_and_predictions(rows):
    tokenizer = byte_pair()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=200)
    result = evaluate_whole_answers(model, tokenizer, rows, length="characters", disable_tqdm=True)
    p, report = result.predictions, result.report
    assert report["scoring"] == "choices" and report["length"] == "characters" and report["n"] == 3
    known = [0, 1, 2]
    answer = [int(np.argmax(p["choice_scores"][i])) for i in known]
    assert report["full_vocab"]["accuracy"] == report["options"]["accuracy"] == np.mean(np.array(answer) == [0, 1, 2])
    mass = np.exp(p["choice_logprobs"])
    # One class a choice, and one for all other texts
    brier = [np.square(mass[i] - np.eye(4)[[0, 1, 2][i]]).sum() + (1 - mass[i].sum()) ** 2 for i in known]
    assert report["full_vocab"]["brier"] == pytest.approx(np.mean(brier), rel=1e-9)
    confidences = result.confidences("choice").confidence
    np.testing.assert_allclose(confidences, [mass[i, answer[i]] for i in known])
    shares = [np.exp(p["choice_scores"][i]) / np.exp(p["choice_scores"][i]).sum() for i in known]
    np.testing.assert_allclose(result.confidences("renormalized").confidence, [s.max() for s in shares])
    assert report["options"]["nll"] == pytest.approx(
        -np.mean([np.log(s[g]) for s, g in zip(shares, known, strict=True)])
    )
    again = MultipleChoiceResult.from_rows(result.to_rows())
    assert again.report["options"] == report["options"] and again.report["scoring"] == "choices"
    with pytest.raises(ValueError, match="topk_mass"):
        result.confidences("topk")


def test_mistakes_are_refused(rows):
    tokenizer = byte_pair()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=200)
    with pytest.raises(ValueError, match="`length` must be one of none"):
        evaluate_whole_answers(model, tokenizer, rows, length="words")
    with pytest.raises(ValueError, match="`temperature`"):
        evaluate_whole_answers(model, tokenizer, rows, temperature=0.0)
    one = rows.select([0]).map(lambda row: {"choices": [" ", " red"]})
    with pytest.raises(ValueError, match="a choice has no characters"):
        evaluate_whole_answers(model, tokenizer, one, length="characters", disable_tqdm=True)
