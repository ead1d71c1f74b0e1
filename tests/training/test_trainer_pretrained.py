"""Real pretrained weights: siblings distil, and a student with another tokenizer is refused."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from first_trl import FirstDistillTrainer, add_teacher_topk
from tests.conftest import DATA as REAL_DATA
from tests.support.tiny import run, tiny_config


torch.set_num_threads(1)

DATA = REAL_DATA / "tiny_llama"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"pretrained tiny Llamas are not in {DATA}")

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day she saw a "
    "big red ball under a tree. She wanted to give it to her friend Tom, because Tom was sad."
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "babyllama105_a")


@pytest.fixture(scope="module")
def cache(tokenizer, tmp_path_factory):
    rows = Dataset.from_list([{"text": STORY[i : i + 90]} for i in range(0, 120, 10)])
    return add_teacher_topk(
        rows, str(DATA / "babyllama105_a"), tokenizer, k=8, num_draws=50, output_dir=tmp_path_factory.mktemp("cache"),
        disable_tqdm=True,
    )  # fmt: skip


@pytest.mark.parametrize("estimator", ["bucket", pytest.param("sampled", marks=pytest.mark.slow)])
def test_a_sibling_comes_closer_to_its_teacher(estimator, tokenizer, cache, tmp_path):
    args = tiny_config(tmp_path, estimator=estimator, max_steps=12, learning_rate=3e-4, packing=True, max_length=192)
    _, recorded = run(str(DATA / "babyllama105_b"), args, cache, tokenizer)
    losses = [log["teacher_cross_entropy"] for log in recorded.logs if "loss" in log]
    entropy = recorded.logs[0]["teacher_entropy"]
    # Epochs differ in which rows meet, so compare windows. The cross-entropy cannot fall below the teacher's entropy
    assert sum(losses[-3:]) - 3 * entropy < 0.8 * (sum(losses[:3]) - 3 * entropy)
    assert losses[-1] > entropy


def test_the_cache_of_another_tokenizer_is_refused(cache, tmp_path):
    other = AutoTokenizer.from_pretrained(DATA / "stories260K")
    student = AutoModelForCausalLM.from_pretrained(DATA / "stories260K")
    with pytest.raises(ValueError, match="the same ids would mean other tokens"):
        FirstDistillTrainer(student, tiny_config(tmp_path), cache, processing_class=other)
