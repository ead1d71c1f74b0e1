"""
What can be added from outside: tasks, estimators, recalibration methods, teacher backends and columns of the report.

Each has a registry and a decorator. A module that uses the decorators is a plugin: import it before you use its names,
name it in a recipe (`plugins: [my_module]`), or let an installed distribution name it as an entry point of the group
`first_trl.plugins`.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .utils.registry import Registry
from .vocabulary import HIGHER_IS_BETTER, Metric
from .vocabulary import METRICS as BUILTIN_METRICS


T = TypeVar("T")

TASKS = Registry(
    "task",
    {
        "alpaca": "first_trl.tasks.alpaca:Alpaca",
        "arc": "first_trl.tasks.arc:Arc",
        "boolq": "first_trl.tasks.boolq:BoolQ",
        "commonsense_qa": "first_trl.tasks.commonsense_qa:CommonsenseQA",
        "custom": "first_trl.tasks.custom:Custom",
        "diabetes": "first_trl.tasks.diabetes:Diabetes",
        "digits": "first_trl.tasks.digits:Digits",
        "mmlu": "first_trl.tasks.mmlu:MMLU",
        "mmlu_category": "first_trl.tasks.mmlu_category:MMLUCategory",
        "mmlu_field": "first_trl.tasks.mmlu_field:MMLUField",
        "noisy_world": "first_trl.tasks.noisy_world:NoisyWorld",
        "openbook_qa": "first_trl.tasks.openbook_qa:OpenBookQA",
    },
)
ESTIMATORS = Registry(
    "estimator",
    {
        "topk": "first_trl.losses.topk:TOPK",
        "bucket": "first_trl.losses.bucket:BUCKET",
        "renormalized": "first_trl.losses.renormalized:RENORMALIZED",
        "sampled": "first_trl.losses.sampled:SAMPLED",
        "probability_softmax": "first_trl.losses.probability_softmax:PROBABILITY_SOFTMAX",
    },
)
RECALIBRATIONS = Registry(
    "recalibration",
    {
        "none": "first_trl.recalibration.methods:NONE",
        "probability_temperature": "first_trl.recalibration.methods:PROBABILITY_TEMPERATURE",
        "logit_temperature": "first_trl.recalibration.methods:LOGIT_TEMPERATURE",
        "label_smoothing": "first_trl.recalibration.methods:LABEL_SMOOTHING",
        "log_label_smoothing": "first_trl.recalibration.methods:LOG_LABEL_SMOOTHING",
    },
)
BACKENDS = Registry(
    "teacher backend",
    {
        "transformers": "first_trl.teacher.backends.committee:transformers_backend",
        "vllm": "first_trl.teacher.backends.vllm:VLLMBackend",
    },
)
METRICS = Registry("report metric", {})


def register_task(name: str) -> Callable[[T], T]:
    """
    Add a task: a subclass of [`~first_trl.tasks.Task`], found by [`get_task`] and by a recipe's `task.name`.

    Raises:
        `ValueError`: The name is taken.

    Example:

    ```python
    from dataclasses import dataclass
    from first_trl import register_task
    from first_trl.tasks import Example, Task

    @register_task("parity")
    @dataclass(frozen=True)
    class Parity(Task):
        name = "parity"
        splits = {"train": "train", "validation": "validation", "test": "test"}

        def rows(self, split, path, revision, seed):
            for number in range(100):
                yield f"{split} {number}", Example(f"{number} is", " odd" if number % 2 else " even", (" even", " odd"), number % 2)
    ```
    """
    return TASKS.register(name)


def register_recalibration(name: str) -> Callable[[T], T]:
    """
    Add a rescale of the teacher: a subclass of [`~first_trl.recalibration.Method`], or an instance of one. It is then a
    `method` of [`Recalibration`], of [`fit_recalibration`] and of the trainer's `recalibration`.

    Raises:
        `ValueError`: The name is taken.

    Example:

    ```python
    import numpy as np
    from first_trl import register_recalibration
    from first_trl.recalibration import Method

    @register_recalibration("uniform_mix")
    class UniformMix(Method):
        symbol = "u"
        domain = "0 <= u < 1"
        grid = (0.0, 0.5, 0.05, 0.01)

        def allows(self, value):
            return 0.0 <= value < 1.0

        def rescale(self, logprobs, value):  # [positions, k], raw log-probabilities -> log of the target over the k
            q = np.exp(logprobs - np.logaddexp.reduce(logprobs, axis=-1, keepdims=True))
            return np.log((1 - value) * q + value / q.shape[1])
    ```
    """
    return RECALIBRATIONS.register(name)


def register_backend(name: str) -> Callable[[T], T]:
    """
    Add a teacher engine: a callable that takes the teacher ([`~transformers.PreTrainedModel`], on this process's device)
    and the keyword arguments of a recipe's `capture.backend_options`, and returns a
    [`~first_trl.teacher.backends.TeacherBackend`]. A recipe names it as `capture.backend`.

    Raises:
        `ValueError`: The name is taken.

    Example:

    ```python
    import torch
    from first_trl import register_backend
    from first_trl.teacher.backends import TransformersBackend

    @register_backend("half")
    def half(model, dtype="bfloat16"):
        return TransformersBackend(model.to(dtype=getattr(torch, dtype)))
    ```
    """
    return BACKENDS.register(name)


def register_metric(
    name: str, *, title: str, scale: int = 1, digits: int = 3, higher_is_better: bool = False
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """
    Add a column to the report's tables and to its JSON: a function of the stored predictions of one arm on one role.

    It is called with the keyword arguments `confidence` (`np.ndarray` of shape `(rows,)`, float64: probability of the
    predicted answer), `correct` (`(rows,)`, bool), `probabilities` (`(rows, options)`, float64: of every option, 0 where
    a row has fewer) and `gold` (`(rows,)`, int64: the right option), and returns a finite number. It is called twice:
    over the whole vocabulary, where a row of `probabilities` sums to at most 1, and over the options, where it sums to
    1. For free text the rows are tokens, and `probabilities` and `gold` are `None`.

    Args:
        name (`str`):
            Key in `report.json`.
        title (`str`):
            Heading of the column.
        scale (`int`, *optional*, defaults to `1`):
            Factor for printing; 100 for percent.
        digits (`int`, *optional*, defaults to `3`):
            Digits behind the point.
        higher_is_better (`bool`, *optional*, defaults to `False`):
            The direction, for the best value of a column and for paired differences.

    Raises:
        `ValueError`: The name is taken, by a built-in column too.

    Example:

    ```python
    from first_trl import register_metric

    @register_metric("overconfident", title="Wrong above .9 %", scale=100, digits=1)
    def overconfident(*, confidence, correct, probabilities, gold):
        return float(((confidence > 0.9) & ~correct).mean())
    ```
    """
    taken = next((metric for metric in BUILTIN_METRICS if metric.key == name), None)
    if taken is not None:
        raise ValueError(
            f"There is a report metric {name!r} already ({taken.title}). Register yours under another name."
        )

    def add(function: Callable[..., float]) -> Callable[..., float]:
        METRICS.register(name)(function)
        _COLUMNS[name] = (Metric(name, title, scale, digits), higher_is_better)
        return function

    return add


_COLUMNS: dict[str, tuple[Metric, bool]] = {}


def report_metrics() -> tuple[Metric, ...]:
    """Columns of a report: the built-in ones, then those that plugins add."""
    return (*BUILTIN_METRICS, *(_COLUMNS[name][0] for name in METRICS))


def higher_is_better(key: str) -> bool:
    """Direction of a column of the report."""
    return key in HIGHER_IS_BETTER or (key in _COLUMNS and _COLUMNS[key][1])


def register_estimator(name: str, *, target: str = "kept") -> Callable[[T], T]:
    """
    Add an estimator of the divergence to the teacher: a subclass of [`~first_trl.losses.Estimator`], or an instance of
    one. It is then a value of `FirstDistillConfig.estimator` and of a recipe's `arms.NAME.estimator`. One function of
    the student at the kept tokens defines it; memory and time stay those of the fused loss, whose gradient for it is
    found by autograd on `(tokens, k)` tensors.

    Args:
        name (`str`):
            What it is called in configurations.
        target (`str`, *optional*, defaults to `"kept"`):
            What it is trained on: `"kept"`, the recalibrated distribution over the kept tokens; `"tail"`, the same and
            the mass of all others; `"draws"`, the teacher's draws stored at capture.

    Raises:
        `ValueError`: The name is taken, or `target` is none of the three.

    Example:

    ```python
    import torch
    from first_trl import register_estimator
    from first_trl.losses import Estimator

    @register_estimator("squared_error", target="tail")
    class SquaredError(Estimator):
        def divergence(self, student, target):
            kept = torch.where(target.kept, (student.log_p.exp() - target.mass) ** 2, 0.0).sum(-1)
            return kept + (student.log_tail.exp() - target.tail) ** 2
    ```
    """
    if target not in ("kept", "tail", "draws"):
        raise ValueError(f"`target` of the estimator {name!r} must be 'kept', 'tail' or 'draws', got {target!r}.")

    def add(estimator: T) -> T:
        ESTIMATORS.register(name)(estimator)
        _TARGETS[name] = target
        return estimator

    return add


# What an estimator is trained on, where it is not the kept tokens alone
_TARGETS = {"bucket": "tail", "sampled": "draws"}


def estimator_target(name: str) -> str:
    """`"kept"`, `"tail"` or `"draws"`: what an estimator is trained on. Imports no estimator."""
    return _TARGETS.get(name, "kept")


def method_symbol(method: str) -> str:
    """What reports call the value of a recalibration: `c` for the probability temperature."""
    return str(one(RECALIBRATIONS[method]).symbol) if method in RECALIBRATIONS else method


def load_plugins(modules: Iterable[str], folders: Iterable[Path | str] = ()) -> None:
    """
    Import the modules that register something.

    Args:
        modules (`list[str]`):
            Importable names.
        folders (`list[str]`, *optional*):
            Where to look beside Python's own path: the folder of a recipe. The working folder always counts.

    Raises:
        `ValueError`: A module that is not found, or that fails while it is imported.
    """
    # Behind the installed ones: a file beside a recipe must not hide a library
    places = [str(Path(folder).resolve()) for folder in (*folders, Path.cwd())]
    sys.path += [place for place in dict.fromkeys(places) if place not in sys.path]
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
                raise ValueError(
                    f"There is no plugin module {module!r} in {' or '.join(dict.fromkeys(places))}, and none is installed. "
                    "Start the command in the folder that holds it, or name that folder in PYTHONPATH."
                ) from None
            raise ValueError(f"The plugin {module!r} cannot be loaded ({type(error).__name__}: {error}).") from error


def one(thing: Any) -> Any:
    """An object as it was registered, or made of the class that was."""
    return thing() if isinstance(thing, type) else thing
