"""The real CommonsenseQA files and pretrained (toy) Llamas, from teacher to report."""

import json

import pytest

from first_trl.cli import main


# The answer letter follows an opening bracket: this sentencepiece vocabulary writes " A" as two tokens
TEMPLATE = r'task.options={template: "{question}\nAnswer Choices:\n{choices}\nAnswer: (", completion: "{letter}"}'


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_folder, stories):
    folder = tmp_path_factory.mktemp("csqa")
    small = "{max_steps: 6, learning_rate: 1e-3, global_batch_size: 16, gradient_checkpointing: false, save_strategy: 'no'}"
    arms = ["sft: {kind: sft}", "sft_ts: {kind: temperature_scaling, of: sft}", "teacher: {kind: teacher}"]
    arms += ["first: {kind: distill, recalibration: probability_temperature}"]
    arms += ["first_lora: {kind: distill, recalibration: logit_temperature, lora: {r: 4, target_modules: all-linear}}"]
    status = main(
        [
            "run", "commonsense_qa", "--output-dir", str(folder), f"task.path={data_folder / 'commonsense_qa'}", TEMPLATE,
            "task.splits.train=train[:200]", "task.splits.validation=train[-150:]", "task.max_length=110",
            f"teacher={{name_or_path: {stories}, sft: {small}}}",
            f"student={{name_or_path: {stories}, config: {{num_hidden_layers: 3}}}}",
            f"training={small}", f"arms={{{', '.join(arms)}}}", "evaluation.batch_size=64", "num_threads=1",
        ]
    )  # fmt: skip
    assert status == 0
    return folder


def test_all_1221_questions_are_scored_on_every_arm(run):
    report = json.loads((run / "report" / "report.json").read_text())
    assert set(report["results"]) == {"teacher", "sft", "sft_ts", "first", "first_lora"}
    for arm in report["results"].values():
        assert arm["test"]["n"] == 1221
        assert arm["test"]["chance_accuracy"] == pytest.approx(0.2)
        for reading in ("full_vocab", "options"):
            assert 0 <= arm["test"][reading]["ece"] <= 1
            assert arm["test"][reading]["nll"] > 0


def test_no_row_is_lost_in_silence(run):
    """Rows read = rows used + rows dropped, in the data, the cache and the report."""
    counts = json.loads((run / "data" / "counts.json").read_text())
    markdown = (run / "report" / "report.md").read_text()
    for role, read in (("train", 200), ("validation", 150), ("test", 1221)):
        count = counts[role]
        assert count["read"] == read
        assert count["rows"] + sum(count["dropped"].values()) + count["not_selected"] == read
        assert f"| {role} | {read} | {count['rows']} |" in markdown
    manifest = json.loads((run / "cache" / "manifest" / "train.json").read_text())
    assert manifest["counts"]["rows"] == counts["train"]["rows"] == manifest["counts"]["positions"]
    assert sum(counts["train"]["dropped"].values()) > 0  # 110 tokens are too few for some
    cut = json.loads((run / "report" / "report.json").read_text())["results"]["first"]["test"]["n_truncated"]
    assert cut > 0
    assert f"{cut} of 1221 prompts were cut" in markdown
    assert "Picking an option at random is right 20.0 %" in markdown


def test_the_lora_student_is_an_adapter(run):
    assert (run / "students" / "first_lora" / "model" / "adapter_model.safetensors").is_file()
    assert not (run / "students" / "first_lora" / "model" / "model.safetensors").exists()
