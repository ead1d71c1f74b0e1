"""Two processes compute what one does, a killed run resumes to the same bits, and the accelerate configs load."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from first_trl import FirstDistillTrainer
from tests.support.distributed_steps import DDP_ESTIMATORS, HELD_OUT, SHAPES, SHARDED, held_out, step
from tests.support.sharded_steps import RUNS, steps
from tests.support.tiny import StopAt, tiny_cache, tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
torch.set_num_threads(1)


def launch(*command, check=True, folder=ROOT, **variables):
    # From another folder, with whatever else is on the path
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ, "PYTHONPATH": paths, "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    output = tmp_path_factory.mktemp("two") / "results.pt"
    launch(
        "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml"),
        "--main_process_port", str(free_port()), "-m", "tests.support.distributed_steps", str(output),
    )  # fmt: skip
    return torch.load(output, weights_only=True)


def assert_same_gradients(first, second, rtol=1e-6):
    assert set(first) == set(second)
    scale = max(float(gradient.abs().max()) for gradient in second.values())
    assert scale > 1e-3
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=rtol, atol=rtol * scale, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", DDP_ESTIMATORS)
def test_ddp_equals_one_process(estimator, two_processes, tmp_path):
    """Batch 8 on one process = 4 x 1 on two = 2 x 2 on two: loss, metrics, all gradients; 7 rows of evaluation too."""
    one = step(tmp_path, estimator=estimator)
    for shape in SHAPES:
        two = two_processes[f"ddp {estimator} {shape}"]
        assert_same_gradients(two["gradients"], one["gradients"])
        for name in ("loss", "kl", "cross_entropy", "entropy", "mean_token_accuracy", "num_tokens"):
            assert two["log"][name] == pytest.approx(one["log"][name], rel=1e-6), name
        for name in ("kl", "teacher_entropy", "mean_token_accuracy", "student_mass_outside"):
            assert two["eval"][f"eval_{name}"] == pytest.approx(one["eval"][f"eval_{name}"], rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", HELD_OUT)
def test_held_out_numbers_of_two_processes_are_those_of_one(layout, two_processes, tmp_path):
    """Every row counts once, whatever the last batch is filled up with."""
    one = held_out(tmp_path)
    two = two_processes[f"held out {layout}"]
    for kind in two:
        prefix = "test" if kind == "predict" else "eval"
        names = ["loss", "entropy", "mean_token_accuracy"] + (["kl", "teacher_entropy"] if kind != "sft" else [])
        for name in names:
            assert two[kind][f"{prefix}_{name}"] == pytest.approx(one[kind][f"{prefix}_{name}"], rel=1e-6), (
                kind,
                name,
            )
    assert one["predict"]["rows"] == two.get("predict", one["predict"])["rows"] == 11
    assert one["predict"]["test_loss"] == pytest.approx(one["distill"]["eval_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SHARDED)
def test_fsdp2_equals_one_process(layout, two_processes, tmp_path):
    """Also with a head that is sharded on its own, and never called as a module."""
    one = step(tmp_path, tied=SHARDED[layout][0])
    assert_same_gradients(two_processes[f"fsdp2 {layout}"]["gradients"], one["gradients"])


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="ZeRO-3 needs `pip install deepspeed`")
    output = tmp_path_factory.mktemp("zero3") / "results.pt"
    launch(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
        "-m", "tests.support.sharded_steps", str(output), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    return torch.load(output, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_zero3_equals_one_process(name, zero3, tmp_path):
    """Three steps, with an evaluation after each, and the saved model read again by the same processes."""
    assert_same_steps(name, zero3, tmp_path)


def assert_same_steps(name, launched, folder):
    kind, tied, _ = RUNS[name]
    one, two = steps(folder, kind, tied, False), launched[name]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5) and len(one["loss"]) == 3
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5) and len(one["eval_loss"]) == 3
    assert set(two["weights"]) == set(one["weights"])
    for weight, tensor in one["weights"].items():
        torch.testing.assert_close(two["weights"][weight], tensor, rtol=1e-5, atol=1e-5, msg=weight)


def accelerate_with_fsdp2(*command, **options):
    """accelerate goes on as DDP on CPU processes, which `fsdp2_on_cpu` sets right."""
    launch(
        "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml"), "--mixed_precision", "no",
        "--main_process_port", str(free_port()), "-m", *command, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    output = tmp_path_factory.mktemp("fsdp2") / "results.pt"
    accelerate_with_fsdp2("tests.support.sharded_steps", str(output))
    return torch.load(output, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (*_, shares) in RUNS.items() if not shares])
def test_fsdp2_of_accelerate_equals_one_process(name, fsdp2, tmp_path):
    """As under ZeRO-3, with models that accelerate shards."""
    assert_same_steps(name, fsdp2, tmp_path)


@pytest.mark.slow
def test_a_run_completes_under_fsdp2(tmp_path):
    """Every stage and arm of the quickstart, with an adapter among the students."""
    accelerate_with_fsdp2("tests.support.fsdp2_on_cpu", "run", "quickstart", "--smoke", folder=tmp_path)
    assert_whole(tmp_path / "outputs" / "smoke" / "quickstart")


def assert_whole(run):
    assert (run / "report" / "report.md").is_file()
    weights = load_file(run / "students" / "first" / "model" / "model.safetensors")
    assert all(tensor.numel() > 0 and torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.slow
def test_a_run_completes_under_zero3(tmp_path):
    """Trainings are split, and captures and evaluations between them read whole models."""
    pytest.importorskip("deepspeed", reason="ZeRO-3 needs `pip install deepspeed`")
    launch(
        "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "zero3.yaml"), "--mixed_precision", "no",
        "--main_process_port", str(free_port()), "-m", "first_trl", "run", "quickstart", "--smoke",
        folder=tmp_path, DS_ACCELERATOR="cpu",
    )  # fmt: skip
    assert_whole(tmp_path / "outputs" / "smoke" / "quickstart")


def train(folder, stop=None, resume=False):
    """Six steps with a checkpoint at the third; `stop` kills the process after that step."""
    tokenizer = tiny_tokenizer()
    trainer = FirstDistillTrainer(
        tiny_llama(seed=1),
        tiny_config(
            folder, per_device_train_batch_size=2, max_steps=6, save_strategy="steps", save_steps=3,
            learning_rate=1e-2, train_sampling_strategy="random",
        ),
        tiny_cache(tiny_llama(), tokenizer, tiny_rows(), k=5),
        processing_class=tokenizer,
        callbacks=[] if stop is None else [StopAt(stop)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    folder = tmp_path / "killed"
    code = f"import torch; from tests.training.test_trainer_distributed import train; train({str(folder)!r}, stop=5)"
    assert launch("-c", code, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed, whole = train(folder, resume=True), train(tmp_path / "whole")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


KINDS = {"cpu": "NO", "single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}


def test_every_accelerate_config_is_known():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_configs_are_what_their_names_say(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.use_cpu == (name == "cpu")
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3
