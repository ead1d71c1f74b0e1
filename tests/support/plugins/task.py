"""A task: is the sum of two digits even?"""

from dataclasses import dataclass

from first_trl import register_task
from first_trl.tasks import Example, Task
from first_trl.tasks.word_tokenizer import word_tokenizer


CHOICES = (" even", " odd")
PAIRS = [(a, b) for a in range(10) for b in range(10)]
SPLITS = {"train": PAIRS[:60], "validation": PAIRS[60:80], "test": PAIRS[80:]}


@register_task("parity")
@dataclass(frozen=True)
class Parity(Task):
    name = "parity"
    splits = {name: name for name in SPLITS}

    def rows(self, split, path, revision, seed):
        for a, b in SPLITS[split]:
            gold = (a + b) % 2
            yield f"{a} + {b}", Example(f"{a} plus {b} is", CHOICES[gold], CHOICES, gold)

    def tokenizer(self, path=None, revision=None, seed=0):
        return word_tokenizer((*map(str, range(10)), "plus", "is", *(choice.strip() for choice in CHOICES)))
