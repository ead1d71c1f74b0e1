"""What ends a command from outside is one sentence and an exit status, not a traceback."""

import errno
import gc
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from first_trl.cli import main
from first_trl.utils.errors import explain
from tests.support.quickstart import TINY
from tests.support.tiny import tiny_llama, tiny_tokenizer


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}


def test_a_second_run_into_one_folder_is_refused(tmp_path, capsys):
    with FileLock(tmp_path / ".lock"):
        assert main(["run", "quickstart", "--stage", "data", "--output-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("Another run is at work in") == 1
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_run_gives_its_objects_back(tmp_path):
    """What is frozen until Python ends counts as leaked there, and Triton prints forty lines of it behind every run."""
    run = ["run", "quickstart", *TINY, "--stage", "data", "--output-dir", str(tmp_path)]
    gc.unfreeze()
    assert main(run) == 0
    assert gc.get_freeze_count() == 0
    gc.collect()
    gc.freeze()
    frozen = gc.get_freeze_count()
    assert main(run) == 0
    # What a caller has frozen stays so, but for what was freed meanwhile
    assert gc.get_freeze_count() > 0.9 * frozen


def failing(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("first_trl.experiments.stages.run.run_recipe", fail)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["run", "quickstart", "--output-dir", str(tmp_path)]) == 130
    err = capsys.readouterr().err
    assert "run the same command again to continue" in err and "Traceback" not in err


def test_ctrl_c_while_libraries_are_imported(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(["precompute", "--teacher", "x"]) == 130
    assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.slow
def test_ctrl_c_in_a_training(tmp_path):
    """A real signal while weights are trained; the same command goes on behind what was finished."""
    command = [sys.executable, "-m", "first_trl", "run", "quickstart", *TINY, "--output-dir", str(tmp_path / "run")]
    command += ["teacher.pretrain.num_train_epochs=200"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
        # A shell starts its background jobs deaf to the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stdout:
        if "base/teacher: running" in line:
            break
    # The first lines of the log, or of the progress bar: the trainer is at work
    while (letter := process.stderr.read(1)) and letter != "%":
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err.count("interrupted; run the same command again to continue") == 1 and "Traceback" not in err
    done = subprocess.run([*command[:-1]], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contextmanager
def files_of_at_most(size):
    """A limit that the system itself sets, so that whatever writes a larger file fails in earnest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def inputs(tmp_path):
    """A model, rows to capture, confidences to report."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"w{3 + i % 20} ", "completion": f"w{3 + i % 7} w{4 + i % 11}"} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.csv").write_text("confidence,correct\n" + "0.8,1\n0.6,0\n" * 20)
    (tmp_path / "test.csv").write_text("question,A,B,answer\nw3 w4,w5,w6,A\n")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["precompute", "--teacher", "model", "--dataset", "rows.jsonl", "--output-dir", "out"],
        ["calibrate", "c.csv", "--resamples", "0", "--output-dir", "out"],
        ["run", "quickstart", *TINY, "--stage", "data", "--output-dir", "out"],
    ],
    ids=lambda words: words[0],
)
def test_what_cannot_be_written_is_one_sentence_and_no_loss(words, inputs, monkeypatch, capsys):
    """Arrow, datasets and matplotlib write in ways of their own, and the same command succeeds afterwards."""
    monkeypatch.chdir(inputs)
    with files_of_at_most(1_000):
        assert main(words) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert "larger than a file may be here" in err[-1] and not any("Traceback" in line for line in err)
    assert main(words) == 0


FULL = """
mount -t tmpfs -o size=300k none "$1" && cd "$1" || exit 99
shift
"$@"; echo "STATUS $?"
mount -o remount,size=64m . && "$@" --stage pretrain; echo "STATUS $?"
mount -o remount,ro . && "$@" --stage teacher; echo "STATUS $?"
"""


@pytest.mark.slow
def test_a_full_and_a_read_only_disk(tmp_path):
    """A file system of 300 kB under the run, then a larger one, then one that takes no more."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs `unshare -rm`, to mount a file system as a user")
    command = [sys.executable, "-m", "first_trl", "run", "quickstart", *TINY, "--output-dir", "run"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL, "sh", str(tmp_path), *command],
        env={**ENVIRONMENT, "HF_HOME": str(tmp_path.parent / "hf")}, capture_output=True, text=True,
    )  # fmt: skip
    assert re.findall(r"STATUS (\d+)", done.stdout) == ["2", "0", "2"], done.stderr
    # What was whole before the disk was full is kept
    assert done.stdout.count("  data: done before, kept") == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("first-trl:")]
    assert len(said) == 2 and "Traceback" not in done.stderr
    assert "the disk is full. Free space and run the same command again" in said[0]
    assert "the file system is read-only" in said[1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), "model.safetensors: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/a"), "/mnt/a: the file system is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/mnt/b"), "/mnt/b: permission denied"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/mnt/c"), "/mnt/c: the disk quota is used up"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: No space left on device"), "disk is full"),
        (RuntimeError("TensorBoardCallback requires tensorboard to be installed."), "pip install tensorboard"),
        (RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`."), "report_to: none"),
        (RuntimeError("TrackioCallback requires trackio to be installed. Run `pip install trackio`."), "trackio"),
    ],
)
def test_disks_and_trackers(error, said, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert main(["run", "quickstart", "--output-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and err.strip().count("\n") == 0


@pytest.mark.parametrize(
    "words",
    [
        # Status 1 would say that the threshold is broken
        ["calibrate", "table.csv", "--threshold", "/no/model"],
        ["evaluate", "/no/model", "--task", "digits"],
        ["inspect", "table.csv", "--tokenizer", "/no/model"],
        ["precompute", "--dataset", "table.csv", "--teacher", "/no/model", "--output-dir", "cache"],
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("confidence,correct,prompt,completion\n0.9,1,a,b\n")
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "first-trl: /no/model is no folder, and no id of a repository on the Hub" in err and "Traceback" not in err


def test_a_file_in_the_way_of_the_output(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text("confidence,correct\n0.9,1\n")
    for folder, said in (
        (path, "a file of this name is in the way"),
        (path / "x", "a file is where a folder should be"),
    ):
        assert main(["calibrate", str(path), "--output-dir", str(folder)]) == 2
        assert said in capsys.readouterr().err


def test_a_reader_that_has_seen_enough():
    command = [sys.executable, "-m", "first_trl", "recipes", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("length", [0, 7, -100])
def test_truncated_weights_are_named(length, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(Exception) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    said = explain(caught.value)
    assert str(path) in said and "damaged or cut short" in said


def test_truncated_weights_are_named_by_a_command(inputs, capsys):
    path = inputs / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["evaluate", str(inputs / "model"), "--task", "custom", "--path", str(inputs)]) == 2
    err = capsys.readouterr().err
    assert f"{path} is damaged or cut short" in err and "Traceback" not in err


def test_errors_of_the_code_keep_their_traceback(tmp_path, monkeypatch):
    failing(monkeypatch, RuntimeError("expected scalar type Long"))
    with pytest.raises(RuntimeError, match="scalar type"):
        main(["run", "quickstart", "--output-dir", str(tmp_path)])
