"""A recipe that captures from a server: it must hold the teacher that the run has trained."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from first_trl.cli import main
from first_trl.teacher.backends.vllm import VLLMBackend
from tests.support.quickstart import TINY
from tests.support.vllm.protocol import ProtocolServer


@pytest.fixture
def serve():
    running = []

    def start(model):
        running.append(ProtocolServer(model.eval().float(), max_model_len=4096))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def test_the_served_teacher_must_be_the_trained_one(serve, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def call(url, *options):
        return main(["run", "quickstart", *TINY, f"capture.vllm_url={url}", "--output-dir", str(run), *options])

    for stage in ("data", "pretrain", "teacher"):
        assert call("http://127.0.0.1:9", "--stage", stage) == 0
    probe = json.loads((run / "teacher" / "probe.json").read_text())
    assert len(probe["input_ids"]) == 8
    base, trained = (
        AutoModelForCausalLM.from_pretrained(run / name / "model") for name in ("base/teacher", "teacher")
    )
    with torch.no_grad():
        ids = torch.tensor([probe["input_ids"][0]])
        for model, values in ((base, probe["base_logprobs"]), (trained, probe["logprobs"])):
            own = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert own.tolist() == pytest.approx(values[0], abs=1e-4)
    nearly = AutoModelForCausalLM.from_pretrained(run / "teacher" / "model")
    for weight, before in zip(nearly.parameters(), base.parameters(), strict=True):
        weight.data.lerp_(before.data, 0.7)
    capsys.readouterr()
    for wrong in (base, nearly):
        assert call(serve(wrong).url, "--stage", "capture") == 2
        assert "does not hold the teacher that this run has trained" in capsys.readouterr().err
        assert not (run / "cache" / "manifest").exists()
    # A run from before there were probes makes it from the models it holds
    (run / "teacher" / "probe.json").unlink()
    asked = []
    start = VLLMBackend.__init__

    def begin(self, *args, **options):
        asked.append(options["concurrency"])
        start(self, *args, **options)

    monkeypatch.setattr(VLLMBackend, "__init__", begin)
    again = ("--stage", "capture", "capture.vllm_concurrency=3")
    assert call(serve(trained).url, *again) == 0, capsys.readouterr().err
    assert asked == [3]
    assert (run / "teacher" / "probe.json").is_file() and (run / "cache" / "manifest" / "train.json").is_file()


def test_a_served_teacher_that_is_not_fine_tuned_must_be_the_one_of_the_run(serve, tmp_path, capsys):
    run = tmp_path / "run"

    def call(url, *options):
        tuned = ("teacher.sft=null", f"capture.vllm_url={url}", "--output-dir", str(run))
        return main(["run", "quickstart", *TINY, *tuned, *options])

    for stage in ("data", "pretrain"):
        assert call("http://127.0.0.1:9", "--stage", stage) == 0
    base, student = (
        AutoModelForCausalLM.from_pretrained(run / "base" / role / "model") for role in ("teacher", "student")
    )
    capsys.readouterr()
    assert call(serve(student).url, "--stage", "capture") == 2
    said = capsys.readouterr().err
    assert "does not hold the teacher of the recipe" in said and "base/teacher/model" in said
    assert not (run / "cache" / "manifest").exists()
    assert call(serve(base).url, "--stage", "capture") == 0, capsys.readouterr().err
