"""Students made of the first layers of a model: the very hidden states of the whole one, and an adapter that finds its base."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from first_trl.experiments.plan.models import config_of, shape_of
from first_trl.experiments.recipe import load_recipe
from first_trl.experiments.recipe.models import ModelSpec
from first_trl.experiments.stages.training import make_model
from first_trl.training.keep_layers import keep_first_layers, load_first_layers
from tests.support.tiny import tiny_gpt2, tiny_llama


@pytest.mark.parametrize("make", [lambda: tiny_llama(num_hidden_layers=3), tiny_gpt2], ids=["llama", "gpt2"])
def test_a_cut_model_computes_what_the_whole_one_does_up_to_there(make, tmp_path):
    whole = make().eval()
    whole.save_pretrained(tmp_path)
    for n in range(1, whole.config.num_hidden_layers):
        cut = load_first_layers(str(tmp_path), n).eval()
        ids = torch.arange(3, 11)[None]
        with torch.no_grad():
            states = whole(ids, output_hidden_states=True).hidden_states[n]
            norm = getattr(whole.base_model, "norm", None) or whole.base_model.ln_f
            expected = whole.get_output_embeddings()(norm(states))
            torch.testing.assert_close(cut(ids).logits, expected)
        assert cut.config.num_hidden_layers == n


def test_it_is_saved_and_loaded_as_any_other(tmp_path):
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "whole")
    cut = load_first_layers(str(tmp_path / "whole"), 2)
    cut.save_pretrained(tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in cut.named_parameters()}


def test_what_a_configuration_lists_by_layer_is_cut_too():
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Qwen3Config(num_hidden_layers=4, layer_types=kinds, eos_token_id=[1, 2, 3, 4], use_sliding_window=True)
    cut = keep_first_layers(config, 3)
    assert cut.layer_types == kinds[:3]
    assert cut.eos_token_id == [1, 2, 3, 4]


@pytest.mark.parametrize("n", [0, 4])
def test_too_few_or_too_many_layers(n, tmp_path):
    with pytest.raises(ValueError, match=f"keep_layers={n}: a llama of 3 layers keeps from 1 to 3"):
        keep_first_layers(tiny_llama(num_hidden_layers=3).config, n)


def test_recipe_and_plan(tmp_path):
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path)
    spec = ModelSpec(name_or_path=str(tmp_path), keep_layers=2)
    assert not spec.used_as_it_is and ModelSpec(name_or_path="x").used_as_it_is
    planned = shape_of(spec, config_of(spec, "student", None))
    made = make_model(spec, None, 0, "student")
    assert planned.layers == 2
    assert planned.parameters == sum(p.numel() for p in made.parameters())


def test_a_model_from_scratch_has_no_layers_to_leave_out():
    overrides = ["student.keep_layers=1"]
    with pytest.raises(ValueError, match=r"student\.keep_layers cuts a pretrained model: give student\.name_or_path"):
        load_recipe("quickstart", overrides)
