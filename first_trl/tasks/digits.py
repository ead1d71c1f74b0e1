"""
Handwritten digits as text: the real UCI optical digits that scikit-learn carries, 8 by 8 pixels of 0 to 16.

Each image is pooled to 4 by 4 (means of 2 by 2 pixels) and 8 grey levels. A pixel is one word that holds its row,
column and level. Template, 19 tokens with `<bos>`, and a completion of one token such as `" 7"`:

```text
r0c0=0 r0c1=5 r0c2=6 r0c3=0 r1c0=... r3c3=1 digit :
```

The 1797 images are split at random into 900 `train`, 300 `validation` and 597 `test`. Two splits shift the 597 test
images: `ood` adds Gaussian noise of standard deviation 3 to the pixels (clipped to 0..16), `ood_shift` moves each
image one pixel in a random direction. The labels are clean and the same writers stand in all splits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.extras import optional
from .base import Example, Task
from .word_tokenizer import word_tokenizer


SIZES = {"train": 900, "validation": 300, "test": 597}
NOISE_SD = 3.0
N_LEVELS = 8
_SIDE = 4
_DIGITS = tuple(str(digit) for digit in range(10))


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Word-level tokenizer of 143 tokens: 3 special, 2 marker words, 10 digits, 128 pixel words."""
    pixels = [f"r{r}c{c}={level}" for r in range(_SIDE) for c in range(_SIDE) for level in range(N_LEVELS)]
    return word_tokenizer(["digit", ":", *_DIGITS, *pixels])


@lru_cache(maxsize=4)
def make_images(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split name -> images of shape `(n, 8, 8)` with values in 0..16, and their digits of shape `(n,)`."""
    datasets = optional("sklearn.datasets", extra="tasks", what="The task `digits`")
    images, digits = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    bounds = np.cumsum(list(SIZES.values()))[:-1]
    splits = {split: (images[rows], digits[rows]) for split, rows in zip(SIZES, np.split(order, bounds), strict=True)}
    test_images, test_digits = splits["test"]
    noisy = np.clip(test_images + rng.normal(0.0, NOISE_SD, test_images.shape), 0.0, 16.0)
    moves = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])[rng.integers(4, size=len(test_images))]
    shifted = np.zeros_like(test_images)
    for image, moved, (down, right) in zip(test_images, shifted, moves, strict=True):
        # What leaves the frame is lost; what enters is blank.
        padded = np.pad(image, 1)
        moved[:] = padded[1 - down : 9 - down, 1 - right : 9 - right]
    return {**splits, "ood": (noisy, test_digits), "ood_shift": (shifted, test_digits)}


def pool_levels(images: np.ndarray) -> np.ndarray:
    """Images of shape `(n, 8, 8)` with values in 0..16 -> grey levels 0..7 of shape `(n, 4, 4)`."""
    means = images.reshape(-1, _SIDE, 2, _SIDE, 2).mean(axis=(2, 4))
    # A block of four full pixels has the mean 16, which would be a ninth level.
    return np.minimum(means * N_LEVELS / 16.0, N_LEVELS - 1).astype(np.int64)


@dataclass(frozen=True)
class Digits(Task):
    """The digits. `seed` of [`~first_trl.tasks.base.Task.load`] chooses the split, the noise and the moves."""

    drop_copies: bool = field(default=False, kw_only=True)

    name = "digits"
    splits = {split: split for split in (*SIZES, "ood", "ood_shift")}

    def tokenizer(
        self, path: str | None = None, revision: str | None = None, seed: int = 0
    ) -> PreTrainedTokenizerBase:
        """[`build_tokenizer`]'s tokenizer."""
        return build_tokenizer()

    def rows(self, split: str, path: str | None, revision: str | None, seed: int) -> Iterator[tuple[str, Example]]:
        images, digits = make_images(seed)[split]
        choices = tuple(f" {digit}" for digit in _DIGITS)
        for i, (levels, digit) in enumerate(zip(pool_levels(images), digits.tolist(), strict=True)):
            pixels = " ".join(f"r{r}c{c}={levels[r, c]}" for r in range(_SIDE) for c in range(_SIDE))
            yield f"row {i}", Example(f"{pixels} digit :", choices[digit], choices, digit)
