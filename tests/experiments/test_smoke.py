"""`--smoke`: every recipe that travels with the package runs to its report, and nothing of it is left out."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import trl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from first_trl.cli import main
from first_trl.experiments.recipe import (
    ArmSpec,
    CaptureSpec,
    EvaluationSpec,
    HubSpec,
    ModelSpec,
    Recipe,
    SplitSpec,
    TaskSpec,
    TeacherSpec,
    cells,
    load_recipe,
    merged_folder,
)
from first_trl.experiments.smoke import smoke_recipe
from first_trl.experiments.smoke.models import tiny_model
from first_trl.experiments.smoke.rows import DATA, smoke_task
from first_trl.experiments.smoke.tokenizer import smoke_tokenizer
from first_trl.tasks import answer_token_ids_of_rows, get_task, list_tasks
from first_trl.utils.resources import recipe_names
from tests.support.hub_server import HubServer, run_client


FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3", "gemma3_text", "gemma2", "gpt2", "phi3", "olmo2",
    "qwen3_moe", "falcon",
)  # fmt: skip
MODEL = ModelSpec(name_or_path="someone/a-model", architecture="llama", init_kwargs={"dtype": "bfloat16"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(smoke_tokenizer(tmp_path_factory.mktemp("smoke") / "tokenizer"))


def make_recipe(**changes) -> Recipe:
    splits = {
        "train": SplitSpec("train[:90%]"),
        "validation": SplitSpec("train[90%:]"),
        "test": SplitSpec("validation"),
    }
    recipe = Recipe(
        name="mine",
        task=TaskSpec("commonsense_qa", splits, revision="abc", max_length=256),
        teacher=replace(MODEL, sft={"num_train_epochs": 3, "learning_rate": 1e-5}),
        student=MODEL,
        arms={"teacher": ArmSpec("teacher"), "first": ArmSpec("distill", recalibration="probability_temperature")},
    )
    return replace(recipe, **changes)


def small(tmp_path, **changes) -> Recipe:
    return smoke_recipe(make_recipe(**changes), tmp_path)


# every recipe

# Every kind of thing that a recipe may ask for is in one of these, but for ELSEWHERE; the other recipes, which combine the
# same, are slow. So are second seeds, which are one run more and a merged report, and the known rows of shift_study
ONE_SEED = ["seeds=[1]"]
QUICK: dict[str, list[str]] = {
    "my_questions": [],
    "shift_study": ["evaluation.splits=[ood]"],
    "modern/gemma3_openbook_qa": ONE_SEED,
    "paper/ablation_estimators": [],
    "paper/boolq_llama2": [],
    "paper/e2_llama1_alpaca_token_level": [],
    "paper/e8_llama2_alpaca": [],
    "real/smollm2_arc_easy": ONE_SEED,
    "real/smollm2_mmlu_field": ONE_SEED,
}
ELSEWHERE = {
    # Of beyond_study alone: test_pipeline_options.py runs such arms and teachers, and shift_study has cases
    "arms.*.select=nll", "teachers.*.folds", "cases.*.teachers", "cases.*.arms.*.data",
    # A case of shift_study
    "task.name=digits",
    # Of the quickstart's studies: test_pipeline_options.py, and the grid of test_sweep.py
    "arms.*.restrict_to_choices", "arms.*.lora.modules_to_save", "grid.arms.*.recalibration_value", "grid.arms.*.top_k",
    # Families like llama: test_a_tiny_model_of_every_family
    *(f"{role}.architecture={family}" for role in ("teacher", "student") for family in ("qwen3", "smollm3")),
    # Left out by the transformation (test_models_trainings_and_folder); test_served_teacher.py has a server
    "capture.vllm_url", "capture.vllm_model",
    # An option of a split in real/smollm2_arc_easy
    "task.options.subset",
}  # fmt: skip
# Keys whose value is a kind, and keys under which recipes choose the names
SAID = {
    "architecture", "estimator", "feature", "fit", "fold_by", "kind", "length", "methods", "name", "objective", "positions",
    "recalibration", "scoring", "select", "task", "unseen",
}  # fmt: skip
NAMED = {"arms", "cases", "splits", "teachers"}
PARTS = ("task", "teacher", "student", "teachers", "capture", "recalibration", "training", "arms", "cases", "grid",
         "evaluation")  # fmt: skip


def kinds(path: str, value) -> set[str]:
    """The keys that a part of a recipe sets, with their values where these name a kind."""
    key = path.rsplit(".", 1)[-1]
    if isinstance(value, dict):
        inside = (kinds(f"{path}.{'*' if key in NAMED else name}", inner) for name, inner in value.items())
        if key == "grid" or path == "cases.*":
            inside = ({f"{path}.{re.sub('^arms[.][^.]+', 'arms.*', name)}"} for name in value)
        return set().union(*inside)
    if isinstance(value, list):
        return set().union(*(kinds(path, inner) for inner in value))
    if value is None or value is False:
        return set()
    return {f"{path}={value}" if key in SAID else path}


def test_every_kind_is_in_a_quick_recipe():
    asked = {}
    for name in recipe_names():
        data = asdict(load_recipe(name))
        asked[name] = set().union(*(kinds(part, data[part]) for part in PARTS))
    quick = ELSEWHERE.union(*(asked[name] for name in QUICK))
    assert {name: found - quick for name, found in asked.items() if found - quick} == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *(pytest.param(name, words, id=name) for name, words in QUICK.items()),
        *(
            pytest.param(name, [], id=f"{name}-whole", marks=pytest.mark.slow)
            for name in recipe_names()
            if QUICK.get(name) != []
        ),
    ],
)
def test_every_recipe_runs_to_its_report(name, words, tmp_path):
    assert main(["run", name, *words, "--smoke", "--output-dir", str(tmp_path)]) == 0
    recipe = load_recipe(name, words)
    smoke = smoke_recipe(recipe, tmp_path)
    runs = cells(smoke)
    assert set(recipe.arms) == set(smoke.arms) and set(recipe.task.splits) == set(smoke.task.splits)
    assert list(recipe.cases)[:2] == list({run.cell["case"]: None for run in runs if "case" in run.cell})
    if (merged := merged_folder(smoke)) is not None and len(runs) > 1:
        assert (merged / "report" / "report.md").is_file()
    for run in runs:
        report = json.loads((run.folder / "report" / "report.json").read_text())
        assert set(run.arms) <= set(report["results"])
        for role in run.evaluation.splits:
            assert all(report["results"][arm][role]["n"] > 0 for arm in run.arms)
            assert (run.folder / "report" / f"reliability_{role}.png").stat().st_size > 5000
        assert "the numbers mean nothing" in (run.folder / "report" / "report.md").read_text()
        for arm, spec in run.arms.items():
            if spec.kind in ("sft", "distill"):
                model = run.folder / "students" / arm / "model"
                weights = "adapter_model.safetensors" if spec.lora is not None else "model.safetensors"
                assert (model / weights).is_file()
                assert f"trl {trl.__version__}, " in (model / "README.md").read_text()
        if run.capture.k > 1 and run.recalibration.methods:
            assert list((run.folder / "recalibration").glob("*.json"))


PUSH = """
from first_trl.cli import main
assert main(["run", "my_questions", "--smoke", "hub={namespace: alice, private: false}"]) == 0
"""


# Quick are the names and the privacy, below, and pushes, in test_share.py
@pytest.mark.slow
def test_what_is_pushed_has_another_name_and_is_private(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        run_client(PUSH, hub)
        assert hub.internal_errors == [] and hub.foreign_requests == []
        trained = {name for name, arm in load_recipe("my_questions").arms.items() if arm.kind in ("sft", "distill")}
        for name in trained:
            repo_id = f"alice/my_questions-smoke-{name}"
            assert "the numbers mean nothing" in hub.files(repo_id, "model")["README.md"].decode()
            assert hub.repo(repo_id, "model").private
        assert hub.repo("alice/my_questions-smoke-cache", "dataset").private


def test_a_second_smoke_run_keeps_what_is_there(tmp_path, capsys):
    options = ["run", "quickstart", "--smoke", "--output-dir", str(tmp_path), "--stage"]
    for stage in ("data", "pretrain"):
        assert main([*options, stage]) == 0
    assert "base/teacher: running" in capsys.readouterr().out
    assert main([*options, "pretrain"]) == 0
    assert ": running" not in capsys.readouterr().out


# models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_of_every_family(family, tokenizer, tmp_path):
    spec = tiny_model(ModelSpec("someone/huge", family, config={"tie_word_embeddings": True}), "teacher")
    assert spec.from_scratch and spec.config["tie_word_embeddings"] is True
    config = AutoConfig.for_model(spec.architecture, vocab_size=len(tokenizer), pad_token_id=0, **spec.config)
    model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() < 120_000
    assert config.get_text_config().model_type == ("gemma3_text" if family == "gemma3" else family)
    model.eval().save_pretrained(tmp_path)
    ids = torch.tensor(
        [tokenizer("What do bees gather from flowers?\nAnswer: A nectar, and that is all.")["input_ids"]]
    )
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits)
    assert ids.shape[1] > 16 and torch.isfinite(logits).all()


def test_families_keep_what_makes_them_different():
    assert tiny_model(ModelSpec(architecture="gemma3_text"), "t").config["layer_types"] == [
        "sliding_attention",
        "full_attention",
    ]
    assert sorted(tiny_model(ModelSpec(architecture="smollm3"), "t").config["no_rope_layers"]) == [0, 1]
    assert tiny_model(ModelSpec(architecture="qwen3_moe"), "t").config["num_experts_per_tok"] == 2
    kept = tiny_model(ModelSpec(architecture="gpt2", config={"attn_pdrop": 0.5, "n_embd": 1600, "n_inner": 9999}), "t")
    assert kept.config["attn_pdrop"] == 0.5 and kept.config["n_embd"] == 32 and "n_inner" not in kept.config


def test_the_family_comes_from_the_cache_or_must_be_told(stories, tmp_path):
    spec = small(tmp_path, teacher=ModelSpec(stories, sft={})).teacher
    assert spec.architecture == "llama" and spec.name_or_path is None
    with pytest.raises(ValueError, match=r"student is 'nobody/nothing'.*`architecture: llama`"):
        small(tmp_path, student=ModelSpec("nobody/nothing"))
    with pytest.raises(ValueError, match=r"teacher\.architecture 'lama'"):
        small(tmp_path, teacher=ModelSpec(architecture="lama"))


# tokenizer and rows


def test_answers_are_one_token(tokenizer):
    assert len(tokenizer) < 1000 and len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    for text in ("Grüße, 世界\n\tx = 1", "a plain text"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    for task in ("commonsense_qa", "openbook_qa", "arc", "boolq", "mmlu", "custom"):
        split = "dev" if task == "mmlu" else "train"
        rows = get_task(task).load(split, path=str(DATA / task)).dataset
        assert all(len(set(ids)) == len(ids) for ids in answer_token_ids_of_rows(tokenizer, rows))
    letters = {"template": "{question}\n{choices}\nAnswer: (", "completion": "{letter}"}
    rows = get_task("commonsense_qa", **letters).load("train", path=str(DATA / "commonsense_qa")).dataset
    assert len(answer_token_ids_of_rows(tokenizer, rows)[0]) == 5


def test_the_tokenizer_is_made_once(tmp_path):
    smoke_tokenizer(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    smoke_tokenizer(tmp_path)
    assert before == {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_has_rows(name, tmp_path):
    task = get_task(name)
    splits = {split: SplitSpec(split) for split in task.splits if split not in ("auxiliary_train", "pretrain")}
    if name == "alpaca":
        splits = {"train": SplitSpec("train[:90%]"), "validation": SplitSpec("train[90%:]")}
    small = smoke_task(TaskSpec(name, {"train": SplitSpec("dev" if name == "mmlu" else "train"), **splits}), tmp_path)
    for spec in small.splits.values():
        rows = get_task(name, **small.options).load(spec.split, path=small.path, limit=spec.limit).dataset
        assert 2 <= len(rows) <= 24


def slices(*texts: str, task="commonsense_qa") -> list[int]:
    """Rows in each part of the training file of 12."""
    splits = {f"s{i}": SplitSpec(text) for i, text in enumerate(texts)}
    small = smoke_task(TaskSpec(task, splits), Path("unused"))
    loaded = [get_task(task).load(spec.split, path=small.path).dataset["id"] for spec in small.splits.values()]
    assert len({row for part in loaded for row in part}) == sum(map(len, loaded)), "slices that were apart overlap"
    return [len(part) for part in loaded]


def test_slices_keep_their_order_and_at_least_two_rows():
    assert slices("train[:90%]", "train[90%:]") == [10, 2]
    assert slices("train[:80%]", "train[80%:90%]", "train[90%:]") == [8, 2, 2]
    assert slices("train[:1%]", "train[1%:2%]", "train[2%:]") == [2, 2, 8]
    assert slices("train[:8000]", "train[8000:9000]", "train[9000:]") == [8, 2, 2]
    assert slices("train[:-1000]", "train[-1000:]") == [10, 2]
    assert slices("train") == [12]
    # Six parts of a file of twelve
    assert slices(*(f"train[{start}%:{start + 1}%]" for start in range(6))) == [2, 2, 2, 2, 2, 2]


def test_rows_follow_the_task_of_each_role(tmp_path):
    splits = {
        "train": SplitSpec("train[:90%]"),
        "validation": SplitSpec("train[90%:]", limit=5000),
        "csqa": SplitSpec("validation", task="commonsense_qa", path="someone/copy", limit=3, unseen="question"),
        "mmlu": SplitSpec("test", task="mmlu", options={"subject": "anatomy", "completion": " {letter}"}),
        "world": SplitSpec("test", task="noisy_world"),
    }
    task = smoke_task(TaskSpec("alpaca", splits, path="big.json", max_length=1024, append_eos=True), tmp_path)
    assert task.path == str(DATA / "alpaca/alpaca_data.json") and task.append_eos and task.max_length == 512
    assert [task.splits[role].limit for role in splits] == [None, 24, 3, None, 24]
    assert task.splits["csqa"].path == str(DATA / "commonsense_qa") and task.splits["csqa"].unseen == "question"
    assert task.splits["mmlu"].options == {"completion": " {letter}"}
    assert task.splits["world"].path is None
    assert task.splits["train"].split == "train[0:22]" and task.splits["validation"].split == "train[22:24]"


# the transformation


def test_models_trainings_and_folder(tmp_path):
    training = {
        "learning_rate": 2e-5, "num_train_epochs": 5, "global_batch_size": 256, "gradient_accumulation_steps": 64,
        "bf16": True, "gradient_checkpointing": True, "optim": "adamw_8bit", "deepspeed": "z3.json", "max_steps": -1,
        "save_strategy": "steps", "save_steps": 10,
    }  # fmt: skip
    lora = {"r": 64, "lora_alpha": 128, "target_modules": ["q_proj"], "layers_to_transform": [30]}
    recipe = small(
        tmp_path,
        training=training,
        teacher=replace(MODEL, sft={}, lora=lora, select="nll"),
        arms={"a": ArmSpec("distill", lora=lora, training={"learning_rate": 1.0, "per_device_train_batch_size": 2})},
        teachers={"cross": TeacherSpec(sft={"num_train_epochs": 9}, folds=8, fold_by="id")},
        capture=CaptureSpec(k=7, vllm_url="http://localhost:8000", vllm_model="m"),
    )
    assert (recipe.teacher.name_or_path, recipe.teacher.init_kwargs, recipe.teacher.select) == (
        None,
        {"dtype": "bfloat16"},
        "nll",
    )
    assert recipe.teacher.sft is not None and recipe.teacher.sft["max_steps"] == 3 and recipe.student.sft is None
    assert recipe.teacher.lora == {"r": 4, "lora_alpha": 128, "target_modules": ["q_proj"]}
    assert recipe.training == {
        "learning_rate": 2e-5, "num_train_epochs": 1, "max_steps": 2, "global_batch_size": 8,
        "gradient_accumulation_steps": 2, "bf16": False, "fp16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    assert recipe.arms["a"].training == {"learning_rate": 1.0} and recipe.arms["a"].lora == recipe.teacher.lora
    variant = recipe.teachers["cross"]
    assert (variant.folds, variant.fold_by, variant.sft) == (2, "id", {"num_train_epochs": 1})
    assert (recipe.capture.k, recipe.capture.vllm_url, recipe.capture.vllm_model) == (7, None, None)
    assert recipe.report.notes[0].startswith("SMOKE RUN") and "vLLM" in recipe.report.notes[1]
    assert recipe.folder == tmp_path and recipe.num_threads == 1 and recipe.report_to == "none"
    assert recipe.tokenizer == str(tmp_path / "tokenizer") and recipe.task.revision is None
    assert cells(recipe)[0].arms == recipe.arms


def test_repositories_are_not_those_of_the_real_run(tmp_path, monkeypatch):
    # Random models go to a Hub of one's own or nowhere
    public = small(tmp_path, hub=HubSpec("me", private=False))
    assert public.hub is None and any("Nothing was pushed" in note for note in public.report.notes)
    monkeypatch.setattr("first_trl.experiments.smoke.recipe.ENDPOINT", "http://127.0.0.1:1")
    recipe = small(tmp_path, hub=HubSpec("me", private=False))
    assert recipe.name == "mine-smoke" and recipe.hub == HubSpec("me", private=True)
    assert small(tmp_path).hub is None


def test_grids_are_cut_to_two_values_and_seeds_to_two(tmp_path):
    grid = {"arms.first.recalibration_value": [0.1, 0.2, 0.3]}
    recipe = small(tmp_path, grid=grid, seeds=[5, 6, 7])
    assert recipe.seeds == [5, 6] and recipe.grid == {"arms.first.recalibration_value": [0.1, 0.2]}
    assert set(cells(recipe)[1].arms) == {
        "teacher",
        "first@recalibration_value=0.1",
        "first@recalibration_value=0.2",
    }
    runs = {
        "task.splits.test.limit": [100, 1000, 9000],
        "capture.k": [2, 3, 4],
        "training.learning_rate": [1e-5, 2e-5],
        "training.max_steps": [1, 100],
        "teacher.name_or_path": ["big", "bigger"],
        "teacher.sft.warmup_steps": [5],
    }
    recipe = small(tmp_path, grid=runs, seeds=[5, 6, 7])
    assert recipe.grid == {
        "task.splits.test.limit": [24],
        "capture.k": [2, 3],
        "training.learning_rate": [1e-5, 2e-5],
        "training.max_steps": [1],
        "teacher.name_or_path": [None],
        "teacher.sft.warmup_steps": [5],
    }
    assert recipe.seeds == [5] and len(cells(recipe)) == 4


def test_of_very_many_evaluations_two_roles_are_kept(tmp_path):
    splits = make_recipe().task.splits
    roles = {
        "a": SplitSpec("validation"),
        "b": SplitSpec("validation", unseen="question"),
        "c": SplitSpec("validation"),
    }
    task = TaskSpec("commonsense_qa", {**splits, **roles})
    for n_arms, kept in ((10, ["test", "a", "b", "c"]), (30, ["test", "a", "b"])):
        arms = {f"arm{i}": ArmSpec("sft") for i in range(n_arms)}
        recipe = small(tmp_path, task=task, arms=arms, evaluation=EvaluationSpec(["test", *roles]))
        assert recipe.evaluation.splits == kept and set(recipe.arms) == set(arms)
        assert ("Roles that were not evaluated: c." in recipe.report.notes) == (n_arms == 30)
        assert cells(recipe)[0].evaluation.splits == kept


def test_cases_become_small_too(tmp_path):
    text = {"name": "boolq", "splits": {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"}}
    cases = {
        "as_is": {},
        "digits": {
            "task": {"name": "digits", "splits": {"train": "train", "validation": "validation", "test": "test"}},
            "training.num_train_epochs": 30,
            "teacher.sft": {"num_train_epochs": 30, "learning_rate": 1.0},
            "arms.teacher": None,
        },
        "other": {"task": text, "student.name_or_path": "someone/gpt2", "student.architecture": "gpt2"},
    }
    recipe = small(tmp_path, cases=cases, seeds=[1, 2])
    as_is, digits = cells(recipe)
    assert "Cases that were not run: other." in recipe.report.notes
    (other,) = cells(small(tmp_path, cases={"other": cases["other"]}))
    assert as_is.arms == recipe.arms and as_is.seed == 1
    assert (digits.task.name, digits.task.path, digits.tokenizer) == ("digits", None, None)
    assert digits.task.splits["test"].limit == 24 and set(digits.arms) == {"first"}
    assert digits.training["num_train_epochs"] == 1 and digits.training["max_steps"] == 2
    assert digits.teacher.sft is not None
    assert (digits.teacher.sft["learning_rate"], digits.teacher.sft["max_steps"]) == (0.05, 3)
    assert other.task.path == str(DATA / "boolq") and other.tokenizer == recipe.tokenizer
    assert (other.student.name_or_path, other.student.architecture) == (None, "gpt2")
    assert other.student.config["n_embd"] == 32 and "hidden_size" not in other.student.config
    assert as_is.student.architecture == "llama" and as_is.student.config["hidden_size"] == 32
