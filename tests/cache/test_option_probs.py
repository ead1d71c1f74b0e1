"""A teacher whose tokenizer is another one: its distribution over the options, matched by option."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from first_trl import add_option_probs, add_teacher_topk, evaluate_option_order, evaluate_whole_answers, get_task
from first_trl.tasks.word_tokenizer import word_tokenizer
from first_trl.teacher.backends import TransformersBackend
from first_trl.teacher.option_probs import OptionBackend
from tests.support.tiny import VOCAB, run, tiny_config, tiny_llama, tiny_tokenizer


THINGS = ["cork", "anvil", "brick", "feather"]
WORDS = ["which", "floats", "?", "Answer", "Choices:", "Answer:", *THINGS, *"ABCD", *(f"({x})" for x in "ABCD")]
WORDS += [f"item{i}" for i in range(20)]
TASK = get_task("custom")


@pytest.fixture(scope="module")
def tokenizer():
    """The teacher's: the words in another order than any student's, and more of them."""
    return word_tokenizer(["of", "a", "kind", *reversed(WORDS)])


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return tiny_llama(5, vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.csv"
    lines = [
        f"which item{i} floats ?,{','.join(THINGS)},A" if i % 3 else f"which item{i} floats ?,cork,brick,,,B"
        for i in range(12)
    ]
    path.write_text("question,A,B,C,D,answer\n" + "\n".join(lines))
    return TASK.load("train", path=str(path)).dataset


def shares(teacher, tokenizer, prompt, choices, temperature=1.0):
    scores = []
    for choice in choices:
        ids, start = tokenizer(prompt + choice)["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            lp = (teacher(torch.tensor([ids])).logits[0] / temperature).double().log_softmax(-1)
        scores.append(sum(float(lp[t - 1, ids[t]]) for t in range(start, len(ids))))
    return np.exp(scores) / np.exp(scores).sum()


@pytest.mark.parametrize("scoring", ["token", "choices"])
def test_probabilities_are_the_teachers_over_the_options(teacher, tokenizer, rows, scoring):
    hidden = rows.map(lambda row, i: {"gold": -1 if i % 2 else row["gold"]}, with_indices=True)
    found = add_option_probs(hidden, teacher, tokenizer, scoring=scoring, temperature=1.3, disable_tqdm=True)
    assert found.column_names == [*hidden.column_names, "target_probs"] and found["gold"][:] == hidden["gold"][:]
    assert {len(row["target_probs"]) for row in found} == {2, 4}
    for row in found:
        expected = shares(teacher, tokenizer, row["prompt"], row["choices"], 1.3)
        np.testing.assert_allclose(row["target_probs"], expected, atol=1e-5)
        assert sum(row["target_probs"]) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="hold 'target_probs' already"):
        add_option_probs(found, teacher, tokenizer)


def test_the_teacher_may_read_the_question_in_its_own_way(teacher, tokenizer, rows):
    """The student answers with letters; the teacher is shown no letters and answers with the texts."""
    asked = rows.map(
        lambda row: {"prompt": f"{row['question']} Answer:", "choices": [f" {text}" for text in row["options"]]}
    )
    found = add_option_probs(
        rows, teacher, tokenizer, asked=asked, scoring="choices", length="tokens", disable_tqdm=True
    )
    assert found["choices"][:] == rows["choices"][:]
    same = evaluate_whole_answers(teacher, tokenizer, asked, length="tokens", disable_tqdm=True)
    for i, row in enumerate(found):
        expected = np.exp(same.predictions["choice_scores"][i])
        np.testing.assert_allclose(row["target_probs"], (expected / expected.sum())[: len(row["choices"])], atol=1e-9)


def test_averaged_over_orders(teacher, tokenizer, rows):
    found = add_option_probs(rows, teacher, tokenizer, task=TASK, permutations=24, disable_tqdm=True)
    wanted = evaluate_option_order(teacher, tokenizer, TASK, rows, permutations=24, disable_tqdm=True).averaged
    for row, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(row["target_probs"], expected, atol=1e-9)
    turned = rows.map(lambda row: dict(zip(("prompt", "choices", "options"), _turned(row), strict=True)))
    again = add_option_probs(turned, teacher, tokenizer, task=TASK, permutations=24, disable_tqdm=True)
    for row, other in zip(found, again, strict=True):
        np.testing.assert_allclose(other["target_probs"], row["target_probs"][::-1], atol=1e-6)


def _turned(row):
    example = TASK.reorder(row, range(len(row["options"]))[::-1])
    return example.prompt, list(example.choices), list(example.options)


def test_other_questions_are_refused(teacher, tokenizer, rows):
    with pytest.raises(ValueError, match="11 rows for 12"):
        add_option_probs(rows, teacher, tokenizer, asked=rows.select(range(11)))
    with pytest.raises(ValueError, match="Row 0 has the id"):
        add_option_probs(rows, teacher, tokenizer, asked=rows.select(range(11, -1, -1)))
    fewer = Dataset.from_list([{"prompt": row["prompt"], "choices": row["choices"][:1]} for row in rows])
    with pytest.raises(ValueError, match="Row 0 has 2 choices, and 1 in `asked`"):
        add_option_probs(rows, teacher, tokenizer, asked=fewer)
    with pytest.raises(ValueError, match="`permutations` needs `task`"):
        add_option_probs(rows, teacher, tokenizer, permutations=3)


def test_the_same_tokens_with_other_choices_are_refused(teacher, tokenizer, rows):
    """Both rows would get the distribution of the later one."""
    asked = rows.select([0, 1])
    student = Dataset.from_dict(
        {"input_ids": [[3, 4]] * 2, "labels": [[-100, 4]] * 2, "choice_ids": [[4, 5], [4, 6, 7, 8]]}
    )
    with pytest.raises(ValueError, match="Row 1 has the tokens of an earlier row and other choices"):
        OptionBackend(TransformersBackend(teacher), tokenizer, student, asked, disable_tqdm=True)
    apart = student.map(lambda row, i: {"input_ids": [3 + i, 4]}, with_indices=True)
    OptionBackend(TransformersBackend(teacher), tokenizer, apart, asked, disable_tqdm=True)


@pytest.mark.parametrize("column", ["question", "gold"])
def test_rows_without_ids_in_another_order_are_refused(column, teacher, tokenizer, rows):
    rows = rows.select_columns(["prompt", "choices", column]).add_column("options", [["yes", "no"]] * 12)
    with pytest.raises(ValueError, match=f"Row 0 has the {column} .* use the same order"):
        add_option_probs(rows, teacher, tokenizer, asked=rows.select(range(11, -1, -1)))


def test_an_order_that_nothing_tells_is_warned_of(teacher, tokenizer, rows, recwarn):
    bare = rows.select_columns(["prompt", "choices"])
    # As the answer of one side is unknown, and an `id` stands for a question in other words
    for asked in (bare, rows.map(lambda row: {"gold": -1, "question": "", "prompt": f"a {row['prompt']}"})):
        ours = rows if asked is not bare else bare
        assert add_option_probs(ours, teacher, tokenizer, asked=asked, disable_tqdm=True)["target_probs"][0]
    assert not [warning for warning in recwarn if "`asked`" in str(warning.message)]
    other = bare.map(lambda row: {"prompt": f"a {row['prompt']}"})
    with pytest.warns(UserWarning, match="Nothing tells whether the rows of `asked` are in the order"):
        add_option_probs(bare, teacher, tokenizer, asked=other, disable_tqdm=True)


def other_tokenizer(tokenizer, seed=0):
    """The words of a tokenizer under other ids, among words that it does not know; and its ids in theirs."""
    words = list(tokenizer.get_vocab())
    order = np.random.default_rng(seed).permutation([*words, *(f"x{i}" for i in range(9))]).tolist()
    vocabulary = {word: i for i, word in enumerate(order)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return other, {tokenizer.get_vocab()[word]: vocabulary[word] for word in words}


def test_a_student_learns_what_the_same_teacher_in_its_own_vocabulary_teaches(tmp_path):
    """One teacher in two vocabularies: soft labels by option, against its cache by id restricted to the choices."""
    own = tiny_tokenizer()
    other, ids = other_tokenizer(own)
    teacher, moved = tiny_llama(7), tiny_llama(8, vocab_size=len(other))
    weights = moved.state_dict() | {k: v for k, v in teacher.state_dict().items() if "layers" in k or "norm" in k}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name][list(ids.values())] = teacher.state_dict()[name][list(ids)]
    moved.load_state_dict(weights)
    rng = np.random.default_rng(1)
    rows = []
    for i in range(24):
        choices = [f" w{token}" for token in rng.choice(np.arange(3, VOCAB), 2 + i % 3, replace=False)]
        prompt = " ".join(f"w{token}" for token in rng.choice(np.arange(3, VOCAB), 5 + i % 2))
        rows.append({"prompt": prompt, "completion": choices[0], "choices": choices, "gold": 0})
    rows = Dataset.from_list(rows)
    options = {"k": VOCAB, "logprob_dtype": "float32", "disable_tqdm": True}
    cache = add_teacher_topk(rows, teacher, own, output_dir=tmp_path / "cache", **options)
    soft = add_option_probs(rows, moved, other, disable_tqdm=True)
    steps = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "brier_weight": 0.3}
    trained = []
    for data, chosen in ((cache, {"restrict_to_choices": True}), (soft, {})):
        trainer, _ = run(tiny_llama(1), tiny_config(tmp_path, **steps, **chosen), data, own)
        trained.append(torch.cat([value.detach().flatten() for value in trainer.model.parameters()]))
    start = torch.cat([value.detach().flatten() for value in tiny_llama(1).parameters()])
    assert float((trained[0] - start).abs().max()) > 1e-2
    assert float((trained[0] - trained[1]).abs().max()) < 1e-5
