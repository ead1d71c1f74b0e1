"""`first-trl evaluate` on the files of four benchmarks, and its numbers beside those of lm-evaluation-harness."""

import gzip
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from first_trl.cli import main
from first_trl.tasks import get_task
from tests.support.harness import run_harness
from tests.support.tiny import tiny_llama


BENCHMARKS = {
    "commonsense_qa": ("commonsense_qa", "validation", 1221),
    "openbook_qa": ("openbook_qa", "test", 500),
    "arc": ("arc_easy", "test", 2376),
    "mmlu": ("mmlu", "test", 14042),
}
HARNESS_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
  - metric: acc_mutual_info
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def model(data_folder, tmp_path_factory) -> str:
    """A random Llama of 0.8 million parameters with the vocabulary of GPT-2."""
    folder = tmp_path_factory.mktemp("random")
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "gpt2_tokenizer")
    end = tokenizer.eos_token_id
    tiny_llama(
        vocab_size=len(tokenizer), max_position_embeddings=1024, bos_token_id=end, eos_token_id=end, pad_token_id=None
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def evaluate(model, path, name, output, *options):
    command = ["evaluate", model, "--task", name, "--path", str(path), "--split", BENCHMARKS[name][1]]
    assert main([*command, "--device", "cpu", "--output-dir", str(output), *options]) == 0
    report = json.loads((output / "report.json").read_text())
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    return report, rows


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("limit", [12, pytest.param(None, marks=pytest.mark.slow)])
def test_each_benchmark_is_read_and_scored(model, data_folder, tmp_path, capsys, name, limit):
    path = data_folder / BENCHMARKS[name][0]
    report, rows = evaluate(model, path, name, tmp_path, *([] if limit is None else ["--limit", str(limit)]))
    assert report["scoring"] == "token"
    assert len(rows) == report["scores"]["model"]["n"] == (limit or BENCHMARKS[name][2])
    assert "Evaluating: 100%" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocabulary", ["gpt2", pytest.param("sentencepiece", marks=pytest.mark.slow)])
def test_numbers_are_those_of_the_harness(model, stories, data_folder, tmp_path, vocabulary):
    """Accuracy and the confidence of every row: letters by their token, texts by all tokens and each normalisation."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    model = model if vocabulary == "gpt2" else stories
    with gzip.open(data_folder / "arc_easy" / "test.jsonl.gz", "rt") as file:
        lines = list(file)
    ragged = [line for line in lines if len(json.loads(line)["question"]["choices"]) != 4]
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc" / "test.jsonl").write_text("".join([*lines[:14], *ragged]))
    for completion in ("letter", "text"):
        rows = get_task("arc", completion=f" {{{completion}}}").load("test", path=str(tmp_path / "arc")).dataset
        data = tmp_path / f"{completion}.jsonl"
        rows.map(lambda row: {"choices": [choice[1:] for choice in row["choices"]]}).to_json(data)
        (tmp_path / f"{completion}.yaml").write_text(HARNESS_TASK.format(name=completion, data=data))
    results = run_harness(tmp_path, model, ["letter", "text"])
    for completion, length, metric in (
        ("letter", "none", "acc"),
        ("text", "none", "acc"),
        ("text", "characters", "acc_norm"),
        ("text", "bytes", "acc_bytes"),
        ("text", "unconditional", "acc_mutual_info"),
    ):
        if length == "unconditional" and vocabulary == "sentencepiece":
            continue  # The harness cuts the text into other tokens there: without a question it begins with "▁▁"
        options = ["--option", f"completion= {{{completion}}}", "--length", length, "--bins", "15"]
        report, rows = evaluate(model, tmp_path / "arc", "arc", tmp_path / f"{completion} {length}", *options)
        one_token = completion == "letter" and vocabulary == "gpt2"  # " A" is "▁" and "A" in the other
        assert report["scoring"] == ("token" if one_token and length == "none" else "choices")
        theirs = results["results"][completion][f"{metric},none"]
        assert report["scores"]["model"]["accuracy"] == pytest.approx(theirs, abs=1e-9)
        samples = sorted(results["samples"][completion], key=lambda sample: sample["doc_id"])
        assert len(rows) == len(samples) == 25 and {len(row["options"]) for row in rows} == {3, 4, 5}
        for row, sample in zip(rows, samples, strict=True):
            assert row["id"] == sample["doc"]["id"]
            logprobs = np.array([float(answer[0][0]) for answer in sample["resps"]])
            # The second half is behind an empty prompt
            logprobs, bare = np.split(logprobs, 2)
            if length == "characters":
                logprobs = logprobs / [len(text) for text in sample["doc"]["choices"]]
            elif length == "bytes":
                logprobs = logprobs / [len(text.encode()) for text in sample["doc"]["choices"]]
            elif length == "unconditional":
                logprobs = logprobs - bare
            expected = np.exp(logprobs) / np.exp(logprobs).sum()
            np.testing.assert_allclose(row["probabilities"], expected, atol=1e-5)
