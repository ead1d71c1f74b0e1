"""The paper's experiments as recipes: none is missing, none lacks an arm, and none says more than is known."""

import re
from functools import cache
from pathlib import Path

import pytest

from first_trl.experiments.recipe import cells, load_recipe
from first_trl.experiments.smoke.rows import DATA
from first_trl.tasks import answer_token_ids, get_task
from first_trl.utils.resources import recipe_names, recipe_path


PAPER = sorted(name for name in recipe_names() if name.startswith("paper/"))
MODERN = sorted(name for name in recipe_names() if name.startswith("modern/"))

EXPERIMENTS = ["E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8", "E9", "E10"]
ABLATIONS = ["temperature", "top-k", "student temperature", "label smoothing", "estimators"]

LLAMA1 = ("huggyllama/llama-30b", "huggyllama/llama-7b")
LLAMA2 = ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-7b-hf")
OPENLLAMA = ("openlm-research/open_llama_13b", "openlm-research/open_llama_7b")
QWEN15 = ("Qwen/Qwen1.5-7B", "Qwen/Qwen1.5-1.8B")
# What the authors' files say about each experiment; nothing inferred, nothing of ours
KNOWN = {
    "E1": {"pair": LLAMA1, "task": "alpaca", "teacher": 1e-5, "sft": 2e-5, "distill": 2e-5, "epochs": 3, "k": 5},
    "E2": {"pair": LLAMA1, "task": "alpaca", "teacher": 1e-5, "sft": 2e-5, "distill": 2e-5, "epochs": 3, "k": 5},
    "E3": {"pair": OPENLLAMA, "task": "alpaca", "teacher": 1e-5, "sft": 2e-5, "distill": 2e-5, "epochs": 3, "k": 5},
    "E4": {"pair": OPENLLAMA, "task": "alpaca", "teacher": 1e-5, "sft": 2e-5, "distill": 2e-5, "epochs": 3, "k": 5},
    "E5": {"pair": OPENLLAMA, "task": "alpaca", "teacher": 1e-5, "sft": 2e-5, "distill": 2e-5, "epochs": 3, "k": 5},
    "E6": {"task": "commonsense_qa", "distill": 2e-5},
    "E7": {"teacher_model": LLAMA2[0], "task": "commonsense_qa", "teacher": 1e-5},
    "E8": {"pair": LLAMA2, "task": "alpaca", "teacher": 1e-5, "distill": 4e-5, "epochs": 4, "batch": 256, "k": 5},
    "E9": {"pair": QWEN15, "task": "alpaca", "teacher": 2e-6, "distill": 2e-6, "epochs": 3, "batch": 128, "k": 5},
    "E10": {"teacher_model": LLAMA1[0], "task": "openbook_qa", "teacher": 1e-5, "k": 4},
}
EVALUATED = {
    "E1": ["openbook_qa"], "E2": ["alpaca"], "E3": ["commonsense_qa"], "E4": ["openbook_qa"], "E5": ["openbook_qa"],
    "E6": ["commonsense_qa"], "E7": ["commonsense_qa", "commonsense_qa"], "E10": ["openbook_qa"],
}  # fmt: skip
# Student and teacher temperature of runs that have both
BOTH_SIDES = {
    "E2": [(0.8, 0.4), (0.8, 0.6), (0.6, 0.4), (0.6, 0.6)],
    "E3": [(0.28, 0.28), (0.28, 0.28)],
    "E5": [(0.28, 0.28)],
    "ablation student temperature": [(0.8, 0.4), (0.8, 0.6), (0.6, 0.4), (0.6, 0.6), (0.28, 0.28)],
}
# The only figures of the paper that are at hand
ABSTRACT = "accuracy up by 2.3 points, mis-calibration down by 10"


@cache
def recipe(name):
    return load_recipe(name)


def of(experiment):
    (name,) = [name for name in PAPER if experiment in recipe(name).reproduces]
    return recipe(name)


def table(name):
    """Rows of the table at the head of a file."""
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    start = lines.index("# setting | value | status | source")
    assert lines[start + 1] == "# --- | --- | --- | ---"
    assert all(line.startswith("#") for line in lines[:start]), "the table opens the file"
    end = next(i for i, line in enumerate(lines) if line.startswith("# known = "))
    return [line.removeprefix("# ").split(" | ") for line in lines[start + 2 : end]]


def learning_rate(loaded, arm):
    return {**loaded.training, **loaded.arms[arm].training}["learning_rate"]


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, *(f"ablation {name}" for name in ABLATIONS)])
def test_every_experiment_and_ablation_has_one_recipe(experiment):
    assert len([name for name in PAPER if experiment in recipe(name).reproduces]) == 1


@pytest.mark.parametrize("task", ["commonsense_qa", "openbook_qa", "boolq"])
def test_every_in_domain_task_has_a_recipe(task):
    assert any(recipe(name).task.name == task for name in PAPER)


@pytest.mark.parametrize("name", PAPER + MODERN)
def test_every_recipe_has_all_kinds_of_arms(name):
    arms = list(recipe(name).arms.values())
    students = [arm for arm in arms if arm.kind == "distill"]
    sft = [arm for arm in arms if arm.kind == "sft"]
    scaled = {arm.of for arm in arms if arm.kind == "temperature_scaling"}
    assert any(arm.kind == "teacher" and arm.teacher is None for arm in arms)
    assert any(not arm.training.get("num_train_epochs") and "max_steps" not in arm.training for arm in sft)
    assert any(arm.training.get("num_train_epochs") == 1 for arm in sft)
    assert any(arm.training.get("label_smoothing_factor") == 0.1 for arm in sft)
    plain = [arm for arm in students if arm.estimator == "topk"]
    assert any(arm.recalibration == "none" for arm in plain)
    for method in ("label_smoothing", "log_label_smoothing"):
        assert any((arm.recalibration, arm.recalibration_value) == (method, 0.1) for arm in plain)
    for method in ("probability_temperature", "logit_temperature"):
        assert any((arm.recalibration, arm.recalibration_value) == (method, None) for arm in plain), "a fitted value"
    assert scaled >= {"sft", "direct"}


@pytest.mark.parametrize("name", PAPER + MODERN)
def test_names_runs_and_families(name):
    loaded = recipe(name)
    assert loaded.name == Path(name).name, "the folder of the run is called like the file"
    assert loaded.teacher.architecture and loaded.student.architecture, "smoke runs need the families"
    for run in cells(loaded):
        labels = [arm.label for arm in run.arms.values()]
        assert None not in labels and len(set(labels)) == len(labels)
    text = recipe_path(name).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 119


def test_no_two_recipes_share_a_folder():
    names = [recipe(name).name for name in recipe_names()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", PAPER)
def test_the_table_says_of_every_setting_how_it_is_known(name):
    rows = table(name)
    assert len(rows) > 15
    for row in rows:
        assert len(row) == 4, row
        setting, value, status, source = row
        assert setting and value and status in ("known", "inferred", "ours"), row
        tags = re.findall(r"\[(\w+)\]", source)
        assert set(tags) <= {"A", "C1", "C2", "V", "M", "B", "I"}, row
        if status == "known":
            # What somebody else tells, remembers or concludes is not known
            assert set(tags) & {"A", "C1", "C2"} and not set(tags) & {"B", "I"}, row
        if status == "inferred":
            assert tags, row
    settings = [row[0] for row in rows]
    assert len(set(settings)) == len(settings)


@pytest.mark.parametrize("name", PAPER)
def test_the_table_and_the_recipe_say_the_same(name):
    loaded, rows = recipe(name), {row[0]: row[1] for row in table(name)}

    def number(setting):
        return float(re.match(r"[\d.]+(e-\d+)?", rows[setting]).group())

    assert number("lr of the teacher") == loaded.teacher.sft["learning_rate"]
    assert number("lr of the SFT student") == learning_rate(loaded, "sft") == learning_rate(loaded, "sft_short")
    assert number("lr of the distillation") == learning_rate(loaded, "direct") == learning_rate(loaded, "first")
    assert number("epochs, distillation") == loaded.training["num_train_epochs"]
    assert number("epochs, fine-tuning") == loaded.teacher.sft["num_train_epochs"]
    assert number("global batch") == loaded.training["global_batch_size"] == loaded.teacher.sft["global_batch_size"]
    assert number("block size") == loaded.task.max_length
    assert number("top k") == loaded.capture.k
    assert number("weight decay") == loaded.training["weight_decay"] == loaded.teacher.sft["weight_decay"]
    assert ("overlap" in rows) == any(split.unseen for split in loaded.task.splits.values())
    truncates = loaded.task.on_overflow.startswith("truncate")
    assert ("longer rows" in rows) == truncates


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_known_settings_are_those_of_the_authors(experiment):
    loaded, known = of(experiment), dict(KNOWN[experiment])
    expected = {
        "pair": (loaded.teacher.name_or_path, loaded.student.name_or_path),
        "teacher_model": loaded.teacher.name_or_path,
        "task": loaded.task.name,
        "teacher": loaded.teacher.sft["learning_rate"],
        "sft": learning_rate(loaded, "sft"),
        "distill": learning_rate(loaded, "direct"),
        "epochs": loaded.training["num_train_epochs"],
        "batch": loaded.training["global_batch_size"],
        "k": loaded.capture.k,
    }
    assert {key: expected[key] for key in known} == known
    for training in (loaded.training, loaded.teacher.sft):
        assert training["lr_scheduler_type"] == "cosine"
        assert training["warmup_steps"] == 0.03
        assert training["gradient_checkpointing"] is True
    assert (loaded.seed, loaded.seeds, loaded.task.max_length, loaded.task.append_eos) == (1234, [], 512, False)
    assert loaded.student.init_kwargs["dtype"] == "bfloat16"
    assert loaded.task.splits["train"].split == "train[:90%]"


@pytest.mark.parametrize("experiment", EVALUATED)
def test_evaluation_is_on_the_task_of_the_authors_run(experiment):
    loaded = of(experiment)
    tasks = [loaded.task.splits[role].task or loaded.task.name for role in loaded.evaluation.splits]
    assert tasks == EVALUATED[experiment]


@pytest.mark.parametrize("experiment", BOTH_SIDES)
def test_temperatures_on_both_sides(experiment):
    arms = [arm for arm in of(experiment).arms.values() if arm.estimator == "probability_softmax"]
    assert [(arm.student_temperature, arm.recalibration_value) for arm in arms] == BOTH_SIDES[experiment]
    assert all(arm.recalibration == "probability_temperature" for arm in arms)


def test_arms_that_were_seen_with_values_of_their_own():
    assert [learning_rate(of("E3"), arm) for arm in ("softmax", "softmax_3e-5")] == [2e-5, 3e-5]
    assert [learning_rate(of("E3"), f"log_label_smoothing{lr}") for lr in ("", "_1e-5")] == [2e-5, 1e-5]
    assert learning_rate(of("E4"), "log_label_smoothing_1e-5") == 1e-5
    assert learning_rate(of("E5"), "softmax") == 1e-5
    assert of("E2").arms["teacher_025"].recalibration_value == 0.25
    assert of("E7").teachers["slower"].sft["learning_rate"] == 8e-6
    swept = [arm.recalibration_value for arm in cells(of("E6"))[0].arms.values() if arm.swept]
    assert swept == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    # "As it comes" means that nothing moves
    for training in (*(of(e).arms["base"].training for e in ("E2", "E4")), of("E2").teachers["base"].sft):
        assert training == {"max_steps": 1, "learning_rate": 0.0}


def test_sweeps_of_the_ablations():
    def swept(ablation, prefix):
        arms = cells(of(f"ablation {ablation}"))[0].arms
        return sorted(next(iter(arm.swept.values())) for name, arm in arms.items() if name.startswith(f"{prefix}@"))

    coarse, fine = [i / 10 for i in range(1, 11)], [round(0.2 + i / 50, 2) for i in range(11)]
    assert swept("temperature", "c") == sorted({*coarse, *fine})
    assert swept("student temperature", "c") == [0.25, 0.28, 0.3]
    assert of("ablation top-k").capture.k == swept("top-k", "k_direct")[-1] == swept("top-k", "k_first")[-1] == 10
    estimators = {arm.estimator for arm in of("ablation estimators").arms.values() if arm.kind == "distill"}
    assert estimators == {"topk", "bucket", "renormalized", "sampled"}
    assert of("ablation estimators").capture.num_draws > 0


@pytest.mark.parametrize("name", PAPER)
def test_out_of_domain_questions_are_kept_out_of_training(name):
    loaded = recipe(name)
    for role in loaded.evaluation.splits:
        split = loaded.task.splits[role]
        if split.task not in (None, loaded.task.name):
            assert split.unseen == "question", role


@pytest.mark.parametrize("name", PAPER + MODERN)
def test_no_recipe_claims_a_result(name):
    loaded = recipe(name)
    notes = " ".join(loaded.report.notes)
    assert ("Not run here" in notes) and re.search(r"GPUs? of \d+ GB|one of 24 GB|Made for \d", notes)
    if name in PAPER:
        assert ABSTRACT in notes and "repeats a design and no number" in notes
    claims = f"{loaded.description} {notes.replace(ABSTRACT, '')} {loaded.report.title}"
    assert not re.search(r"\d\s*(%|points?\b|percent)", claims)
    assert not re.search(r"\b(ECE|accuracy|NLL|Trust) (of|is|was|=|rises|falls|drops) ?(about )?\d", claims)
    assert not re.search(r"outperform|achiev|we (found|reach|obtain)|results show|state of the art", claims, re.I)


def test_what_was_not_confirmed_says_so():
    (name,) = [name for name in PAPER if recipe(name).task.name == "boolq"]
    assert recipe(name).reproduces == ["BoolQ (recalled)"]
    assert ["inferred", "[B]; no trace in the code or in a summary"] in [row[2:] for row in table(name)]
    assert "could not be confirmed" in " ".join(recipe(name).report.notes)
    # Only the teacher of E7 was seen
    assert ["arms with a student", "all", "ours", "no run was seen"] in table("paper/e7_llama2_commonsense_qa")


@pytest.mark.parametrize("tokenizer", ["gpt2_tokenizer", "tiny_llama/stories260K"])
def test_letters_are_single_tokens_behind_the_prompts_of_the_paper_recipes(data_folder, tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(data_folder / tokenizer)
    layouts = set()
    for name in PAPER:
        task = recipe(name).task
        used = [(task.name, task.options), *((split.task, split.options) for split in task.splits.values())]
        layouts |= {(task, tuple(sorted(options.items()))) for task, options in used if task and options}
    assert {task for task, _ in layouts} == {"commonsense_qa", "openbook_qa"}
    for task, options in layouts:
        row = get_task(task, **dict(options)).load("train", path=str(DATA / task)).dataset[0]
        ids = answer_token_ids(loaded, row["prompt"], row["choices"])
        assert len(set(ids)) == len(row["choices"])


def test_label_smoothing_of_the_sft_arm_reaches_the_loss(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.support.tiny import tiny_llama, tiny_tokenizer

    rows = Dataset.from_dict({"input_ids": [[3, 4, 5, 6]] * 4, "labels": [[-100, -100, 5, 6]] * 4})

    def loss(smoothing):
        args = SFTConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, label_smoothing_factor=smoothing, report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=tiny_tokenizer())
        return trainer.train().training_loss

    import torch

    logits = tiny_llama()(torch.tensor([[3, 4, 5, 6]])).logits[0, [1, 2]].log_softmax(-1)
    hard, uniform = -logits[[0, 1], [5, 6]].mean().item(), -logits.mean().item()
    assert loss(0.0) == pytest.approx(hard, abs=1e-4)
    assert loss(0.1) == pytest.approx(0.9 * hard + 0.1 * uniform, abs=1e-4)
    assert abs(hard - uniform) > 1e-3
