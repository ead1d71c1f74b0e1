"""The README, read for its commands and examples."""

import re
from pathlib import Path


README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def block(heading: str, language: str = "python") -> str:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)[0]
