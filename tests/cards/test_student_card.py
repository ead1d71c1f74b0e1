"""The model card of a student: metadata that the Hub's client reads back, true figures, and what is missing is said."""

import ast
import itertools
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig

from first_trl import add_teacher_topk, evaluate_multiple_choice, expected_calibration_error, load_teacher_cache
from first_trl.cache.folder import load_manifest, store_recalibration
from first_trl.cards import Evaluation, License, StudentCard, find_license, score_result, teacher_cache_card
from first_trl.cards import license as license_module
from first_trl.cards.render import hub_id
from first_trl.cards.scores import score_tokens
from first_trl.cards.wording import estimator_text, shown_arguments
from first_trl.evaluation.predictions import MultipleChoiceResult, multiple_choice_report
from first_trl.evaluation.token_level import row_intervals, token_level_report
from first_trl.losses import ESTIMATORS
from first_trl.training.trainer import FirstDistillTrainer
from tests.support.predictions import predictions
from tests.support.tiny import tiny_config, tiny_llama, tiny_rows, tiny_tokenizer


def a_card(**changes) -> StudentCard:
    bounds = frozenset({"Best | possible"})
    own, other = score_result(predictions(1000, 0.02)), score_result(predictions(1000, 0.2, seed=1))
    better = score_result(predictions(1000, seed=2))
    models = {"SFT": other, "FIRST": own, "Best | possible": better}
    options = {
        "name": "mine",
        "repo_id": "me/mine",
        "base_model": "org/base",
        "base_description": "",
        "cache_repo": "me/cache",
        "cache": "[me/cache](https://huggingface.co/datasets/me/cache) at commit `abc`",
        "recalibration": "`probability_temperature`, c = 0.3; fitted",
        "datasets": ["org/data"],
        "evaluations": [
            Evaluation(
                "test", models, "FIRST", "org/data", "org/data", "default", "v1", "validation", "in-domain", bounds
            ),
            Evaluation("ood", models, "FIRST", "org/data", "org/data", "default", "v1", "validation"),
        ],
        "baseline": "SFT",
        "license": License("apache-2.0"),
        "license_source": "as its base model",
    }
    return StudentCard(**{**options, **changes})


def tables(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_metadata_read_back_holds_every_score(tmp_path):
    card = a_card()
    data = ModelCard.load(card.write(tmp_path)).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "finetune", "transformers")
    assert data.pipeline_tag == "text-generation" and data.license == "apache-2.0"
    assert data.datasets == ["org/data", "me/cache"]
    assert {"first_trl", "distillation", "calibration", "trl"} <= set(data.tags)
    scored = card.evaluations[0].scored
    for role in ("test", "ood"):
        found = {e.metric_type: e for e in data.eval_results if e.dataset_name == f"org/data ({role})"}
        assert set(found) == {"accuracy", "ece", "trust", "nll", "brier"}
        for key, score in scored.scores.items():
            assert found[key].metric_value == score.value
            assert found[key].metric_args["interval_95"] == [score.low, score.high]
        assert found["ece"].metric_args["n_bins"] == 10
    # Two evaluations of one split would be one for the Hub
    assert {e.dataset_split for e in data.eval_results} == {"validation", "validation (ood)"}
    adapter = a_card(adapter=True).metadata()
    assert (adapter.library_name, adapter.base_model_relation) == ("peft", "adapter")
    assert "base_model_relation" not in a_card(base_model=None).metadata().to_dict()


def test_the_table_holds_all_models_and_says_which_are_better(tmp_path):
    card = a_card()
    text = card.write(tmp_path).read_text()
    assert "![Accuracy against confidence, in bins of confidence](reliability.png)" in text
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    ece = {label: scored.scores["ece"].value for label, scored in card.evaluations[0].models.items()}
    rows = [line for line in tables(text) if line.count("[") == 5]
    assert len(rows) == 6
    assert f" {100 * ece['SFT']:.1f} [" in rows[0] and "**FIRST** (this model)" in rows[1]
    assert ece["Best | possible"] < ece["FIRST"] < ece["SFT"]
    # What no model can reach is no rival, where it is said to be that
    first, second = text.split("### `ood`")
    assert "Lower ECE than this model here" not in first
    assert "Lower ECE than this model here: Best | possible." in second
    assert "### `test` (in-domain): org/data" in text and "### `ood`: org/data" in text
    for above, below in itertools.pairwise(text.splitlines()):
        if above.startswith("|") and below.startswith("|"):
            plain = [line.replace("\\|", "") for line in (above, below)]
            assert plain[0].count("|") == plain[1].count("|"), (above, below)
    assert "Noise floor" in text and not re.search(r"\{\{(?!FIRST)|\{%|\bNone\b(?! else)", text)


def test_what_was_chosen_on_is_no_claim():
    models = {"FIRST": score_result(predictions(400))}
    roles = (("validation", "validation"), ("test", "in-domain"))
    card = a_card(evaluations=[Evaluation(name, models, "FIRST", "data", domain=domain) for name, domain in roles])
    text = card.render()
    assert "### `validation` (validation)" in text and "for choices, not for claims" in text
    assert {e.dataset_name for e in ModelCard(text).data.eval_results} == {"data (test)"}
    alone = a_card(evaluations=card.evaluations[:1]).metadata()
    assert alone.eval_results is None and "model-index" not in alone.to_dict() and "metrics" not in alone.to_dict()


def test_only_arguments_that_decide_the_result_are_shown():
    private = {"hub_token": "hf_secret", "output_dir": "/home/me/out", "hub_model_id": "me/x", "run_name": "mine",
               "resume_from_checkpoint": "/home/me/out/checkpoint-1", "logging_dir": "/home/me/log"}  # fmt: skip
    shown = {"learning_rate": 0.1, "adam_beta2": 0.98, "label_smoothing_factor": 0.1, "global_batch_size": 64}
    text = a_card(arguments={**private, **shown, "max_steps": None}).render()
    for value in ("hf_secret", "/home/me", "me/x", "`run_name`", "`max_steps`"):
        assert value not in text
    for name, value in shown.items():
        assert f"| `{name}` | {value} |" in text
    assert shown_arguments({"optim": SimpleNamespace(value="adamw_torch")}) == {"optim": "adamw_torch"}
    own = shown_arguments({"seed": 1, "token_dropout": 0.1, "optim": "sgd"}, own=["token_dropout"])
    assert list(own.items()) == [("optim", "sgd"), ("token_dropout", 0.1), ("seed", 1)]


def test_names_of_files_are_no_repositories(tmp_path):
    for name in (
        "questions.csv",
        "data/train.jsonl",
        "data/rows.parquet",
        "data/rows.JSON.gz",
        str(tmp_path),
        "",
        None,
    ):
        assert hub_id(name) is None, name
    assert hub_id(str(tmp_path / "gone")) is None
    for name in ("gpt2", "org/data", "org/Model-1.5", "org/model_v0.1"):
        assert hub_id(name) == name


def test_a_card_without_an_evaluation_says_so(tmp_path):
    card = a_card(evaluations=[], license=None, license_source="")
    text = card.write(tmp_path).read_text()
    assert "**Not evaluated yet**" in text and "evaluate_multiple_choice(model, tokenizer, dataset)" in text
    assert not (tmp_path / "reliability.png").exists() and "reliability.png" not in text
    data = ModelCard(text).data
    assert not data.eval_results and data.license is None and "Not stated" in text
    assert "an ECE in that range" not in text


def test_code_on_the_card_is_short_and_valid(monkeypatch):
    text = a_card(prompt='Say "x"\nanswer:', choices=[' "a"', " b"]).render()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) <= 10
    assert 'answer_pipeline("me/mine")' in blocks[0] and "abstain_below=0.5" in blocks[0]
    compile(blocks[0], "card", "exec")
    # Nothing is said where the most likely token is none of the choices, however sure the model is of it
    for answer, said in ((" b", " b"), (None, "I do not know")):
        output, printed = {"answer": answer, "index": None, "confidence": 0.9, "abstained": False}, []
        module = SimpleNamespace(answer_pipeline=lambda repo_id, output=output: lambda *args, **options: output)
        monkeypatch.setitem(sys.modules, "first_trl", module)
        exec(blocks[0], {"print": lambda *values, printed=printed: printed.append(values)})
        assert printed == [(said, 0.9)]
    prompt = next(line for line in blocks[0].splitlines() if line.startswith("prompt = "))
    assert ast.literal_eval(prompt.removeprefix("prompt = ")) == 'Say "x"\nanswer:'


def test_intervals_hold_the_truth_and_shrink():
    """Over 40 samples of a model whose ECE is known: a 95 % interval misses it rarely, and it is not simply wide."""
    missed = dict.fromkeys(("ece", "accuracy", "nll", "trust"), 0)
    truth = {"ece": 0.1, "accuracy": 0.5, "trust": 0.4}
    truth["nll"] = score_result(predictions(200_000, 0.1, seed=99)).scores["nll"].value
    widths = []
    for seed in range(40):
        scored = score_result(predictions(800, 0.1, seed=seed))
        widths.append(scored.scores["ece"].high - scored.scores["ece"].low)
        for key in missed:
            score = scored.scores[key]
            assert score.low <= score.value <= score.high
            missed[key] += not score.low <= truth[key] <= score.high
    assert max(missed.values()) <= 7, missed
    assert np.mean(widths) < 4 * 2 * math.sqrt(0.25 / 800)
    result = predictions(500, 0.1)
    ece = expected_calibration_error(result.predictions["top_prob"], result.predictions["top_is_gold"].astype(int))
    assert score_result(result).scores["ece"].value == ece == result.report["full_vocab"]["ece"]


@pytest.mark.parametrize("answers", [[True] * 100, [False] * 100])
def test_a_mean_of_rows_of_one_kind_has_no_interval(answers):
    """A calibrated model that is .99 sure is right on all of 100 rows every third time; its true NLL is .056, not .010."""
    right = np.array(answers)
    p = np.where(right, 0.99, 0.01)
    choices = np.where(np.arange(2) == 0, np.log(0.99), np.log(0.01)).repeat(100).reshape(2, 100).T
    arrays = {
        "id": np.arange(100).astype(str), "gold": np.where(right, 0, 1), "n_choices": np.full(100, 2),
        "choice_logprobs": choices, "option_mass": np.ones(100), "top_prob": np.full(100, 0.99), "top_is_gold": right,
        "gold_logprob": np.log(p), "sum_squares": np.full(100, 0.99**2 + 0.01**2), "truncated": np.zeros(100, bool),
    }  # fmt: skip
    scores = score_result(MultipleChoiceResult(arrays, multiple_choice_report(arrays))).scores
    assert (scores["nll"].low, scores["brier"].low) == (None, None)
    assert scores["nll"].value == pytest.approx(-np.log(p[0]))
    assert row_intervals({**arrays, "row": np.arange(100) // 2}).keys() == {
        "accuracy",
        "mean_confidence",
        "ece",
        "trust",
    }
    # Three rows of the other kind give them one, which does not reach below 0; two do not
    for others in (2, 3):
        kind = np.arange(100) >= others
        mixed = arrays | {"top_is_gold": kind, "gold_logprob": np.log(np.where(kind, 0.99, 0.01))}
        score = score_result(MultipleChoiceResult(mixed, multiple_choice_report(mixed))).scores["nll"]
        found = row_intervals({**mixed, "row": np.arange(100)})
        assert (score.low is None) == ("brier" not in found) == (others == 2)
    assert score.low == 0.0 and 0.056 < score.high < 0.4
    low, high = found["brier"]
    assert low == 0.0 and 0.02 < high < 0.2
    # However many tokens they have
    assert "nll" not in row_intervals({**mixed, "row": np.maximum(np.arange(100) - 1, 0)})


def test_the_licence_is_read_and_never_invented(tmp_path):
    assert find_license(None) is None and find_license(str(tmp_path)) is None
    assert find_license("no one/such name") is None
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n")
    found = find_license(str(tmp_path))
    assert found == License("other", "llama3") and found.metadata == {"license": "other", "license_name": "llama3"}
    (tmp_path / "README.md").write_text("no header")
    assert find_license(str(tmp_path)) is None


def test_a_hub_that_does_not_answer_is_asked_again(monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token):
            pass

        def model_info(self, repo_id, timeout):
            calls.append(repo_id)
            if len(calls) == 1:
                raise ConnectionError("no network")
            return SimpleNamespace(card_data={"license": "mit"})

    monkeypatch.setattr(license_module, "HfApi", Hub)
    monkeypatch.setattr(license_module, "is_offline", lambda: False)
    name = "first-trl-tests/asked-again"
    assert find_license(name) is None
    assert find_license(name) == find_license(name) == License("mit")
    assert calls == [name, name]


def test_every_estimator_is_explained():
    assert all(": " in estimator_text(name) for name in (*ESTIMATORS, "sampled"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    teacher = tiny_llama(0)
    teacher.config._name_or_path = "org/teacher"
    add_teacher_topk(Dataset.from_list(tiny_rows(16)), teacher, tiny_tokenizer(), k=4, output_dir=folder)
    fit = {"recalibration": {"method": "probability_temperature", "value": 0.31}}
    store_recalibration(folder, "train", "probability_temperature", fit)
    return load_teacher_cache(folder)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_trainer_writes_the_card_of_its_student(cache, tmp_path, adapter):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]) if adapter else None
    args = tiny_config(tmp_path / "out", recalibration="probability_temperature", learning_rate=1e-3)
    trainer = FirstDistillTrainer(tiny_llama(1), args, cache, processing_class=tiny_tokenizer(), peft_config=lora)
    trainer.train()
    trainer.create_model_card(model_name="mine", dataset_name="me/cache", tags="mine")
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data
    assert data.library_name == ("peft" if adapter else "transformers") and "mine" in data.tags
    assert data.datasets == ["me/cache"] and data.base_model is None
    assert "`probability_temperature`, c = 0.31; fitted on validation rows and stored with the cache" in text
    assert "[org/teacher](https://huggingface.co/org/teacher)" in text
    assert f"manifest `{cache[0]['teacher_cache'].split(':')[0]}`: the 4 most likely tokens" in text
    assert "| `learning_rate` | 0.001 |" in text and "| `estimator` | topk |" in text
    assert "**Not evaluated yet**" in text and str(tmp_path) not in text
    assert ("`target_modules` ['q_proj', 'v_proj']" in text) == adapter

    rows = [{"prompt": f"w{3 + i % 9} w{4 + i % 7}", "choices": [" w5", " w6"], "gold": i % 2} for i in range(40)]
    with pytest.warns(UserWarning, match="40 examples"):
        result = evaluate_multiple_choice(trainer.model, tiny_tokenizer(), Dataset.from_list(rows), disable_tqdm=True)
    trainer.add_evaluation(result, dataset_name="org/data", split="test")
    trainer.create_model_card()
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    found = {e.metric_type: e for e in data.eval_results}
    assert found["ece"].metric_value == result.report["full_vocab"]["ece"]
    assert (found["ece"].dataset_type, found["ece"].dataset_split) == ("org/data", "test")
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 5000
    assert "Only 40 rows" in (tmp_path / "out" / "README.md").read_text()
    # Training on makes another model, of which nothing is known
    trainer.train()
    trainer.create_model_card()
    assert "**Not evaluated yet**" in (tmp_path / "out" / "README.md").read_text()


def test_free_text_is_scored_by_tokens_with_intervals_over_texts():
    rng = np.random.default_rng(0)
    values = {
        "id": np.repeat([str(i) for i in range(40)], 25),
        "row": np.repeat(np.arange(40), 25),
        "position": np.tile(np.arange(25), 40),
        "gold_token": np.ones(1000, int),
        "top_token": np.ones(1000, int),
        "top_prob": rng.uniform(0.2, 1, 1000),
        "top_is_gold": rng.random(1000) < 0.5,
        "gold_logprob": -rng.exponential(1, 1000),
        "sum_squares": rng.uniform(0.2, 0.9, 1000),
    }
    report = token_level_report(values, n_rows=40) | {"null_ece": {"mean": 0.02, "q95": 0.03}}
    scored = score_tokens(values, report)
    for key in ("accuracy", "ece", "trust", "nll", "brier"):
        score = scored.scores[key]
        assert score.value == report["full_vocab"][key] and score.low < score.value < score.high
    card = a_card(evaluations=[Evaluation("alpaca", {"FIRST": scored}, "FIRST", "alpaca", split="train[95%:]")])
    text = card.render()
    assert "1,000 tokens" in text and "The intervals are over whole texts" in text and "answer options" not in text
    assert "below 3.0 % in 95 of 100" in text
    # Neither the intervals nor the limits are those of multiple choice
    assert "over whole texts" in text and "over the rows" not in text and "choices=" not in text
    assert "answer's first token" not in text and "measured on the tokens of reference texts" in text.replace(
        "\n", " "
    )
    rows = Evaluation("test", {"FIRST": score_result(predictions(400))}, "FIRST", "questions")
    both = a_card(evaluations=[rows, *card.evaluations], choices=[" A", " B"]).render()
    assert "Rows. In brackets" in both and "Free text. In brackets" in both and "Wilson" in both
    assert "choices=" in both and "the confidence in single tokens was measured" in both
    assert {e.task_type for e in ModelCard(text).data.eval_results} == {"text-generation"}


def test_the_cache_card_counts_prompts_without_an_answer(tmp_path):
    folder = tmp_path / "cache"
    add_teacher_topk(Dataset.from_list(tiny_rows(16)), tiny_llama(0), tiny_tokenizer(), k=4, output_dir=folder)
    assert "Without an answer" not in teacher_cache_card(folder)
    manifest = load_manifest(folder)
    manifest.counts["rows_without_gold"] = 5
    (folder / "manifest" / "train.json").write_text(manifest.to_json())
    store_recalibration(folder, "train", "probability_temperature", {"value": 0.31})
    text = teacher_cache_card(folder)
    assert "| Rows | Without an answer | Positions |" in text and f"| {manifest.counts['rows']} | 5 |" in text
    assert "recalibration_value=0.31" in text
    for above, below in itertools.pairwise(text.splitlines()):
        if above.startswith("|") and below.startswith("|"):
            assert above.count("|") == below.count("|"), (above, below)
