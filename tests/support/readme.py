"""The front pages, read for their commands and examples."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def block(heading: str, language: str = "python", page: str = README) -> str:
    """The first block of code of a section."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)[0]


def commands(page: str) -> list[str]:
    """Every `first-trl` command in the blocks of a page, without comments; those of `-m first_trl` among them."""
    lines = "".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|-m |bin/)first[-_]trl .*", re.sub(r"\s+#.*", "", line)) for line in lines]
    return [re.sub(r"^.*?first[-_]trl ", "first-trl ", match[0]) for match in found if match]
