"""A finished run goes to a Hub and comes back in another process: the same predictions, the same ECE, whole cards."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from first_trl.cli import main
from first_trl.experiments.share.push import push_run, repo_name, repo_prefix, write_student_cards
from first_trl.utils.resources import recipe_path
from tests.support.hub_server import HubServer, run_client
from tests.support.quickstart import TINY


ARMS = {
    "teacher": {"kind": "teacher", "label": "Teacher"},
    "sft": {"kind": "sft", "label": "SFT"},
    "sft_ts": {"kind": "temperature_scaling", "of": "sft"},
    "first": {"kind": "distill", "recalibration": "probability_temperature", "label": "FIRST"},
    "lora": {"kind": "distill", "recalibration": "logit_temperature", "recalibration_value": 1.5,
             "lora": {"r": 4, "target_modules": "all-linear"}},
}  # fmt: skip


def make_run(folder: Path) -> None:
    data = yaml.safe_load(Path(recipe_path("quickstart")).read_text())
    data["arms"] = ARMS
    data["report"] = {"title": "Tiny run", "notes": ["A note."]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    assert main(["run", str(folder / "tiny.yaml"), *TINY, "--output-dir", str(folder / "run")]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    make_run(folder)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


PUSH = """
import json
from first_trl.cli import main
from first_trl.experiments.share.push import push_run

bare = ["push", RUN, "--namespace", "alice", "--prefix", "bare", "--no-cache", "--no-base", "--arms", "lora"]
assert main(bare) == 0
first = push_run(RUN, "alice", arms=["teacher", "sft", "first", "lora"], private=True, tag="v1")
assert push_run(RUN, "alice", arms=["teacher", "sft", "first", "lora"], tag="v1") == first
assert main(["push", RUN, "--namespace", "alice", "--arms", "first", "lora"]) == 0
# What was pushed before stays on record
assert json.load(open(RUN + "/share.json")) == first
print("SHARED", json.dumps(first))
"""

LOAD = """
import json, os, re
import numpy as np, pyarrow.parquet as pq
from datasets import load_from_disk
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from first_trl.tasks.decision import decision_request
from first_trl import evaluate_multiple_choice, load_teacher_cache, verify_teacher_cache

LOADERS = {"first": AutoModelForCausalLM, "lora": AutoPeftModelForCausalLM, "teacher": AutoModelForCausalLM}
for arm, loader in LOADERS.items():
    place = SHARED[arm]
    where = {"revision": place["commit"]}
    model = loader.from_pretrained(place["repo_id"], **where)
    tokenizer = AutoTokenizer.from_pretrained(place["repo_id"], **where)
    card = ModelCard.load(hf_hub_download(place["repo_id"], "README.md", **where))
    card.validate()
    for role in ("test", "ood"):
        stored = pq.read_table(f"{EVALUATE}/{arm}/{role}.parquet").to_pydict()
        result = evaluate_multiple_choice(model, tokenizer, load_from_disk(f"{ROWS}/{role}"), batch_size=256,
                                          disable_tqdm=True)
        for name in ("id", "gold", "answer", "top_token", "top_prob", "gold_logprob", "sum_squares"):
            assert result.predictions[name].tolist() == stored[name], (arm, role, name)
        report = json.load(open(f"{EVALUATE}/{arm}/{role}.json"))["full_vocab"]
        ece = result.report["full_vocab"]["ece"]
        assert ece == report["ece"]
        if arm != "teacher":
            stated = {e.metric_type: e.metric_value for e in card.data.eval_results if f"({role})" in e.dataset_name}
            assert stated == {name: report[name] for name in ("accuracy", "ece", "trust", "nll", "brier")}, (arm, role)
    if arm != "teacher":
        folder = snapshot_download(place["repo_id"], **where)
        example = {}
        exec(re.search(r"```python\\n(.*?)```", card.content, re.S)[1], example)
        assert 0 < example["result"]["confidence"] <= 1 and len(example["result"]["choices"]) == 12
        # The temperature came along: the evaluation's probabilities by the names on the card
        exec(re.findall(r"```python\\n(.*?)```", card.content, re.S)[1], example)
        temperature = json.load(open(f"{EVALUATE}/{arm}/decisions.json"))["temperature"]
        stored = pq.read_table(f"{EVALUATE}/{arm}/test.parquet").to_pydict()["choice_logprobs"]
        rows = load_from_disk(f"{ROWS}/test")
        for row, logprobs in zip(rows, stored):
            found = list(example["decide"](decision_request(row))["answer"]["probabilities"].values())
            scaled = np.array(logprobs) / temperature
            assert np.allclose(found, np.exp(scaled - np.logaddexp.reduce(scaled)), atol=1e-5), arm
        assert set(example["answer"]) == {choice.strip() for choice in rows[0]["choices"]}
        assert "(reliability.png)" in card.content and os.path.getsize(f"{folder}/reliability.png") > 5000
cache = load_teacher_cache(SHARED["cache"]["repo_id"], revision=SHARED["cache"]["commit"])
verify_teacher_cache(cache, tokenizer)
"""


@pytest.mark.parametrize(
    "env",
    [pytest.param({}, id="xet"), pytest.param({"HF_HUB_DISABLE_XET": "1"}, id="lfs", marks=pytest.mark.slow)],
)
def test_what_is_shared_comes_back_the_same(env, finished, run, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        pushed = run_client(f"RUN = {str(run)!r}\n{PUSH}", hub, env)
        shared = json.loads(pushed.stdout.split("SHARED ")[1].splitlines()[0])
        assert set(shared) == {"cache", "base", "teacher", "sft", "first", "lora"}
        # The repository starts with a commit of the Hub's own; the second and third push made none
        assert hub.count(r"POST /api/(models|datasets)/.*/commit/main", 200) == len(shared) + 1
        # An adapter without its base names no place on this machine
        assert hub.count(r".*bare-base") == 0 and "adapter_model.safetensors" in hub.files("alice/bare-lora", "model")
        for content in hub.files("alice/bare-lora", "model").values():
            assert str(finished).encode() not in content and str(run).encode() not in content
        # The run has gone from the place where the adapter was trained
        place = tmp_path / "moved"
        shutil.copytree(run, place)
        shutil.rmtree(run)
        where = (
            f"SHARED = {shared!r}\nEVALUATE = {str(place / 'evaluate')!r}\nROWS = {str(place / 'data' / 'rows')!r}\n"
        )
        run_client(where + LOAD, hub, env)
        assert hub.foreign_requests == [] and hub.internal_errors == []

        for name, target in shared.items():
            files = hub.files(target["repo_id"], "dataset" if name == "cache" else "model", "v1")
            assert not {"training_args.bin", "unit.json", "training_log.json"} & set(files)
            for path, content in files.items():
                if path.endswith((".md", ".json")):
                    for secret in (str(finished), str(run), str(tmp_path), hub.token):
                        assert secret.encode() not in content, (name, path, secret)
        config = json.loads(hub.files("alice/quickstart-lora", "model")["adapter_config.json"])
        assert (config["base_model_name_or_path"], config["revision"]) == (
            "alice/quickstart-base",
            shared["base"]["commit"],
        )
        cache = hub.files("alice/quickstart-cache", "dataset")["README.md"].decode()
        assert "# Teacher cache: llama made from scratch, fine-tuned, top" in cache
        assert "| train | task `noisy_world`, split `train` | 96 |" in cache and "memory" not in cache
        card = hub.files("alice/quickstart-first", "model")["README.md"].decode()
        assert f"alice/quickstart-cache) at commit `{shared['cache']['commit']}`" in card
        assert "[Teacher](" not in card and "| Teacher | " in card and "SFT + " not in card.split("## Evaluation")[0]
        assert "- A note." in card and "`topk`" in card and "fitted by ECE on 64 positions" in card
        lora = hub.files("alice/quickstart-lora", "model")["README.md"].decode()
        assert "library_name: peft" in lora and "base_model: alice/quickstart-base" in lora
        assert "base_model_relation: adapter" in lora
        assert "`logit_temperature`, T = 1.5; set by hand in the recipe" in lora
        assert "not distilled" not in card and "baseline of a distillation run" in (
            hub.files("alice/quickstart-sft", "model")["README.md"].decode()
        )
        assert "**not** recalibrated" in hub.files("alice/quickstart-teacher", "model")["README.md"].decode()


TRAINER = """
import os
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM
from first_trl import FirstDistillTrainer, add_teacher_topk, evaluate_multiple_choice
from tests.support.tiny import tiny_config, tiny_llama, tiny_rows, tiny_tokenizer

tokenizer = tiny_tokenizer()
cache = add_teacher_topk(Dataset.from_list(tiny_rows(16)), tiny_llama(0), tokenizer, k=4, output_dir="cache")
tiny_llama(1).save_pretrained("base")
tokenizer.save_pretrained("base")
for name, lora in (("full", None), ("lora", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))):
    args = tiny_config(name, hub_model_id=f"alice/{name}", recalibration="logit_temperature", recalibration_value=2.0)
    trainer = FirstDistillTrainer("base", args, cache, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard.load(f"alice/{name}")
    card.validate()
    assert card.data.library_name == ("peft" if lora else "transformers"), name
    assert "Not evaluated yet" in card.content and "`logit_temperature`, T = 2; set in the training" in card.content
    assert "a local model, `base`" in card.content and f'answer_pipeline("alice/{name}")' in card.content
    rows = [{"prompt": f"w{3 + i % 9} w{4 + i % 7}", "choices": [" w5", " w6"], "gold": i % 2} for i in range(40)]
    result = evaluate_multiple_choice(trainer.model, tokenizer, Dataset.from_list(rows), disable_tqdm=True)
    trainer.add_evaluation(result, dataset_name="alice/questions", split="test")
    trainer.push_to_hub(dataset_name="alice/cache")
    data = ModelCard.load(f"alice/{name}").data
    found = {e.metric_type: e.metric_value for e in data.eval_results}
    assert found["ece"] == result.report["full_vocab"]["ece"] and data.datasets == ["alice/cache"]
    loader = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    again = evaluate_multiple_choice(loader.from_pretrained(f"alice/{name}"), tokenizer, Dataset.from_list(rows),
                                     disable_tqdm=True)
    assert again.report["full_vocab"]["ece"] == found["ece"]

# Full weights over an adapter, which transformers would take in their place
trainer = FirstDistillTrainer("base", tiny_config("over", hub_model_id="alice/lora", max_steps=2), cache,
                              processing_class=tokenizer)
trainer.train()
trainer.push_to_hub(blocking=False)
trained = trainer.model.state_dict()
for name, weight in AutoModelForCausalLM.from_pretrained("alice/lora").state_dict().items():
    assert weight.equal(trained[name]), name
"""


def test_a_trainer_pushes_its_card(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        run_client(TRAINER, hub)
        assert hub.internal_errors == [] and hub.foreign_requests == []
        for name in ("full", "lora"):
            files = hub.files(f"alice/{name}", "model")
            assert files["reliability.png"].startswith(b"\x89PNG")
        assert not [path for path in hub.files("alice/lora", "model") if path.startswith("adapter_")]


def test_cards_alone_send_nothing(run, capsys):
    assert main(["push", str(run), "--cards-only", "--license", "mit"]) == 0
    paths = capsys.readouterr().out.split()
    assert {Path(path).parent.parent.name for path in paths} == {"sft", "first", "lora"}
    for path in paths:
        text = Path(path).read_text()
        assert "license: mit" in text and "chosen by the author of this repository" in text
        assert str(run) not in text
        assert (Path(path).parent / "reliability.png").is_file()


def test_a_licence_comes_from_the_base_on_this_machine(run):
    (run / "base" / "student" / "model" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    cards = write_student_cards(run, arms=["first"], license="mit")
    assert "license: cc-by-4.0" in cards["first"].read_text()


def test_mistakes_are_named(run, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no finished run: recipe.yaml is missing"):
        push_run(tmp_path / "nothing", "alice")
    with pytest.raises(ValueError, match=r"'frist' is no arm of this run. Choose among "):
        push_run(run, "alice", arms=["frist"])
    with pytest.raises(ValueError, match=r"'sft_ts' is another arm with temperatures behind it"):
        push_run(run, "alice", arms=["sft_ts"])
    assert main(["push", str(run)]) == 2
    assert "--namespace" in capsys.readouterr().err
    shutil.rmtree(run / "students" / "lora" / "model")
    with pytest.raises(ValueError, match="holds no model"):
        push_run(run, "alice", token="hf_x")
    (run / "report" / "report.json").unlink()
    with pytest.raises(ValueError, match=r"report/report.json is missing"):
        write_student_cards(run)


def test_names_of_repositories():
    assert repo_name("quickstart", "first@recalibration_value=0.3,top_k=2") == (
        "quickstart-first-recalibration_value-0.3-top_k-2"
    )
    with pytest.raises(ValueError, match="too long"):
        repo_name("x" * 96, "first")
    assert repo_prefix("quickstart", {}, 0) == "quickstart"
    cell = {"case": "obqa", "training.learning_rate": 0.1}
    assert repo_prefix("quickstart", cell, 3) == "quickstart-obqa-training.learning_rate-0.1-seed-3"
