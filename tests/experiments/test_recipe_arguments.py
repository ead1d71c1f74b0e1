"""Names and values that only a library would judge, hours later, are judged when a recipe is read, without the library."""

import dataclasses
import re
import subprocess
import sys

import pytest

from first_trl.experiments.recipe import load_recipe
from first_trl.experiments.recipe.arguments import config_problems, lora_fields, training_fields, training_problems


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=1e-5x", "training.learning_rate must be of type float, got '1e-5x'"),
        ("training.num_train_epochs=-1", "training.num_train_epochs must be above 0, got -1"),
        ("teacher.sft.max_steps=0", "teacher.sft.max_steps must be at least 1, or -1"),
        ("arms.sft.training.num_train_epoch=1", "arms.sft.training: unknown training argument 'num_train_epoch'. Did you mean"),
        ("training.gradient_checkpointing=1", "training.gradient_checkpointing must be of type bool"),
        ("training.per_device_train_batch_size=true", "must be of type int, got True"),
        ("arms.first_lora.lora.lora_alfa=3", "unknown argument 'lora_alfa' of LoraConfig. Did you mean 'lora_alpha'"),
        ("arms.first_lora.lora.r=0", "arms.first_lora.lora.r must be at least 1, got 0"),
        ("student.init_kwargs={dtyp: bfloat16}", "student.init_kwargs: unknown argument 'dtyp'. Did you mean 'dtype'"),
        ("student.config.hidden_sise=16", "student.config: unknown key 'hidden_sise' of the architecture 'llama'. Did you mean 'hidden_size'"),
        ("teacher.config.hidden_size=wide", "teacher.config.hidden_size must be of type int, got 'wide'"),
        ("training.lr_scheduler_type=cosin", "training.lr_scheduler_type: there is no value 'cosin'. Did you mean 'cosine'"),
        ("training.optim=adamw_torc", "training.optim: there is no value 'adamw_torc'. Did you mean 'adamw_torch'"),
        ("training.save_strategy=no", "training.save_strategy: a bare `no` is false in YAML. Put it in quotes"),
        ("task.splits.train.limit=", "has no value. Write task.splits.train.limit=null"),
        ("grid.arms.first.top_k=[1]", "Write 'grid={arms.first.top_k: [...]}'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_mend(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe("quickstart", [override])


def test_all_problems_of_a_recipe_are_told_at_once():
    with pytest.raises(ValueError, match="2 problems") as error:
        load_recipe("quickstart", ["training.learning_rat=1", "arms.first.top_k=9"])
    assert "'learning_rate'" in str(error.value) and "arms.first.top_k must be from 1" in str(error.value)


def test_the_names_read_from_source_are_those_of_the_classes():
    from peft import LoraConfig

    from first_trl import FirstDistillConfig

    names = {f.name for f in dataclasses.fields(FirstDistillConfig) if f.init} | {"global_batch_size", "fused_loss"}
    assert set(training_fields()) == names
    assert set(lora_fields()) == {f.name for f in dataclasses.fields(LoraConfig) if f.init}


def test_what_the_libraries_take_is_taken():
    from transformers import AutoConfig, SchedulerType
    from transformers.training_args import OptimizerNames

    for key, names in (("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames)):
        assert list(training_problems({key: "adamw_no"}, "training"))
        assert not [problem for name in names for problem in training_problems({key: name.value}, "training")]
    for architecture in ("llama", "gpt2", "qwen2", "gemma2", "mixtral", "opt", "falcon_h1"):
        assert list(config_problems(architecture, {"hidden_sise": 1}, "student.config"))
        config = AutoConfig.for_model(architecture)
        given = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        given |= {name: getattr(config, name) for name in config.attribute_map if hasattr(config, name)}
        given |= {"rope_theta": 1e4, "attn_implementation": "eager"}
        assert list(config_problems(architecture, given, "student.config")) == []


@pytest.mark.parametrize("words", [["recipes", "list"], ["run", "quickstart", "training.learning_rat=1"]])
def test_recipes_are_read_without_the_libraries_that_run_them(words):
    code = (
        "import sys; from first_trl.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if words[0] == "recipes" else 2), done.stderr
    assert words[0] == "recipes" or "Did you mean 'learning_rate'" in done.stderr
