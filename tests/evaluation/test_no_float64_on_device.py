"""MPS has no float64: what evaluations, fits and captures compute in it, they compute on the CPU."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from first_trl import add_teacher_topk, answer_pipeline, evaluate_multiple_choice
from first_trl.evaluation.choice_scoring import score_choices
from first_trl.evaluation.posthoc import fit_posthoc_temperature
from first_trl.evaluation.token_level import evaluate_token_level
from first_trl.tasks import get_task, tokenize_rows
from tests.support.tiny import tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class DeviceWithoutFloat64(TorchFunctionMode):
    """On a CPU: refuses to widen a tensor that `cpu()` did not give, and to move a wide one to a device."""

    def __init__(self):
        super().__init__()
        self.moved = []  # kept, so that no other tensor gets their ids

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = args[0] if args and isinstance(args[0], torch.Tensor) else None
        wide = name == "double" or (name == "to" and torch.float64 in (*args[1:], *kwargs.values()))
        if given is not None and wide and not any(given is each for each in self.moved):
            raise TypeError("Cannot convert a MPS Tensor to float64")
        places = [each for each in (*args[1:], *kwargs.values()) if isinstance(each, torch.device | str)]
        if name == "to" and places and given is not None and given.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        result = func(*args, **kwargs)
        if name == "cpu":
            self.moved.append(result)
        return result


def test_the_mode_finds_what_mps_refuses():
    for act in (
        lambda x: x.double().cpu(), lambda x: x.to(torch.float64), lambda x: x.cpu().double().to(x.device),
    ):  # fmt: skip
        with DeviceWithoutFloat64(), pytest.raises(TypeError, match="float64"):
            act(torch.ones(2))
    with DeviceWithoutFloat64():
        torch.ones(2).cpu().double()


def test_nothing_is_wide_on_the_device(tmp_path):
    task = get_task("digits")
    tokenizer, rows = task.tokenizer(), task.load("test", limit=12).dataset
    model = tiny_llama(vocab_size=len(tokenizer))
    tokens = tokenize_rows(rows, tokenizer, supervise="all").dataset
    pairs = rows.map(lambda row: {"choices": [choice * 2 for choice in row["choices"]]})
    with DeviceWithoutFloat64():
        evaluate_multiple_choice(model, tokenizer, rows, disable_tqdm=True)
        evaluate_token_level(model, tokenizer, tokens, disable_tqdm=True)
        score_choices(model, tokenizer, pairs, disable_tqdm=True)
        fit_posthoc_temperature(model, tokenizer, rows, disable_tqdm=True)
        answer_pipeline(model, tokenizer=tokenizer)(rows)
        add_teacher_topk(tokens, model, tokenizer, k=2, output_dir=tmp_path, disable_tqdm=True)
