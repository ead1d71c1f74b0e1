"""What ends a command from outside is one sentence and an exit status, not a traceback."""

import errno

import pytest
from filelock import FileLock

from first_trl.cli import main
from first_trl.utils.errors import explain
from tests.support.tiny import tiny_llama


def test_a_second_run_into_one_folder_is_refused(tmp_path, capsys):
    with FileLock(tmp_path / ".lock"):
        assert main(["run", "quickstart", "--output-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("Another run is at work in") == 1
    assert not (tmp_path / "recipe.yaml").exists()


def failing(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("first_trl.experiments.stages.run.run_recipe", fail)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["run", "quickstart", "--output-dir", str(tmp_path)]) == 130
    err = capsys.readouterr().err
    assert "run the same command again to continue" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), "model.safetensors: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/a"), "/mnt/a: the file system is read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/mnt/b"), "/mnt/b: permission denied"),
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


def test_errors_of_the_code_keep_their_traceback(tmp_path, monkeypatch):
    failing(monkeypatch, RuntimeError("expected scalar type Long"))
    with pytest.raises(RuntimeError, match="scalar type"):
        main(["run", "quickstart", "--output-dir", str(tmp_path)])
