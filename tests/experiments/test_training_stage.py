"""A training of the pipeline: what loggers write outlives the checkpoints, and a logger that is missing is named."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from first_trl.experiments.recipe import ModelSpec
from first_trl.experiments.run_folder import RunFolder, TrainingFolder
from first_trl.experiments.stages.context import RunContext
from first_trl.experiments.stages.teachers import base_model, base_units
from first_trl.experiments.stages.training import check_reporting, load_trained, train_sft, training_arguments
from first_trl.tasks import get_task
from first_trl.training.config import FirstDistillConfig
from tests.support.tiny import tiny_llama, tiny_rows, tiny_tokenizer


torch.set_num_threads(1)


class EventFiles(TrainerCallback):
    """Writes where TensorBoard's and CodeCarbon's callbacks write."""

    def on_log(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / "runs" / "one"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "events").open("a") as file:
            file.write(f"{state.global_step}\n")
        (Path(args.output_dir) / "emissions.csv").write_text("kg\n")


class OneRunAProcess(TrainerCallback):
    """Logs as W&B's and SwanLab's callbacks do: into the run that is open, else into a new one."""

    def setup(self, args, state, control, **kwargs):
        logger = getattr(self, "_wandb", None) or self._swanlab
        if logger.run is None:
            logger.run = args.run_name
            logger.runs.append(args.run_name)

    on_train_begin = setup


class Missing(TrainerCallback):
    def __init__(self):
        raise RuntimeError("MissingCallback requires missing to be installed. Run `pip install missing`.")


def recipe(report_to):
    return SimpleNamespace(name="one", seed=0, report_to=report_to)


def test_logs_outlive_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "event_files", EventFiles)
    training = {"max_steps": 2, "logging_steps": 1, "gradient_checkpointing": False, "disable_tqdm": True}
    rows, folder = Dataset.from_list(tiny_rows()), TrainingFolder(tmp_path)
    train_sft(recipe("event_files"), tiny_llama(), tiny_tokenizer(), rows, training, folder)
    assert not folder.checkpoints.exists()
    assert (folder.reports / "runs" / "one" / "events").read_text().split()[:2] == ["1", "2"]
    assert {path.name for path in folder.reports.iterdir()} == {"runs", "emissions.csv"}


@pytest.mark.parametrize("attribute", ["_wandb", "_swanlab"])
@pytest.mark.parametrize("before", [None, "mine"])
def test_each_training_has_a_run_of_its_own(attribute, before, tmp_path, monkeypatch):
    """But for a run that was open before, which is not ours to close."""
    logger = SimpleNamespace(run=before, runs=[])
    logger.get_run, logger.finish = lambda: logger.run, lambda: setattr(logger, "run", None)
    callback = type("Callback", (OneRunAProcess,), {attribute: logger})
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "one_run", callback)
    training = {"max_steps": 1, "gradient_checkpointing": False, "disable_tqdm": True}
    for name in ("teacher", "sft"):
        folder = TrainingFolder(tmp_path / name)
        train_sft(recipe("one_run"), tiny_llama(), tiny_tokenizer(), Dataset.from_list(tiny_rows()), training, folder)
    assert logger.runs == ([] if before else ["one/teacher/seed-0", "one/sft/seed-0"]) and logger.run == before


def test_without_a_logger_there_is_no_folder(tmp_path):
    training = {"max_steps": 1, "gradient_checkpointing": False, "disable_tqdm": True, "fused_loss": True}
    folder = TrainingFolder(tmp_path)
    train_sft(recipe("none"), tiny_llama(), tiny_tokenizer(), Dataset.from_list(tiny_rows()), training, folder)
    assert not folder.reports.exists() and folder.log.is_file()


def test_a_fine_tuning_projects_the_answers_alone(tmp_path):
    """The vocabulary is what a step costs here: 76 of 80 positions are prompts, and nothing of them is multiplied with it."""
    rows = Dataset.from_list([{"input_ids": [*range(3, 23)], "labels": [*[-100] * 19, 22]}] * 4)

    def operations(**options):
        training = {"max_steps": 2, "gradient_checkpointing": False, "disable_tqdm": True, **options}
        folder = TrainingFolder(tmp_path / str(len(options)))
        with FlopCounterMode(display=False) as counter:
            train_sft(recipe("none"), tiny_llama(vocab_size=5000), tiny_tokenizer(), rows, training, folder)
        return counter.get_total_flops()

    assert operations(fused_loss=True) < 0.25 * operations()


def test_a_logger_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "missing", Missing)
    for check in (
        check_reporting,
        lambda name: training_arguments(FirstDistillConfig, recipe(name), {}, TrainingFolder(tmp_path)),
    ):
        with pytest.raises(
            ValueError, match=r"missing is not installed .* `pip install missing`, or set `report_to: none`"
        ):
            check("missing")
        with pytest.raises(ValueError, match=r"unknown logger 'tensorbord'.*tensorboard"):
            check("tensorbord")
    check_reporting("none")


def on_the_hub(cache, seed):
    """Another commit of a model, as a download leaves it, and the name's newest."""
    commit = f"{seed:040x}"
    folder = cache / "models--someone--base"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    tiny_llama(seed).save_pretrained(folder / "snapshots" / commit)
    return commit


def test_a_model_of_the_hub_stays_the_commit_that_a_run_began_with(tmp_path, monkeypatch):
    """An adapter that was trained on one is no model together with another."""
    # transformers looks for an adapter of that name on the Hub all the same, for minutes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    where = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    spec = ModelSpec(name_or_path="someone/base", init_kwargs=where)

    def base(role="student", folder="run", spec=spec):
        run = SimpleNamespace(
            recipe=SimpleNamespace(student=spec, teacher=spec, seed=0),
            folder=RunFolder(tmp_path / folder),
            is_main=True,
        )
        return base_model(run, role)

    def begins_like(model, seed):
        return torch.equal(model.lm_head.weight, tiny_llama(seed).lm_head.weight)

    on_the_hub(tmp_path / "hub", 1)
    rows, folder = Dataset.from_list(tiny_rows()), TrainingFolder(tmp_path / "trained")
    training = {"max_steps": 2, "learning_rate": 1e-2, "gradient_checkpointing": False, "disable_tqdm": True}
    lora = {"r": 2, "target_modules": ["q_proj"]}
    train_sft(recipe("none"), base(), tiny_tokenizer(), rows, training, folder, lora=lora)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        trained = load_trained(folder, spec, base)(ids).logits
        second = on_the_hub(tmp_path / "hub", 2)
        assert torch.equal(load_trained(folder, spec, base)(ids).logits, trained)
    assert begins_like(base(), 1)
    # Asked for by name, or by another run, it is another one
    named = ModelSpec(name_or_path="someone/base", init_kwargs={**where, "revision": second})
    assert begins_like(base(spec=named), 2) and begins_like(base(folder="other run"), 2)
    assert begins_like(base("teacher"), 1), "the same model is the student's and the teacher's"
    # So is one that the run makes of it
    cut = ModelSpec(name_or_path="someone/base", init_kwargs=where, keep_layers=1)
    run = SimpleNamespace(
        recipe=SimpleNamespace(student=cut, teacher=spec, seed=0), role_keys={"train": "rows"}, keys={}, folder=RunFolder(tmp_path / "run"), is_main=True,
        tokenizer=tiny_tokenizer,
    )  # fmt: skip
    (unit,) = [unit for unit in base_units(run) if unit.name == "base/student"]
    unit.work(tmp_path / "run" / unit.name)
    assert begins_like(base_model(run, "student"), 1)


def test_the_tokenizer_of_a_local_run_asks_the_hub_for_nothing(tmp_path, monkeypatch):
    """The task has rows on the Hub, of which this run reads none."""
    asked = []
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: asked.append("the Hub"))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = SimpleNamespace(
        task=SimpleNamespace(name="arc", options={}, path=None, revision=None),
        tokenizer=None,
        tokenizer_source=(str(tmp_path / "model"), None),
        capture=SimpleNamespace(target="vocabulary"),
        seed=0,
    )
    run = SimpleNamespace(recipe=recipe, folder=RunFolder(tmp_path / "run"), is_main=True)
    run.data_revision = partial(RunContext.data_revision, run)
    assert RunContext.tokenizer(run).get_vocab() == tiny_tokenizer().get_vocab() and asked == []
    # Where the rows are the Hub's, it is asked
    assert RunContext.data_revision(run, get_task("arc"), None, None) is None and asked == ["the Hub"]
