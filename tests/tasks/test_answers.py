"""Every answer is one token behind its prompt, or an error says why not."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from first_trl.tasks import answer_token_ids, answer_token_ids_of_rows, get_task
from first_trl.tasks.answers import choice_token_ids
from first_trl.tasks.word_tokenizer import word_tokenizer
from tests.conftest import DATA
from tests.support.families import family_tokenizer


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the tokenizers are not at {DATA}")
BEFORE_LETTER = {"template": "{question}\nAnswer Choices:\n{choices}\nAnswer: (", "completion": "{letter}"}


def word_level(words: list[str], single: str, unk: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>" if unk else None
    )


def load(name: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DATA / name)


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_special_tokens_around_the_prompt_do_not_hide_the_answer(single):
    tokenizer = word_level(["what", "now", "yes", "no"], single)
    assert answer_token_ids(tokenizer, "what now", [" yes", " no"]) == [5, 6]


def test_unknown_and_shared_tokens_are_refused():
    tokenizer = word_level(["what", "yes", "no"], "<s> $A")
    with pytest.raises(ValueError, match=r"answer ' maybe' is the unknown token '<unk>'"):
        answer_token_ids(tokenizer, "what", [" yes", " maybe"])
    with pytest.raises(ValueError, match="appending the answer 'yes' changes the tokens of the prompt"):
        answer_token_ids(tokenizer, "what", [" no", "yes"])
    with pytest.raises(ValueError, match="' yes' and '  yes' are the same token 4"):
        answer_token_ids(tokenizer, "what", [" yes", "  yes"])
    with pytest.raises(ValueError, match="answer ' yes no' is 2 tokens"):
        answer_token_ids(tokenizer, "what", [" yes no", " no"])
    with pytest.raises(ValueError, match="there are no choices"):
        answer_token_ids(tokenizer, "what", [])
    with pytest.raises(ValueError, match="a choice is empty"):
        answer_token_ids(tokenizer, "what", [" yes", ""])


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_the_space_belongs_to_the_letter_or_to_the_prompt(sentencepiece):
    """Where a space stands decides whether an answer is a token of its own; what merges is refused."""
    tokenizer = family_tokenizer(sentencepiece=sentencepiece)
    space = "▁" if sentencepiece else "Ġ"

    def tokens(prompt, choices):
        return tokenizer.convert_ids_to_tokens(answer_token_ids(tokenizer, prompt, choices))

    assert tokens("Which river?\nAnswer:", [" A", " B"]) == [f"{space}A", f"{space}B"]
    assert tokens("Which river?\nAnswer: (", ["A", "B"]) == ["A", "B"]
    with pytest.raises(ValueError, match=r"answer 'A' changes the tokens of the prompt, which ends in '.*Answer: '"):
        answer_token_ids(tokenizer, "Which river?\nAnswer: ", ["A", "B"])


@needs_data
def test_gpt2_takes_the_space_into_the_token():
    tokenizer = load("gpt2_tokenizer")
    letters = [" A", " B", " C", " D", " E"]
    assert answer_token_ids(tokenizer, "x\nAnswer:", letters) == [317, 347, 327, 360, 412]
    assert answer_token_ids(tokenizer, "x\nAnswer: (", [letter.strip() for letter in letters]) == [32, 33, 34, 35, 36]
    assert answer_token_ids(tokenizer, "x\nAnswer:", [" yes", " no"]) == [3763, 645]


@needs_data
def test_gpt2_prompt_that_ends_in_a_space_merges_with_the_answer():
    # "Answer: " ends in the token of one space, "Answer: A" has the token " A" there: no boundary is left.
    with pytest.raises(ValueError, match=r"changes the tokens of the prompt, which ends in '.*Answer: '"):
        answer_token_ids(load("gpt2_tokenizer"), "x\nAnswer: ", ["A", "B"])


@needs_data
def test_words_of_several_tokens_are_refused_with_the_mend():
    with pytest.raises(ValueError, match=r"'Ġsuburban' \+ 'Ġdevelopment'.*letters instead of words"):
        answer_token_ids(load("gpt2_tokenizer"), "x\nAnswer:", [" bank", " suburban development"])


@needs_data
@pytest.mark.parametrize("name", ["tiny_llama/stories260K", "tiny_llama/babyllama105_a"])
def test_sentencepiece_like_tokenizers_need_the_prompt_to_end_before_the_letter(name):
    tokenizer = load(name)
    path = str(DATA / "commonsense_qa")
    rows = get_task("commonsense_qa").load("validation", path=path, limit=50).dataset
    with pytest.raises(
        ValueError, match=r"answer ' A' is 2 tokens .*'▁' \+ 'A'.*end the prompt just before the letter"
    ):
        answer_token_ids_of_rows(tokenizer, rows)
    rows = get_task("commonsense_qa", **BEFORE_LETTER).load("validation", path=path).dataset
    ids = answer_token_ids_of_rows(tokenizer, rows)
    assert len(ids) == 1221
    assert {tuple(row) for row in ids} == {tuple(tokenizer.convert_tokens_to_ids(list("ABCDE")))}


@needs_data
def test_byte_fallback_makes_a_strange_answer_several_tokens():
    with pytest.raises(ValueError, match=r"answer '漢' is 3 tokens .*'<0xE6>'"):
        answer_token_ids(load("tiny_llama/stories260K"), "Answer: (", ["A", "漢"])


@needs_data
def test_all_rows_are_checked_and_batches_agree_with_single_rows():
    tokenizer = load("gpt2_tokenizer")
    rows = get_task("arc").load("test", path=str(DATA / "arc_easy"), limit=150).dataset
    ids = answer_token_ids_of_rows(tokenizer, rows, batch_size=7)
    assert ids == [answer_token_ids(tokenizer, row["prompt"], row["choices"]) for row in rows]
    # One bad row behind many good ones, once by its prompt's end and once by a later choice.
    for prompt, choices in (("x\nAnswer: ", ["A", "B"]), ("x\nAnswer:", [" A", " Bzzq"])):
        records = [{"id": f"r{i}", "prompt": "x\nAnswer:", "choices": [" A", " B"]} for i in range(30)]
        records[20] |= {"prompt": prompt, "choices": choices}
        with pytest.raises(ValueError, match=r"^r20: "):
            answer_token_ids_of_rows(tokenizer, Dataset.from_list(records), batch_size=8)


def test_datasets_without_choices_are_refused():
    tokenizer = get_task("noisy_world").tokenizer()
    text = get_task("noisy_world").load("pretrain", limit=3).dataset
    with pytest.raises(ValueError, match="there are no choices"):
        answer_token_ids_of_rows(tokenizer, text)
    with pytest.raises(ValueError, match="no column 'choices'"):
        answer_token_ids_of_rows(tokenizer, text.remove_columns("choices"))


def test_whole_answers_that_are_the_same_tokens_are_refused():
    tokenizer = word_tokenizer(["which", "?", "cat", "<unk>"], unknown="<unk>")
    ids = choice_token_ids(tokenizer, ["which ?"], [[" cat", " cat cat"]], ["row 7"])
    assert [len(tokens) for tokens in ids[1][0]] == [1, 2]
    with pytest.raises(ValueError, match="row 7: the answers ' dog' and ' cow' are the same tokens"):
        choice_token_ids(tokenizer, ["which ?"], [[" cat", " dog", " cow"]], ["row 7"])
    with pytest.raises(ValueError, match="row 7: there are no choices"):
        choice_token_ids(tokenizer, ["which ?"], [[]], ["row 7"])
