"""
Which arguments trainings, adapters and models take. The names are read from the source of the installed libraries:
importing them takes seconds, and a typo is to be answered at once.
"""

import ast
import dataclasses
import importlib
import importlib.util
import re
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt

from ...training.options import DistillOptions, TrainerOptions, inside, limits_text, marks
from ...utils.names import nearest


# (package, file, class), base first
_SFT = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_LORA = (
    ("peft", "config.py", "PeftConfigMixin"),
    ("peft", "config.py", "PeftConfig"),
    ("peft", "tuners/lora/config.py", "LoraConfig"),
)
# Passed on by `from_pretrained`; what overrides the configuration stands in the model's `config`
INIT_KWARGS = (
    "adapter_kwargs", "attn_implementation", "cache_dir", "code_revision", "device_map", "dtype",
    "experts_implementation", "force_download", "gguf_file", "ignore_mismatched_sizes", "key_mapping",
    "local_files_only", "max_memory", "offload_buffers", "offload_folder", "offload_state_dict", "output_loading_info",
    "proxies", "quantization_config", "revision", "state_dict", "subfolder", "torch_dtype", "tp_plan", "tp_size",
    "trust_remote_code", "use_kernels", "use_safetensors", "variant", "weights_only",
)  # fmt: skip
# What a training or an adapter with another value cannot mean
_LIMITS: dict[str, tuple[Any, ...]] = {
    "per_device_train_batch_size": (Ge(1),), "per_device_eval_batch_size": (Ge(1),), "global_batch_size": (Ge(1),),
    "gradient_accumulation_steps": (Ge(1),), "num_train_epochs": (Gt(0),), "learning_rate": (Ge(0),),
    "weight_decay": (Ge(0),), "max_grad_norm": (Ge(0),), "warmup_steps": (Ge(0),), "adam_beta1": (Ge(0), Lt(1)),
    "adam_beta2": (Ge(0), Lt(1)), "label_smoothing_factor": (Ge(0), Le(1)), "r": (Ge(1),), "lora_alpha": (Gt(0),),
    "lora_dropout": (Ge(0), Le(1)),
}  # fmt: skip
_PLAIN = {
    "int": int, "float": int | float, "str": str, "bool": bool, "dict": dict, "list": list, "tuple": list | tuple,
    "None": type(None),
}  # fmt: skip


@cache
def training_fields() -> Mapping[str, str]:
    """Name -> annotation of the arguments of trainings, as in `SFTConfig` and `FirstDistillConfig`, and of recipes."""
    own = {name: str(hint) for name, hint in typing.get_type_hints(TrainerOptions).items()}
    return _fields(_SFT) | own | {"global_batch_size": "int", "fused_loss": "bool"}


@cache
def lora_fields() -> Mapping[str, str]:
    """Name -> annotation of the arguments of `peft.LoraConfig`."""
    return _fields(_LORA)


def training_problems(training: Mapping[str, Any], place: str) -> Iterator[str]:
    """What is wrong with training arguments, one sentence each."""
    arms = DistillOptions.__dataclass_fields__
    yield from (f"{place}.{key} is a key of the arm itself: arms.NAME.{key}." for key in training if key in arms)
    others = {key: value for key, value in training.items() if key not in arms}
    yield from _judged(others, training_fields(), place, "training argument")
    smoothed = training.get("label_smoothing_factor") or training.get("loss_type", "nll") != "nll"
    if training.get("fused_loss") is True and smoothed:
        yield (
            f"{place}: fused_loss is the negative log-likelihood of the labels; with label_smoothing_factor or another "
            "loss_type, set fused_loss: false."
        )


def lora_problems(lora: Mapping[str, Any], place: str) -> Iterator[str]:
    """What is wrong with the arguments of an adapter, one sentence each."""
    yield from _judged(lora, lora_fields(), place, "argument", " of LoraConfig")


def init_problems(given: Mapping[str, Any], place: str) -> Iterator[str]:
    """Names that `from_pretrained` does not take."""
    for key in given:
        if key not in INIT_KWARGS:
            hint = nearest(str(key), INIT_KWARGS, list_known=False)
            yield f"{place}: unknown argument {key!r}.{hint} Keys of the model's configuration belong in `config`."


def config_problems(architecture: str, config: Mapping[str, Any], place: str) -> Iterator[str]:
    """
    What is wrong with the configuration of a model from scratch: transformers keeps a key that it does not know without
    a word, and the model gets its default size.
    """
    known = _config_fields(architecture)
    if known is not None:
        yield from _judged(config, known, place, "key", f" of the architecture {architecture!r}")


def _judged(
    given: Mapping[str, Any], known: Mapping[str, str], place: str, what: str, whose: str = ""
) -> Iterator[str]:
    for key, value in given.items():
        if key not in known:
            yield f"{place}: unknown {what} {key!r}{whose}.{nearest(str(key), known, list_known=False)}"
        elif wrong := list(_type(key, value, known[key], place)):
            yield from wrong
        else:
            yield from _outside(key, value, place)


def _outside(key: str, value: Any, place: str) -> Iterator[str]:
    limits = [*_LIMITS.get(key, ()), *marks(TrainerOptions).get(key, ())]
    if limits and value is not None and not inside(value, limits):
        yield f"{place}.{key} must be {limits_text(limits)}, got {value!r}."
    if key == "max_steps" and value != -1 and not inside(value, [Ge(1)]):
        yield f"{place}.max_steps must be at least 1, or -1 for whole epochs, got {value!r}."


def _type(key: str, value: Any, annotation: str, place: str) -> Iterator[str]:
    names = {part.strip().partition("[")[0] for part in annotation.split("|")}
    options = [option for name in names - _PLAIN.keys() for option in _enumeration(name)]
    if options:
        if value is False and "no" in options:
            yield f'{place}.{key}: a bare `no` is false in YAML. Put it in quotes: "no".'
        elif value not in options:
            yield f"{place}.{key}: there is no value {value!r}.{nearest(str(value), options)}"
    # What else is no plain type is for the library to judge
    elif names <= _PLAIN.keys():
        right = any(
            isinstance(value, _PLAIN[name]) and (name == "bool" or not isinstance(value, bool)) for name in names
        )
        if not right:
            wanted = " or ".join(sorted(names - {"None"}))
            yield f"{place}.{key} must be of type {wanted}, got {value!r}."


def _fields(chain: tuple[tuple[str, str, str], ...]) -> dict[str, str]:
    try:
        found: dict[str, str] = {}
        for package, file, name in chain:
            found |= _arguments(_classes(_source(package) / file)[name])
        return found
    except (OSError, LookupError):
        # Another version of the library keeps its classes elsewhere: then it is imported, which is slow and always right
        package, _, name = chain[-1]
        cls = getattr(importlib.import_module(package), name)
        return {f.name: f.type if isinstance(f.type, str) else "object" for f in dataclasses.fields(cls) if f.init}


def _source(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise LookupError(package)
    return Path(spec.origin).parent


@cache
def _classes(file: Path) -> dict[str, ast.ClassDef]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def _arguments(node: ast.ClassDef) -> dict[str, str]:
    """Fields that a dataclass declares itself."""
    return {
        item.target.id: ast.unparse(item.annotation)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and _is_argument(item)
    }


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """Name -> value of what a class sets to a literal."""
    found = {}
    for item in node.body:
        target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
        if isinstance(target, ast.Name) and getattr(item, "value", None) is not None:
            try:
                found[target.id] = ast.literal_eval(item.value)  # type: ignore[attr-defined]
            except ValueError:
                continue
    return found


@cache
def _enumeration(name: str) -> tuple[str, ...]:
    """Values of an enumeration of transformers' training arguments; none for another type."""
    try:
        for file in ("trainer_utils.py", "training_args.py"):
            node = _classes(_source("transformers") / file).get(name)
            if node is not None and any(ast.unparse(base).endswith("Enum") for base in node.bases):
                return tuple(str(value) for value in _constants(node).values())
    except (OSError, LookupError):
        pass
    return ()


@cache
def _config_fields(architecture: str) -> Mapping[str, str] | None:
    """Name -> annotation of the configuration of an architecture; `None` where its source does not tell."""
    try:
        root = _source("transformers")
        base = root / "configuration_utils.py"
        (file,) = (root / "models" / architecture.replace("-", "_")).glob("configuration_*.py")
        node = next(n for n in _classes(file).values() if _constants(n).get("model_type") == architecture)
        if [ast.unparse(parent) for parent in node.bases] != ["PreTrainedConfig"]:
            return None
        found = _arguments(_classes(base)["PreTrainedConfig"]) | _arguments(node)
        found |= dict.fromkeys(_constants(node).get("attribute_map", ()), "object")
    except (OSError, LookupError, ValueError, StopIteration):
        return None
    # Older names, which are taken from the other keyword arguments
    for path in (base, root / "modeling_rope_utils.py", file):
        if path.is_file():
            older = re.findall(
                r"""kwargs(?:\.(?:pop|get|setdefault)\(\s*|\[)["'](\w+)["']""", path.read_text(encoding="utf-8")
            )
            found |= {name: "object" for name in older if name not in found}
    return found


def _is_argument(item: ast.AnnAssign) -> bool:
    if ast.unparse(item.annotation).startswith(("ClassVar", "typing.ClassVar")):
        return False
    options = item.value.keywords if isinstance(item.value, ast.Call) else []
    return not any(
        option.arg == "init" and isinstance(option.value, ast.Constant) and option.value.value is False
        for option in options
    )
