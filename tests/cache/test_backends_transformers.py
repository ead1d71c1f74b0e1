"""The transformers backend where memory is short, and what goes through the head."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import Cohere2Config, Cohere2ForCausalLM, Gemma2Config, Gemma2ForCausalLM

from first_trl.teacher.backends import TransformersBackend
from tests.benchmarks import capture as capture_benchmark
from tests.support.tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_rows


K = 5


class Full:
    """A model with room for so many tokens a forward, padding included."""

    def __init__(self, model, room, message="CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"):
        self.room, self.message = room, message
        self.seen, self.fitted = [], []
        model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module, args, kwargs):
        tokens = kwargs["input_ids"].numel()
        self.seen.append(tokens)
        if tokens > self.room:
            raise torch.OutOfMemoryError(self.message)
        self.fitted.append(len(kwargs["input_ids"]))


def inputs(count=16, longest=24, supervised=None):
    rows, positions = [], []
    for row in sorted(tiny_rows(count, longest=longest), key=lambda row: -len(row["input_ids"])):
        rows.append(np.array(row["input_ids"], np.int32))
        at = np.flatnonzero(np.array(row["labels"]) != -100)
        positions.append(at[at > 0][:supervised])
    uniforms = [np.random.default_rng(i).random((len(at), 3)) for i, at in enumerate(positions)]
    return rows, positions, uniforms


def score(backend, rows, positions, uniforms):
    return backend.score(rows, positions, K, VOCAB, uniforms)


def assert_equal(scores, expected):
    for a, b in zip(scores, expected, strict=True):
        for name in ("ids", "logprobs", "tail_logprob", "draws"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2.00 GiB.\nmore", "no room"])
def test_a_batch_that_does_not_fit_is_halved(build, message, caplog):
    rows, positions, uniforms = inputs()
    model = build().train()
    backend, full = TransformersBackend(model), Full(model, 100, message)
    with caplog.at_level(logging.WARNING):
        scores = score(backend, rows, positions, uniforms)
    assert model.training
    # Bit for bit what forwards of these sizes give where there is room, and the whole batch up to rounding
    roomy, ends = TransformersBackend(build()), np.cumsum(full.fitted)
    parts = [slice(end - size, end) for end, size in zip(ends, full.fitted, strict=True)]
    assert ends[-1] == len(rows)
    expected = [one for part in parts for one in score(roomy, rows[part], positions[part], uniforms[part])]
    assert_equal(scores, expected)
    for a, b in zip(scores, score(roomy, rows, positions, uniforms), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.draws, b.draws)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    longest = len(rows[0])
    # Tried whole, in halves, in quarters
    assert full.seen[:3] == [16 * longest, 8 * longest, 4 * longest]
    assert caplog.records[-1].getMessage().endswith(f"Set `max_tokens_per_batch={4 * longest}` to begin with that.")
    tried, warned = len(full.seen), len(caplog.records)
    # The size is remembered: nothing fails any more
    assert_equal(score(backend, rows, positions, uniforms), expected)
    assert max(full.seen[tried:]) <= 100 and len(caplog.records) == warned


def test_a_row_that_does_not_fit_alone_ends_the_capture_with_a_sentence():
    model = tiny_llama()
    Full(model, 3)
    rows, positions, uniforms = inputs()
    with pytest.raises(
        ValueError, match=r"single row of 23 tokens, and no `max_tokens_per_batch` .*`max_length`"
    ) as e:
        score(TransformersBackend(model), rows, positions, uniforms)
    assert "\n" not in str(e.value)


def test_processes_that_hold_one_teacher_do_not_cut_a_batch():
    model = tiny_llama()
    Full(model, 100)
    backend = TransformersBackend(model)
    backend.ranks_per_teacher = 2
    with pytest.raises(ValueError, match="lower `max_tokens_per_batch` below 368"):
        score(backend, *inputs())


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    model = tiny_llama()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        score(TransformersBackend(model), *inputs())


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def soft_capped():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0))


def scaled():
    torch.manual_seed(0)
    return Cohere2ForCausalLM(Cohere2Config(**SMALL, logit_scale=0.3))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, soft_capped, scaled])
def test_only_wanted_positions_go_through_the_head(build):
    """As on a GPU: no tensor of rows, columns and vocabulary."""
    model = build()
    backend = TransformersBackend(model)
    rows, positions, uniforms = inputs(supervised=3)
    expected = score(backend, rows, positions, uniforms)
    wanted = sum(len(at) for at in positions)
    assert not backend._selects
    backend._selects = True
    read = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, output: read.append(output.shape))
    scores = score(backend, rows, positions, uniforms)
    hook.remove()
    assert read == [(1, wanted, VOCAB)]
    for a, b in zip(scores, expected, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.tail_logprob, b.tail_logprob, atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_that_does_not_call_its_head_is_read_whole():
    model = tiny_llama()
    head = model.lm_head
    own = model.forward

    def forward(*args, **kwargs):
        hidden = model.model(*args, **{name: value for name, value in kwargs.items() if name != "logits_to_keep"})
        output = own(*args, **kwargs)
        output.logits = torch.nn.functional.linear(hidden.last_hidden_state, head.weight)
        return output

    rows, positions, uniforms = inputs()
    expected = score(TransformersBackend(tiny_llama()), rows, positions, uniforms)
    model.forward = forward
    backend = TransformersBackend(model)
    backend._keeps_logits, backend._selects = False, True
    assert_equal(score(backend, rows, positions, uniforms), expected)
    assert not backend._selects


def test_the_benchmark_of_capture_still_runs(tmp_path, monkeypatch):
    """Its bare forward takes the backend's own way to the logits, which is no public one."""
    options = "--rows 3 --length 8 --width 64 --layers 1 --vocab 600 --repeats 1 --loop-rows 1 --skip-memory"
    monkeypatch.setattr("sys.argv", ["capture", *options.split(), "--json", str(tmp_path / "result.json")])
    capture_benchmark.main()
    assert json.loads((tmp_path / "result.json").read_text())["capture_over_bare_forward"] > 0
