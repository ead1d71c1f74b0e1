"""
Progression of diabetes as text: the real table of 442 patients that scikit-learn carries (Efron et al., 2004).

Ten measurements (age, sex, body mass index, blood pressure, six blood values) are each written as one word with one of
8 levels, and the answer is the quarter that the progression after a year falls into. Template, 13 tokens with `<bos>`,
and a completion of one token such as `" quarter-3"`:

```text
age=5 sex=1 bmi=6 bp=4 s1=2 s2=2 s3=0 s4=5 s5=7 s6=3 progression :
```

The patients are split at random into 240 `train`, 80 `validation` and 122 `test`. Levels and quarters are quantiles of
the training rows. `ood` is the test rows whose measurements got Gaussian noise of one standard deviation before they
were put into levels. The measurements say little about the answer, so that a model that is sure is wrong; and with 122
rows even a perfectly calibrated model shows an ECE of several points.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.extras import optional
from .base import Example, Task
from .word_tokenizer import word_tokenizer


SIZES = {"train": 240, "validation": 80, "test": 122}
FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
QUARTERS = tuple(f"quarter-{i}" for i in range(1, 5))
N_LEVELS = 8
NOISE_SD = 1.0


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Word-level tokenizer of 89 tokens: 3 special, 2 marker words, 4 answers, 80 measurements."""
    levels = [f"{feature}={level}" for feature in FEATURES for level in range(N_LEVELS)]
    return word_tokenizer(["progression", ":", *QUARTERS, *levels])


@lru_cache(maxsize=4)
def make_levels(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split name -> levels of shape `(n, 10)` from 0 to 7, and quarters of shape `(n,)` from 0 to 3."""
    datasets = optional("sklearn.datasets", extra="tasks", what="The task `diabetes`")
    values, target = datasets.load_diabetes(return_X_y=True, scaled=False)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(values))
    bounds = np.cumsum(list(SIZES.values()))[:-1]
    rows = dict(zip(SIZES, np.split(order, bounds), strict=True))
    train = values[rows["train"]]
    level_cuts = np.quantile(train, np.arange(1, N_LEVELS) / N_LEVELS, axis=0)
    quarter_cuts = np.quantile(target[rows["train"]], [0.25, 0.5, 0.75])

    def levels(features: np.ndarray) -> np.ndarray:
        # A value that stands on a cut belongs below it, so that each of the two sexes has one level
        return (features[:, None, :] > level_cuts[None]).sum(axis=1)

    splits = {split: (levels(values[i]), np.searchsorted(quarter_cuts, target[i])) for split, i in rows.items()}
    test = values[rows["test"]]
    noisy = test + NOISE_SD * train.std(axis=0) * rng.standard_normal(test.shape)
    return {**splits, "ood": (levels(noisy), splits["test"][1])}


@dataclass(frozen=True)
class Diabetes(Task):
    """The patients. `seed` of [`~first_trl.tasks.base.Task.load`] chooses the split and the noise."""

    drop_copies: bool = field(default=False, kw_only=True)

    name = "diabetes"
    splits = {split: split for split in (*SIZES, "ood")}

    def tokenizer(
        self, path: str | None = None, revision: str | None = None, seed: int = 0
    ) -> PreTrainedTokenizerBase:
        """[`build_tokenizer`]'s tokenizer."""
        return build_tokenizer()

    def rows(self, split: str, path: str | None, revision: str | None, seed: int) -> Iterator[tuple[str, Example]]:
        choices = tuple(f" {quarter}" for quarter in QUARTERS)
        for i, (levels, quarter) in enumerate(zip(*(part.tolist() for part in make_levels(seed)[split]), strict=True)):
            words = " ".join(f"{feature}={level}" for feature, level in zip(FEATURES, levels, strict=True))
            yield f"row {i}", Example(f"{words} progression :", choices[quarter], choices, quarter)
