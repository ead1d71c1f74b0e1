"""Distance to training rows: defined in every corner, the same in any batch, and states that score as a forward does."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from first_trl import evaluate_multiple_choice
from first_trl.evaluation.answer_states import AnswerStates, candidate_layers, collect_answer_states
from first_trl.evaluation.next_token import next_token_states
from first_trl.evaluation.novelty import METRICS, NoveltyReference, fit_reference
from first_trl.tasks import tokenize_rows
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer


pytestmark = pytest.mark.filterwarnings("ignore:.*(n < 300|noise|fewer than|bin).*:UserWarning")


def dataset(n: int = 40, seed: int = 0) -> Dataset:
    """Prompts of many lengths, 2 or 3 choices, one answer in ten hidden."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        choices = [f" w{j}" for j in (3, 4, 5)[: int(rng.integers(2, 4))]]
        prompt = " ".join(f"w{j}" for j in rng.integers(6, 24, size=rng.integers(1, 9)))
        gold = -1 if i % 10 == 9 else int(rng.integers(len(choices)))
        rows.append({"id": f"q{i}", "prompt": prompt, "choices": choices, "gold": gold})
    return Dataset.from_list(rows)


def states(n: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("temperature", ["one", "each"])
def test_states_score_as_a_forward_does(make, temperature):
    model, tokenizer, rows = make(), tiny_tokenizer(), dataset()
    found = collect_answer_states(model, tokenizer, rows, [1, 2], batch_size=7, disable_tqdm=True)
    given = 1.7 if temperature == "one" else np.random.default_rng(1).uniform(0.5, 4.0, size=len(rows))
    expected = [
        evaluate_multiple_choice(model, tokenizer, rows, temperature=t, disable_tqdm=True).predictions
        for t in np.unique(given)
    ]
    place = np.unique(given, return_inverse=True)[1] if temperature == "each" else np.zeros(len(rows), int)
    result = found.result(np.array(rows["id"]), given).predictions
    assert set(result) == set(expected[0])
    for name, values in result.items():
        right = np.stack([expected[place[i]][name][i] for i in range(len(rows))])
        if values.dtype.kind == "f":
            assert values == pytest.approx(right, abs=3e-4, nan_ok=True), name
        else:
            assert (values == right).all(), name


@pytest.mark.parametrize("lora", [False, True])
def test_states_do_not_depend_on_the_batch(lora):
    model = tiny_llama()
    if lora:
        torch.manual_seed(0)
        adapted = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, adapted).eval()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 5]]

    def read(batch_size: int) -> list[np.ndarray]:
        found = [np.zeros((4, 16)) for _ in range(2)]
        for index, _, hidden in next_token_states(
            model, prompts, [1, 2], batch_size=batch_size, disable_tqdm=True, desc=""
        ):
            for place, state in zip(found, hidden, strict=True):
                place[index] = state.numpy()
        return found

    alone, together = read(1), read(4)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    if lora:
        merged = model.merge_and_unload()
        hidden = merged(input_ids=torch.tensor([prompts[2]]), output_hidden_states=True).hidden_states
        for layer, state in zip((1, 2), alone, strict=True):
            assert state[2] == pytest.approx(hidden[layer][0, -1].detach().numpy(), abs=1e-5)
    with pytest.raises(ValueError, match=r"no layer 3: the model has 2"):
        list(next_token_states(model, prompts, [3], batch_size=2, disable_tqdm=True, desc=""))


def test_tokenised_rows_are_read_at_their_answer(tmp_path):
    model, tokenizer, rows = tiny_llama(), tiny_tokenizer(), dataset()
    rows = rows.select([i for i, gold in enumerate(rows["gold"]) if gold >= 0])
    tokens = tokenize_rows(
        rows.add_column("completion", [row["choices"][row["gold"]] for row in rows]), tokenizer
    ).dataset
    plain = collect_answer_states(model, tokenizer, rows, [2], disable_tqdm=True)
    found = collect_answer_states(model, tokenizer, tokens, [2], disable_tqdm=True)
    assert (found.right_token == plain.right_token).all() and found.right == pytest.approx(plain.right, abs=1e-5)
    assert found.states[2] == pytest.approx(plain.states[2], abs=1e-2)
    found.save(tmp_path / "states.safetensors")
    again = AnswerStates.load(tmp_path / "states.safetensors")
    assert (again.states[2] == found.states[2]).all() and (again.partition == found.partition).all()
    assert len(plain.labelled()) == len(plain) and plain.max_probability().max() <= 1.0


def test_candidate_layers():
    assert [candidate_layers(n) for n in (1, 2, 4, 30)] == [[1], [1, 2], [1, 2, 3, 4], [8, 15, 23, 30]]


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_far_is_new_in_any_batch_and_after_saving(metric, tmp_path):
    # Rows lie along a line; others on another one are new
    line, other = states(2, 24, seed=3)
    near = line + 0.1 * states(200, 24)
    reference = fit_reference(near, layer=2, metric=metric)
    fresh = torch.cat([line + 0.1 * states(20, 24, seed=5), line + 0.3 * other + 0.1 * states(20, 24, seed=6)])
    feature = reference.feature(fresh)
    assert feature[:20].max() < feature[20:].min()
    assert (reference.percentile(feature)[20:] > 0.99).all() and reference.percentile(feature)[:20].mean() < 0.9
    alone = np.concatenate([reference.feature(fresh[i : i + 1]) for i in range(40)])
    assert alone == pytest.approx(feature, abs=1e-6)
    assert reference.feature(5.0 * fresh) == pytest.approx(feature, abs=1e-5)
    digest = reference.save(tmp_path / "novelty.safetensors", model="tiny")
    again, values = NoveltyReference.load(tmp_path / "novelty.safetensors", digest)
    assert values == {"model": "tiny"} and (again.feature(fresh) == feature).all()
    assert reference.save(tmp_path / "again.safetensors", model="tiny") == digest
    with pytest.raises(ValueError, match="SHA-256 differs"):
        NoveltyReference.load(tmp_path / "novelty.safetensors", "0" * 64)


def test_the_distance_is_the_mean_over_neighbours():
    rows, fresh = states(50), states(5, seed=9)
    reference = fit_reference(rows, layer=1, k=3)
    units, points = (x / x.norm(dim=-1, keepdim=True) for x in (rows, fresh))
    leave_one_out = 1 - units @ units.T
    leave_one_out.fill_diagonal_(torch.inf)
    own = leave_one_out.sort().values[:, :3].mean(-1)
    logs = np.log(own.numpy() + 1e-3 * np.median(own.numpy()))
    found = np.log((1 - points @ units.T).sort().values[:, :3].mean(-1).numpy() + 1e-3 * np.median(own.numpy()))
    assert reference.feature(fresh) == pytest.approx((found - logs.mean()) / logs.std(), abs=0.02)


@pytest.mark.parametrize("metric", METRICS)
def test_corners(metric):
    assert np.isfinite(fit_reference(states(5), layer=1, metric=metric, k=10).feature(states(3, seed=2))).all()
    copies = fit_reference(states(1).repeat(30, 1), layer=1, metric=metric)
    assert copies.sd == 0.0 and (copies.feature(states(3, seed=2)) == 0.0).all()
    # Copies of training rows are as near as can be, and no less than that
    half = fit_reference(torch.cat([states(20), states(20), states(60, seed=4)]), layer=1, metric=metric, k=1)
    assert np.isfinite(half.feature(states(20))).all()
    with pytest.raises(ValueError, match="At least two training rows"):
        fit_reference(states(1), layer=1, metric=metric)
    broken = states(4)
    broken[2, 3] = torch.nan
    with pytest.raises(ValueError, match="row 2 is zero or not finite"):
        fit_reference(broken, layer=1, metric=metric)
    with pytest.raises(ValueError, match=r"\[B, 12\] are needed, got \[3, 5\]"):
        half.feature(states(3, 5))


def test_what_is_stored_is_bounded(tmp_path):
    reference = fit_reference(states(3000, 1024), layer=1)
    reference.save(tmp_path / "novelty.safetensors")
    assert 4_900_000 < (tmp_path / "novelty.safetensors").stat().st_size <= 5_000_000
    assert len(fit_reference(states(500), layer=1, max_rows=100).rows) == 100
    with pytest.raises(ValueError, match="`metric` must be one of"):
        fit_reference(states(5), layer=1, metric="l1")
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        fit_reference(states(5), layer=1, k=0)
    (tmp_path / "torn.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="holds no reference rows"):
        NoveltyReference.load(tmp_path / "torn.safetensors")
