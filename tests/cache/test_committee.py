"""Several teachers cached as one: the mean of their distributions, and how far they disagree."""

import copy
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from first_trl import FirstDistillTrainer, add_teacher_topk, load_teacher_cache, verify_teacher_cache
from first_trl.cache.folder import load_manifest
from first_trl.cache.verify_folder import verify_cache_folder
from first_trl.cards import teacher_cache_card
from first_trl.cli import main
from first_trl.experiments.recipe import ArmSpec, ModelSpec, TeacherSpec
from first_trl.experiments.run_folder import RunFolder
from first_trl.experiments.stages.teachers import teacher_model, teachers
from first_trl.teacher.backends import CommitteeBackend
from tests.support.tiny import VOCAB, tiny_config, tiny_gpt2, tiny_llama, tiny_rows, tiny_tokenizer, with_digests


INFORMATION = "teacher_mutual_information"


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_list(tiny_rows(12))


def members():
    return [tiny_llama(), tiny_llama(1), tiny_gpt2(2)]


def capture(teacher, rows, folder=None, **options):
    options = {"k": 4, "logprob_dtype": "float32", "disable_tqdm": True, **options}
    return add_teacher_topk(rows, teacher, tiny_tokenizer(), output_dir=folder, **options)


@pytest.fixture(scope="module")
def committee(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("committee")
    return folder, capture(members(), rows, folder, num_draws=3)


def numpy_committee(models, row):
    """Mean and mutual information at each supervised position of a row, from full logits in double precision."""
    own = []
    for model in models:
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(torch.tensor([row["input_ids"]])).logits[0].numpy()
        p = np.exp(logits - logits.max(-1, keepdims=True))
        own.append(p / p.sum(-1, keepdims=True))
    own = np.array(own)
    mean = own.mean(0)
    entropies = -(own * np.log(own)).sum(-1)
    information = -(mean * np.log(mean)).sum(-1) - entropies.mean(0)
    at = [t - 1 for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
    return mean[at], information[at]


def test_mean_and_mutual_information_are_those_of_numpy(committee, rows):
    _, cache = committee
    seen = []
    for row, entry in zip(rows, cache, strict=True):
        mean, information = numpy_committee(members(), row)
        order = np.argsort(-mean, axis=1)[:, :4]
        assert entry["teacher_topk_ids"] == order.tolist()
        kept = np.take_along_axis(mean, order, 1)
        np.testing.assert_allclose(np.exp(entry["teacher_topk_logprobs"]), kept, atol=1e-5)
        np.testing.assert_allclose(np.exp(entry["teacher_tail_logprob"]), 1 - kept.sum(1), atol=1e-5)
        np.testing.assert_allclose(entry[INFORMATION], information, atol=1e-5)
        seen += entry[INFORMATION]
    # Models of random weights do disagree
    assert min(seen) > 0.05 and max(seen) < math.log(3)


@pytest.mark.parametrize("active", [["first"], ["first", "third"]])
def test_a_given_model_goes_on_with_the_adapters_it_had(active, rows):
    def config():
        return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])

    model = get_peft_model(tiny_llama(), config(), adapter_name="first")
    model.add_adapter("second", config())
    model.add_adapter("third", config())
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.set_adapter("first")
    model.base_model.set_adapter(active)
    trained = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        before = model(torch.tensor([[3, 4, 5]])).logits
    capture(CommitteeBackend([(model, "first"), (model, "second")]), rows.select(range(2)))
    assert model.active_adapters == active and [p.requires_grad for p in model.parameters()] == trained
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, before)


def test_a_model_and_an_adapter_on_that_very_model_are_refused():
    base = tiny_llama()
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the adapter acts in both"):
        CommitteeBackend([base, adapted])


@pytest.mark.parametrize("teacher", [tiny_llama, tiny_gpt2])
def test_one_member_is_the_plain_teacher(teacher, rows, tmp_path):
    alone, plain = (capture(given, rows, tmp_path / name) for name, given in (("a", [teacher()]), ("b", teacher())))
    assert alone.to_dict() == plain.to_dict() and INFORMATION not in alone.column_names
    assert load_manifest(tmp_path / "a").id == load_manifest(tmp_path / "b").id
    with pytest.raises(ValueError, match="two or more teachers"):
        CommitteeBackend([teacher()])


def test_members_that_say_the_same_do_not_disagree(rows):
    same = tiny_llama()
    with torch.no_grad():
        same.lm_head.weight[:] = tiny_llama().lm_head.weight
    same.config.rms_norm_eps = 1.0000001e-6  # another model by its digest, and the same logits
    cache, plain = capture([tiny_llama(), same], rows), capture(tiny_llama(), rows)
    assert max(value for entry in cache[INFORMATION] for value in entry) < 1e-5
    np.testing.assert_allclose(
        np.concatenate(cache["teacher_topk_logprobs"]), np.concatenate(plain["teacher_topk_logprobs"]), atol=1e-5
    )
    with pytest.raises(ValueError, match="are the same model"):
        capture([tiny_llama(), tiny_llama()], rows)


def test_teachers_that_know_nothing_in_common_disagree_by_log_m(rows):
    """Each sure of its own token: the most that two can disagree, and no more than verification allows."""
    sure = []
    for token in (5, 9):
        model = tiny_gpt2(token)
        model.lm_head = torch.nn.Linear(16, VOCAB)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias.zero_()[token] = 60.0
        sure.append(model)
    cache = capture(sure, rows)
    np.testing.assert_allclose(np.concatenate(cache[INFORMATION]), math.log(2), atol=1e-6)
    np.testing.assert_allclose(np.exp(np.concatenate(cache["teacher_topk_logprobs"]))[:, :2], 0.5, atol=1e-6)
    verify_teacher_cache(cache, tiny_tokenizer())


def test_a_smaller_head_gives_what_it_lacks_no_probability(rows):
    padded = tiny_llama(1, vocab_size=VOCAB + 8)
    cache = capture([tiny_llama(), padded], rows, k=VOCAB)
    whole = np.exp(np.concatenate(cache["teacher_topk_logprobs"])).sum(1) + np.exp(
        np.concatenate(cache["teacher_tail_logprob"])
    )
    np.testing.assert_allclose(whole, 1, atol=1e-5)
    with torch.no_grad():
        beyond = padded(torch.tensor([rows[0]["input_ids"]])).logits[0].softmax(-1)[:, VOCAB:].sum(-1) / 2
    at = [t - 1 for t in range(1, len(rows[0]["labels"])) if rows[0]["labels"][t] != -100]
    np.testing.assert_allclose(np.exp(cache[0]["teacher_tail_logprob"]), beyond[at], atol=1e-5)


class Killed(BaseException):
    pass


def test_a_killed_capture_goes_on_bit_for_bit(rows, tmp_path):
    options = {"num_draws": 3, "shard_size": 8, "max_rows_per_batch": 2}
    capture(members(), rows, tmp_path / "whole", **options)
    backend, score, calls = CommitteeBackend(members()), CommitteeBackend.score, []

    def dies(*args):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise Killed
        return score(backend, *args)

    backend.score = dies
    with pytest.raises(Killed):
        capture(backend, rows, tmp_path / "killed", **options)
    assert list((tmp_path / "killed/data").glob(".*.journal"))
    capture(members(), rows, tmp_path / "killed", **options)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "data").iterdir()} for name in ("whole", "killed")
    )
    assert first == second and len(first) == 2
    verify_cache_folder(tmp_path / "killed")


def test_a_changed_member_is_another_committee(rows, tmp_path):
    capture(members(), rows, tmp_path)
    again = capture(members(), rows, tmp_path)
    assert again.to_dict() == load_teacher_cache(tmp_path).to_dict()
    changed = members()
    with torch.no_grad():
        changed[2].transformer.wte.weight[7, 3] += 1e-3
    for other in (changed, members()[:2], [tiny_llama(), tiny_llama(1), tiny_gpt2(3)]):
        with pytest.raises(ValueError, match=r"capture of other inputs.*weights_digest"):
            capture(other, rows, tmp_path)


def adapter(folder, seed, base, **options):
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.save_pretrained(folder)
    return os.fspath(folder)


def elements(model):
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base = type(tiny_llama()).from_pretrained(folder / "base")
    names = [adapter(folder / f"lora-{i}", i, base, lora_alpha=8 * (i + 1)) for i in range(3)]
    return folder / "base", names


def test_adapters_share_their_base(adapters, rows, tmp_path):
    base, names = adapters
    backend = CommitteeBackend(names)
    models = {id(member.backend.model): member.backend.model for member in backend.members}
    assert len(models) == 1
    own = 2 * 2 * (2 * 16 + 2 * 16)  # layers, projections, A and B of rank 2
    assert elements(next(iter(models.values()))) == elements(tiny_llama()) + 3 * own
    shared = capture(backend, rows, tmp_path / "shared")
    apart = capture(
        [PeftModel.from_pretrained(tiny_llama(), name).merge_and_unload() for name in names], rows, tmp_path / "apart"
    )
    for name in ("teacher_topk_logprobs", INFORMATION):
        np.testing.assert_allclose(
            np.concatenate(shared[name]), np.concatenate(apart[name]), atol=1e-5
        )  # merging rounds
    # Pairs of a model and the name of an adapter, as one who trained them has them
    model = PeftModel.from_pretrained(tiny_llama(), names[0], adapter_name="a")
    model.load_adapter(names[1], adapter_name="b")
    pairs, two = capture([(model, "a"), (model, "b")], rows), capture(names[:2], rows)
    for name in ("teacher_topk_logprobs", INFORMATION):
        assert pairs[name] == two[name]
    # The adapter of one member changes: another committee
    changed = adapter(tmp_path / "lora-1", 9, type(tiny_llama()).from_pretrained(base))
    with pytest.raises(ValueError, match=r"capture of other inputs.*weights_digest"):
        capture([names[0], changed, names[2]], rows, tmp_path / "shared")
    with pytest.raises(ValueError, match="named twice"):
        CommitteeBackend([names[0], names[0]])


def test_a_recipes_committee_of_adapters_shares_the_base(adapters, rows, tmp_path):
    base, names = adapters
    for unit, name in (("teacher", names[0]), ("teacher-one", names[1]), ("teacher-v1.5", names[2])):
        shutil.copytree(name, tmp_path / unit / "model")
    spec = ModelSpec(name_or_path=str(base), sft={}, lora={"r": 2})
    variants = {"m": TeacherSpec(committee=["teacher", "one", "v1.5"]), "one": TeacherSpec(), "v1.5": TeacherSpec()}
    recipe = SimpleNamespace(teacher=spec, teachers=variants, arms={"m": ArmSpec(kind="distill", teacher="m")}, seed=0)
    run = SimpleNamespace(folder=RunFolder(tmp_path), recipe=recipe)
    assert [teacher.name for teacher in teachers(recipe)] == ["", "one", "v1.5", "m"]
    members = teacher_model(run, teachers(recipe)[-1])
    assert len({id(model) for model, _ in members}) == 1
    found, expected = capture(members, rows), capture(names, rows)
    for name in ("teacher_topk_logprobs", INFORMATION):
        np.testing.assert_allclose(np.concatenate(found[name]), np.concatenate(expected[name]), atol=1e-6)


def test_a_member_of_nan_is_named(rows):
    broken = tiny_gpt2(1)
    broken.config.name_or_path = "broken-teacher"
    with torch.no_grad():
        broken.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(
        ValueError, match=r"logits of teacher broken-teacher are NaN or infinite on the row of \d+ tokens"
    ):
        capture([tiny_llama(), broken], rows)


def test_other_tokenizers_are_refused_by_name(tmp_path):
    for name, prefix in (("one", "w"), ("two", "v")):
        tiny_llama(len(prefix)).save_pretrained(tmp_path / name)
        tiny_tokenizer(prefix=prefix).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"Teachers \S+one and \S+two have different tokenizers"):
        CommitteeBackend([os.fspath(tmp_path / "one"), os.fspath(tmp_path / "two")])
    with pytest.raises(ValueError, match="2 revisions for 3 teachers"):
        CommitteeBackend(members(), revision=["main", None])


def test_what_a_batch_does_not_hold_is_halved(rows, tmp_path):
    whole = capture(members(), rows)
    models = members()

    def room(module, args, kwargs):
        if kwargs["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    models[1].register_forward_pre_hook(room, with_kwargs=True)
    cut = CommitteeBackend(models)
    found = capture(cut, rows, tmp_path)
    assert cut._most_tokens is not None and cut._most_tokens <= 80
    np.testing.assert_allclose(np.concatenate(found[INFORMATION]), np.concatenate(whole[INFORMATION]), atol=1e-5)


def edited(cache, change):
    entries = cache[INFORMATION][:]
    change(entries)
    position = cache.column_names.index(INFORMATION)
    features = cache.features
    table = cache.to_dict() | {INFORMATION: entries}
    found = with_digests(Dataset.from_dict({name: table[name] for name in cache.column_names}, features=features))
    assert found.column_names.index(INFORMATION) == position
    found.info.description = cache.info.description
    return found


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda entries: entries[3].__setitem__(0, float("nan")), "Row 3 .* is nan"),
        (lambda entries: entries[2].__setitem__(0, -0.01), "Row 2 .* is -0.0"),
        (lambda entries: entries[1].__setitem__(0, 1.2), "more than the log 3 = 1.0986"),
        (lambda entries: entries[5].append(0.1), "Row 5 .*`teacher_mutual_information` has"),
    ],
)
def test_what_no_committee_can_say_is_refused(committee, change, says):
    with pytest.raises(ValueError, match=says):
        verify_teacher_cache(edited(committee[1], change))


def test_damage_and_loss_of_the_column_are_noticed(committee):
    _, cache = committee
    verify_teacher_cache(edited(cache, lambda entries: None), tiny_tokenizer())
    with pytest.raises(ValueError, match="is gone, the manifest names a committee of 3"):
        verify_teacher_cache(cache.remove_columns(INFORMATION))
    lost = cache.remove_columns(INFORMATION)
    lost.info.description = ""
    with pytest.raises(ValueError, match="digest mismatch"):
        verify_teacher_cache(lost)


def test_what_the_manifest_and_the_card_say(committee):
    folder, _ = committee
    manifest = load_manifest(folder)
    assert manifest.committee_size == 3
    assert manifest.teacher["parameters"] == sum(model.num_parameters() for model in members())
    assert [len(entry["weights_digest"]) for entry in manifest.teacher["members"]] == [16] * 3
    card = teacher_cache_card(folder)
    assert "| Member 3 | GPT2LMHeadModel, weights `" in card
    assert f"| `{INFORMATION}` | how far the 3 teachers disagree" in card and "at most 1.099" in card
    assert "> The distribution is the mean of the probabilities of 3 teachers" in card
    (shard,) = folder.glob("data/*.parquet")
    assert str(pq.read_schema(shard).field(INFORMATION).type.value_type) == "float"


def test_a_student_learns_the_mean(committee, tmp_path):
    trainer = FirstDistillTrainer(
        model=tiny_llama(7),
        args=tiny_config(tmp_path, estimator="bucket", max_steps=2),
        train_dataset=committee[1],
        processing_class=tiny_tokenizer(),
    )
    assert trainer.train().training_loss > 0


def test_precompute_takes_several_teachers(adapters, rows, tmp_path, capsys):
    base, names = adapters
    rows.to_json(tmp_path / "rows.jsonl")
    command = ["precompute", "--tokenizer", str(base), "--dataset", str(tmp_path / "rows.jsonl"), "--k", "4"]
    for name in names[:2]:
        command += ["--teacher", name]
    assert main([*command, "--output-dir", str(tmp_path / "cache"), "--logprob-dtype", "float32"]) == 0
    assert "12 rows" in capsys.readouterr().out
    found = json.loads((tmp_path / "cache/manifest/train.json").read_text())
    assert [entry["name"] for entry in found["teacher"]["members"]] == ["lora-0", "lora-1"]
    assert load_teacher_cache(tmp_path / "cache")[INFORMATION] == capture(names[:2], rows)[INFORMATION]
    assert main([*command, "--teacher-revision", "main", "--output-dir", str(tmp_path / "other")]) != 0
    assert "as often as `--teacher`" in capsys.readouterr().err
