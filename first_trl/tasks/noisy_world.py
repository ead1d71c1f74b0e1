"""
Noisy world: generated text QA whose true answer distribution is known.

A world has 12 jobs, 8 places, 6 kinds of weather, 12 tools and 200 names. What somebody carries is a draw from

$$ P(\\text{tool} \\mid j, p, w) = \\text{softmax}(2.5\\,(U_j + 0.8\\,S_p + 0.4\\,R_w + 0.5\\,I_{jp})) $$

with standard normal tables U, S, R and I, so that even a perfect model is right about 70 % of the time and its
calibration can be held against the truth. Names carry no information: they make memorising possible. A fifth of the
(job, place) pairs (19 of 96) never occurs in `train`, `validation` and `test`; these pairs form `ood`.

Template, 15 tokens with `<bos>`, and a completion of one token such as `" hammer"`:

```text
question : NAME the JOB at PLACE in WEATHER carries what ? answer :
```

The split `pretrain` is plain text for next-token training (empty prompt, no choices): sentences that tell the habits
of a job, a place, a weather, or a place and a weather, over all pairs, but never of a job at a place.

The split `unlabelled` holds questions without an answer, eight times as many as `train`: (job, place) pairs that occur
in `train`, any weather and name. No answer is drawn for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

import numpy as np
from transformers import PreTrainedTokenizerBase

from .base import Example, Task
from .word_tokenizer import word_tokenizer


JOBS = (
    "nurse",
    "baker",
    "sailor",
    "farmer",
    "teacher",
    "miner",
    "painter",
    "guard",
    "pilot",
    "cook",
    "tailor",
    "clerk",
)
PLACES = ("harbor", "market", "forest", "castle", "library", "station", "meadow", "bridge")
WEATHERS = ("rain", "snow", "fog", "sun", "wind", "hail")
TOOLS = ("hammer", "saw", "rope", "lamp", "knife", "brush", "map", "bucket", "ladder", "needle", "shovel", "whistle")
# 8 * 5 * 5 made-up names such as "bela" and "tori"; none is a word used elsewhere.
NAMES = tuple(a + b + c for a, b, c in product("bdfklmtv", "aeiou", ("la", "no", "ri", "su", "vi")))
FUNCTION_WORDS = ("question", ":", "the", "at", "in", "carries", "what", "?", "answer", "someone", "often", ".")

SIZES = {"train": 2400, "validation": 1200, "test": 3000, "ood": 3000, "pretrain": 8000, "unlabelled": 19200}
HELD_OUT_FRACTION = 0.2
# Sentences of the pretraining text have at most 9 tokens with `<bos>`: the longest one goes without its full stop.
SENTENCES = (
    "the {job} often carries {tool} .",
    "someone at {place} often carries {tool} .",
    "someone in {weather} often carries {tool} .",
    "someone at {place} in {weather} often carries {tool}",
)


@dataclass(frozen=True)
class World:
    """
    One world and its samples.

    Attributes:
        posterior (`np.ndarray` of shape `(12, 8, 6, 12)`): Probability of each tool for every job, place and weather.
        held_out (`np.ndarray` of shape `(19, 2)`): The (job, place) pairs that occur in `ood` only.
        samples (`dict[str, np.ndarray]`): Split name -> int array of shape `(n, 5)`; columns job, place, weather,
            name, tool. In `pretrain` the fourth column is the sentence template; in `unlabelled` the tool is -1.
    """

    posterior: np.ndarray
    held_out: np.ndarray
    samples: dict[str, np.ndarray]


@lru_cache(maxsize=4)
def make_world(seed: int) -> World:
    """
    Draws the world of `seed`; order of the draws: U, S, R, I, held-out pairs, train, validation, test, ood, text,
    unlabelled.
    """
    rng = np.random.default_rng(seed)
    n_jobs, n_places, n_weathers, n_tools = len(JOBS), len(PLACES), len(WEATHERS), len(TOOLS)
    job = rng.standard_normal((n_jobs, 1, 1, n_tools))
    place = rng.standard_normal((1, n_places, 1, n_tools))
    weather = rng.standard_normal((1, 1, n_weathers, n_tools))
    interaction = rng.standard_normal((n_jobs, n_places, 1, n_tools))
    scores = 2.5 * (job + 0.8 * place + 0.4 * weather + 0.5 * interaction)
    posterior = np.exp(scores - scores.max(axis=-1, keepdims=True))
    posterior /= posterior.sum(axis=-1, keepdims=True)

    pairs = np.array(list(product(range(n_jobs), range(n_places))))
    order = rng.permutation(len(pairs))
    n_held_out = int(HELD_OUT_FRACTION * len(pairs))
    held_out, seen = pairs[order[:n_held_out]], pairs[order[n_held_out:]]

    def draw(n: int, allowed: np.ndarray, n_fourth: int) -> np.ndarray:
        chosen = allowed[rng.integers(len(allowed), size=n)]
        w = rng.integers(n_weathers, size=n)
        fourth = rng.integers(n_fourth, size=n)
        cumulative = posterior[chosen[:, 0], chosen[:, 1], w].cumsum(axis=-1)
        # The last sum can fall short of 1 by rounding; a draw above it still means the last tool.
        tool = np.minimum((rng.random((n, 1)) >= cumulative).sum(axis=-1), n_tools - 1)
        return np.column_stack([chosen, w, fourth, tool])

    samples = {split: draw(SIZES[split], seen, len(NAMES)) for split in ("train", "validation", "test")}
    samples["ood"] = draw(SIZES["ood"], held_out, len(NAMES))
    # A sentence leaves attributes out. Drawing them all and saying some is the same as marginalising the posterior.
    samples["pretrain"] = draw(SIZES["pretrain"], pairs, len(SENTENCES))
    # Last, so that a world's other splits are what they were before there was this one
    observed = np.unique(samples["train"][:, :2], axis=0)
    n = SIZES["unlabelled"]
    chosen = observed[rng.integers(len(observed), size=n)]
    w, names = rng.integers(n_weathers, size=n), rng.integers(len(NAMES), size=n)
    samples["unlabelled"] = np.column_stack([chosen, w, names, np.full(n, -1)])
    return World(posterior, held_out, samples)


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Word-level tokenizer of 253 tokens, the same for every seed."""
    return word_tokenizer([*FUNCTION_WORDS, *JOBS, *PLACES, *WEATHERS, *TOOLS, *NAMES])


@dataclass(frozen=True)
class NoisyWorld(Task):
    """
    The noisy world. `seed` of [`~first_trl.tasks.base.Task.load`] chooses the world, and the splits of one seed belong
    together. The column `posterior` holds the true probability of every choice; the group of a row is its
    (job, place) pair.
    """

    drop_copies: bool = field(default=False, kw_only=True)

    name = "noisy_world"
    splits = {split: split for split in SIZES}
    unlabelled_splits = ("unlabelled",)

    def tokenizer(
        self, path: str | None = None, revision: str | None = None, seed: int = 0
    ) -> PreTrainedTokenizerBase:
        """[`build_tokenizer`]'s tokenizer."""
        return build_tokenizer()

    def rows(self, split: str, path: str | None, revision: str | None, seed: int) -> Iterator[tuple[str, Example]]:
        world = make_world(seed)
        choices = tuple(f" {tool}" for tool in TOOLS)
        for i, (job, place, weather, fourth, tool) in enumerate(world.samples[split].tolist()):
            where = f"row {i}"
            if split == "pretrain":
                words = {"job": JOBS[job], "place": PLACES[place], "weather": WEATHERS[weather], "tool": TOOLS[tool]}
                yield where, Example(prompt="", completion=SENTENCES[fourth].format(**words))
                continue
            yield (
                where,
                Example(
                    prompt=f"question : {NAMES[fourth]} the {JOBS[job]} at {PLACES[place]} in {WEATHERS[weather]} "
                    "carries what ? answer :",
                    completion=choices[tool] if tool >= 0 else None,
                    choices=choices,
                    gold=tool,
                    group=f"{JOBS[job]}|{PLACES[place]}",
                    posterior=tuple(world.posterior[job, place, weather].tolist()),
                ),
            )
