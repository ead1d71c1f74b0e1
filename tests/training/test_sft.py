"""The fused loss of labels makes the gradients of TRL's trainer."""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from first_trl import add_teacher_topk
from first_trl.tasks import tokenize_rows
from first_trl.teacher.prepare import prepare_rows
from first_trl.training.sft import FirstSFTTrainer
from tests.support.families import CHAT, MARKED, THINKING, TOOLS, family_tokenizer
from tests.support.tiny import GradientRecorder, tiny_gpt2, tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)
LAYOUTS = {
    "padded": {},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "padding free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 24},
    "cut": {"max_length": 6},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def train(cls, student, tokenizer, folder, lora=None, **options):
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True,
        "max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 9, "max_grad_norm": 0.0,
        "logging_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    ours = {"fused_loss": options.pop("fused_loss")} if "fused_loss" in options else {}
    recorder = GradientRecorder()
    trainer = cls(
        copy.deepcopy(student),
        args=SFTConfig(str(folder), **{**settings, **options}),
        train_dataset=Dataset.from_list(tiny_rows(9, longest=20)),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[recorder],
        **ours,
    )
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_gradients_are_those_of_sft_trainer(build, layout, tokenizer, tmp_path):
    options = LAYOUTS[layout]
    _, theirs = train(SFTTrainer, build(), tokenizer, tmp_path, **options)
    _, ours = train(FirstSFTTrainer, build(), tokenizer, tmp_path, fused_loss=True, **options)
    assert set(ours.gradients[0]) == set(theirs.gradients[0])
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        scale = max(float(gradient.abs().max()) for gradient in other.values())
        assert scale > 1e-2
        for name, gradient in other.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-6, atol=1e-6 * max(scale, 1.0), msg=name)
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        for name in {"loss", "entropy", "mean_token_accuracy", "num_tokens"} & set(other):
            # TRL's two statistics are means of batches
            exact = options.get("gradient_accumulation_steps", 1) == 1 or name in ("loss", "num_tokens")
            assert mine[name] == pytest.approx(other[name], rel=1e-5 if exact else 0.5), name


def test_without_it_a_step_is_that_of_sft_trainer(tokenizer, tmp_path):
    """Bit for bit: the figures of a recipe that does not ask for it stay."""
    theirs, _ = train(SFTTrainer, tiny_llama(), tokenizer, tmp_path)
    ours, _ = train(FirstSFTTrainer, tiny_llama(), tokenizer, tmp_path)
    for name, weight in theirs.model.state_dict().items():
        assert torch.equal(weight, ours.model.state_dict()[name]), name


def test_adapters(tokenizer, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    _, theirs = train(SFTTrainer, tiny_llama(), tokenizer, tmp_path, lora=lora)
    _, ours = train(FirstSFTTrainer, tiny_llama(), tokenizer, tmp_path, lora=lora, fused_loss=True)
    for name, gradient in theirs.gradients[1].items():
        torch.testing.assert_close(ours.gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("stream", [False, True])
def test_rows_without_an_answer_are_refused(stream, tokenizer, tmp_path):
    """Their labels are fillers: a student would learn to say them."""
    answers = [{"prompt": f"w{5 + i} w9", "completion": None if i == 2 else " w4"} for i in range(4)]
    cache = add_teacher_topk(Dataset.from_list(answers), tiny_llama(), tokenizer, k=2, disable_tqdm=True)
    tokens = tokenize_rows(Dataset.from_list(answers[:2]), tokenizer, supervise="answer_position").dataset

    def train(rows):
        args = SFTConfig(
            str(tmp_path), max_steps=1, report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False
        )
        rows = rows.to_iterable_dataset() if stream else rows
        FirstSFTTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer).train()

    for rows, count, name in ((cache, "1 of 4", "teacher_has_gold"), (tokens, "2 of 2", "has_gold")):
        count = "some" if stream else count
        with pytest.raises(ValueError, match=f"{count} rows of the train dataset have none .`{name}` is false"):
            train(rows)
    answered = cache.filter(lambda answered: answered is not False, input_columns=["teacher_has_gold"])
    train(answered.remove_columns(["teacher_has_gold"]) if stream else answered)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_another_loss_is_refused(options, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`fused_loss=True` is the negative log-likelihood of the labels"):
        train(FirstSFTTrainer, tiny_llama(), tokenizer, tmp_path, fused_loss=True, **options)


TURN, ANSWER = [{"role": "user", "content": "Which river?"}], [{"role": "assistant", "content": "A"}]
TOOLS_OF_ROWS = [[{"name": "river", "takes": {"a": 1}}], [{"name": "mill", "takes": {"b": 2}}]]
UNLIKE = {
    "an empty thinking block": (THINKING, [{"prompt": TURN, "completion": ANSWER}], "Row 0 .* has the labels"),
    "roles": (CHAT, [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}], "human"),
    "parts": (
        CHAT,
        [{"messages": [{"role": role, "content": [{"type": "text", "text": "A"}]} for role in ("user", "assistant")]}],
        "'type'",
    ),
    "nulls": (TOOLS, [{"messages": TURN + ANSWER, "tools": tools} for tools in TOOLS_OF_ROWS], "null"),
}
ALIKE = {
    "prompt": (CHAT, [{"prompt": TURN, "completion": ANSWER}], {}),
    "messages": (THINKING, [{"messages": TURN + ANSWER}], {}),
    "everything": (THINKING, [{"prompt": TURN, "completion": ANSWER}], {"completion_only_loss": False}),
    "switched": (
        THINKING,
        [{"prompt": TURN, "completion": ANSWER, "chat_template_kwargs": {"enable_thinking": False}}],
        {},
    ),
    "assistant": (MARKED, [{"messages": TURN + ANSWER}], {"assistant_only_loss": True}),
    "cut": (CHAT, [{"messages": TURN + ANSWER}], {"max_length": 4}),
    "tools": (TOOLS, [{"messages": TURN + ANSWER, "tools": TOOLS_OF_ROWS[0]}], {}),
}


def trainer_of(rows, tokenizer, folder, **options):
    student = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    args = SFTConfig(str(folder), **{"use_cpu": True, "bf16": False, "report_to": "none", **options})
    return FirstSFTTrainer(student, args=args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", UNLIKE)
def test_conversations_that_a_teacher_is_captured_on_otherwise_are_told(name, stream, tmp_path):
    template, rows, message = UNLIKE[name]
    tokenizer, rows = family_tokenizer(template=template), Dataset.from_list(rows)
    given = rows.to_iterable_dataset() if stream else rows
    with pytest.warns(UserWarning, match=f"(?s){message}.*and where a teacher is captured.*prepare_rows"):
        trainer_of(given, tokenizer, tmp_path, max_steps=1)
    same = prepare_rows(rows, tokenizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*where a teacher is captured")
        trainer = trainer_of(same, tokenizer, tmp_path)
    assert (
        trainer.train_dataset.select_columns(["input_ids", "labels"])[:]
        == same.select_columns(["input_ids", "labels"])[:]
    )


@pytest.mark.parametrize("name", ALIKE)
def test_conversations_that_are_read_alike_are_not(name, tmp_path):
    template, rows, options = ALIKE[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*where a teacher is captured")
        trainer_of(Dataset.from_list(rows), family_tokenizer(template=template), tmp_path, **options)
